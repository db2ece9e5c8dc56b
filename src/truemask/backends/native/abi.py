"""What this side and `csrc/abi.h` agree on: the structure of a call, field by field, and the constants in it.

The library says a hash of its own (`tm_abi`); one that says another was built from other sources, and is not used.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import c_float, c_int64, c_uint64, c_void_p

import torch

TILE = 64  # queries and keys: what a row of a MIXED tile lets through is one 64-bit word
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TENSOR, ALIBI, RELATIVE = 1, 2, 3  # kinds of bias; 0 is none
ALL, SLABS = -1, -2  # what a run of tiles may have instead of a pattern: everything is seen, or the slabs say what
ENDS = ("slab_first", "slab_rows", "slab_starts", "slab_lo", "slab_hi")


class ArrayStruct(ctypes.Structure):
    """A tensor `[b, h, n, d]` without gaps in its last axis: strides in elements."""

    _fields_ = (("data", c_void_p), ("sample", c_int64), ("head", c_int64), ("row", c_int64))


class CallStruct(ctypes.Structure):
    """`Call` of `csrc/abi.h`, field by field."""

    _fields_ = (
        *((name, c_int64) for name in ("b", "hq", "hk", "nq", "nk", "d", "dv", "dtype", "threads", "in_parts")),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, ArrayStruct) for name in ("q", "k", "v", "out")),
        *((name, c_void_p) for name in ("lse", "sinks", "base", "log_total")),
        *((name, c_int64) for name in ("mask_b", "mask_h", "mask_row")),
        *((name, c_void_p) for name in ("starts", "runs", "words", "order", *ENDS)),
        ("bias_kind", c_int64),
        ("bias", c_void_p),
        ("bias_strides", c_int64 * 4),
        ("reach", c_int64),
        *((name, c_void_p) for name in ("q_positions", "k_positions")),
        *((name, c_int64) for name in ("q_stride", "k_stride")),
        *((name, c_uint64) for name in ("drop_below", "seed")),
        ("keep_scale", c_float),
        *((name, ArrayStruct) for name in ("dout", "dq", "dk", "dv_out")),
        *((name, c_void_p) for name in ("dlse", "keys_log_total", "delta")),
    )


ARRAYS = struct.Struct("@17q")  # q, k, v, out and lse
SIZES_AND_ARRAYS = struct.Struct("@10q2f16q")  # the fields of a call up to `out`, which every call fills in at once
assert SIZES_AND_ARRAYS.size == CallStruct.out.offset + CallStruct.out.size


def hash_of(text: str) -> int:
    """Its hash (FNV-1a)."""
    value = 14695981039346656037
    for byte in text.encode():
        value = (value ^ byte) * 1099511628211 % (1 << 64)
    return value


Line = tuple[str, int, int]


def fields_of(*structures: type[ctypes.Structure]) -> list[Line]:
    """The names of their fields, with places and sizes."""
    fields = [(structure, name) for structure in structures for name, *_ in structure._fields_]
    return [(name, getattr(structure, name).offset, getattr(structure, name).size) for structure, name in fields]


def lines(said: list[Line]) -> str:
    """As text, one a line."""
    return "".join(f"{name} {a} {b}\n" for name, a, b in said)


def layout() -> str:
    """The fields with their places and sizes, and the constants, as `layout` of `csrc/abi.h` writes them."""
    floats, brains, halves = DTYPES.values()
    constants = [
        ("bytes", ctypes.sizeof(ArrayStruct), ctypes.sizeof(CallStruct)),
        ("tile", TILE, TILE),
        ("dtypes", floats, floats),
        ("dtypes", brains, halves),
        ("runs", ALL, SLABS),
        ("biases", TENSOR, ALIBI),
        ("biases", ALIBI, RELATIVE),
    ]
    return lines([*fields_of(ArrayStruct, CallStruct), *constants])
