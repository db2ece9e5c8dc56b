"""Rectangles of (query, key) cells, and the map that says of each tile whether it is EMPTY, MIXED or FULL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from truemask.common.memory import HoldsArrays
from truemask.geometry.logic import EMPTY, FULL, MIXED, States, tri_state
from truemask.geometry.slabs.slabs import Region

Ints = NDArray[np.int64]
BATCH_CELLS = 1 << 22  # cells evaluated at once: a few tens of megabytes of 64-bit indices


@dataclass(frozen=True)
class Rectangles:
    """Many non-empty rectangles `[q0, q1) x [k0, k1)` of sample b and head h: int64 arrays that broadcast together."""

    b: Ints
    h: Ints
    q0: Ints
    q1: Ints
    k0: Ints
    k1: Ints

    @classmethod
    def of(
        cls, q: tuple[ArrayLike, ArrayLike], k: tuple[ArrayLike, ArrayLike], b: ArrayLike = 0, h: ArrayLike = 0
    ) -> Rectangles:
        """Rectangles of queries `[q[0], q[1])` and keys `[k[0], k[1])`: numbers, or arrays of them."""
        b, h, q0, q1, k0, k1 = (np.asarray(x, np.int64) for x in (b, h, *q, *k))
        if (q0 >= q1).any() or (k0 >= k1).any() or any((x < 0).any() for x in (b, h, q0, k0)):
            raise ValueError(f"a rectangle is a start and a larger stop, from 0 on: got q {q}, k {k}, b {b}, h {h}")
        return cls(b, h, q0, q1, k0, k1)

    def moved(self, **changes: Ints) -> Rectangles:
        """The same rectangles with some of their arrays replaced."""
        return replace(self, **changes)


TileKey = Callable[[Rectangles], Sequence[Ints]]
Evaluate = Callable[[Ints, Ints, Ints, Ints], NDArray[np.bool_]]
Plane = Callable[[Region], NDArray[np.bool_]]


class TileCounts(NamedTuple):
    """Tiles of each state over the distinct samples and heads."""

    empty: int
    mixed: int
    full: int


class Run(NamedTuple):
    """Tiles `[start, stop)` of one row of tiles, all in the same state (MIXED 1 or FULL 2)."""

    start: int
    stop: int
    state: int


class Evaluated(NamedTuple):
    """A batch of MIXED tiles with the truth of their cells: `cells [tile, q, k]`, False beyond the true lengths."""

    b: Ints
    h: Ints
    i: Ints
    j: Ints
    cells: NDArray[np.bool_]
    area: Ints


class Patterns(NamedTuple):
    """A batch of MIXED tiles that share few patterns of cells."""

    cells: NDArray[np.bool_]  # [pattern, q, k], False beyond the true lengths
    tiles: Ints  # which of the MIXED tiles, in the order of `mixed()`
    which: Ints  # the pattern of each


class TileRows:
    """Runs of tiles per row of tiles: `rows[b, h, i]` is a list of `Run`s without the EMPTY ones.

    Where the mask does not vary over samples and heads, `rows[i]` is the same, and iterating gives every row.
    """

    def __init__(self, tiles: TileMap) -> None:
        self._tiles = tiles

    def __len__(self) -> int:
        return self._tiles.shape[2]

    def __iter__(self) -> Iterator[list[Run]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, place: int | tuple[int, int, int]) -> list[Run]:
        shape = self._tiles.shape[:3]
        if not isinstance(place, tuple):
            if shape[:2] != (1, 1):
                raise IndexError(
                    f"rows[i] needs a mask that does not vary; this map has {shape[:2]}: ask rows[b, h, i]"
                )
            place = (0, 0, place)
        place = (place[0], place[1], place[2] + shape[2] * (place[2] < 0))
        if not all(0 <= at < size for at, size in zip(place, shape, strict=True)):
            raise IndexError(f"rows[b, h, i]: {place} is out of range of {shape}")
        row = int(np.ravel_multi_index(place, shape))
        lo, hi = self._tiles.row_starts[row], self._tiles.row_starts[row + 1]
        return [Run(*map(int, run)) for run in self._tiles.runs[lo:hi]]


@dataclass(frozen=True)
class TileMap(HoldsArrays):
    """Which tiles of a mask are EMPTY, MIXED or FULL, stored as runs; sound always, exact after `refine()`.

    `shape` is (samples, heads, rows of tiles, columns of tiles), with 1 where the mask does not vary. The last tiles
    are cut at the true lengths, so one that is all True within them is FULL.
    """

    q_len: int
    kv_len: int
    block: tuple[int, int]
    shape: tuple[int, int, int, int]
    row_starts: Ints  # [samples * heads * rows + 1]: where each row's runs begin
    runs: Ints  # [runs, 3]: start, stop, state; EMPTY ones left out
    evaluate: Evaluate
    exact: bool = False
    tile_key: TileKey | None = None  # numbers that tell tiles of different cells apart; None: all may differ
    plane: Plane | None = None  # the cells of whole regions, of masks that hold them

    @property
    def rows(self) -> TileRows:
        """`rows[b, h, i]`: the runs (start, stop, state) of row i of the tiles."""
        return TileRows(self)

    @cached_property
    def counts(self) -> TileCounts:
        """How many tiles are empty, mixed and full."""
        sizes = self.runs[:, 1] - self.runs[:, 0]
        mixed, full = (int(sizes[self.runs[:, 2] == state].sum()) for state in (MIXED, FULL))
        return TileCounts(math.prod(self.shape) - mixed - full, mixed, full)

    @property
    def unsure(self) -> int:
        """MIXED tiles that are not proven to hold both values; 0 after `refine()`."""
        return 0 if self.exact else self.counts.mixed

    @property
    def state(self) -> States:
        """The dense view, int8 `[b, h, rows, columns]`: 0 EMPTY, 1 MIXED, 2 FULL."""
        flat = np.zeros((math.prod(self.shape[:3]), self.shape[3] + 1), np.int8)
        row = np.repeat(np.arange(len(flat)), np.diff(self.row_starts))
        np.add.at(flat, (row, self.runs[:, 0]), self.runs[:, 2].astype(np.int8))
        np.add.at(flat, (row, self.runs[:, 1]), -self.runs[:, 2].astype(np.int8))
        return np.cumsum(flat, axis=1, dtype=np.int8)[:, :-1].reshape(self.shape)

    def mixed(self) -> tuple[Ints, Ints, Ints, Ints]:
        """The places (b, h, i, j) of the MIXED tiles, in row order."""
        (b, h, i), start, stop = self._runs(MIXED)
        size = stop - start
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        return np.repeat(b, size), np.repeat(h, size), np.repeat(i, size), np.repeat(start, size) + within

    def full(self) -> Rectangles:
        """The FULL runs as rectangles of cells, one for each run of tiles."""
        (b, h, i), start, stop = self._runs(FULL)
        q0, q1, k0, _ = self.extents(i, start)
        return Rectangles(b, h, q0, q1, k0, np.minimum(stop * self.block[1], self.kv_len))

    def _runs(self, state: np.int8) -> tuple[tuple[Ints, Ints, Ints], Ints, Ints]:
        """The runs in one state: their (b, h, i), first tile and stop."""
        keep = np.flatnonzero(self.runs[:, 2] == state)
        row = np.searchsorted(self.row_starts, keep, "right") - 1
        b, h, i = (x.astype(np.int64) for x in np.unravel_index(row, self.shape[:3]))
        return (b, h, i), self.runs[keep, 0], self.runs[keep, 1]

    def extents(self, i: Ints, j: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """`q0, q1, k0, k1` of tiles (i, j), cut at the true lengths."""
        (bq, bk) = self.block
        return i * bq, np.minimum((i + 1) * bq, self.q_len), j * bk, np.minimum((j + 1) * bk, self.kv_len)

    @cached_property
    def _sharing(self) -> tuple[Ints, Ints]:
        """One MIXED tile of each pattern, and the number of the pattern of every MIXED tile."""
        b, h, i, j = self.mixed()
        if self.tile_key is None:
            return np.arange(len(b)), np.arange(len(b))
        q0, q1, k0, k1 = self.extents(i, j)
        numbers = [*self.tile_key(Rectangles(b, h, q0, q1, k0, k1)), q1 - q0, k1 - k0]
        pattern = np.zeros(len(b), np.int64)
        for number in numbers:
            values, index = np.unique(np.broadcast_to(number, b.shape), return_inverse=True)
            pattern = np.unique(pattern * len(values) + index, return_inverse=True)[1]
        return np.unique(pattern, return_index=True)[1], pattern

    @property
    def cells_to_evaluate(self) -> int:
        """Cells of all patterns of MIXED tiles: what counting and refining evaluate."""
        return len(self._sharing[0]) * min(self.block[0], self.q_len) * min(self.block[1], self.kv_len)

    def patterns(self) -> Iterator[Patterns]:
        """The MIXED tiles in batches, each pattern evaluated once."""
        examples, pattern = self._sharing
        order = np.argsort(pattern, kind="stable")
        ends = np.searchsorted(pattern[order], np.arange(len(examples) + 1))
        places = self.mixed()
        step = self._batch
        for first in range(0, len(examples), step):
            last = min(first + step, len(examples))
            cells = self._cells(*(x[examples[first:last]] for x in places))
            tiles = order[ends[first] : ends[last]]
            yield Patterns(cells, tiles, pattern[tiles] - first)

    def evaluated(self) -> Iterator[Evaluated]:
        """The MIXED tiles in batches, in row order, with every cell's truth."""
        b, h, i, j = self.mixed()
        for first in range(0, len(b), self._batch):
            part = slice(first, first + self._batch)
            q0, q1, k0, k1 = self.extents(i[part], j[part])
            cells = self._cells(b[part], h[part], i[part], j[part])
            yield Evaluated(b[part], h[part], i[part], j[part], cells, (q1 - q0) * (k1 - k0))

    @property
    def _batch(self) -> int:
        """Tiles evaluated at once."""
        return max(1, BATCH_CELLS // max(1, min(self.block[0], self.q_len) * min(self.block[1], self.kv_len)))

    def _cells(self, b: Ints, h: Ints, i: Ints, j: Ints) -> NDArray[np.bool_]:
        """The cells of tiles, False beyond the true lengths."""
        bq, bk = min(self.block[0], self.q_len), min(self.block[1], self.kv_len)
        if self.plane is not None:
            return self._cut(self.plane, bq, bk, b, h, i, j)
        q0, _, k0, _ = self.extents(i, j)
        q = q0[:, None, None] + np.arange(bq)[None, :, None]
        k = k0[:, None, None] + np.arange(bk)[None, None, :]
        inside = (q < self.q_len) & (k < self.kv_len)
        q, k = np.minimum(q, self.q_len - 1), np.minimum(k, self.kv_len - 1)
        return self.evaluate(b[:, None, None], h[:, None, None], q, k) & inside

    def _cut(self, plane: Plane, bq: int, bk: int, *places: Ints) -> NDArray[np.bool_]:
        """The same from what the mask holds: neighbours in a row of tiles are read at once."""
        cells = np.zeros((len(places[0]), bq, bk), bool)
        order = np.lexsort(places[::-1])
        b, h, i, j = (x[order] for x in places)
        goes_on = (j[1:] == j[:-1] + 1) & (i[1:] == i[:-1]) & (h[1:] == h[:-1]) & (b[1:] == b[:-1])
        starts = np.flatnonzero(np.append(True, ~goes_on)) if len(b) else order
        q0, q1, k0, k1 = self.extents(i, j)
        for lo, hi in zip(starts.tolist(), [*starts[1:].tolist(), len(b)], strict=False):
            left, right = int(k0[lo]), int(k1[hi - 1])
            region = Region(int(b[lo]), int(h[lo]), int(q0[lo]), int(q1[lo]), left, right)
            strip = plane(region)
            height, entire = len(strip), lo + (right - left) // bk  # the last one may be cut
            parts = strip[:, : (entire - lo) * bk].reshape(height, entire - lo, bk)
            cells[order[lo:entire], :height] = parts.swapaxes(0, 1)
            if entire < hi:
                cells[order[entire], :height, : (right - left) % bk] = strip[:, (entire - lo) * bk :]
        return cells

    def dense(self) -> NDArray[np.bool_]:
        """Every cell, bool `[b, h, q, k]`: FULL runs are filled, MIXED tiles evaluated."""
        out = np.zeros((*self.shape[:2], self.q_len, self.kv_len), bool)
        full = self.full()
        for b, h, q0, q1, k0, k1 in zip(full.b, full.h, full.q0, full.q1, full.k0, full.k1, strict=True):
            out[b, h, q0:q1, k0:k1] = True
        for part in self.evaluated():
            q0, q1, k0, k1 = self.extents(part.i, part.j)
            for n, place in enumerate(zip(part.b, part.h, q0, q1, k0, k1, strict=True)):
                height, width = place[3] - place[2], place[5] - place[4]
                out[place[0], place[1], place[2] : place[3], place[4] : place[5]] = part.cells[n, :height, :width]
        return out

    def refine(self) -> TileMap:
        """The exact map: every MIXED tile is evaluated and called what it is."""
        if self.exact:
            return self
        b, h, i, j = self.mixed()
        q0, q1, k0, k1 = self.extents(i, j)
        set_cells = np.zeros(len(b), np.int64)
        for part in self.patterns():
            set_cells[part.tiles] = part.cells.sum((1, 2))[part.which]
        states = tri_state(set_cells == 0, set_cells == (q1 - q0) * (k1 - k0))
        state = self.state
        state[b, h, i, j] = states
        starts, runs = runs_of(state)
        return replace(self, row_starts=starts, runs=runs, exact=True)


def shared(
    parts: list[TileMap], which: Ints, evaluate: Evaluate, tile_key: TileKey | None, plane: Plane | None
) -> TileMap:
    """One map of samples and heads that share maps: `which [samples, heads]` of the parts each has."""
    first = parts[0]
    sizes = [np.diff(part.row_starts) for part in parts]
    order = which.ravel()
    starts = np.append(0, np.cumsum(np.concatenate([sizes[n] for n in order])))
    runs = np.concatenate([parts[n].runs for n in order])
    shape = (*which.shape, *first.shape[2:])
    exact = all(part.exact for part in parts)
    return TileMap(first.q_len, first.kv_len, first.block, shape, starts, runs, evaluate, exact, tile_key, plane)  # pyright: ignore[reportArgumentType]


def runs_of(state: States) -> tuple[Ints, Ints]:
    """`state [..., columns]` as (row starts, runs), the EMPTY runs left out."""
    flat = state.reshape(math.prod(state.shape[:-1]), state.shape[-1])
    if flat.size == 0:
        return np.zeros(len(flat) + 1, np.int64), np.zeros((0, 3), np.int64)
    first = np.ones(flat.shape, bool)
    first[:, 1:] = flat[:, 1:] != flat[:, :-1]
    start = np.flatnonzero(first)
    row, column = np.divmod(start, flat.shape[1])
    stop = np.append(start[1:], flat.size) - row * flat.shape[1]
    value = flat.reshape(-1)[start]
    keep = value != EMPTY
    runs = np.stack([column, stop, value.astype(np.int64)], axis=1)[keep]
    starts = np.zeros(len(flat) + 1, np.int64)
    np.cumsum(np.bincount(row[keep], minlength=len(flat)), out=starts[1:])
    return starts, runs
