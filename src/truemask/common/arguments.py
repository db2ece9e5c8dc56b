"""Numbers that callers give, checked where they come in: a whole number within bounds, or an error that names it."""

from __future__ import annotations

import operator
from typing import cast

import numpy as np
import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.real_tensors import is_late
from truemask.errors import MaskError

MAX_POSITION = 1 << 40  # sizes, offsets and positions stay below this, so that 64-bit index arithmetic cannot overflow


def whole(value: object, name: str, least: int = 0) -> int:
    """`value` as a Python int of at least `least`, or an error that names the argument."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise MaskError(f"{name} must be a whole number, got {describe(value)}")
    if isinstance(value, torch.SymInt):  # a size or an argument of a graph that is recorded for many of them
        torch._check(value >= least)
        return cast(int, value)
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point() and is_late(value):
        return cast(int, value)
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):
        raise MaskError(f"{name} must be a whole number, got {describe(value)}") from None
    if not least <= number < MAX_POSITION:
        shown = number if abs(number) < 1 << 80 else f"a number of {number.bit_length()} bits"
        raise MaskError(f"{name} must be at least {least} and below 2**40, got {shown}")
    return number
