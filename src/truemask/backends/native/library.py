"""The native kernel as a library: its structure, the one that is loaded for this processor, and why there is none."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_float, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch

from truemask.backends import isa as isa_files
from truemask.backends.isa import ISAS, OFF, VARIABLE, built, file_of, in_use, runs_on
from truemask.common.formatting import suggest
from truemask.errors import PlanError

SLABS = ("slab_first", "slab_rows", "slab_starts", "slab_lo", "slab_hi")


class ArrayStruct(ctypes.Structure):
    """A tensor `[b, h, n, d]` without gaps in its last axis: strides in elements."""

    _fields_ = (("data", c_void_p), ("sample", c_int64), ("head", c_int64), ("row", c_int64))


class CallStruct(ctypes.Structure):
    """`Call` of `csrc/abi.h`, field by field."""

    _fields_ = (
        *((name, c_int64) for name in ("b", "hq", "hk", "nq", "nk", "d", "dv", "dtype", "threads")),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, ArrayStruct) for name in ("q", "k", "v", "out")),
        *((name, c_void_p) for name in ("lse", "sinks")),
        *((name, c_int64) for name in ("mask_b", "mask_h")),
        *((name, c_void_p) for name in ("starts", "runs", "words", "order", *SLABS)),
        ("bias_kind", c_int64),
        ("bias", c_void_p),
        ("bias_strides", c_int64 * 4),
        ("reach", c_int64),
        *((name, c_void_p) for name in ("q_positions", "k_positions")),
        *((name, c_int64) for name in ("q_stride", "k_stride")),
        *((name, c_uint64) for name in ("drop_below", "seed")),
        ("keep_scale", c_float),
        *((name, ArrayStruct) for name in ("dout", "dq", "dk", "dv_out")),
        *((name, c_void_p) for name in ("dlse", "keys_lse", "delta")),
    )


def library() -> ctypes.CDLL:
    """The library; PlanError if there is none."""
    found, why = _loaded(os.environ.get(VARIABLE, ""))
    if found is None:
        raise PlanError(f"the native kernel is missing: {why}")
    return found


def run(name: str, call: CallStruct) -> None:
    """Call `tm_forward` or `tm_backward`; MemoryError if it finds no room."""
    if getattr(library(), name)(ctypes.byref(call)):
        sizes = f"q [{call.b}, {call.hq}, {call.nq}, {call.d}], {call.nk} keys"
        raise MemoryError(f"attend: the native kernel found no memory for {sizes}")


def missing() -> str:
    """Why there is no library; empty if there is one."""
    return _loaded(os.environ.get(VARIABLE, ""))[1]


def isa() -> str:
    """The instruction set of the library that is loaded; empty without one."""
    found = _loaded(os.environ.get(VARIABLE, ""))[0]
    return "" if found is None else Path(found._name).stem.removeprefix("truemask_")


@cache
def _loaded(wanted: str) -> tuple[ctypes.CDLL | None, str]:
    if wanted == OFF:
        return None, f"{VARIABLE}={OFF} says so"
    if wanted and wanted not in ISAS:
        return None, f"{VARIABLE}={wanted!r} is none of {', '.join((*ISAS, OFF))}{suggest(wanted, ISAS)}"
    names = built()
    if not names:
        return None, _why_not_built()
    capability = torch.backends.cpu.get_cpu_capability()
    name = in_use(capability)
    if not name:
        return None, f"built are {', '.join(names)}; this processor runs {', '.join(runs_on(capability))}"
    try:
        found = ctypes.CDLL(str(file_of(name)))
    except OSError as error:
        return None, f"{file_of(name).name} cannot be loaded ({error})"
    if found.tm_call_bytes() != ctypes.sizeof(CallStruct):
        return None, "it was built from other sources than these: install truemask again"
    for name in ("tm_forward", "tm_backward"):
        getattr(found, name).restype = ctypes.c_int
        getattr(found, name).argtypes = [ctypes.c_void_p]
    found.tm_peak.restype, found.tm_peak.argtypes = ctypes.c_double, [ctypes.c_double, ctypes.c_int]
    found.tm_start_threads_with.argtypes = [ctypes.c_void_p]
    found.tm_start_threads_with(_openmp())
    return found, ""


def _openmp() -> int | None:
    """The address of `GOMP_parallel` of the OpenMP library that torch runs on, if it has it (GNU's and LLVM's do)."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError):
        return None


def _why_not_built() -> str:
    note = isa_files.FOLDER / "missing.txt"
    if note.is_file():
        return f"it was not built: {note.read_text(encoding='utf-8').strip()}"
    return "it was not built, which takes a C++ compiler when truemask is installed (`g++` or `clang++`)"
