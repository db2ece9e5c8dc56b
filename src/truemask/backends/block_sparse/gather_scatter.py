"""Rows of tensors `[h, n, d]` by strips: overlapping views where the strips move in equal steps, copies elsewhere.

`rows` of `[h, n, d]` are vectors of d numbers. Whatever the strides, they are the rows of one matrix, so that a gather
is a plain selection, and a scatter an addition, of rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from truemask.backends.block_sparse.batching import Steps


def taken(x: Tensor, steps: Steps | None, places: Tensor | None, part: slice, size: int) -> Tensor:
    """Strips `[strips, h, size, d]` of `x [h, n, d]`: a view if they move in steps, else the rows at `places`."""
    if steps is not None:
        return strided(x, steps, part, size)
    assert places is not None
    return gathered(x, places[part])


def strided(x: Tensor, steps: Steps, part: slice, size: int) -> Tensor:
    """Strips as a view, which may overlap."""
    h, _, d = x.shape
    sh, sn, sd = x.stride()
    first = x.storage_offset() + (steps.first + part.start * steps.step) * sn
    return x.as_strided((part.stop - part.start, h, size, d), (steps.step * sn, sh, sn, sd), first)


def gathered(x: Tensor, places: Tensor) -> Tensor:
    """Strips copied: `[strips, h, size, d]` of `x [h, n, d]` at `places [strips, size]`."""
    h, _, d = x.shape
    strips, size = places.shape
    if x.is_contiguous() or x.stride(-1) != 1:
        return x.index_select(1, places.flatten()).view(h, strips, size, d).transpose(0, 1)
    matrix, numbers = _matrix(x, places)
    return matrix.index_select(0, numbers.flatten()).view(strips, size, h, d).transpose(1, 2)


def put(x: Tensor, steps: Steps | None, places: Tensor | None, part: slice, real: Tensor | None, new: Tensor) -> None:
    """Write strips `new [strips, h, size, d]` into `x`; `real` rows only."""
    if steps is not None:
        strided(x, steps, part, new.shape[2]).copy_(new)
        return
    assert places is not None
    matrix, numbers = _matrix(x, places[part])
    rows = new.transpose(1, 2).flatten(0, 2)
    numbers = numbers.flatten()
    if real is not None:
        keep = real[part].unsqueeze(-1).expand(*real[part].shape, x.shape[0]).flatten().nonzero()[:, 0]
        rows, numbers = rows.index_select(0, keep), numbers.index_select(0, keep)
    if rows.shape[1] == 1:
        matrix.view(-1).scatter_(0, numbers, rows.flatten())
    else:
        matrix.index_copy_(0, numbers, rows)


def add(x: Tensor, steps: Steps | None, places: Tensor | None, part: slice, new: Tensor) -> None:
    """Add strips `new [strips, h, size, d]` to `x`, where they may overlap; always in the same order."""
    if steps is None or (0 < steps.step < 16 and part.stop - part.start > 1):
        places = _spread(steps, part, new.shape[2]) if steps is not None else places
        assert places is not None
        rows = places if steps is not None else places[part]
        matrix, numbers = _matrix(x, rows)
        matrix.index_add_(0, numbers.flatten(), new.transpose(1, 2).flatten(0, 2))
        return
    size = new.shape[2]
    if steps.step == 0 and len(new) > 1:
        new, part = new.sum(0, keepdim=True), slice(0, 1)
    width = steps.step if len(new) > 1 else size
    for first in range(0, size, max(width, 1)):
        columns = new[:, :, first : first + width]
        strided(x, Steps(steps.first + first, steps.step), part, columns.shape[2]).add_(columns)


def _spread(steps: Steps, part: slice, size: int) -> Tensor:
    starts = steps.first + steps.step * torch.arange(part.start, part.stop)
    return starts[:, None] + torch.arange(size)


def _matrix(x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """`x [h, n, d]` as a matrix whose rows hold its rows, and which of them stand at `places`: `[strips, size, h]`."""
    h, n, d = x.shape
    sh, sn, _ = x.stride()
    unit = math.gcd(sh if h > 1 else 0, sn if n > 1 else 0) or d
    matrix = x.as_strided((((h - 1) * sh + (n - 1) * sn) // unit + 1, d), (unit, 1), x.storage_offset())
    return matrix, (places * (sn // unit if n > 1 else 0))[..., None] + torch.arange(h) * (sh // unit if h > 1 else 0)
