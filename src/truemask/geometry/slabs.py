"""The exact form of a mask: slabs of affine runs.

Almost every mask in use lets each query see a few half-open intervals of keys whose ends stand still or move by one
as the query moves. A *slab* is a range of rows `[first, stop)` with runs of keys `[lo + s * q, hi + t * q)`, s and t
in {0, 1}. Lists of slabs are closed under and, or, not, shifts, crops and transposition (`overlay.py`), and their size
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
from numpy.typing import ArrayLike, NDArray

from truemask.geometry.ranges import spans

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

FAR = 1 << 42  # beyond every position: the end of a run that has none
MOST = 1 << 21  # ends of runs that are worth looking at, over all rows


class NoExactFormError(Exception):
    """There are no slabs of the mask, or more than `MOST` runs: it is better looked at tile by tile."""


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
    known: dict[Any, Slabs] | None = None

    def moved(self, rows: int, keys: int) -> Region:
        """The region as a mask knows it that is re-indexed by so much."""
        return self._replace(q0=self.q0 + rows, q1=self.q1 + rows, k0=self.k0 + keys, k1=self.k1 + keys)


@dataclass(frozen=True, eq=False)
class Slabs:
    """Rows `[rows[i], rows[i + 1])` see the runs `starts[i]:starts[i + 1]`, which are in order and apart.

    Run j is the keys from `ends[0, j] + slopes[0, j] * q` up to, not including, `ends[1, j] + slopes[1, j] * q`; it is
    empty on no row of its slab, and no two lines cross inside one.
    """

    rows: Ints  # [m + 1], increasing
    starts: Ints  # [m + 1]
    ends: Ints  # [2, runs]
    slopes: Ints  # [2, runs], 0 or 1

    @property
    def sizes(self) -> Ints:
        """The number of runs of each slab."""
        return np.diff(self.starts)

    @cached_property
    def most(self) -> int:
        """The largest number of runs of a slab."""
        return int(self.sizes.max(initial=0))

    @cached_property
    def moves(self) -> bool:
        """Whether any end moves."""
        return bool(self.slopes.any())

    @cached_property
    def owner(self) -> Ints:
        """The slab of each run."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def first(self) -> Ints:
        """The first row of each run's slab."""
        return self.rows[self.owner]

    @property
    def last(self) -> Ints:
        """The last row of each run's slab."""
        return self.rows[self.owner + 1] - 1

    def at(self, side: int, row: Ints) -> Ints:
        """Where the runs begin (side 0) or end (side 1) on a row of each."""
        return self.ends[side] + self.slopes[side] * row

    def moved(self, rows: int, keys: int) -> Slabs:
        """The same picture `rows` further down and `keys` further right."""
        return replace(self, rows=self.rows + rows, ends=self.ends - self.slopes * rows + keys)

    def between(self, first: int, stop: int) -> Slabs:
        """The rows `[first, stop)` alone, which must be some of those there are."""
        a, b = np.searchsorted(self.rows, first, "right") - 1, np.searchsorted(self.rows, stop, "left")
        rows = np.concatenate([[first], self.rows[a + 1 : b], [stop]]).astype(np.int64)
        runs = slice(self.starts[a], self.starts[b])
        starts = self.starts[a : b + 1] - self.starts[a]
        return Slabs(rows, starts, self.ends[:, runs], self.slopes[:, runs])


# -- making slabs ------------------------------------------------------------------------------------------------------


def bands(first: ArrayLike, stop: ArrayLike, lo: ArrayLike, s: ArrayLike, hi: ArrayLike, t: ArrayLike) -> Slabs:
    """One slab of rows `[first, stop)` with the runs `[lo + s * q, hi + t * q)`, in order and apart."""
    lo, hi, s, t = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, np.int64)) for x in (lo, hi, s, t)))
    affordable(lo.size)
    return Slabs(np.array([first, stop], np.int64), np.array([0, lo.size]), np.stack([lo, hi]), np.stack([s, t]))


def blank(first: ArrayLike, stop: ArrayLike) -> Slabs:
    """Rows that see nothing."""
    none = np.zeros((2, 0), np.int64)
    return Slabs(np.array([first, stop], np.int64), np.zeros(2, np.int64), none, none)


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
    ends, slopes = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("ends", "slopes"))
    return tidy(rows, counts, ends, slopes)


def flag_runs(flags: Flags, first: int = 0) -> tuple[Ints, Ints]:
    """Where runs of flags begin and end, counted from `first`."""
    steps = np.diff(np.pad(flags, 1).view(np.int8))
    return np.flatnonzero(steps == 1) + first, np.flatnonzero(steps == -1) + first


def from_cells(rows: Ints, edges: Ints, cells: Flags) -> Slabs:
    """Blocks: rows `[rows[i], rows[i + 1])` see the keys `[edges[j], edges[j + 1])` where `cells[i, j]`."""
    steps = np.diff(np.pad(cells, ((0, 0), (1, 1))).view(np.int8), axis=1)
    row, opens = np.nonzero(steps == 1)
    _, closes = np.nonzero(steps == -1)
    affordable(len(row))
    ends = np.stack([edges[opens], edges[closes]])
    return tidy(rows, np.bincount(row, minlength=len(cells)), ends, np.zeros_like(ends))


def affordable(ends: int) -> None:
    """Raise if an exact form of so many ends is not worth having."""
    if ends > MOST:
        raise NoExactFormError(f"{ends} runs")


