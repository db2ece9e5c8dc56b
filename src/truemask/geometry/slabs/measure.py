"""What slabs answer without looking at a cell: pairs, dead rows, keys seen and by whom last, a witness, and tiles.

The slabs are cut to the keys `[0, width)` that are asked about, and their rows start at 0.
"""

from __future__ import annotations

import numpy as np

from truemask.geometry.logic import FULL, MIXED
from truemask.geometry.ranges import spans
from truemask.geometry.slabs.lines import Flags, Ints, union
from truemask.geometry.slabs.slabs import Slabs


def pairs(x: Slabs) -> int:
    """The number of cells, of unmerged slabs too: each run is a sum of an arithmetic series.

    >>> from truemask.geometry.slabs.slabs import bands
    >>> pairs(bands(0, 5, 0, 0, 1, 1))  # causal
    15
    """
    first, last = x.first, x.last
    heights, widths = last - first + 1, (x.at(1, first) - x.at(0, first)) + (x.at(1, last) - x.at(0, last))
    if heights.astype(float) @ widths > 1 << 62:  # more than 64 bits hold: Python's own integers
        return sum(height * width // 2 for height, width in zip(heights.tolist(), widths.tolist(), strict=True))
    return int((heights * widths // 2).sum())


def live_rows(x: Slabs) -> Flags:
    """Which rows see something."""
    return np.repeat(x.sizes > 0, np.diff(x.rows))


def seen_keys(x: Slabs, width: int) -> Flags:
    """Which keys some row sees: a run moves by at most one a row, so its rows cover one interval."""
    steps = np.zeros(width + 1, np.int64)
    np.add.at(steps, x.at(0, x.first), 1)
    np.add.at(steps, x.at(1, x.last), -1)
    return steps.cumsum()[:width] > 0


def keys_in_runs(x: Slabs) -> int:
    """How many keys the runs reach, each run counted for itself: what `last_rows` looks at."""
    return int((x.at(1, x.last) - x.at(0, x.first)).sum())


def last_rows(x: Slabs, width: int) -> Ints:
    """The last row that sees each key, -1 for none: that of its run, or where the run's first key moves past it.

    >>> from truemask.geometry.slabs.slabs import bands
    >>> last_rows(bands(0, 5, -1, 1, 1, 1), 5)  # a window of two
    array([1, 2, 3, 4, 4])
    """
    last = np.full(width, -1, np.int64)
    run, key = spans(x.at(0, x.first), x.at(1, x.last))
    row = x.last[run]
    np.maximum.at(last, key, np.where(x.slopes[0, run] == 1, np.minimum(row, key - x.ends[0, run]), row))
    return last


def first_cell(x: Slabs) -> tuple[int, int] | None:
    """The first cell in reading order, or None if there is none; slabs may be unmerged."""
    if not pairs(x):
        return None
    x = x.canonical
    row = int(x.rows[x.owner[0]])
    return row, int(x.ends[0, 0] + x.slopes[0, 0] * row)


def tile_runs(x: Slabs, width: int, block: tuple[int, int]) -> tuple[Ints, Ints]:
    """The tiles that are not EMPTY as runs: for each row of tiles where its runs begin, and (start, stop, state).

    Slabs are cut at the rows of tiles. A tile is touched if a run of any piece meets it, and FULL if in every piece of
    its row of tiles a run covers it.
    """
    (bq, bk), columns = block, -(-width // block[1])
    height = int(x.rows[-1])
    count = -(-height // bq)
    cuts = union(x.rows, np.arange(0, height, bq))
    slab = np.searchsorted(x.rows, cuts[:-1], "right") - 1
    piece, run = spans(x.starts[slab], x.starts[slab + 1])
    top, bottom = cuts[:-1][piece], cuts[1:][piece] - 1
    (lo, hi), (s, t) = x.ends[:, run], x.slopes[:, run]
    tile = top // bq
    touched = (lo + s * top) // bk, (hi + t * bottom - 1) // bk + 1
    covers = hi + t * top
    full = -(-(lo + s * bottom) // bk), np.where(covers == width, columns, covers // bk)
    full = full[0], np.maximum(full[1], full[0])
    pieces = np.bincount(cuts[:-1] // bq, minlength=count)
    return _merged(count, columns, tile, touched, full, pieces)


def _merged(
    count: int, columns: int, tile: Ints, touched: tuple[Ints, Ints], full: tuple[Ints, Ints], pieces: Ints
) -> tuple[Ints, Ints]:
    """Go through the ends of what is touched and covered, row of tiles by row of tiles."""
    place = np.concatenate([tile, tile, tile, tile]) * (columns + 1) + np.concatenate([*touched, *full])
    one, none = np.ones(len(tile), np.int64), np.zeros(len(tile), np.int64)
    order = np.argsort(place)
    place = place[order]
    touching = np.concatenate([one, -one, none, none])[order].cumsum()
    covering = np.concatenate([none, none, one, -one])[order].cumsum()
    final = np.ones(len(place), bool)
    final[:-1] = place[1:] != place[:-1]
    place, touching, covering = place[final], touching[final], covering[final]
    row, start = np.divmod(place, columns + 1)
    state = np.where(covering == pieces[row], FULL, np.where(touching > 0, MIXED, 0)).astype(np.int64)
    begins = np.ones(len(place), bool)
    begins[1:] = (state[1:] != state[:-1]) | (row[1:] != row[:-1])
    row, start, state = row[begins], start[begins], state[begins]
    stop = np.roll(start, -1)  # the last change of every row of tiles is to EMPTY
    keep = state > 0
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(row[keep], minlength=count), out=starts[1:])
    return starts, np.stack([start, stop, state], axis=1)[keep]
