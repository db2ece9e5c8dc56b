"""The instruction sets of the native kernel: what each takes of a processor and of a compiler, and which one runs here.

`pip install` compiles `csrc/` once for each; the best that the processor has is loaded when somebody first asks.
`TRUEMASK_ISA` names another one, or `off`. This file imports neither torch nor truemask, because the build reads it
where neither is installed.
"""

from __future__ import annotations

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


SETS = (  # the best first: a processor that runs one runs all that follow
    InstructionSet(
        "avx512_bf16",
        frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")),
        "",
        (*AVX512, "-mavx512bf16"),
    ),
    InstructionSet("avx512", frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl")), "AVX512", tuple(AVX512)),
    InstructionSet("avx2", frozenset(("avx2", "fma")), "AVX2", ("-mavx2", "-mfma")),
    InstructionSet("base", frozenset(), "", ()),
)
ISAS = tuple(one.name for one in SETS)


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
        return next(ISAS[i:] for i, one in enumerate(SETS) if one.processor <= flags)
    word = capability.split()[0]
    return next((ISAS[i:] for i, one in enumerate(SETS) if one.torch == word), ISAS[-1:])


def wanted() -> str:
    """What the environment names; empty for the best."""
    return os.environ.get(VARIABLE, "")


def in_use(capability: str, named: str) -> str:
    """The set whose file would be loaded here; empty if none. `capability` is torch's word for the processor."""
    able = runs_on(capability)
    return next((name for name in built() if name in able and named in ("", name)), "")


@cache
def processor_flags() -> frozenset[str]:
    """What Linux says that the processor has; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return frozenset()
    line = next((line for line in info.read_text(errors="replace").splitlines() if line.startswith("flags")), "")
    return frozenset(line.split())
