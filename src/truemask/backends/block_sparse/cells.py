"""What is true of the cells of some strips: allowed, biased, kept by dropout; asked for where they are computed.

Shapes: s strips, h heads of a piece, n rows and m keys of a strip; an axis is 1 where nothing varies along it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.backends.base import Inputs
from truemask.backends.block_sparse.batching import Group, Plane, Steps
from truemask.backends.block_sparse.gather_scatter import add, gathered, put, strided, taken
from truemask.backends.shared.dropout import kept
from truemask.backends.shared.eager import checked_value
from truemask.biases import Bias
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.predicate import check_unchanged


@dataclass(frozen=True, eq=False)
class Sparse:
    """A mask lowered to groups of strips."""

    planes: tuple[Plane, ...]
    shape: tuple[int, int]  # samples and heads that the mask tells apart
    covered: bool  # whether every row is in a strip
    dead: Tensor | None  # bool [b, h, q] of `shape`; None if every row sees something
    from_mask: bool  # whether some patterns are not kept, so that only a run knows which of their rows are dead
    few_keys: bool  # whether all strips together take fewer keys than there are, as in decoding

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        groups = [group for plane in self.planes for group in plane.groups]
        masks = {id(group.masking): group.masking.nbytes for group in groups if group.masking is not None}
        dead = 0 if self.dead is None else self.dead.nbytes
        return sum(group.nbytes for group in groups) + sum(masks.values()) + dead


class Piece(NamedTuple):
    """One plane of the tensors: a sample and the heads that share its strips; or all samples, as more heads."""

    groups: tuple[Group, ...]
    sample: int | None  # None: all of them, folded
    heads: slice
    kv_heads: slice

    def of(self, x: Tensor) -> Tensor:
        """The piece of `x [b, h, n, ...]`: `[heads, n, ...]`."""
        return self._cut(x, self.heads)

    def keys_of(self, x: Tensor) -> Tensor:
        """The same of tensors with as many heads as keys have."""
        return self._cut(x, self.kv_heads)

    def _cut(self, x: Tensor, heads: slice) -> Tensor:
        if self.sample is None:
            return x[0] if len(x) == 1 else x.as_strided((x.shape[0] * x.shape[1], *x.shape[2:]), x.stride()[1:])
        return x[self.sample, heads]

    @property
    def place(self) -> tuple[Tensor, Tensor]:
        """The sample and the heads, `[1, 1, 1, 1]` and `[1, h, 1, 1]`."""
        assert self.sample is not None
        heads = torch.arange(self.heads.start, self.heads.stop)
        return torch.full((1, 1, 1, 1), self.sample), heads.view(1, -1, 1, 1)


def pieces(sparse: Sparse, kv_heads: int, *tensors: Tensor, apart: bool = False) -> Iterator[Piece]:
    """The pieces of a call; samples are folded into heads if every tensor's strides and `apart` allow it."""
    batch, heads = tensors[0].shape[:2]
    fold = sparse.shape == (1, 1) and not apart and all(folds(x) for x in tensors)
    for plane in sparse.planes:
        head_range = slice(0, heads) if sparse.shape[1] == 1 else slice(plane.h, plane.h + 1)
        shared = slice(head_range.start * kv_heads // heads, (head_range.stop * kv_heads - 1) // heads + 1)
        for sample in [plane.b] if sparse.shape[0] > 1 else [None] if fold else range(batch):
            yield Piece(plane.groups, sample, head_range, shared)


def folds(x: Tensor) -> bool:
    """Whether samples are but more heads of it."""
    return len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)


