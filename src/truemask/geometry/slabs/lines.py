"""Lines of slabs as plain arrays, and slabs that go on in the same lines as one.

A line is one number, twice the key where it is on row 0, plus 1 if it moves by one key a row. Slabs are their first
rows (and the end), how many runs each has, and the lines at which the runs begin and end, `[2, runs]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from truemask.geometry.ranges import spans

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Stack = tuple[Ints, Ints, Ints]  # rows, counts, lines


def places(lines: Ints, row: Ints) -> Ints:
    """Where lines are on a row of each."""
    return (lines >> 1) + (lines & 1) * row


def after(counts: Ints) -> Ints:
    """Where things begin of which there are so many each, and where the last of them end."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def union(*numbers: Ints) -> Ints:
    """Different numbers, in order. (`np.unique` hashes integers, which takes longer.)"""
    every = np.concatenate(numbers)
    every.sort(kind="stable")  # which is quick on what is sorted in parts
    if not len(every):
        return every
    new = np.ones(len(every), bool)
    np.not_equal(every[1:], every[:-1], out=new[1:])
    return every[new]


# -- fewer slabs -------------------------------------------------------------------------------------------------------


def tidied(rows: Ints, counts: Ints, lines: Ints) -> Stack:
    """Slabs that go on in the same lines as one; a row alone takes lines that pass through it."""
    alone = rows[1:] - rows[:-1] == 1
    if alone.any():
        single, first = np.repeat(alone, counts), np.repeat(rows[:-1], counts)
        lines = np.where(single, 2 * places(lines, first), lines)
    stack = joined(rows, counts, lines)
    while (alone := stack[0][1:] - stack[0][:-1] == 1).any():
        adopted = _adopted(*stack, alone)
        if not adopted.any():
            break
        stack = joined(*_without(*stack, adopted))
    return stack


def joined(rows: Ints, counts: Ints, lines: Ints) -> Stack:
    """Neighbouring slabs with the same lines as one, and nothing else done to them."""
    return _without(rows, counts, lines, _same_lines(counts, lines))


def _without(rows: Ints, counts: Ints, lines: Ints, ended: Flags) -> Stack:
    """Without the beginnings of slabs that belong to the one above."""
    if not ended.any():
        return rows, counts, lines
    keep = np.concatenate([[True], ~ended])
    runs = np.flatnonzero(np.repeat(keep, counts))
    return np.append(rows[:-1][keep], rows[-1]), counts[keep], lines.take(runs, axis=1)


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


def _same_lines(counts: Ints, lines: Ints) -> Flags:
    """Which slabs go on in the lines of the one above."""
    joined = counts[1:] == counts[:-1]
    if not lines.shape[1]:
        return joined
    starts = np.cumsum(counts) - counts
    for side in (0, 1):  # most slabs differ in the first run already
        first = lines[side].take(starts, mode="clip")
        joined &= (first[1:] == first[:-1]) | (counts[1:] == 0)
    some = np.flatnonzero(joined & (counts[1:] > 1))
    if len(some):
        pairs = _Pairs.of(some, counts, starts)
        joined[some] = pairs.everywhere(lines.take(pairs.upper, axis=1) == lines.take(pairs.lower, axis=1))
    return joined


def _adopted(rows: Ints, counts: Ints, lines: Ints, alone: Flags) -> Flags:
    """Rows alone are given the lines of a neighbour, or of each other: which slabs then go on as the one above."""
    some = (counts[1:] == counts[:-1]) & (alone[1:] | alone[:-1])
    joined = np.zeros(len(counts) - 1, bool)
    if not some.any():
        return joined
    pairs = _Pairs.of(np.flatnonzero(some), counts, np.cumsum(counts) - counts)
    above, upper, lower = pairs.above, pairs.upper, pairs.lower
    row = rows[above + 1][pairs.pair]  # the first row of the lower slab
    step = places(lines[:, lower], row) - places(lines[:, upper], row - 1)
    taken = np.zeros(len(counts), bool)  # slabs that get other lines
    down = pairs.everywhere(step == lines[:, upper] & 1) & alone[above + 1] & ~alone[above]
    taken[above[down] + 1] = True
    up = pairs.everywhere(step == lines[:, lower] & 1) & alone[above] & ~alone[above + 1] & ~taken[above]
    taken[above[up]] = True
    both = pairs.everywhere((step == 0) | (step == 1)) & alone[above] & alone[above + 1]
    both &= ~taken[above] & ~taken[above + 1]
    both &= _every_other(above, both)
    for subset, source, target in ((down, upper, lower), (up, lower, upper)):
        runs = subset[pairs.pair]
        lines[:, target[runs]] = lines[:, source[runs]]
    runs = both[pairs.pair]
    start = lines[:, upper[runs]] - 2 * step[:, runs] * (row[runs] - 1) + step[:, runs]  # rows alone have slopes 0
    for target in (upper[runs], lower[runs]):
        lines[:, target] = start
    joined[above] = down | up | both
    return joined


def _every_other(place: Ints, flags: Flags) -> Flags:
    """Of places chosen in a row, the first, the third, and so on."""
    places = place[flags]
    some = np.zeros(len(place), bool)
    if len(places):
        begins = np.ones(len(places), bool)
        begins[1:] = places[1:] != places[:-1] + 1
        offset = places - np.maximum.accumulate(np.where(begins, places, -1))
        some[np.flatnonzero(flags)[offset % 2 == 0]] = True
    return some
