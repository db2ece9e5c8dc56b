"""The questions that every mask answers about given sizes: tiles, cells, counts, dead rows, pictures.

Sizes come with the question (law 3 in docs/conventions.md): `q_len`, `kv_len` (None: as many keys as positions have
passed), and `batch` and `heads` where a mask varies over them without holding a number of them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from truemask.common.arguments import LARGEST, whole
from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.geometry.slabs.measure import first_cell, live_rows, pairs, seen_keys
from truemask.geometry.slabs.slabs import Region
from truemask.geometry.tiles.measure import first_cell_in, lives_in, pairs_in
from truemask.geometry.tiles.tile_map import BATCH_CELLS, TileMap, shared
from truemask.masks.core.exact_form import Exact
from truemask.masks.core.pictures import Pictures
from truemask.masks.core.slab_tensors import SlabTensors, slab_tensors
from truemask.masks.core.verdict import Cell

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILED_FROM = 1 << 16  # cells from which on a dense mask is filled tile by tile
ANY = 0  # the size of an axis over which a mask varies without holding a number of entries


class Questions(Exact, Pictures):
    """What can be asked of a mask, in terms of the few things that it says of itself."""

    batch_size: Any  # int: 1 all samples alike, ANY unknown, n data for n samples
    head_count: Any  # int: the same for heads
    text: Any  # str: the expression

    @abstractmethod
    def check(self, q_len: int, kv_len: int, *, batch: int | None = None, heads: int | None = None) -> None:
        """Raise if the mask cannot answer for these sizes."""

    @abstractmethod
    def kv_len_for(self, q_len: int) -> int:
        """What `kv_len=None` means."""

    @abstractmethod
    def at(self, q_start: int = 0, k_start: int = 0) -> Any:
        """The same mask for later rows and keys."""

    @abstractmethod
    def _check(self, q_stop: int, k_stop: int) -> None:
        """Raise if positions below these are more than the data answers for."""

    @abstractmethod
    def _settles(self, k_stop: int) -> tuple[int, int] | None:
        """A row from which on what is seen of the keys below `k_stop` repeats, and with what period."""

    def _sizes(self, q_len: int, kv_len: int | None, batch: int | None, heads: int | None) -> tuple[int, int, int, int]:
        """Checked (samples, heads, q_len, kv_len), with 1 where the mask does not vary."""
        q_len = int(whole(q_len, "q_len"))  # an answer is of one size, also while a graph for many is recorded
        kv_len = int(self.kv_len_for(q_len) if kv_len is None else whole(kv_len, "kv_len"))
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

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.tiles(1024).counts
        TileCounts(empty=28, mixed=8, full=28)
        """
        samples, head_count, q_len, kv_len = self._sizes(q_len, kv_len, batch, heads)
        pair = (block, block) if not isinstance(block, tuple) else block
        if len(pair) != 2:
            raise MaskError(f"block is an int or a pair (queries, keys), got {describe(block)}")
        sizes = (whole(pair[0], "block", 1), whole(pair[1], "block", 1))
        members, which = self._variants(samples, head_count)
        parts = [self._map(b, h, q_len, kv_len, sizes) for b, h in members] or [self._map(0, 0, q_len, kv_len, sizes)]
        if which.size == 1:
            return parts[0]
        return shared(parts, which, self._cells, self._phase, self._plane if self.holds_cells else None)

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
            if self.holds_cells:
                return torch.from_numpy(self._planes(samples, head_count, q_len, kv_len))
            return torch.from_numpy(self.tiles(q_len, kv_len, batch=samples, heads=head_count).dense())
        b, h, q, k = indices(samples, head_count, q_len, kv_len, device)
        return self.truth(b, h, q, k).contiguous()

    def _planes(self, samples: int, heads: int, q_len: int, kv_len: int) -> NDArray[np.bool_]:
        """Every cell `[b, h, q, k]`, some rows at a time: what is combined with the mask's tensors takes memory too."""
        cells = np.zeros((samples, heads, q_len, kv_len), bool)
        step = max(1, BATCH_CELLS // max(1, kv_len))
        for b, h in np.ndindex(samples, heads):
            for row in range(0, q_len, step):
                last = min(row + step, q_len)
                cells[b, h, row:last] = self._plane(Region(b, h, row, last, 0, kv_len))
        return cells

    def to_block_mask(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        block: int | tuple[int, int] = 128,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The mask for FlexAttention: a `torch.nn.attention.flex_attention.BlockMask`, without evaluating every cell.

        Its lists are those of torch's `create_block_mask`, its `mask_mod` is `truth`; `block` is an int or (queries,
        keys). `device=None` is the CPU. It can be made in a `DataLoader` worker, pinned, and moved with `.to(device)`,
        which takes the mask's data along (docs/flex.md).

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.to_block_mask(512).full_kv_num_blocks
        tensor([[[0, 1, 2, 3]]], dtype=torch.int32)
        """
        from truemask.masks.core.block_mask import block_mask_of

        tiles = self.tiles(q_len, kv_len, block, batch=batch, heads=heads)
        return block_mask_of(self, tiles, device)

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

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.count(5)
        tensor([[15]])
        """
        samples, head_count, q_len, kv_len = self._sizes(q_len, kv_len, batch, heads)

        def pairs_of(b: int, h: int) -> int:
            slabs = self._rough(b, h, q_len, kv_len)
            found = pairs_in(self._searched(b, h, q_len, kv_len)) if slabs is None else pairs(slabs)
            if found >= 1 << 63:
                raise MaskError(f"`{self}` lets {found} pairs through, more than int64 holds: ask about fewer queries")
            return found

        return self._for_each(pairs_of, samples, head_count)

    def density(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> float:
        """The share of all (query, key) pairs that is let through, a mean over samples and heads; 0.0 of nothing."""
        pairs = self.count(q_len, kv_len, batch=batch, heads=heads)
        cells = q_len * (self.kv_len_for(q_len) if kv_len is None else kv_len)
        return float(pairs.double().mean()) / cells if cells else 0.0

    def dead_queries(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """Which queries may attend to nothing, bool `[b, h, q]`: their output is zeros (law 5, docs/conventions.md)."""
        samples, head_count, q_len, kv_len = self._sizes(q_len, kv_len, batch, heads)

        def live(b: int, h: int) -> NDArray[np.bool_]:
            slabs = self._exact(b, h, q_len, kv_len)
            return lives_in(self._searched(b, h, q_len, kv_len), 0) if slabs is None else live_rows(slabs)

        return ~self._for_each(live, samples, head_count, q_len).bool()

    def dead_keys(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """Which keys no query may attend to, bool `[b, h, k]`."""
        samples, head_count, q_len, kv_len = self._sizes(q_len, kv_len, batch, heads)
        return ~self._seen(samples, head_count, q_len, kv_len)

    def live_keys(
        self,
        q_start: int,
        kv_len: int | None = None,
        *,
        q_stop: int | None = None,
        batch: int | None = None,
        heads: int | None = None,
    ) -> Tensor:
        """Which of the keys so far any later query may still see, bool `[b, h, k]`: what a cache must keep.

        Later queries are those from position `q_start` on, up to `q_stop`; by default all that can ever come (as far as
        the mask's data reach). `kv_len` is the number of keys, by default `q_start`.

        >>> from truemask.masks.leaves.bands import causal, window
        >>> from truemask.masks.leaves.per_token import prefix
        >>> mask = causal & (window(3) | prefix(1))
        >>> mask.live_keys(6)[0, 0].int().tolist()  # the sink, and what position 6 and later ones look back at
        [1, 0, 0, 0, 1, 1]
        """
        q_start = whole(q_start, "q_start")
        kv_len = q_start if kv_len is None else whole(kv_len, "kv_len")
        stop = self._last_query(q_start, kv_len) if q_stop is None else whole(q_stop, "q_stop", q_start)
        later = cast("Questions", self.at(q_start=q_start))
        samples, head_count, rows, _ = later._sizes(max(0, stop - q_start), kv_len, batch, heads)
        return later._seen(samples, head_count, rows, kv_len)

    def _last_query(self, q_start: int, kv_len: int) -> int:
        """A row behind which no query sees any of the first keys that none before saw."""
        settled = self._settles(kv_len)
        held = self._rows_held(q_start)
        if settled is None and held is None:
            raise MaskError(
                f"live_keys: what `{self}` lets later queries see of {kv_len} keys never repeats, and nothing says "
                "where queries end: pass `q_stop=`, the number of queries that there will be"
            )
        stop = held if settled is None else max(q_start, settled[0]) + settled[1]
        return min(stop, held) if stop is not None and held is not None else stop or 0

    def _rows_held(self, q_start: int) -> int | None:
        """How many queries the mask's data answer for; None if for any number."""

        def answers(q_stop: int) -> bool:
            try:
                self._check(q_stop, 0)
            except MaskError:
                return False
            return True

        if answers(LARGEST - 1):
            return None
        low, high = 0, LARGEST - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if answers(middle) else (low, middle)
        return low

    def to_slabs(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> SlabTensors:
        """The exact form as plain int64 tensors: slabs of rows, and runs of keys whose ends move by 0 or 1 a row.

        Raises MaskError if the mask has none (predicates, random cells) or it would be larger than two million runs.

        >>> from truemask.masks.leaves.bands import window
        >>> slabs = window(3).to_slabs(8)
        >>> slabs.q_start.tolist(), slabs.q_stop.tolist(), slabs.starts.tolist()
        ([0, 3], [3, 8], [0, 1, 2])
        >>> slabs.low.tolist(), slabs.low_slope.tolist(), slabs.high.tolist(), slabs.high_slope.tolist()
        ([0, -2], [0, 1], [1, 1], [1, 1])
        """
        samples, head_count, q_len, kv_len = self._sizes(q_len, kv_len, batch, heads)
        members, which = self._variants(samples, head_count)
        found = [self._exact(b, h, q_len, kv_len) for b, h in members]
        parts = [slabs for slabs in found if slabs is not None]
        if len(parts) < len(found):
            raise MaskError(
                f"`{self}` has no exact form for {q_len} queries and {kv_len} keys: `tiles(...)` and `to_dense(...)` "
                "answer for such masks"
            )
        return slab_tensors(parts, which)

    def _seen(self, samples: int, heads: int, q_len: int, kv_len: int) -> Tensor:
        """Which keys some query sees."""

        def seen(b: int, h: int) -> NDArray[np.bool_]:
            slabs = self._exact(b, h, q_len, kv_len)
            return lives_in(self._searched(b, h, q_len, kv_len), 1) if slabs is None else seen_keys(slabs, kv_len)

        return self._for_each(seen, samples, heads, kv_len).bool()

    def _first(self, samples: int, heads: int, q_len: int, kv_len: int) -> Cell | None:
        """A cell that is True, or None if there is none."""
        for b, h in self._variants(samples, heads)[0]:
            slabs = self._rough(b, h, q_len, kv_len)
            found = first_cell_in(self._searched(b, h, q_len, kv_len)) if slabs is None else first_cell(slabs)
            if found is not None:
                return Cell(b, h, *found)
        return None


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