class Cells(NamedTuple):
    """Some strips of a group in a piece."""

    piece: Piece
    group: Group
    part: slice

    @property
    def rows(self) -> Tensor:
        """`[s, 1, n, 1]`."""
        return self.group.row_index(self.part)[:, None, :, None]

    @property
    def keys(self) -> Tensor:
        """`[s, 1, 1, m]`."""
        return self.group.key_index(self.part)[:, None, None, :]

    def take_rows(self, x: Tensor) -> Tensor:
        """The strips' rows of `x [b, h, n, d]`: `[s, h, n, d]`."""
        group = self.group
        return taken(self.piece.of(x), group.rows, group.row_places, self.part, group.height)

    def put_rows(self, x: Tensor, new: Tensor) -> None:
        """Write them."""
        put(self.piece.of(x), self.group.rows, self.group.row_places, self.part, self.group.real, new)

    def take_keys(self, x: Tensor) -> Tensor:
        """The strips' keys of `x [b, y, k, d]`: `[s, y, m, d]`."""
        group, part = self.group, self.part
        if group.interleaved is None:
            return taken(self.piece.keys_of(x), group.keys, group.key_places, part, group.width)
        keys = gathered(self.piece.keys_of(x), group.interleaved.part(part)[None])[0]
        return strided(keys, Steps(0, group.interleaved.step), slice(0, part.stop - part.start), group.width)

    def add_keys(self, x: Tensor, new: Tensor) -> None:
        """Add to them."""
        group, part, total = self.group, self.part, self.piece.keys_of(x)
        if group.interleaved is None:
            add(total, group.keys, group.key_places, part, new)
            return
        keys = group.interleaved.part(part)[None]
        sums = new.new_zeros(new.shape[1], keys.shape[1], new.shape[3])
        add(sums, Steps(0, group.interleaved.step), None, slice(0, part.stop - part.start), new)
        add(total, None, keys, slice(0, 1), sums[None])

    def allowed(self, mask: Mask) -> Tensor:
        """What the mask lets through, bool `[1 or s, 1, n, m]`; nothing of what is padding."""
        group = self.group
        if group.from_mask:
            b, h = self.piece.place
            check_unchanged(mask)
            cells = mask.truth(b, h[:, :1], self.rows, self.keys)
            if group.widths is not None:
                cells = cells & (torch.arange(group.width) < group.widths[self.part, None])[:, None, None]
            return cells if group.real is None else cells & group.real[self.part, None, :, None]
        if group.masking is not None:
            return group.masking.additive(self.part, group.height, group.width, torch.float32) == 0
        cells = torch.ones(1, 1, group.height, group.width, dtype=torch.bool)
        return cells.tril_() if group.causal else cells

    def bias(self, bias: Tensor | Bias, positions: tuple[Tensor, Tensor] | None) -> Tensor:
        """The numbers of a bias, `[s, h, n, m]`; a bias object is asked at the positions of rows and keys."""
        sample = self.piece.sample
        assert sample is not None
        if isinstance(bias, Bias):
            assert positions is not None
            q, k = (side[sample] if side.ndim == 2 else side for side in positions)
            b, h = self.piece.place
            sizes = (self.part.stop - self.part.start, h.numel(), self.group.height, self.group.width)
            return checked_value(bias, b, h, q[self.rows], k[self.keys], sizes)
        return self.plane_of(bias)[self.bias_place(bias)].movedim(0, 1)

    def plane_of(self, bias: Tensor) -> Tensor:
        """The bias tensor of the piece, `[h, q, k]`."""
        assert self.piece.sample is not None
        plane = bias[self.piece.sample if len(bias) > 1 else 0]
        return plane[self.piece.heads] if len(plane) > 1 else plane

    def bias_place(self, bias: Tensor) -> tuple[slice, Tensor, Tensor]:
        """Where its cells stand in the bias tensor's plane."""
        rows, keys = self.rows[:, 0], self.keys[:, 0]
        rows = rows if bias.shape[2] > 1 else torch.zeros_like(rows[:1, :1])
        return slice(None), rows, keys if bias.shape[3] > 1 else torch.zeros_like(keys[:1, :, :1])

    def kept(self, inputs: Inputs) -> Tensor:
        """What dropout keeps, bool `[s, h, n, m]`."""
        return kept(inputs.seed, inputs.dropout, *self.piece.place, self.rows, self.keys)