# -- fewer slabs -------------------------------------------------------------------------------------------------------


def tidy(rows: Ints, counts: Ints, ends: Ints, slopes: Ints) -> Slabs:
    """Neighbouring slabs whose runs go on in the same lines, as one; a row alone takes lines that pass through it."""
    rows, counts = np.asarray(rows, np.int64), np.asarray(counts)
    alone = rows[1:] - rows[:-1] == 1
    if alone.any():
        single, first = np.repeat(alone, counts), np.repeat(rows[:-1], counts)
        ends, slopes = np.where(single, ends + slopes * first, ends), np.where(single, 0, slopes)
    found = _joined(rows, counts, ends, slopes, _same_lines(counts, ends, slopes))
    while (alone := found[0][1:] - found[0][:-1] == 1).any():
        joined = _adopted(*found, alone)
        if not joined.any():
            break
        found = _joined(*found, joined)
        found = _joined(*found, _same_lines(*found[1:]))
    rows, counts, ends, slopes = found
    return Slabs(rows, np.append(0, np.cumsum(counts)), ends, slopes)


def _joined(rows: Ints, counts: Ints, ends: Ints, slopes: Ints, joined: Flags) -> tuple[Ints, Ints, Ints, Ints]:
    """Without the beginnings of slabs that are joined to the one above."""
    if not joined.any():
        return rows, counts, ends, slopes
    keep = np.concatenate([[True], ~joined])
    runs = np.repeat(keep, counts)
    return np.append(rows[:-1][keep], rows[-1]), counts[keep], ends[:, runs], slopes[:, runs]


class _Pairs(NamedTuple):
    """Slabs and the next ones, with as many runs: the upper slabs, and for each run its pair and place in both."""

    above: Ints
    pair: Ints
    upper: Ints
    lower: Ints

    @classmethod
    def of(cls, above: Ints, counts: Ints, starts: Ints) -> _Pairs:
        begin, count = starts[above], counts[above]
        pair, upper = spans(begin, begin + count)
        return cls(above, pair, upper, upper + count[pair])

    def everywhere(self, fits: Flags) -> Flags:
        """Whether it fits on every run of a pair, at both ends."""
        return np.bincount(self.pair[~(fits[0] & fits[1])], minlength=len(self.above)) == 0


def _same_lines(counts: Ints, ends: Ints, slopes: Ints) -> Flags:
    """Which slabs go on in the lines of the one above."""
    starts = np.cumsum(counts) - counts
    joined = counts[1:] == counts[:-1]
    if ends.shape[1]:
        first = ends[0, np.minimum(starts, ends.shape[1] - 1)]
        joined &= (first[1:] == first[:-1]) | (counts[1:] == 0)
    if joined.any():
        pairs = _Pairs.of(np.flatnonzero(joined), counts, starts)
        a, b = pairs.upper, pairs.lower
        joined[pairs.above] = pairs.everywhere((ends[:, a] == ends[:, b]) & (slopes[:, a] == slopes[:, b]))
    return joined


def _adopted(rows: Ints, counts: Ints, ends: Ints, slopes: Ints, alone: Flags) -> Flags:
    """Rows alone are given the lines of a neighbour, or of each other: which slabs then go on as the one above."""
    some = (counts[1:] == counts[:-1]) & (alone[1:] | alone[:-1])
    joined = np.zeros(len(counts) - 1, bool)
    if not some.any():
        return joined
    pairs = _Pairs.of(np.flatnonzero(some), counts, np.cumsum(counts) - counts)
    above, upper, lower = pairs.above, pairs.upper, pairs.lower
    row = rows[above + 1][pairs.pair]  # the first row of the lower slab
    step = (ends[:, lower] + slopes[:, lower] * row) - (ends[:, upper] + slopes[:, upper] * (row - 1))
    taken = np.zeros(len(counts), bool)  # slabs that get other lines
    down = pairs.everywhere(step == slopes[:, upper]) & alone[above + 1] & ~alone[above]
    taken[above[down] + 1] = True
    up = pairs.everywhere(step == slopes[:, lower]) & alone[above] & ~alone[above + 1] & ~taken[above]
    taken[above[up]] = True
    both = pairs.everywhere((step == 0) | (step == 1)) & alone[above] & alone[above + 1]
    both &= ~taken[above] & ~taken[above + 1]
    both &= _every_other(above, both)
    for chosen, source, target in ((down, upper, lower), (up, lower, upper)):
        runs = chosen[pairs.pair]
        ends[:, target[runs]], slopes[:, target[runs]] = ends[:, source[runs]], slopes[:, source[runs]]
    runs = both[pairs.pair]
    start = ends[:, upper[runs]] - step[:, runs] * (row[runs] - 1)  # slopes of rows alone are 0
    for target in (upper[runs], lower[runs]):
        ends[:, target], slopes[:, target] = start, step[:, runs]
    joined[above] = down | up | both
    return joined


def _every_other(place: Ints, chosen: Flags) -> Flags:
    """Of places chosen in a row, the first, the third, and so on."""
    places = place[chosen]
    some = np.zeros(len(place), bool)
    if len(places):
        begins = np.ones(len(places), bool)
        begins[1:] = places[1:] != places[:-1] + 1
        offset = places - np.maximum.accumulate(np.where(begins, places, -1))
        some[np.flatnonzero(chosen)[offset % 2 == 0]] = True
    return some
