"""Questions about ranges of a table, answered for many ranges at once in constant time each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from truemask.common.memory import HoldsArrays

Ints = NDArray[np.int64]


def spans(begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """All numbers of many ranges `[begin, end)`, one after the other, and the range that each comes from.

    >>> which, number = spans(np.array([5, 0]), np.array([7, 1]))
    >>> which.tolist(), number.tolist()
    ([0, 0, 1], [5, 6, 0])
    """
    size = end - begin
    which = np.repeat(np.arange(len(size)), size)
    number = np.repeat(end - np.cumsum(size), size)
    number += np.arange(len(which))
    return which, number


class RangeTable(HoldsArrays):
    """Minimum and maximum of `values[row, lo:hi]` for arrays of (row, lo, hi), by a sparse table of powers of two.

    Building costs O(n log n), a question two look-ups. `values` is `[rows, n]`; a single row serves every `row`.

    >>> low, high = RangeTable(np.array([[3, 1, 4, 1, 5]])).between(np.array(0), np.array([0, 2]), np.array([2, 5]))
    >>> low.tolist(), high.tolist()
    ([1, 1], [3, 5])
    """

    def __init__(self, values: Ints) -> None:
        self.rows, self.size = values.shape
        self.low, self.high = [values], [values]
        width = 1
        while 2 * width <= self.size:
            last, top = self.low[-1], self.high[-1]
            self.low.append(np.minimum(last[:, :-width], last[:, width:]))
            self.high.append(np.maximum(top[:, :-width], top[:, width:]))
            width *= 2

    def between(self, row: Ints, lo: Ints, hi: Ints) -> tuple[Ints, Ints]:
        """Minimum and maximum over `[lo, hi)`; every range must be non-empty and inside the table."""
        row = np.minimum(row, self.rows - 1)
        row, lo, hi = np.broadcast_arrays(row, lo, hi)
        level = np.frexp((hi - lo).astype(np.float64))[1] - 1
        low, high = np.empty(lo.shape, np.int64), np.empty(lo.shape, np.int64)
        for step in np.unique(level):
            at = level == step
            r, first, last = row[at], lo[at], hi[at] - (1 << int(step))
            low[at] = np.minimum(self.low[step][r, first], self.low[step][r, last])
            high[at] = np.maximum(self.high[step][r, first], self.high[step][r, last])
        return low, high


class RunTable(HoldsArrays):
    """A table stored as runs: `values[row, i]` holds on `[ends[row, i - 1], ends[row, i])`.

    The sparse tables are as long as the runs are many; one small integer per position finds a position's run.
    """

    def __init__(self, ends: Ints, values: Ints) -> None:
        self.rows, self.size = ends.shape[0], int(ends[0, -1])
        lengths = np.diff(ends, axis=1, prepend=0)
        runs = np.arange(ends.shape[1], dtype=np.int32)
        self.run = np.stack([np.repeat(runs, row) for row in lengths])
        self.table = RangeTable(values)

    def between(self, row: Ints, lo: Ints, hi: Ints) -> tuple[Ints, Ints]:
        """Minimum and maximum of the values over positions `[lo, hi)`, which must be inside the table."""
        row = np.minimum(row, self.rows - 1)
        first, last = self.run[row, lo].astype(np.int64), self.run[row, hi - 1].astype(np.int64)
        return self.table.between(row, first, last + 1)


class Counts(HoldsArrays):
    """How many flags are set in `[lo, hi)`: prefix sums of `flags [rows, n]`; beyond the table nothing is set.

    >>> Counts(np.array([[True, False, True]])).between(np.array(0), np.array([0, 1]), np.array([3, 9])).tolist()
    [2, 1]
    """

    def __init__(self, flags: NDArray[np.bool_]) -> None:
        self.rows, self.size = flags.shape
        self.sums = np.zeros((self.rows, self.size + 1), np.int64)
        np.cumsum(flags, axis=1, out=self.sums[:, 1:])

    def between(self, row: Ints, lo: Ints, hi: Ints) -> Ints:
        row = np.minimum(row, self.rows - 1)
        return self.sums[row, np.minimum(hi, self.size)] - self.sums[row, np.minimum(lo, self.size)]


def added(numbers: NDArray[Any], grain: int) -> NDArray[Any]:
    """The sums of every `grain` rows of booleans or of such sums, the last ones of fewer.

    Byte by byte as far as that goes: numpy's own sums of booleans make 64-bit integers of each first.

    >>> added(np.ones((5, 2), bool), 2).tolist()
    [[2, 2], [2, 2], [1, 1]]
    """
    sums = np.zeros((-(-len(numbers) // grain), *numbers.shape[1:]), np.uint8 if grain < 16 else np.int64)
    for step in range(grain):
        part = numbers[step::grain]
        sums[: len(part)] += part
    return sums


class Areas(HoldsArrays):
    """How many cells are set in rectangles of `cells [samples, heads, rows, columns]`: a summed-area table.

    (F. Crow, Summed-area tables for texture mapping, 1984.) Large tensors keep sums of `grain` x `grain` blocks only;
    `covering` then answers for the smallest rectangle of whole blocks around the one asked about.
    """

    def __init__(self, cells: NDArray[np.bool_], most: int = 1 << 22) -> None:
        self.samples, self.heads, self.height, self.width = cells.shape
        self.grain = 1
        while cells.size // self.grain**2 > most:
            self.grain *= 2
        rows, columns = (-(-n // self.grain) for n in (self.height, self.width))
        self.sums = np.zeros((self.samples, self.heads, rows + 1, columns + 1), np.int64)
        for place in np.ndindex(self.samples, self.heads):  # one plane at a time: sums are wide integers
            inside = self.sums[place][1:, 1:]
            inside += added(added(cells[place], self.grain).T, self.grain).T
            np.cumsum(inside, 0, out=inside)
            np.cumsum(inside, 1, out=inside)

    def covering(self, b: Ints, h: Ints, q0: Ints, q1: Ints, k0: Ints, k1: Ints) -> tuple[Ints, Ints]:
        """Cells set in, and size of, the whole blocks that cover `[q0, q1) x [k0, k1)`."""
        b, h = np.minimum(b, self.samples - 1), np.minimum(h, self.heads - 1)
        g = self.grain
        top, left, bottom, right = q0 // g, k0 // g, -(-q1 // g), -(-k1 // g)
        s = self.sums
        inside = s[b, h, bottom, right] - s[b, h, top, right] - s[b, h, bottom, left] + s[b, h, top, left]
        height = np.minimum(bottom * g, self.height) - top * g
        width = np.minimum(right * g, self.width) - left * g
        return inside, height * width
