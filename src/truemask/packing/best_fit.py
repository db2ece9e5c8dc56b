"""Best fit: which row each sequence goes into, in time n log n."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np


def best_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of at most `length` tokens for sequences of such sizes (1 to `length`): the row and start of each.

    Best fit decreasing: the longest first (equal ones in their order), each into the fullest row that still has room,
    or into a new one. Never more than 11/9 of the fewest rows possible, plus 4 (D. S. Johnson, Near-optimal bin
    packing algorithms, 1973).

    >>> best_fit(np.array([2, 5, 3, 6]), 8)
    (array([0, 1, 1, 0]), array([6, 0, 5, 0]))
    """
    order = np.argsort(-sizes, kind="stable")
    rows, starts = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    spaces: list[int] = []  # the distinct numbers of free tokens of rows that have any, ascending
    open_rows: dict[int, list[int]] = {}  # rows by their free tokens
    count = 0
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(spaces, size)
        if place == len(spaces):
            row, space, count = count, length, count + 1
        else:
            space = spaces[place]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[place]
        rows[index], starts[index] = row, length - space
        rest = space - size
        if rest in open_rows:
            open_rows[rest].append(row)
        elif rest:
            open_rows[rest] = [row]
            spaces.insert(bisect_left(spaces, rest), rest)
    return rows, starts
