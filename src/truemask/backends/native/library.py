"""The native kernel as a library: the one that is loaded for this processor, and why there is none."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch

from truemask.backends import isa as isa_files
from truemask.backends.isa import (
    ISAS,
    OFF,
    VARIABLE,
    built,
    candidates,
    file_of,
    in_use,
    refusal,
    runs_on,
    wanted,
)
from truemask.backends.native.abi import CallStruct, hash_of, layout
from truemask.backends.native.step_abi import StepStruct, step_layout
from truemask.common.formatting import suggest
from truemask.errors import PlanError


def library() -> ctypes.CDLL:
    """The library; PlanError if there is none."""
    kernel, why = _loaded(wanted())
    if kernel is None:
        raise PlanError(f"the native kernel is missing: {why}")
    return kernel


def run(name: str, call: CallStruct) -> None:
    """Call `tm_forward` or `tm_backward`; MemoryError if it finds no room."""
    if getattr(library(), name)(ctypes.byref(call)):
        sizes = f"q [{call.b}, {call.hq}, {call.nq}, {call.d}], {call.nk} keys"
        raise MemoryError(f"attend: the native kernel found no memory for {sizes}")


def run_step(step: StepStruct) -> None:
    """Call `tm_step`; MemoryError if it finds no room."""
    if library().tm_step(ctypes.byref(step)):
        raise MemoryError(f"a step of decoding for {step.b} samples of {step.n} tokens found no memory")


def missing() -> str:
    """Why there is no library; empty if there is one."""
    return _loaded(wanted())[1]


def peak(seconds: float, halves: bool) -> float:
    """Additions and multiplications a second that all threads reach together, in fp32 or in products of bf16."""
    return library().tm_peak(seconds, halves, torch.get_num_threads())


def products_of_bf16() -> str:
    """What bf16 is multiplied in here: `floats`, `pairs` or `tiles`."""
    return ("floats", "pairs", "tiles")[library().tm_products_of_bf16()]


def isa() -> str:
    """The instruction set of the library that is loaded; empty without one."""
    kernel = _loaded(wanted())[0]
    return "" if kernel is None else Path(kernel._name).stem.removeprefix("truemask_")


def passed_over() -> list[str]:
    """Better instruction sets that the processor has, each with the reason why it is not the one that is loaded."""
    if wanted() or not isa():
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    better = [name for name in runs_on(capability) if ISAS.index(name) < ISAS.index(isa())]
    return [*_left_out(better), *_refused(better)]


@cache
def _loaded(named: str) -> tuple[ctypes.CDLL | None, str]:
    if named == OFF:
        return None, f"{VARIABLE}={OFF} says so"
    if named and named not in ISAS:
        return None, f"{VARIABLE}={named!r} is none of {', '.join((*ISAS, OFF))}{suggest(named, ISAS)}"
    names = built()
    if not names:
        return None, _why_not_built()
    capability = torch.backends.cpu.get_cpu_capability()
    name = in_use(capability, named)
    if not name:
        able = runs_on(capability)
        built_and_run = f"built are {', '.join(names)}; this processor runs {', '.join(able)}"
        reasons = [*_left_out([named] if named in able else []), *_refused(candidates(capability, named))]
        return None, "; ".join(reasons) or built_and_run
    try:
        kernel = ctypes.CDLL(str(file_of(name)))
    except OSError as error:
        return None, f"{file_of(name).name} cannot be loaded ({error})"
    if _abi_of(kernel) != hash_of(layout() + step_layout()):
        return None, "it was built from other sources than these: install truemask again"
    for name in ("tm_forward", "tm_backward", "tm_step"):
        getattr(kernel, name).restype = ctypes.c_int
        getattr(kernel, name).argtypes = [ctypes.c_void_p]
    kernel.tm_peak.restype, kernel.tm_peak.argtypes = ctypes.c_double, [ctypes.c_double, ctypes.c_int, c_int64]
    kernel.tm_start_threads_with.argtypes = [ctypes.c_void_p]
    kernel.tm_start_threads_with(_openmp())
    return kernel, ""


def _abi_of(kernel: ctypes.CDLL) -> int:
    """What the library says of its structure; 0 from one of long ago, which says nothing."""
    try:
        kernel.tm_abi.restype = c_uint64
        return kernel.tm_abi()
    except AttributeError:
        return 0


def _openmp() -> int | None:
    """The address of `GOMP_parallel` of the OpenMP library that torch runs on, if it has it (GNU's and LLVM's do)."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError):
        return None


def _refused(names: list[str]) -> list[str]:
    """Those that this process may not use, and why."""
    reasons = {name: refusal(file_of(name)) for name in names}
    return [f"{name}: {why}" for name, why in reasons.items() if why]


def _left_out(names: list[str]) -> list[str]:
    """Those that the compiler did not know, in the words of the build."""
    return [line for line in _note().splitlines() if line.split(":")[0] in names]


def _why_not_built() -> str:
    if note := _note():
        return f"it was not built: {note}"
    return "it was not built, which takes a C++ compiler when truemask is installed (`g++` or `clang++`)"


def _note() -> str:
    """What the build left: why there is no library, or which sets the compiler does not know, line by line."""
    note = isa_files.FOLDER / "missing.txt"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else ""
