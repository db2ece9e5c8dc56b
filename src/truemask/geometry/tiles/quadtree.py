"""The tiles of masks that have no exact form: large squares first, and smaller ones only inside those in between.

So the cost follows the boundary between EMPTY and FULL, not the area. (R. Finkel and J. Bentley, Quad trees, 1974;
here each square has 8 x 8 parts, because a call of numpy costs more than a few squares.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from truemask.geometry.logic import FULL, MIXED, States
from truemask.geometry.ranges import spans
from truemask.geometry.tiles.tile_map import Ints, Rectangles

Classify = Callable[[Rectangles], States]

PARTS = 8  # of a square, along each side
BAND = PARTS**2  # rows of tiles looked at together, in squares as high: what is kept is runs, not tiles
AT_ONCE = 1 << 18  # squares classified in one call
MAX_KEPT_PIECES = 1 << 24  # runs, and squares in a band, that are worth keeping


class TooManyTilesError(Exception):
    """More than anyone could keep or evaluate."""


class _Squares(NamedTuple):
    """Squares of tiles: sample and head, first row and column of tiles."""

    b: Ints
    h: Ints
    i: Ints
    j: Ints

    def chosen(self, which: Ints | slice) -> _Squares:
        return _Squares(*(x[which] for x in self))


def classify_tiles(
    classify: Classify, q_len: int, kv_len: int, block: tuple[int, int], b: int, h: int, most_mixed: int | None = None
) -> tuple[Ints, Ints]:
    """The tiles of one sample and head that are not EMPTY: where each row's runs begin, and (start, stop, state).

    Whoever cannot use more than `most_mixed` MIXED tiles says so, and is told early.
    """
    rows, columns = -(-q_len // block[0]), -(-kv_len // block[1])
    counts, runs, total, mixed = [np.zeros(1, np.int64)], [np.zeros((0, 3), np.int64)], 0, 0
    across = np.arange(0, columns, BAND)
    for top in range(0, rows, BAND):
        sample, head, row = (np.full(len(across), x, np.int64) for x in (b, h, top))
        squares = _Squares(sample, head, row, across)
        band = _band(classify, squares, rows, columns, (q_len, kv_len), block)
        starts, joined = _in_rows(band, top, min(top + BAND, rows))
        counts.append(np.diff(starts))
        runs.append(joined)
        total += len(joined)
        _affordable(total, "runs of tiles", MAX_KEPT_PIECES)
        if most_mixed is not None:
            mixed += int((joined[:, 1] - joined[:, 0])[joined[:, 2] == MIXED].sum())
            _affordable(mixed, "tiles to evaluate", most_mixed)
    return np.cumsum(np.concatenate(counts)), np.concatenate(runs)


def _affordable(number: int, what: str, most: int) -> None:
    if number > most:
        raise TooManyTilesError(f"{number} {what}")


def _band(
    classify: Classify, squares: _Squares, rows: int, columns: int, lengths: tuple[int, int], block: tuple[int, int]
) -> Ints:
    """The runs of a band of rows, in any order: `[n, 4]` of row, start, stop, state."""
    _affordable(len(squares.b), "squares", MAX_KEPT_PIECES)
    side = BAND
    parts = [np.zeros((0, 4), np.int64)]
    while len(squares.b):
        state = _classified(classify, squares, side, lengths, block)
        parts.append(_runs(squares.chosen(state == FULL), side, rows, columns, int(FULL)))
        squares = squares.chosen(state == MIXED)
        if side == 1:
            parts.append(_runs(squares, 1, rows, columns, int(MIXED)))
            break
        side //= PARTS
        squares = _parts(squares, side, rows, columns)
    return np.concatenate(parts)


def _classified(
    classify: Classify, squares: _Squares, side: int, lengths: tuple[int, int], block: tuple[int, int]
) -> States:
    """EMPTY, MIXED or FULL for each square, cut at the true lengths."""
    states = []
    for part in _batches(squares):
        (q0, q1), (k0, k1) = (
            (x * size, np.minimum((x + side) * size, length))
            for x, size, length in zip((part.i, part.j), block, lengths, strict=True)
        )
        states.append(np.broadcast_to(classify(Rectangles(part.b, part.h, q0, q1, k0, k1)), part.b.shape))
    return np.concatenate(states)


def _batches(squares: _Squares) -> Iterator[_Squares]:
    for first in range(0, len(squares.b), AT_ONCE):
        yield squares.chosen(slice(first, first + AT_ONCE))


def _parts(squares: _Squares, side: int, rows: int, columns: int) -> _Squares:
    """The smaller squares, `side` tiles wide, of larger ones."""
    count = len(squares.b)
    _affordable(count * PARTS**2, "tiles in a band", MAX_KEPT_PIECES)
    step = np.arange(PARTS) * side
    i = np.broadcast_to(squares.i[:, None, None] + step[:, None], (count, PARTS, PARTS)).ravel()
    j = np.broadcast_to(squares.j[:, None, None] + step, (count, PARTS, PARTS)).ravel()
    inside = np.flatnonzero((i < rows) & (j < columns))
    owner = inside // PARTS**2
    return _Squares(squares.b[owner], squares.h[owner], i[inside], j[inside])


def _runs(squares: _Squares, side: int, rows: int, columns: int, state: int) -> Ints:
    """The rows of tiles of squares: `[n, 4]` of row, start, stop, state."""
    stop = np.minimum(squares.i + side, rows)
    total = int((stop - squares.i).sum())
    if total > MAX_KEPT_PIECES:
        raise TooManyTilesError(f"{total} runs")
    square, row = spans(squares.i, stop)
    start = squares.j[square]
    return np.stack([row, start, np.minimum(start + side, columns), np.full(len(row), state)], axis=1)


def _in_rows(runs: Ints, first: int, stop: int) -> tuple[Ints, Ints]:
    """Where the runs of rows `[first, stop)` begin, and they in order, neighbours of one state joined."""
    runs = runs[np.lexsort((runs[:, 1], runs[:, 0]))]
    begins, ends = np.ones(len(runs), bool), np.ones(len(runs), bool)
    if len(runs):
        before, after = runs[:-1], runs[1:]
        goes_on = (before[:, 0] == after[:, 0]) & (before[:, 2] == after[:, 1]) & (before[:, 3] == after[:, 3])
        begins[1:], ends[:-1] = ~goes_on, ~goes_on
    joined = np.stack([runs[begins, 1], runs[ends, 2], runs[begins, 3]], axis=1)
    counts = np.bincount(runs[begins, 0] - first, minlength=stop - first)
    return np.append(0, np.cumsum(counts)), joined
