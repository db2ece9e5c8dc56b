"""The instruction sets of the native kernel: what each takes of a processor and of a compiler, and which one runs here.

`pip install` compiles `csrc/` once for each; the best that runs here is loaded when somebody first asks.
`TRUEMASK_ISA` names another one, or `off`. This file imports neither torch nor truemask, because the build reads it
where neither is installed.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / "_native"
VARIABLE, OFF = "TRUEMASK_ISA", "off"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512".split()


class InstructionSet(NamedTuple):
    """One for which the kernel is compiled."""

    name: str
    processor: frozenset[str]  # the flags that Linux must list
    torch: str  # how torch calls a processor that has it, if it tells it apart
    compiler: tuple[str, ...]
    only_named: bool = False  # never chosen, only taken where `TRUEMASK_ISA` names it


WIDE = frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl"))
SETS = (  # the best first
    InstructionSet(
        "amx",
        WIDE | {"avx512_bf16", "amx_tile", "amx_bf16"},
        "",
        (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    ),
    InstructionSet("avx512_bf16", WIDE | {"avx512_bf16"}, "", (*AVX512, "-mavx512bf16")),
    InstructionSet("avx512", WIDE, "AVX512", tuple(AVX512)),
    InstructionSet("avx2", frozenset(("avx2", "fma")), "AVX2", ("-mavx2", "-mfma")),
    InstructionSet("base", frozenset(), "", ()),
    InstructionSet(  # `amx` as any processor can compute it, for tests
        "amx_emulated", frozenset(), "", ("-DTM_WIDTH=16", "-DTM_PAIRS", "-DTM_TILES_EMULATED"), only_named=True
    ),
)
ISAS = tuple(one.name for one in SETS)
REFUSALS = {  # what `tm_usable` answers beside 1 (`csrc/isa/usable.h`)
    0: "the processor has no tiles of bf16",
    -1: "the system does not save tiles when it switches threads",
    -2: "the processor's tiles are not eight of 16 rows of 64 bytes",
    -3: "the system does not let this process use tiles",
}


def file_of(name: str) -> Path:
    """Where the library of an instruction set lies, built or not."""
    return FOLDER / f"truemask_{name}.so"


def built() -> list[str]:
    """The names of those whose library is there."""
    return [name for name in ISAS if file_of(name).is_file()]


def runs_on(capability: str) -> tuple[str, ...]:
    """The names of those that this processor has: by Linux, whatever torch was told to use, or else by torch's word."""
    flags = processor_flags()
    if flags:
        return tuple(one.name for one in SETS if one.processor <= flags)
    word = capability.split()[0]
    best = next((i for i, one in enumerate(SETS) if one.torch == word), len(SETS))
    return tuple(one.name for i, one in enumerate(SETS) if i >= best or not one.processor)


def wanted() -> str:
    """What the environment names; empty for the best."""
    return os.environ.get(VARIABLE, "")


def in_use(capability: str, named: str) -> str:
    """The set whose file is loaded here; empty if none. `capability` is torch's word for the processor."""
    return next((name for name in candidates(capability, named) if not refusal(file_of(name))), "")


def candidates(capability: str, named: str) -> list[str]:
    """Those that were built, that the processor has, and that may be taken: the best first."""
    able = runs_on(capability)
    free = [one.name for one in SETS if named == one.name or not (named or one.only_named)]
    return [name for name in built() if name in able and name in free]


@cache
def refusal(library: Path) -> str:
    """Why this process may not use what the processor has, by the library's own word; empty if it may."""
    try:
        answer = ctypes.CDLL(str(library)).tm_usable()
    except (OSError, AttributeError):  # it is said elsewhere what is wrong with such a file
        return ""
    return "" if answer == 1 else REFUSALS.get(answer, f"its library cannot be used ({answer})")


@cache
def processor_flags() -> frozenset[str]:
    """What Linux says that the processor has; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return frozenset()
    line = next((line for line in info.read_text(errors="replace").splitlines() if line.startswith("flags")), "")
    return frozenset(line.split())
