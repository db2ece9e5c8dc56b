"""The native kernel's own tests once more, on builds that stop at the first wrong access or undefined operation.

One is for this processor; the others are the source as AVX-512 with bf16 products and as AMX compile it, with vectors
of 16 floats in pieces and their instructions worked out, so that every processor tests it.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from truemask.backends.isa import VARIABLE
from truemask.backends.native.library import isa, missing

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from importlib import import_module
from pathlib import Path
import pytest
import_module("truemask.backends.isa").FOLDER = Path(sys.argv[1])
files = ["tests/backends/test_native.py", "tests/backends/test_parts.py"]
tests = [*files, "-k", "not fork and not never_built and not a_set_that and not products_of_bf16 and not law_10"]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
"""
FLAGS = "-O1 -g -std=c++17 -fPIC -shared -pthread -fno-math-errno -fsanitize=address,undefined".split()
VARIANTS = runpy.run_path(str(ROOT / "tools" / "native_build.py"))["variants"]()
BUILDS = {"as installed": (isa(), []), "wide": (isa(), ["-DTM_WIDTH=16", "-DTM_PAIRS"]), "tiles": ("amx_emulated", [])}


def sanitizers() -> list[str]:
    """The compiler's libraries that must be there before everything else."""
    names = ("libasan.so", "libubsan.so")
    if shutil.which("g++") is None:
        return []
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return found if all(Path(path).is_absolute() for path in found) else []


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason="the move is whoever installs a C++ compiler")
@pytest.mark.skipif(not sanitizers(), reason="the move is whoever installs g++ with its sanitizers (libasan, libubsan)")
@pytest.mark.parametrize(("name", "more"), BUILDS.values(), ids=BUILDS)
def test_no_wrong_access_and_nothing_undefined(name: str, more: list[str], tmp_path: Path) -> None:
    target = tmp_path / f"truemask_{name}.so"
    command = ["g++", *FLAGS, "-fno-sanitize-recover=undefined", *VARIANTS[name], *more, "-o", str(target)]
    subprocess.run([*command, "-I", str(ROOT / "csrc"), str(ROOT / "csrc" / "kernel.cpp")], check=True, timeout=200)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(sanitizers()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",  # Python's own
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "OMP_NUM_THREADS": "2",
        VARIABLE: name,
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
