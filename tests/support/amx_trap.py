"""Programs whose AMX instructions `amx_trap.cpp` carries out, so that what is compiled for AMX runs without it."""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from truemask.backends import isa

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = runpy.run_path(str(ROOT / "tools" / "native_build.py"))
INSTRUCTIONS = ROOT / "tests" / "backends" / "amx_instructions.cpp"
SIDE, BYTES = 16, 64  # rows of a tile, and bytes of a row
TILES = frozenset(("amx_tile", "amx_bf16"))
FLAGS = "-O2 -std=c++17 -fPIC -shared -Wall -Wextra -Wno-psabi".split()


@cache
def objection() -> str:
    """Why no tile instruction can be carried out here, as a reason to skip; empty if one can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the move is nobody's: only Linux on x86-64 has these signals and instructions"
    if isa.processor_flags() & TILES:
        return "the move is nobody's: this processor has tiles, and test_tiles.py and test_native.py run on them"
    if BUILD["compiler"]() is None or not BUILD["_knows"](["-mamx-tile", "-mamx-bf16"]):
        return "the move is whoever installs a C++ compiler that knows AMX (g++ 11 or later)"
    return ""


def kernel_objection() -> str:
    """Why the kernel cannot run on such tiles here: it takes all of AVX-512 beside them."""
    needs = next(one.processor for one in isa.SETS if one.name == "amx") - TILES
    if why := objection():
        return why
    if not needs <= isa.processor_flags():
        return "the move is whoever has a processor with AVX-512 and its products of bf16"
    return "" if isa.file_of("amx").is_file() else "the move is whoever builds the native kernel for `amx`"


def compiled(source: Path, target: Path, flags: Sequence[str] = ()) -> Path:
    """A library of one file and of headers of `csrc/`."""
    command = [BUILD["compiler"](), *FLAGS, *flags, "-I", str(ROOT / "csrc"), "-o", str(target), str(source)]
    subprocess.run(command, check=True, timeout=200)
    return target


def trap(place: Path) -> Path:
    """What a process has to be started with; made in a folder."""
    return compiled(SOURCE, place / "amx_trap.so", ["-ftls-model=initial-exec"])


def instructions(place: Path) -> ctypes.CDLL:
    """The tile instructions as functions; made in a folder."""
    flags = ["-mno-red-zone", "-mamx-tile", "-mamx-bf16"]
    return ctypes.CDLL(str(compiled(INSTRUCTIONS, place / "instructions.so", flags)))


def config(rows: dict[int, int], row_bytes: dict[int, int]) -> Any:
    """What LDTILECFG reads, for some tiles."""
    found = np.zeros(64, np.uint8)
    found[0] = 1  # the palette
    for t, count in row_bytes.items():
        found[16 + 2 * t : 18 + 2 * t] = count & 255, count >> 8
    for t, count in rows.items():
        found[48 + t] = count
    return found


def run(library: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program of Python with the trap and this checkout."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def pretend() -> None:
    """In such a process: the processor is said to have tiles, and no library is asked, for it would ask that."""
    flags = isa.processor_flags() | TILES
    isa.processor_flags = lambda: flags
    isa.refusal = lambda library: ""
