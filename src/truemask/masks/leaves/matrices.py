"""Masks that hold data over both axes: dense tensors and block patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.formatting import describe
from truemask.common.real_tensors import remembered
from truemask.errors import MaskError
from truemask.geometry.logic import MIXED, States, tri_state
from truemask.geometry.ranges import Areas
from truemask.geometry.slabs.slabs import Flags, NoExactFormError, Region, Slabs, from_cells
from truemask.geometry.tiles.tile_map import Rectangles
from truemask.masks.core.data import Data, flags
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.lookup import pick, within
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import call
from truemask.masks.core.value import Written
from truemask.masks.leaves.per_token import beyond
from truemask.masks.leaves.tile_sample import SAMPLED_FROM, Sample, runs_are_few, sample_of

MAX_READ_CELLS = 1 << 28  # cells of a dense tensor that are looked through for its runs
UNSAMPLED_CELLS = 1 << 16  # up to which every exact form is worth having
GRAINS = 16  # cells of a larger tensor for each of its sums, which are eight bytes


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """`tensor[b, h, q, k]`, with size 1 where it does not vary."""

    tensor: Data
    kind: ClassVar[str] = "dense"

    @remembered
    def batch_size(self) -> int:
        return self.tensor.tensor.shape[0]

    @remembered
    def head_count(self) -> int:
        return self.tensor.tensor.shape[1]

    @remembered
    def _areas(self) -> Areas:
        return Areas(self.tensor.array, max(UNSAMPLED_CELLS, self.tensor.array.size // GRAINS))

    @remembered
    def sample(self) -> Sample | None:
        """What a few tiles of a large tensor show; None of a small one, which is looked at whole."""
        cells = self.tensor.array
        return None if cells.size < SAMPLED_FROM else sample_of(cells)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table = self.table("tensor")
        b, h, q, k = (within(i, n) if n > 1 else i * 0 for i, n in zip((b, h, q, k), table.shape, strict=True))
        return pick(table, b, h, q, k)

    def _tile(self, r: Rectangles) -> States:
        if self.sample is not None and not self.sample.shows_tiles:
            return np.full(np.broadcast_shapes(*(side.shape for side in (r.b, r.h, r.q0, r.k0))), MIXED)
        set_cells, area = self._areas.covering(r.b, r.h, r.q0, r.q1, r.k0, r.k1)
        return tri_state(set_cells == 0, set_cells == area)

    def _slabs(self, r: Region) -> Slabs:
        cells = self._plane(r)
        if cells.size > MAX_READ_CELLS:
            raise NoExactFormError(f"{cells.size} cells are more than are read for this")
        if cells.size > UNSAMPLED_CELLS and not self._has_runs(cells):
            raise NoExactFormError(f"{cells.size} cells without a pattern take less room than their runs")
        return from_cells(np.arange(r.q0, r.q1 + 1), np.arange(r.k0, r.k1 + 1), cells)

    def _has_runs(self, cells: Flags) -> bool:
        """Whether the runs of a part of the tensor take less room than its cells, the sample asked first."""
        return (self.sample is None or self.sample.shows_runs) and runs_are_few(cells)

    @remembered
    def holds_cells(self) -> bool:
        return True

    def _plane(self, r: Region) -> Flags:
        b, h = self._distinct_key(r.b, r.h)
        return self.tensor.array[b, h, r.q0 : r.q1, r.k0 : r.k1]

    def _distinct_key(self, b: int, h: int) -> tuple[int, int]:
        return min(b, self.batch_size - 1), min(h, self.head_count - 1)

    def _check(self, q_stop: int, k_stop: int) -> None:
        beyond(self, self.tensor.tensor.shape[2], q_stop, "queries")
        beyond(self, self.tensor.tensor.shape[3], k_stop, "keys")

    @remembered
    def has_text(self) -> bool:
        return self.tensor.complete

    def _write(self) -> Written:
        return call("dense", self.tensor)


AXES = {"qk": 2, "bqk": 3, "hqk": 3, "bhqk": 4}


@deferrable
def dense(tensor: object, axes: str | None = None) -> Mask:
    """A boolean tensor as a mask, True = may attend: `[q, k]`, or `[b, h, q, k]` with size 1 where it does not vary.

    A 3-D tensor must say what its first axis is: `axes="bqk"` or `axes="hqk"`. The tensor is copied. A tensor of
    numbers is an error that names the importer for it (law 1 in docs/conventions.md).

    >>> dense([[True, False], [True, True]])[1, 0]
    True
    """
    cells = flags(tensor, "dense(tensor)", (2, 3, 4), "[q, k] or [b, h, q, k]")
    data = cells.tensor
    if axes is not None and axes not in AXES:
        raise MaskError(f"dense(axes=...) is one of {', '.join(map(repr, AXES))}, got {describe(axes)}")
    if axes is not None and AXES[axes] != data.ndim:
        raise MaskError(f"dense(axes={axes!r}) needs {AXES[axes]} dimensions, got {describe(data)}")
    if data.ndim == 3 and axes is None:
        n = data.shape[0]
        raise MaskError(
            f"dense(tensor) got {describe(data)}, which can be read two ways: axes='bqk' ({n} samples, heads alike) or "
            f"axes='hqk' ({n} heads, samples alike; x-transformers' reading). Say which"
        )
    shape = {2: (1, 1), 3: (1, data.shape[0]) if axes == "hqk" else (data.shape[0], 1)}.get(data.ndim, data.shape[:2])
    if 0 in shape:
        raise MaskError(f"dense(tensor) needs at least one sample and one head, got {describe(data)}")
    return Dense(cells.reshaped(*shape, *data.shape[-2:]))


@dataclass(frozen=True, eq=False, repr=False)
class BlockPattern(Mask):
    """`matrix[h, q // size, k // size]`."""

    matrix: Data
    size: int
    kind: ClassVar[str] = "block_pattern"
    _numbers: ClassVar[tuple[str, ...]] = ("size",)

    @remembered
    def head_count(self) -> int:
        return self.matrix.tensor.shape[0] if self.matrix.tensor.ndim == 3 else 1

    @remembered
    def _areas(self) -> Areas:
        return Areas(self.matrix.array.reshape(1, self.head_count, *self.matrix.array.shape[-2:]))

    def _tables(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix.tensor.reshape(self.head_count, *self.matrix.tensor.shape[-2:])}

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table = self.table("matrix")
        row, column = (within(i // self.size, n) for i, n in zip((q, k), table.shape[1:], strict=True))
        heads = table.shape[0]
        return pick(table, within(h, heads), row, column) if heads > 1 else pick(table[0], row, column)

    def _tile(self, r: Rectangles) -> States:
        n = self.size
        set_cells, area = self._areas.covering(
            r.b * 0, r.h, r.q0 // n, (r.q1 - 1) // n + 1, r.k0 // n, (r.k1 - 1) // n + 1
        )
        return tri_state(set_cells == 0, set_cells == area)

    def _slabs(self, r: Region) -> Slabs:
        n = self.size
        table = self.matrix.array.reshape(self.head_count, *self.matrix.array.shape[-2:])[self._distinct_key(r.b, r.h)]
        row, column = (np.arange(first // n, (stop - 1) // n + 1) for first, stop in ((r.q0, r.q1), (r.k0, r.k1)))
        rows, edges = np.append(np.maximum(row * n, r.q0), r.q1), np.append(column, column[-1] + 1) * n
        return from_cells(rows, edges, table[row[0] : row[-1] + 1, column[0] : column[-1] + 1])

    def _distinct_key(self, b: int, h: int) -> int:
        return min(h, self.head_count - 1)

    def _check(self, q_stop: int, k_stop: int) -> None:
        rows, columns = self.matrix.tensor.shape[-2:]
        beyond(self, rows * self.size, q_stop, "queries")
        beyond(self, columns * self.size, k_stop, "keys")

    def _write(self) -> Written:
        return call("block_pattern", self.matrix, self.size)


@deferrable
def block_pattern(matrix: object, size: int) -> Mask:
    """Any pattern of blocks: `matrix[q // size, k // size]`, bool `[rows, columns]` or `[h, rows, columns]`.

    >>> block_pattern([[True, False], [True, True]], 2).to_dense(4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    data = flags(matrix, "block_pattern(matrix)", (2, 3), "[rows, columns] or [h, rows, columns]")
    if data.tensor.numel() == 0:
        raise MaskError(f"block_pattern(matrix) needs at least one block, got {describe(data.tensor)}")
    return BlockPattern(data, whole(size, "block_pattern(size)", 1))
