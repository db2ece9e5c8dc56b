"""The exact form of a mask: slabs of affine runs.

Almost every mask in use lets each query see a few half-open intervals of keys whose ends stand still or move by one
as the query moves. A *slab* is a range of rows `[first, stop)` with runs of keys `[lo + s * q, hi + t * q)`, s and t
in {0, 1}. Lists of slabs are closed under and, or, not, shifts, crops and transposition (`algebra.py`), and their size
follows the number of documents and blocks, not the length.

Keys are all integers here, from `-FAR` to `FAR`: a mask is cut to `[0, kv_len)` once, when it is asked about
(`overlay.cropped`), so that what happens beyond the edges costs nothing before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from truemask.common.memory import HoldsArrays
from truemask.geometry.edges import Edges
from truemask.geometry.ranges import spans
from truemask.geometry.slabs.lines import Flags, Ints, after, joined, places, tidied, union

FAR = 1 << 42  # beyond every position: the end of a run that has none
MAX_ENDS = 1 << 21  # ends of runs that are worth looking at, over all rows


class NoExactFormError(Exception):
    """There are no slabs of the mask, or more than `MAX_ENDS` runs: it is better looked at tile by tile."""


class Region(NamedTuple):
    """What slabs are asked about: rows `[q0, q1)` of sample b and head h; their runs are right for keys `[k0, k1)`.

    `known` holds what was found in answering one question, so that a part which occurs twice is worked out once.
    """

    b: int
    h: int
    q0: int
    q1: int
    k0: int
    k1: int
    known: dict[Any, Any] | None = None

    def moved(self, rows: int, keys: int) -> Region:
        """The region as a mask knows it that is re-indexed by so much."""
        return self._replace(q0=self.q0 + rows, q1=self.q1 + rows, k0=self.k0 + keys, k1=self.k1 + keys)


@dataclass(frozen=True, eq=False)
class Slabs(HoldsArrays):
    """Rows `[rows[i], rows[i + 1])` see the runs `starts[i]:starts[i + 1]`, which are in order and apart.

    Run j is the keys from `ends[0, j] + slopes[0, j] * q` up to, not including, `ends[1, j] + slopes[1, j] * q`; it is
    empty on no row of its slab, and no two lines cross inside one. In `unmerged` slabs, which one step of a calculation
    leaves to the next, runs may be empty, or touch each other, on the first and on the last row of a slab.
    """

    rows: Ints  # [m + 1], increasing
    starts: Ints  # [m + 1]
    lines: Ints  # [2, runs]: 2 * end + slope
    unmerged: bool = False

    @classmethod
    def of(cls, rows: Ints, starts: Ints, ends: Ints, slopes: Ints) -> Slabs:
        """Slabs of ends and slopes, `[2, runs]` both."""
        return cls(rows, starts, 2 * ends + slopes)

    @cached_property
    def ends(self) -> Ints:
        """Where the lines are on row 0."""
        return self.lines >> 1

    @cached_property
    def slopes(self) -> Ints:
        """Whether the lines move, 0 or 1."""
        return self.lines & 1

    @cached_property
    def sizes(self) -> Ints:
        """The number of runs of each slab."""
        return self.starts[1:] - self.starts[:-1]

    @property
    def runs(self) -> int:
        """The number of runs."""
        return self.lines.shape[1]

    @cached_property
    def most(self) -> int:
        """The largest number of runs of a slab."""
        return int(self.sizes.max(initial=0))

    @cached_property
    def moves(self) -> bool:
        """Whether any end moves."""
        return bool((self.lines & 1).any())

    @cached_property
    def owner(self) -> Ints:
        """The slab of each run."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @cached_property
    def first(self) -> Ints:
        """The first row of each run's slab."""
        return np.repeat(self.rows[:-1], self.sizes)

    @cached_property
    def last(self) -> Ints:
        """The last row of each run's slab."""
        return np.repeat(self.rows[1:] - 1, self.sizes)

    @cached_property
    def canonical(self) -> Slabs:
        """Unmerged slabs merged: no run empty, none touching, and as few slabs as go on in the same lines."""
        if not self.unmerged:
            return self
        x = self
        lo, hi = places(self.lines, self.first)
        low, high = places(self.lines, self.last)
        same = self.owner[1:] == self.owner[:-1]
        narrow = [_meets(*ends, same) for ends in ((lo, hi), (low, high))]
        if narrow[0].any() or narrow[1].any():
            x = self.cut(np.concatenate([self.first[narrow[0]] + 1, self.last[narrow[1]]]))
            lo, hi = places(x.lines, x.first)
            x = x.without(lo == hi)
            lo, hi = places(x.lines, x.first)
            apart = (hi[:-1] != lo[1:]) | (x.owner[1:] != x.owner[:-1])
            opens, closes = np.append(True, apart)[: len(lo)], np.append(apart, True)[: len(lo)]
            counts = np.bincount(x.owner[opens], minlength=len(x.sizes))
            x = Slabs(x.rows, after(counts), np.stack([x.lines[0, opens], x.lines[1, closes]]))
        return _tidy(x.rows, x.sizes, x.lines)

    def at(self, side: int, row: Ints) -> Ints:
        """Where the runs begin (side 0) or end (side 1) on a row of each."""
        return places(self.lines[side], row)

    def moved(self, rows: int, keys: int) -> Slabs:
        """The same picture `rows` further down and `keys` further right."""
        lines = self.lines - 2 * (rows * (self.lines & 1) - keys)
        return replace(self, rows=self.rows + rows, lines=lines)

    def between(self, first: int, stop: int) -> Slabs:
        """The rows `[first, stop)` alone, which must be some of those there are."""
        if first == self.rows[0] and stop == self.rows[-1]:
            return self
        a, b = np.searchsorted(self.rows, first, "right") - 1, np.searchsorted(self.rows, stop, "left")
        rows = np.concatenate([[first], self.rows[a + 1 : b], [stop]]).astype(np.int64)
        starts = self.starts[a : b + 1] - self.starts[a]
        return replace(self, rows=rows, starts=starts, lines=self.lines[:, self.starts[a] : self.starts[b]])

    def cut(self, at: Ints) -> Slabs:
        """The same runs in slabs that begin at these rows too."""
        rows = union(self.rows, at)
        slab = np.searchsorted(self.rows, rows[:-1], "right") - 1
        run = spans(self.starts[slab], self.starts[slab + 1])[1]
        return replace(self, rows=rows, starts=after(self.sizes[slab]), lines=self.lines[:, run])

    def without(self, runs: Flags) -> Slabs:
        """Without some runs."""
        if not runs.any():
            return self
        counts = self.sizes - np.bincount(self.owner[runs], minlength=len(self.sizes))
        return replace(self, starts=after(counts), lines=self.lines[:, ~runs])

    def clipped(self, start: int, stop: int) -> Slabs:
        """The keys `[start, stop)` alone, unmerged; itself if there are no others."""
        if not ((self.at(0, self.first) < start).any() or (self.at(1, self.last) > stop).any()):
            return self
        passing = np.concatenate([edge - self.ends + 1 for edge in (start, stop)])  # the rows after a line is there
        inside = (self.first < passing) & (passing <= self.last) & (np.concatenate([self.slopes] * 2) == 1)
        x = self.cut(passing[inside]) if inside.any() else self
        top, bottom = places(x.lines, x.first), places(x.lines, x.last)
        lines = np.where(bottom <= start, 2 * start, np.where(top >= stop, 2 * stop, x.lines))
        return Slabs(x.rows, x.starts, lines, unmerged=True).without(lines[0] == lines[1])


