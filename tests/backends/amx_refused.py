"""What a processor with AMX refuses, refused by tests/support/amx_trap.cpp: test_amx_trapped.py runs this file."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support.amx_trap import BYTES, SIDE, config, instructions


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return instructions(tmp_path_factory.mktemp("instructions"))


def by(whole: Any) -> str:
    """The call that configures tiles so."""
    return f"x.configure_by({whole.tobytes()!r})"


def changed(place: int, to: int) -> str:
    """The call that configures eight whole tiles, but for one byte."""
    whole = config(dict.fromkeys(range(8), SIDE), dict.fromkeys(range(8), BYTES))
    whole[place] = to
    return by(whole)


LOAD = "x.load(0, bytes(2048), ctypes.c_int64(64))"
NOT_CONFIGURED = "a tile instruction where this thread has configured no tiles"
REFUSED = {
    "nothing is configured": ("x.zero(0)", NOT_CONFIGURED),
    "tiles are released": (f"x.configure(); {LOAD}; x.release(); {LOAD}", NOT_CONFIGURED),
    "palette 0 releases them": (f"x.configure(); {LOAD}; {changed(0, 0)}; {LOAD}", NOT_CONFIGURED),
    "another thread's": (
        "import threading; x.configure(); t = threading.Thread(target=x.zero, args=(0,)); t.start(); t.join()",
        NOT_CONFIGURED,
    ),
    "one tile is not": (by(config({1: 16}, {1: 64})) + "; x.zero(0)", "a tile that is not configured"),
    "palette": (changed(0, 2), "a palette that is not there"),
    "first row": (changed(1, 1), "a first row other than 0, which is for interrupted loads only"),
    "rest": (changed(60, 1), "a configuration with other than zeros where nothing is"),
    "rows": (changed(48, 17), "a tile that is too large"),
    "bytes": (changed(16, 65), "a tile that is too large"),
    "bytes alone": (changed(48, 0), "a tile with rows or columns only"),
    "three of one": ("x.configure(); x.square()", "a product of tiles that are not three"),
    "rows of C": (changed(48, 15) + "; x.multiply(0, 1, 2)", "a product of tiles that do not fit"),
    "columns of C": (changed(16, 60) + "; x.multiply(0, 1, 2)", "a product of tiles that do not fit"),
    "inner sizes": (changed(50, 15) + "; x.multiply(0, 1, 2)", "a product of tiles that do not fit"),
    "parts of words": (changed(18, 63) + "; x.multiply(0, 1, 2)", "a product of parts of words"),
}


def ended(tiles: ctypes.CDLL, lines: str) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    program = f"import ctypes, sys\nx = ctypes.CDLL(sys.argv[1])\n{lines}"
    return subprocess.run([sys.executable, "-c", program, tiles._name], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_processor_refuses_ends_the_process(what: str, tiles: ctypes.CDLL) -> None:
    lines, why = REFUSED[what]
    done = ended(tiles, lines)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr == f"amx_trap: {why}\n"


@pytest.mark.parametrize("call", ["x.nothing_known()", "x.kept_out_of_caches(bytes(64))"])
@pytest.mark.parametrize("informed", [0, 1])
def test_other_instructions_are_left_to_the_handler_before(call: str, informed: int, tiles: ctypes.CDLL) -> None:
    """The system's, which ends the process; or another, which then had the signal."""
    assert ended(tiles, f"x.configure(); {call}").returncode == -signal.SIGILL
    other = f"x.end_at_the_signal({informed}); ctypes.CDLL(None).amx_trap_install()"
    assert ended(tiles, f"{other}; x.configure(); {call}").returncode == 40 + informed
