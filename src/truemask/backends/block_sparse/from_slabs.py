"""Strips of the exact form: rows cut where slabs are, exactly the keys that they see, patterns as lines."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from truemask.backends.block_sparse.strips import (
    ALL,
    CAUSAL,
    FROM_MASK,
    MAX_PATTERN_BYTES,
    Flags,
    Ints,
    Pattern,
    Strips,
)
from truemask.geometry.slabs.slabs import Slabs

LONG_ROWS = 2048  # rows from which on a causal slab stays whole
OVERHEAD_ROWS = 24  # rows that a strip costs beside its own: low strips are slow


def from_slabs(
    planes: Sequence[tuple[int, int, Slabs]],
    q_len: int,
    kv_len: int,
    shape: tuple[int, int],
    height: int,
    *,
    drawn: bool = True,
) -> Strips:
    """Strips of at most `height` rows with exactly the keys that some row sees; slabs of all samples and heads.

    Rows are cut where the slabs are, unless they see much the same. A long slab that is top-left causal stays one strip
    whatever its height: kernels have a flag for those, which pays where they are long. Who only wants to know what
    strips would cost need not have their patterns `drawn`: those are numbers then, the same for strips surely alike.
    """
    cut = _Cut(height, drawn)
    strips_of: dict[int, list[_Strip]] = {}
    strips: list[_Strip] = []
    places: list[tuple[int, int]] = []
    for b, h, slabs in planes:
        if id(slabs) not in strips_of:
            strips_of[id(slabs)] = list(cut.strips(slabs))
        strips += strips_of[id(slabs)]
        places += [(b, h)] * len(strips_of[id(slabs)])
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

    def __init__(self, height: int, drawn: bool) -> None:
        self.height, self.drawn = height, drawn
        self.numbers: dict[bytes, int] = {}
        self.alike: dict[Hashable, int] = {}
        self.patterns: dict[Pattern, int] = {}
        self.left = MAX_PATTERN_BYTES

    def strips(self, slabs: Slabs) -> Iterator[_Strip]:
        """The strips of one plane, in order."""
        open_: tuple[int, int, Ints] | None = None
        for q0, q1, keys, whole in self._pieces(slabs):
            joined = None if open_ is None or whole else self._joined(open_, q0, q1, keys)
            if open_ is not None and joined is None:
                yield self._made(slabs, *open_)
            open_ = joined or (q0, q1, keys)
            if whole or q1 - q0 == self.height:
                yield self._made(slabs, *open_, whole)
                open_ = None
        if open_ is not None:
            yield self._made(slabs, *open_)

    def _joined(self, before: tuple[int, int, Ints], q0: int, q1: int, keys: Ints) -> tuple[int, int, Ints] | None:
        """Two pieces as one, if that costs less than two strips."""
        if before[1] != q0 or q1 - before[0] > self.height:
            return None
        union = united(before[2], keys)
        apart = (before[1] - before[0] + OVERHEAD_ROWS) * total(before[2]) + (q1 - q0 + OVERHEAD_ROWS) * total(keys)
        return (before[0], q1, union) if (q1 - before[0] + OVERHEAD_ROWS) * total(union) <= apart else None

    def _pieces(self, slabs: Slabs) -> Iterator[tuple[int, int, Ints, bool]]:
        """Rows of one slab each, at most as many as a strip has, and whether they must stay alone."""
        for i, (first, stop) in enumerate(zip(slabs.rows[:-1].tolist(), slabs.rows[1:].tolist(), strict=True)):
            runs = slice(int(slabs.starts[i]), int(slabs.starts[i + 1]))
            if runs.start == runs.stop:
                continue
            ends, slopes = slabs.ends[:, runs], slabs.slopes[:, runs]
            line = (*slopes[:, 0].tolist(), *ends[:, 0].tolist()) if ends.shape[1] == 1 else ()
            if stop - first >= LONG_ROWS and line == (0, 1, first, 1):
                yield first, stop, np.array([[first, stop]]), True
                continue
            for q0 in range(first, stop, self.height):
                q1 = min(q0 + self.height, stop)
                lo, hi = ends[0] + slopes[0] * q0, ends[1] + slopes[1] * (q1 - 1)
                yield q0, q1, united(np.stack([lo, hi], 1)), False

    def _made(self, slabs: Slabs, q0: int, q1: int, keys: Ints, whole: bool = False) -> _Strip:
        """The strip; those cut from one slab have the same pattern where their runs lie alike in their intervals."""
        if whole:
            return _Strip(q0, q1, keys, CAUSAL)
        a, b = int(np.searchsorted(slabs.rows, q0, "right")) - 1, int(np.searchsorted(slabs.rows, q1, "left"))
        runs = slice(int(slabs.starts[a]), int(slabs.starts[b]))
        starts = slabs.ends[0, runs] + slabs.slopes[0, runs] * q0
        inside = starts - keys[np.searchsorted(keys[:, 0], starts, "right") - 1, 0]
        alike = (id(slabs), a, b, q1 - q0, (keys[:, 1] - keys[:, 0]).tobytes(), inside.tobytes())
        if b - a > 1 or alike not in self.alike:
            self.alike[alike] = self._pattern(slabs, a, b, q0, q1, keys) if self.drawn else len(self.alike)
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
                row = np.arange(top, bottom)[:, None]
                cells[top:bottom] |= (columns >= lo + s * row) & (columns < hi + t * row)
            self.numbers[key] = self._number(cells)
        return self.numbers[key]

    def _number(self, cells: Flags) -> int:
        if cells.all():
            return ALL
        pattern = Pattern.of(cells)
        if pattern not in self.patterns and self.left <= 0:
            return FROM_MASK
        self.left -= 0 if pattern in self.patterns else len(pattern.bits)
        return self.patterns.setdefault(pattern, len(self.patterns))


def united(*keys: Ints) -> Ints:
    """The union of intervals `[n, 2]`: in order, apart and not empty."""
    if len(keys) == 1 and len(keys[0]) == 1:
        return keys[0]
    intervals = np.concatenate(keys)
    intervals = intervals[intervals[:, 0] < intervals[:, 1]]
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(intervals[:, 1]) if len(intervals) else intervals[:, 1]
    opens = np.append(True, intervals[1:, 0] > reach[:-1]) if len(intervals) else np.zeros(0, bool)
    closes = np.append(opens[1:], True) if len(intervals) else opens
    return np.stack([intervals[opens, 0], reach[closes]], 1)


def total(keys: Ints) -> int:
    """How many keys intervals hold."""
    return int((keys[:, 1] - keys[:, 0]).sum())
