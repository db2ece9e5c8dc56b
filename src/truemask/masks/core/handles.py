"""Handles: a mask as a tensor, so that it can enter a compiled graph without becoming a constant of it.

`torch.compile` compares what it treats as a constant, and compiles again when it changed. A tensor it takes as given.
So every mask has a handle, a tensor that holds a number, and whoever meets the handle at run time gets the mask back.
A handle that a graph keeps for its backward keeps the mask too: the tensor's memory is a `Handle`.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from truemask.common.real_tensors import is_diverted, ordinary_tensors


class Handle(bytearray):
    """The memory of one handle: its number, and whom it stands for."""

    __slots__ = ("__weakref__", "mask", "twin")
    mask: ref[Any]
    twin: Any  # made when the handle is first shown; holding `mask` itself would be a cycle through a tensor


HANDLES: WeakValueDictionary[int, Handle] = WeakValueDictionary()
HANDLE_NUMBERS = itertools.count(1)


def handle_fields(mask: Any) -> dict[str, Any]:
    """What a graph may call the mask: a new handle, int64 `[1]` on the CPU, and its number as text."""
    number = next(HANDLE_NUMBERS)
    return {"handle": _tensor_of(mask, number), "number": str(number)}


def _tensor_of(mask: Any, number: int) -> Tensor:
    memory = Handle(number.to_bytes(8, sys.byteorder))
    memory.mask, memory.twin = ref(mask), None
    HANDLES[number] = memory
    if torch.is_inference_mode_enabled() or is_diverted():
        with torch.inference_mode(False), ordinary_tensors():
            return torch.frombuffer(memory, dtype=torch.int64)
    return torch.frombuffer(memory, dtype=torch.int64)


def mask_of(handle: Tensor | str) -> Any:
    """The mask of a handle, or of its number, or one equal to it."""
    memory = HANDLES[int(handle)]
    if memory.twin is None:
        mask = memory.mask()
        assert mask is not None, "a handle lives in its mask, and was shown before it could outlive it"
        memory.twin = mask.twin()
    return memory.twin
