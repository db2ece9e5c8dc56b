"""What a sparse kernel runs: strips of rows with the intervals of keys that they may see."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from truemask.geometry.slabs import Slabs
from truemask.geometry.tiles import TileMap

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

ALL, ASKED = -1, -2  # patterns: every key of the intervals is seen; what is seen is not kept, ask the mask
KEPT = 1 << 26  # bytes of patterns, eight cells in each, that are worth keeping
GRAIN = 16  # keys to which intervals are cut: vectors stay whole, and the widths few


class Pattern(NamedTuple):
    """Which cells of a strip are seen: `[height, width]` bits, row by row."""

    height: int
    width: int
    bits: bytes

    @classmethod
    def of(cls, cells: Flags) -> Pattern:
        """The pattern of bool `[height, width]`."""
        return cls(cells.shape[0], cells.shape[1], np.packbits(cells).tobytes())

    @property
    def cells(self) -> Flags:
        """Bool `[height, width]`, with the intervals of keys side by side."""
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.height * self.width)
        return bits.view(np.bool_).reshape(self.height, self.width)


@dataclass(frozen=True, eq=False)
class Strips:
    """Strips of rows `[q0, q1)` of sample b and head h (0 where the mask does not vary), each row in at most one.

    Strip i sees nothing outside the intervals `keys[starts[i]:starts[i + 1]]`, which are in order and apart. Inside
    them it sees every key (`pattern[i]` is ALL), the cells of `patterns[pattern[i]]`, or what the mask says (ASKED).
    Rows in no strip see nothing.
    """

    q_len: int
    kv_len: int
    shape: tuple[int, int]  # samples and heads that the mask tells apart
    b: Ints
    h: Ints
    q0: Ints
    q1: Ints
    starts: Ints  # [strips + 1]
    keys: Ints  # [intervals, 2]
    pattern: Ints  # [strips]
    patterns: tuple[Pattern, ...]

    def __len__(self) -> int:
        return len(self.q0)

    @property
    def heights(self) -> Ints:
        """Rows of each strip."""
        return self.q1 - self.q0

    @property
    def widths(self) -> Ints:
        """Keys of each strip."""
        sums = np.concatenate([[0], np.cumsum(self.keys[:, 1] - self.keys[:, 0])])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    def columns(self, strip: int) -> Ints:
        """The keys of a strip, side by side."""
        parts = [np.arange(first, stop) for first, stop in self.keys[self.starts[strip] : self.starts[strip + 1]]]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def dead(self) -> Flags:
        """Which rows see nothing, bool `[b, h, q]`; strips whose pattern is not kept count as seeing something."""
        dead = np.ones((*self.shape, self.q_len), bool)
        alive = [pattern.cells.any(1) for pattern in self.patterns]
        for b, h, q0, q1, pattern in zip(self.b, self.h, self.q0, self.q1, self.pattern, strict=True):
            dead[b, h, q0:q1] = ~alive[pattern] if pattern >= 0 else False
        return dead


# -- from cells --------------------------------------------------------------------------------------------------------


def from_cells(cells: Flags) -> Strips:
    """One strip for each sample and head, as high as all rows, of the keys that any of them sees: for few rows."""
    samples, heads, q_len, kv_len = cells.shape
    places: list[tuple[int, int]] = []
    keys: list[Ints] = []
    patterns: dict[Pattern, int] = {}
    chosen: list[int] = []
    for b, h in np.ndindex(samples, heads):
        plane = cells[b, h]
        seen = plane.any(0)
        edges = np.flatnonzero(np.diff(seen, prepend=False, append=False))
        if not len(edges):
            continue
        places.append((b, h))
        keys.append(edges.reshape(-1, 2))
        part = plane[:, seen] if len(edges) > 2 else plane[:, edges[0] : edges[1]]
        chosen.append(ALL if part.all() else patterns.setdefault(Pattern.of(part), len(patterns)))
    b, h = np.array(places, np.int64).reshape(-1, 2).T
    starts = np.cumsum([0, *map(len, keys)])
    zero = np.zeros_like(b)
    joined = np.concatenate(keys) if keys else np.zeros((0, 2), np.int64)
    shape = (samples, heads)
    return Strips(
        q_len, kv_len, shape, b, h, zero, zero + q_len, starts, joined, np.array(chosen, np.int64), tuple(patterns)
    )


# -- from slabs --------------------------------------------------------------------------------------------------------

LONG = 2048  # rows from which on a causal slab stays whole
LOW = 24  # rows that a strip costs beside its own: low strips are slow


def from_slabs(
    planes: Sequence[tuple[int, int, Slabs]], q_len: int, kv_len: int, shape: tuple[int, int], height: int
) -> Strips:
    """Strips of at most `height` rows with exactly the keys that some row sees; slabs of all samples and heads.

    Rows are cut where the slabs are, unless they see much the same. A long slab that is top-left causal stays one strip
    whatever its height: kernels have a flag for those, which pays where they are long.
    """
    cut = _Cut(height)
    made: dict[int, list[_Strip]] = {}
    strips: list[_Strip] = []
    places: list[tuple[int, int]] = []
    for b, h, slabs in planes:
        if id(slabs) not in made:
            made[id(slabs)] = list(cut.strips(slabs))
        strips += made[id(slabs)]
        places += [(b, h)] * len(made[id(slabs)])
    b, h = np.array(places, np.int64).reshape(-1, 2).T
    q0, q1, pattern = np.array([(x.q0, x.q1, x.pattern) for x in strips], np.int64).reshape(-1, 3).T
    starts = np.cumsum([0, *(len(x.keys) for x in strips)])
    keys = np.concatenate([x.keys for x in strips]) if strips else np.zeros((0, 2), np.int64)
    return Strips(q_len, kv_len, shape, b, h, q0, q1, starts, keys, pattern, tuple(cut.patterns))


class _Strip(NamedTuple):
    """One strip of a plane."""

    q0: int
    q1: int
    keys: Ints
    pattern: int


class _Cut:
    """Strips of slabs, and the patterns that they have, once each."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.numbers: dict[bytes, int] = {}
        self.alike: dict[Hashable, int] = {}
        self.patterns: dict[Pattern, int] = {}
        self.left = KEPT

    def strips(self, slabs: Slabs) -> Iterator[_Strip]:
        """The strips of one plane, in order."""
        open_: tuple[int, int, Ints] | None = None
        for q0, q1, keys, whole in self._pieces(slabs):
            joined = None if open_ is None or whole else self._joined(open_, q0, q1, keys)
            if open_ is not None and joined is None:
                yield self._made(slabs, *open_)
            open_ = joined or (q0, q1, keys)
            if whole or q1 - q0 == self.height:
                yield self._made(slabs, *open_)
                open_ = None
        if open_ is not None:
            yield self._made(slabs, *open_)

    def _joined(self, before: tuple[int, int, Ints], q0: int, q1: int, keys: Ints) -> tuple[int, int, Ints] | None:
        """Two pieces as one, if that costs less than two strips."""
        if before[1] != q0 or q1 - before[0] > self.height:
            return None
        union = united(before[2], keys)
        apart = (before[1] - before[0] + LOW) * total(before[2]) + (q1 - q0 + LOW) * total(keys)
        return (before[0], q1, union) if (q1 - before[0] + LOW) * total(union) <= apart else None

    def _pieces(self, slabs: Slabs) -> Iterator[tuple[int, int, Ints, bool]]:
        """Rows of one slab each, at most as many as a strip has, and whether they must stay alone."""
        for i, (first, stop) in enumerate(zip(slabs.rows[:-1].tolist(), slabs.rows[1:].tolist(), strict=True)):
            runs = slice(int(slabs.starts[i]), int(slabs.starts[i + 1]))
            if runs.start == runs.stop:
                continue
            ends, slopes = slabs.ends[:, runs], slabs.slopes[:, runs]
            line = (*slopes[:, 0].tolist(), *ends[:, 0].tolist()) if ends.shape[1] == 1 else ()
            if stop - first >= LONG and line == (0, 1, first, 1):
                yield first, stop, np.array([[first, stop]]), True
                continue
            for q0 in range(first, stop, self.height):
                q1 = min(q0 + self.height, stop)
                lo, hi = ends[0] + slopes[0] * q0, ends[1] + slopes[1] * (q1 - 1)
                yield q0, q1, united(np.stack([lo, hi], 1)), False

    def _made(self, slabs: Slabs, q0: int, q1: int, keys: Ints) -> _Strip:
        """The strip; those cut from one slab have the same pattern where their runs lie alike in their intervals."""
        a, b = int(np.searchsorted(slabs.rows, q0, "right")) - 1, int(np.searchsorted(slabs.rows, q1, "left"))
        runs = slice(int(slabs.starts[a]), int(slabs.starts[b]))
        starts = slabs.ends[0, runs] + slabs.slopes[0, runs] * q0
        inside = starts - keys[np.searchsorted(keys[:, 0], starts, "right") - 1, 0]
        alike = (id(slabs), a, b, q1 - q0, (keys[:, 1] - keys[:, 0]).tobytes(), inside.tobytes())
        if b - a > 1 or alike not in self.alike:
            self.alike[alike] = self._pattern(slabs, a, b, q0, q1, keys)
        return _Strip(q0, q1, keys, self.alike[alike])

    def _pattern(self, slabs: Slabs, a: int, b: int, q0: int, q1: int, keys: Ints) -> int:
        """The number of the pattern: that of the runs of slabs `[a, b)` as lines over the strip's rows and columns."""
        rows = np.clip(slabs.rows[a : b + 1], q0, q1) - q0
        runs = slice(int(slabs.starts[a]), int(slabs.starts[b]))
        owner = slabs.owner[runs] - a
        slopes = slabs.slopes[:, runs]
        ends = slabs.ends[:, runs] + slopes * q0
        offsets = np.concatenate([[0], np.cumsum(keys[:, 1] - keys[:, 0])])
        interval = np.searchsorted(keys[:, 0], ends[0] + slopes[0] * rows[owner], "right") - 1
        ends = ends + (offsets[interval] - keys[interval, 0])
        width = int(offsets[-1])
        heights, lengths = np.diff(rows)[owner], ends[1] - ends[0]
        last = lengths + (slopes[1] - slopes[0]) * (heights - 1)
        starts = (slopes[0] * rows[owner], slopes[1] * rows[owner])
        cells = int((heights * (lengths + last + 2 * (starts[1] - starts[0]))).sum())
        if cells == 2 * width * (q1 - q0):
            return ALL
        key = np.concatenate([[q1 - q0, width, len(rows)], rows, owner, ends.ravel(), slopes.ravel()]).tobytes()
        if key not in self.numbers:
            cells = np.zeros((q1 - q0, width), bool)
            columns = np.arange(width)
            lines = zip(rows[owner].tolist(), rows[owner + 1].tolist(), *ends.tolist(), *slopes.tolist(), strict=True)
            for top, bottom, lo, hi, s, t in lines:
                some = np.arange(top, bottom)[:, None]
                cells[top:bottom] |= (columns >= lo + s * some) & (columns < hi + t * some)
            self.numbers[key] = self._number(cells)
        return self.numbers[key]

    def _number(self, cells: Flags) -> int:
        if cells.all():
            return ALL
        pattern = Pattern.of(cells)
        if pattern not in self.patterns and self.left <= 0:
            return ASKED
        self.left -= 0 if pattern in self.patterns else len(pattern.bits)
        return self.patterns.setdefault(pattern, len(self.patterns))


