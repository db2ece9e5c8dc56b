"""Looking things up in the tables that masks hold, for many cells at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truemask.masks.core.data import Data


def pick(table: Tensor, *places: Tensor) -> Tensor:
    """`table[places]` as one operator: `[]` would read a 0-d index as a number, which no tracer can follow."""
    return torch.ops.aten.index.Tensor(table, list(places))


def look_up(table: Tensor, b: Tensor, i: Tensor) -> Tensor:
    """`table[b, i]` of `[n]` or `[b, n]`; places beyond it (padding of a kernel's last tile) read the last entry."""
    i = within(i, table.shape[-1])
    return pick(table, i) if table.ndim == 1 else pick(table, b, i)


def within(i: Tensor, size: Any) -> Tensor:
    """Places below `size`, an int or, where `torch.jit.trace` follows sizes, a tensor; those beyond are the last."""
    return i.clamp(min=0).clamp(max=size - 1) if isinstance(size, Tensor) else i.clamp(0, max(size - 1, 0))


def row_by_row(table: Tensor, places: Tensor) -> Tensor:
    """`table[places]` of a table `[n]` or `[b, n]` at places `[m]` or `[b, m]`: `[m]` or `[b, m]`."""
    if table.ndim == 1:
        return table[places]
    if places.ndim == 1:
        return table[:, places]
    rows = max(table.shape[0], places.shape[0])
    return table.expand(rows, -1).gather(1, places.expand(rows, -1))


def rows_of(data: Data) -> int:
    """For how many samples `[n]` or `[b, n]` data speaks."""
    return data.tensor.shape[0] if data.tensor.ndim == 2 else 1


def low_high(data: Data | None) -> tuple[int, int]:
    """The smallest and largest number of the data, (0, 0) of none, and of late data, which nobody knows yet."""
    if data is None or data.late or data.tensor.numel() == 0:
        return 0, 0
    return int(data.array.min()), int(data.array.max())
