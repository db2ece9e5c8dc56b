"""What is compiled for AMX, run without it: the handler of a signal carries out each tile instruction.

It is `truemask_amx.so` itself that runs, in processes that are started with the handler. What only a processor with AMX
can show is left: that its instructions do what the manual says, and how quick they are.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import amx_trap

FOLDER = Path(__file__).parent
RUN = """
import sys
import pytest
from tests.support.amx_trap import pretend
pretend()
options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
chosen = "amx and not amx_emulated and not every_variant"  # which is in fp32, without tiles
sys.exit(pytest.main([*options, "-k", chosen, *sys.argv[1:]]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return amx_trap.trap(tmp_path_factory.mktemp("trap"))


def pass_with(trap: Path, *files: str) -> None:
    """What some files test of AMX passes in a process that was started with the trap; nothing is skipped."""
    done = amx_trap.run(trap, RUN, *(FOLDER / file for file in files))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@pytest.mark.skipif(bool(amx_trap.objection()), reason=amx_trap.objection())
def test_each_instruction(trap: Path) -> None:
    pass_with(trap, "amx_instructions.py", "amx_refused.py")


@pytest.mark.skipif(bool(amx_trap.kernel_objection()), reason=amx_trap.kernel_objection())
def test_the_kernel_that_is_installed_for_amx(trap: Path) -> None:
    pass_with(trap, "amx_calls.py", "test_native.py")
