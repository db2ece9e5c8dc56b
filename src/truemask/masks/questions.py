"""The questions that every mask answers about given sizes: tiles, cells, counts, dead rows, pictures.

Sizes come with the question (law 3 in docs/conventions.md): `q_len`, `kv_len` (None: as many keys as positions have
passed), and `batch` and `heads` where a mask varies over them without holding a number of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from truemask.errors import MaskError, describe
from truemask.geometry.logic import States
from truemask.geometry.picture import html_picture, text_picture
from truemask.geometry.tiles import Rectangles, TileMap, build_tile_map
from truemask.masks.data_store import whole

TILED_FROM = 1 << 16  # cells from which on a dense mask is filled tile by tile
ANY = 0  # the size of an axis over which a mask varies without holding a number of entries


class Questions(ABC):
    """What can be asked of a mask, in terms of the few things that it says of itself."""

    _tiles_exact: ClassVar[bool] = False  # whether `_tile` answers MIXED only where both values occur
    batch_size: Any  # int: 1 all samples alike, ANY unknown, n data for n samples
    head_count: Any  # int: the same for heads
    text: Any  # str: the expression

    @abstractmethod
    def truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q may attend to key k, on index tensors that broadcast."""

    @abstractmethod
    def _tile(self, r: Rectangles) -> States:
        """Three-valued answers that broadcast with the rectangles."""

    @abstractmethod
    def check(self, q_len: int, kv_len: int, *, batch: int | None = None, heads: int | None = None) -> None:
        """Raise if the mask cannot answer for these sizes."""

    @abstractmethod
    def kv_len_for(self, q_len: int) -> int:
        """What `kv_len=None` means."""

    def _sizes(self, q_len: int, kv_len: int | None, batch: int | None, heads: int | None) -> tuple[int, int, int, int]:
        """Checked (samples, heads, q_len, kv_len), with 1 where the mask does not vary."""
        q_len = whole(q_len, "q_len")
        kv_len = self.kv_len_for(q_len) if kv_len is None else whole(kv_len, "kv_len")
        self.check(q_len, kv_len, batch=batch, heads=heads)
        return _axis(self, "batch", self.batch_size, batch), _axis(self, "heads", self.head_count, heads), q_len, kv_len

    def tiles(
        self,
        q_len: int,
        kv_len: int | None = None,
        block: int | tuple[int, int] = 128,
        *,
        batch: int | None = None,
        heads: int | None = None,
    ) -> TileMap:
        """Which tiles are EMPTY, MIXED or FULL, without evaluating cells; `block` is an int or (queries, keys).

        >>> from truemask.masks.positional import causal
        >>> causal.tiles(1024).counts
        TileCounts(empty=28, mixed=8, full=28)
        """
        samples, head_count, q_len, kv_len = self._sizes(q_len, kv_len, batch, heads)
        pair = (block, block) if not isinstance(block, tuple) else block
        if len(pair) != 2:
            raise MaskError(f"block is an int or a pair (queries, keys), got {describe(block)}")
        sizes = (whole(pair[0], "block", 1), whole(pair[1], "block", 1))
        return build_tile_map(
            self._tile,
            self._cells,
            q_len=q_len,
            kv_len=kv_len,
            block=sizes,
            batch=samples,
            heads=head_count,
            exact=self._tiles_exact,
        )

    def _cells(self, b: Any, h: Any, q: Any, k: Any) -> NDArray[np.bool_]:
        """`truth` on numpy arrays."""
        return self.truth(*map(torch.from_numpy, (b, h, q, k))).numpy()

    def to_dense(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The mask as a bool tensor `[b, h, q, k]`, True = may attend; size 1 where it does not vary."""
        samples, head_count, q_len, kv_len = self._sizes(q_len, kv_len, batch, heads)
        if torch.device(device).type == "cpu" and q_len * kv_len > TILED_FROM:
            return torch.from_numpy(self.tiles(q_len, kv_len, batch=samples, heads=head_count).dense())
        b, h, q, k = indices(samples, head_count, q_len, kv_len, device)
        return self.truth(b, h, q, k).contiguous()

    def __getitem__(self, place: tuple[int, int]) -> bool:
        """Whether query `place[0]` may attend to key `place[1]`."""
        if not (isinstance(place, tuple) and len(place) == 2):
            raise MaskError(f"a cell is `mask[q, k]`, two whole numbers; got {describe(place)}")
        q, k = whole(place[0], "q"), whole(place[1], "k")
        self.check(q + 1, k + 1)
        if (self.batch_size, self.head_count) != (1, 1):
            raise MaskError(
                f"the mask `{self}` varies over {'samples' if self.batch_size != 1 else 'heads'}: choose one first, "
                "with `mask.select(samples=[0], heads=[0])[q, k]`"
            )
        zero = torch.zeros((), dtype=torch.int64)
        return bool(self.truth(zero, zero, zero + q, zero + k))

    def count(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """The number of (query, key) pairs let through, int64 `[b, h]` (size 1 where the mask does not vary).

        >>> from truemask.masks.positional import causal
        >>> causal.count(5)
        tensor([[15]])
        """
        tiles = self.tiles(q_len, kv_len, batch=batch, heads=heads)
        pairs = np.zeros(tiles.shape[:2], np.int64)
        full = tiles.full()
        np.add.at(pairs, (full.b, full.h), (full.q1 - full.q0) * (full.k1 - full.k0))
        for part in tiles.evaluated():
            np.add.at(pairs, (part.b, part.h), part.cells.sum((1, 2)))
        return torch.from_numpy(pairs)

    def density(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> float:
        """The share of all (query, key) pairs that is let through, a mean over samples and heads; 0.0 of nothing."""
        cells = q_len * (self.kv_len_for(q_len) if kv_len is None else kv_len)
        pairs = self.count(q_len, kv_len, batch=batch, heads=heads)
        return float(pairs.double().mean()) / cells if cells else 0.0

    def dead_queries(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """Which queries may attend to nothing, bool `[b, h, q]`: their output is zeros (law 5, docs/conventions.md)."""
        return self._dead(0, q_len, kv_len, batch, heads)

    def dead_keys(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """Which keys no query may attend to, bool `[b, h, k]`."""
        return self._dead(1, q_len, kv_len, batch, heads)

    def _dead(self, axis: int, q_len: int, kv_len: int | None, batch: int | None, heads: int | None) -> Tensor:
        tiles = self.tiles(q_len, kv_len, batch=batch, heads=heads)
        full, sizes = tiles.full(), (tiles.q_len, tiles.kv_len)
        first, stop = ((full.q0, full.q1), (full.k0, full.k1))[axis]
        seen = np.zeros(
            (*tiles.shape[:2], sizes[axis] + tiles.block[axis] + 1), np.int64
        )  # +1 where a run begins, -1 behind it
        np.add.at(seen, (full.b, full.h, first), 1)
        np.add.at(seen, (full.b, full.h, stop), -1)
        alive = seen.cumsum(-1) > 0
        for part in tiles.evaluated():
            some = part.cells.any(2 - axis)
            place = (part.i, part.j)[axis][:, None] * tiles.block[axis] + np.arange(part.cells.shape[1 + axis])
            np.logical_or.at(alive, (part.b[:, None], part.h[:, None], place), some)
        return torch.from_numpy(~alive[..., : sizes[axis]])

    def show(
        self, q_len: int = 16, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> str:
        """A picture in text, one panel for each sample and head that differs."""
        dense = self.to_dense(q_len, kv_len, batch=batch, heads=heads).numpy()
        panels = [(label, dense[place]) for place, label in _panels(dense.shape)]
        return "\n".join(text_picture(cells, title=f"{self}{label}") for label, cells in panels)

    def _repr_html_(self) -> str:
        q_len = _picture_length(self)
        dense = self.to_dense(q_len, batch=self.batch_size or 1, heads=self.head_count or 1).numpy()
        places = list(_panels(dense.shape))[:8]
        cells = np.stack([dense[place] for place, _ in places])
        return html_picture(cells, title=str(self.text), labels=[label for _, label in places])


def indices(b: int, h: int, q: int, k: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tensors `[b, 1, 1, 1]`, `[1, h, 1, 1]`, `[1, 1, q, 1]` and `[1, 1, 1, k]`."""
    first, second, third, last = (torch.arange(size, device=device) for size in (b, h, q, k))
    return first.view(-1, 1, 1, 1), second.view(1, -1, 1, 1), third.view(1, 1, -1, 1), last.view(1, 1, 1, -1)


def _axis(mask: Questions, name: str, own: int, asked: int | None) -> int:
    """The size of the batch or head axis of an answer: 1 where the mask does not vary."""
    if own == ANY and asked is None:
        axis = {"batch": "samples", "heads": "heads"}[name]
        raise MaskError(f"the mask `{mask}` varies over {axis} and holds no number of them: pass `{name}=`")
    return 1 if own == 1 else own or (asked or 0)


def _panels(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], str]]:
    for b, h in np.ndindex(*shape[:2]):
        names = [f"sample {b}"] * (shape[0] > 1) + [f"head {h}"] * (shape[1] > 1)
        yield (b, h), f"  ({', '.join(names)})" if names else ""


def _picture_length(mask: Questions, longest: int = 24) -> int:
    """The longest length up to `longest` that the mask's data answers for."""
    for length in range(longest, 0, -1):
        try:
            mask.check(length, mask.kv_len_for(length))
        except MaskError:
            continue
        return length
    return 0