def united(*keys: Ints) -> Ints:
    """The union of intervals `[n, 2]`: in order, apart and not empty."""
    if len(keys) == 1 and len(keys[0]) == 1:
        return keys[0]
    some = np.concatenate(keys)
    some = some[some[:, 0] < some[:, 1]]
    some = some[np.argsort(some[:, 0], kind="stable")]
    reach = np.maximum.accumulate(some[:, 1]) if len(some) else some[:, 1]
    opens = np.append(True, some[1:, 0] > reach[:-1]) if len(some) else np.zeros(0, bool)
    closes = np.append(opens[1:], True) if len(some) else opens
    return np.stack([some[opens, 0], reach[closes]], 1)


def total(keys: Ints) -> int:
    """How many keys intervals hold."""
    return int((keys[:, 1] - keys[:, 0]).sum())


# -- from tiles --------------------------------------------------------------------------------------------------------


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


def from_tiles(tiles: TileMap, budget: int = KEPT) -> Strips:
    """A strip for each row of tiles that sees anything, with the runs of tiles that are not EMPTY as intervals.

    MIXED tiles are evaluated; those at the ends of an interval are cut where nobody sees anything. Patterns beyond
    `budget` bytes are not kept.
    """
    known = _Cells(8 * budget)
    found = _segments(tiles, known)
    rows, begin = np.unique(found.row, return_index=True)
    ends = np.append(begin[1:], len(found.row))
    touching = np.zeros(len(found.row), bool)
    touching[1:] = (found.first[1:] == found.stop[:-1]) & (found.row[1:] == found.row[:-1])
    opens, closes = np.flatnonzero(~touching), np.flatnonzero(~np.append(touching[1:], False))
    keys = np.stack([found.first[opens], found.stop[closes]], 1)
    b, h, i = (x.astype(np.int64) for x in np.unravel_index(rows, tiles.shape[:3]))
    q0 = i * tiles.block[0]
    q1 = np.minimum(q0 + tiles.block[0], tiles.q_len)
    patterns = _Patterns(known, budget)
    chosen = [patterns.number(found, lo, hi, height) for lo, hi, height in zip(begin, ends, q1 - q0, strict=True)]
    starts = np.searchsorted(opens, np.append(begin, len(found.row)))
    shape = (tiles.shape[0], tiles.shape[1])
    return Strips(
        tiles.q_len, tiles.kv_len, shape, b, h, q0, q1, starts, keys, np.array(chosen, np.int64), tuple(patterns.made)
    )