def _meets(lo: Ints, hi: Ints, same: Flags) -> Flags:
    """Which runs are empty, or touch the next one of the same slab."""
    narrow = lo == hi
    narrow[:-1] |= (hi[:-1] == lo[1:]) & same
    return narrow


# -- making slabs ------------------------------------------------------------------------------------------------------


def bands(first: ArrayLike, stop: ArrayLike, lo: ArrayLike, s: ArrayLike, hi: ArrayLike, t: ArrayLike) -> Slabs:
    """One slab of rows `[first, stop)` with the runs `[lo + s * q, hi + t * q)`, in order and apart."""
    lo, hi, s, t = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, np.int64)) for x in (lo, hi, s, t)))
    affordable(lo.size)
    return Slabs.of(np.array([first, stop], np.int64), np.array([0, lo.size]), np.stack([lo, hi]), np.stack([s, t]))


def blank(first: ArrayLike, stop: ArrayLike) -> Slabs:
    """Rows that see nothing."""
    return Slabs(np.array([first, stop], np.int64), np.zeros(2, np.int64), np.zeros((2, 0), np.int64))


def for_rows(slabs: Slabs, first: int, stop: int) -> Slabs:
    """The rows `[first, stop)` as they are, as far as there are such rows; the others see nothing."""
    top, bottom = int(slabs.rows[0]), int(slabs.rows[-1])
    first, stop = min(max(first, top), bottom), min(max(stop, top), bottom)
    parts = [blank(top, first)] if top < first else []
    parts += [slabs.between(first, stop)] if first < stop else []
    parts += [blank(max(stop, first), bottom)] if max(stop, first) < bottom else []
    return stacked(parts)


def stacked(parts: Sequence[Slabs]) -> Slabs:
    """Slabs of rows that follow each other, as one."""
    counts = np.concatenate([part.sizes for part in parts])
    rows = np.concatenate([part.rows[:-1] for part in parts] + [parts[-1].rows[-1:]])
    return _tidy(rows, counts, np.concatenate([part.lines for part in parts], axis=1))


def flag_runs(flags: Flags, first: int = 0) -> tuple[Ints, Ints]:
    """Where runs of flags begin and end, counted from `first`."""
    steps = np.diff(np.pad(flags, 1).view(np.int8))
    return np.flatnonzero(steps == 1) + first, np.flatnonzero(steps == -1) + first


def from_cells(rows: Ints, edges: Ints, cells: Flags) -> Slabs:
    """Blocks: rows `[rows[i], rows[i + 1])` see the keys `[edges[j], edges[j + 1])` where `cells[i, j]`."""
    changes = Edges.of(cells)
    affordable(changes.count // 2)
    row, column = changes.places()
    lines = 2 * edges[column.reshape(-1, 2).T]
    return _tidy(rows, np.bincount(row[::2], minlength=len(cells)), lines)


def affordable(ends: int) -> None:
    """Raise if an exact form of so many ends is not worth having."""
    if ends > MAX_ENDS:
        raise NoExactFormError(f"{ends} runs")


def tidy(rows: Ints, counts: Ints, ends: Ints, slopes: Ints) -> Slabs:
    """Neighbouring slabs whose runs go on in the same lines, as one; a row alone takes lines that pass through it."""
    return _tidy(np.asarray(rows, np.int64), np.asarray(counts), 2 * ends + slopes)


def _tidy(rows: Ints, counts: Ints, lines: Ints) -> Slabs:
    rows, counts, lines = tidied(rows, counts, lines)
    return Slabs(rows, after(counts), lines)


def left_unmerged(rows: Ints, counts: Ints, lines: Ints) -> Slabs:
    """Neighbouring slabs with the same lines as one, and nothing else done to them: unmerged."""
    rows, counts, lines = joined(rows, counts, lines)
    return Slabs(rows, after(counts), lines, unmerged=True)
