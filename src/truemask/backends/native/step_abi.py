"""What this side and `csrc/decoding/structures.h` agree on: the structures of one step of decoding, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

from truemask.backends.native.abi import CallStruct, fields_of, lines

GELU, SILU, RELU_SQUARED = 0, 1, 2


class LayerStruct(ctypes.Structure):
    """`Layer`: one layer's attention, weights and gains."""

    _fields_ = (
        ("attention", CallStruct),
        *((name, c_void_p) for name in ("attn_gain", "to_q", "to_k", "to_v", "q_gain", "k_gain", "to_out")),
        *((name, c_void_p) for name in ("ff_gain", "ff_in", "ff_in_bias", "ff_out", "ff_out_bias")),
    )


class StepStruct(ctypes.Structure):
    """`Step`: all layers, from token ids to logits."""

    _fields_ = (
        *((name, c_int64) for name in ("b", "n", "dim", "inner", "depth", "vocabulary", "dtype", "threads")),
        *((name, c_int64) for name in ("activation", "gated", "rms", "normed_heads", "rotary")),
        *((name, c_int64) for name in ("positions_stride", "angles_stride")),
        *((name, c_float) for name in ("eps", "offset", "positions_scale", "logits_scale")),
        *((name, c_void_p) for name in ("tokens", "positions")),
        *((name, c_void_p) for name in ("embedding", "position_embedding", "final_gain", "to_logits")),
        *((name, c_void_p) for name in ("cos", "sin", "logits")),
        ("layers", ctypes.POINTER(LayerStruct)),
    )


def step_layout() -> str:
    """The fields with their places and sizes, and the constants, as `csrc/decoding/structures.h` writes them."""
    constants = [
        ("bytes", ctypes.sizeof(LayerStruct), ctypes.sizeof(StepStruct)),
        ("activations", GELU, SILU),
        ("activations", SILU, RELU_SQUARED),
    ]
    return lines([*fields_of(LayerStruct, StepStruct), *constants])