class _Patterns:
    """The patterns of strips, once each."""

    def __init__(self, known: _Cells, budget: int) -> None:
        self.known, self.left = known, budget
        self.by_parts: dict[bytes, int] = {}
        self.by_cells: dict[Pattern, int] = {}
        self.made: list[Pattern] = []

    def number(self, found: _Segments, lo: int, hi: int, height: int) -> int:
        """The number of the pattern of a strip made of segments `[lo, hi)`, or ALL, or ASKED."""
        numbers, widths = found.number[lo:hi], found.stop[lo:hi] - found.first[lo:hi]
        if not numbers.any():
            return ALL
        if (numbers < 0).any():
            return ASKED
        parts = np.stack([numbers, widths, found.skipped[lo:hi]]).tobytes() + bytes(f"{height}", "ascii")
        if parts not in self.by_parts:
            made = self._joined(numbers, widths, found.skipped[lo:hi], height)
            if made not in self.by_cells:
                if self.left <= 0:
                    return ASKED
                self.left -= len(made.bits)
                self.by_cells[made] = len(self.made)
                self.made.append(made)
            self.by_parts[parts] = self.by_cells[made]
        return self.by_parts[parts]

    def _joined(self, numbers: Ints, widths: Ints, skipped: Ints, height: int) -> Pattern:
        parts = [
            self.known.cells[n][:height, skip : skip + width] if n else np.ones((height, width), bool)
            for n, width, skip in zip(numbers, widths, skipped, strict=True)
        ]
        return Pattern.of(np.concatenate(parts, 1))


