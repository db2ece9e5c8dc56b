"""Strips of tile maps, for masks without an exact form: runs of tiles as intervals, MIXED tiles evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from truemask.backends.block_sparse.strips import ALL, FROM_MASK, MAX_PATTERN_BYTES, Flags, Ints, Pattern, Strips
from truemask.geometry.tiles.tile_map import TileMap

GRAIN = 16  # keys to which intervals are cut: vectors stay whole, and the widths few


class _Cells:
    """The MIXED tiles that differ, once each: number 0 is FULL, -1 is not kept."""

    def __init__(self, budget: int) -> None:
        self.numbers: dict[bytes, int] = {}
        self.cells: list[Flags] = [np.ones((1, 1), bool)]
        self.left = budget

    def number(self, cells: Flags) -> int:
        """The number of a tile."""
        key = np.packbits(cells).tobytes() + bytes(f"{cells.shape}", "ascii")
        if key not in self.numbers:
            if self.left <= 0:
                return -1
            self.left -= cells.size  # a byte a cell while strips are made of them
            self.numbers[key] = len(self.cells)
            self.cells.append(cells.copy())
        return self.numbers[key]


class _Segments(NamedTuple):
    """Runs of tiles with one number: row of tiles (samples and heads flattened in front), keys, and where cut."""

    row: Ints
    first: Ints
    stop: Ints
    number: Ints
    skipped: Ints  # columns of the tile before `first`


def from_tiles(tiles: TileMap, budget: int = MAX_PATTERN_BYTES) -> Strips:
    """A strip for each row of tiles that sees anything, with the runs of tiles that are not EMPTY as intervals.

    MIXED tiles are evaluated; those at the ends of an interval are cut where nobody sees anything. Patterns beyond
    `budget` bytes are not kept.
    """
    cells = _Cells(8 * budget)
    segments = _segments(tiles, cells)
    rows, begin = np.unique(segments.row, return_index=True)
    ends = np.append(begin, len(segments.row))[1:]
    touching = np.zeros(len(segments.row), bool)
    touching[1:] = (segments.first[1:] == segments.stop[:-1]) & (segments.row[1:] == segments.row[:-1])
    opens, closes = np.flatnonzero(~touching), np.flatnonzero(~np.append(touching, False)[1:])
    keys = np.stack([segments.first[opens], segments.stop[closes]], 1)
    b, h, i = (x.astype(np.int64) for x in np.unravel_index(rows, tiles.shape[:3]))
    q0 = i * tiles.block[0]
    q1 = np.minimum(q0 + tiles.block[0], tiles.q_len)
    patterns = _Patterns(cells, budget)
    numbers = [patterns.number(segments, lo, hi, height) for lo, hi, height in zip(begin, ends, q1 - q0, strict=True)]
    starts = np.searchsorted(opens, np.append(begin, len(segments.row)))
    shape = (tiles.shape[0], tiles.shape[1])
    return Strips(
        tiles.q_len,
        tiles.kv_len,
        shape,
        b,
        h,
        q0,
        q1,
        starts,
        keys,
        np.array(numbers, np.int64),
        tuple(patterns.patterns),
    )


class _Patterns:
    """The patterns of strips, once each."""

    def __init__(self, cells: _Cells, budget: int) -> None:
        self.cells, self.left = cells, budget
        self.by_parts: dict[bytes, int] = {}
        self.by_cells: dict[Pattern, int] = {}
        self.patterns: list[Pattern] = []

    def number(self, segments: _Segments, lo: int, hi: int, height: int) -> int:
        """The number of the pattern of a strip made of segments `[lo, hi)`, or ALL, or FROM_MASK."""
        numbers, widths = segments.number[lo:hi], segments.stop[lo:hi] - segments.first[lo:hi]
        if not numbers.any():
            return ALL
        if (numbers < 0).any():
            return FROM_MASK
        parts = np.stack([numbers, widths, segments.skipped[lo:hi]]).tobytes() + bytes(f"{height}", "ascii")
        if parts not in self.by_parts:
            pattern = self._joined(numbers, widths, segments.skipped[lo:hi], height)
            if pattern not in self.by_cells:
                if self.left <= 0:
                    return FROM_MASK
                self.left -= len(pattern.bits)
                self.by_cells[pattern] = len(self.patterns)
                self.patterns.append(pattern)
            self.by_parts[parts] = self.by_cells[pattern]
        return self.by_parts[parts]

    def _joined(self, numbers: Ints, widths: Ints, skipped: Ints, height: int) -> Pattern:
        parts = [
            self.cells.cells[n][:height, skip : skip + width] if n else np.ones((height, width), bool)
            for n, width, skip in zip(numbers, widths, skipped, strict=True)
        ]
        return Pattern.of(np.concatenate(parts, 1))


def _segments(tiles: TileMap, cells: _Cells) -> _Segments:
    """What is not EMPTY, in order: FULL runs as they are, MIXED tiles one by one, evaluated and cut."""
    parts = [_full(tiles), *(_evaluated(tiles, cells))]
    row, first, stop, number, skipped = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((first, row))
    return _Segments(row[order], first[order], stop[order], number[order], skipped[order])


def _full(tiles: TileMap) -> _Segments:
    full = tiles.full()
    row = np.ravel_multi_index((full.b, full.h, full.q0 // tiles.block[0]), tiles.shape[:3]).astype(np.int64)
    zero = np.zeros(len(row), np.int64)
    return _Segments(row, full.k0, full.k1, zero, zero)


def _evaluated(tiles: TileMap, cells: _Cells) -> Iterator[_Segments]:
    for part in tiles.evaluated():
        row = np.ravel_multi_index((part.b, part.h, part.i), tiles.shape[:3]).astype(np.int64)
        q0, q1, k0, k1 = tiles.extents(part.i, part.j)
        seen_columns = np.asarray(part.cells.any(axis=1))
        size = seen_columns.shape[1]
        lo = np.where(seen_columns.any(1), seen_columns.argmax(1), size) // GRAIN * GRAIN
        hi = np.minimum(-(-(size - seen_columns[:, ::-1].argmax(1)) // GRAIN) * GRAIN, k1 - k0)
        full = part.cells.sum((1, 2)) == part.area
        lo, hi = np.where(full, 0, lo), np.where(full, k1 - k0, hi)
        keep = np.flatnonzero(lo < hi)
        heights = q1 - q0
        number = [0 if full[n] else cells.number(part.cells[n, : heights[n], : k1[n] - k0[n]]) for n in keep]
        yield _Segments(row[keep], k0[keep] + lo[keep], k0[keep] + hi[keep], np.array(number, np.int64), lo[keep])


def estimated(tiles: TileMap) -> Strips:
    """What `from_tiles` makes, roughly and without looking at a cell: for an estimate of what it costs."""
    sizes = np.minimum(tiles.runs[:, 1] * tiles.block[1], tiles.kv_len) - tiles.runs[:, 0] * tiles.block[1]
    sums = np.concatenate([[0], np.cumsum(sizes)])
    widths = sums[tiles.row_starts[1:]] - sums[tiles.row_starts[:-1]]
    rows = np.flatnonzero(widths)
    b, h, i = (x.astype(np.int64) for x in np.unravel_index(rows, tiles.shape[:3]))
    q0 = i * tiles.block[0]
    keys = np.stack([np.zeros_like(rows), widths[rows]], 1)
    shape = (tiles.shape[0], tiles.shape[1])
    starts, patterns = np.arange(len(rows) + 1), np.full(len(rows), ALL)
    q1 = np.minimum(q0 + tiles.block[0], tiles.q_len)
    return Strips(tiles.q_len, tiles.kv_len, shape, b, h, q0, q1, starts, keys, patterns, ())