def _segments(tiles: TileMap, known: _Cells) -> _Segments:
    """What is not EMPTY, in order: FULL runs as they are, MIXED tiles one by one, evaluated and cut."""
    parts = [_full(tiles), *(_evaluated(tiles, known))]
    row, first, stop, number, skipped = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((first, row))
    return _Segments(row[order], first[order], stop[order], number[order], skipped[order])


def _full(tiles: TileMap) -> _Segments:
    full = tiles.full()
    row = np.ravel_multi_index((full.b, full.h, full.q0 // tiles.block[0]), tiles.shape[:3]).astype(np.int64)
    zero = np.zeros(len(row), np.int64)
    return _Segments(row, full.k0, full.k1, zero, zero)


def _evaluated(tiles: TileMap, known: _Cells) -> Iterator[_Segments]:
    for part in tiles.evaluated():
        row = np.ravel_multi_index((part.b, part.h, part.i), tiles.shape[:3]).astype(np.int64)
        q0, q1, k0, k1 = tiles.extents(part.i, part.j)
        seen = np.asarray(part.cells.any(axis=1))
        size = seen.shape[1]
        lo = np.where(seen.any(1), seen.argmax(1), size) // GRAIN * GRAIN
        hi = np.minimum(-(-(size - seen[:, ::-1].argmax(1)) // GRAIN) * GRAIN, k1 - k0)
        full = part.cells.sum((1, 2)) == part.area
        lo, hi = np.where(full, 0, lo), np.where(full, k1 - k0, hi)
        keep = np.flatnonzero(lo < hi)
        heights = q1 - q0
        number = [0 if full[n] else known.number(part.cells[n, : heights[n], : k1[n] - k0[n]]) for n in keep]
        yield _Segments(row[keep], k0[keep] + lo[keep], k0[keep] + hi[keep], np.array(number, np.int64), lo[keep])


def rough(tiles: TileMap) -> Strips:
    """What `from_tiles` makes, roughly and without looking at a cell: for an estimate of what it costs."""
    sizes = np.minimum(tiles.runs[:, 1] * tiles.block[1], tiles.kv_len) - tiles.runs[:, 0] * tiles.block[1]
    sums = np.concatenate([[0], np.cumsum(sizes)])
    widths = sums[tiles.row_starts[1:]] - sums[tiles.row_starts[:-1]]
    rows = np.flatnonzero(widths)
    b, h, i = (x.astype(np.int64) for x in np.unravel_index(rows, tiles.shape[:3]))
    q0 = i * tiles.block[0]
    keys = np.stack([np.zeros_like(rows), widths[rows]], 1)
    shape = (tiles.shape[0], tiles.shape[1])
    starts, seen = np.arange(len(rows) + 1), np.full(len(rows), ALL)
    q1 = np.minimum(q0 + tiles.block[0], tiles.q_len)
    return Strips(tiles.q_len, tiles.kv_len, shape, b, h, q0, q1, starts, keys, seen, ())
