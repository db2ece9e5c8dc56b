"""What a tile map answers by looking at the cells of its MIXED tiles, each pattern once: pairs, lives, a witness."""

from __future__ import annotations

import numpy as np

from truemask.geometry.ranges import spans
from truemask.geometry.slabs.slabs import Flags
from truemask.geometry.tiles.tile_map import Ints, TileMap


def pairs_in(tiles: TileMap) -> int:
    """The number of cells that are True."""
    full = tiles.full()
    counted = int(((full.q1 - full.q0) * (full.k1 - full.k0)).sum())
    return counted + sum(int(part.cells.sum((1, 2))[part.which].sum()) for part in tiles.patterns())


def live_in(tiles: TileMap, axis: int) -> Flags:
    """Which rows (axis 0) or keys (axis 1) of a map of one sample and head have a cell that is True."""
    full, size, block = tiles.full(), (tiles.q_len, tiles.kv_len)[axis], tiles.block[axis]
    first, stop = ((full.q0, full.q1), (full.k0, full.k1))[axis]
    steps = np.zeros(size + block + 1, np.int64)  # +1 where a run begins, -1 behind it
    np.add.at(steps, first, 1)
    np.add.at(steps, stop, -1)
    alive = steps.cumsum() > 0
    tile = tiles.mixed()[2 + axis]
    for part in tiles.patterns():
        some: Flags = np.logical_or.reduce(part.cells, axis=2 - axis)
        place = tile[part.tiles][:, None] * block + np.arange(some.shape[1])
        np.logical_or.at(alive, place, some[part.which])
    return alive[:size]


def last_rows_in(tiles: TileMap) -> Ints:
    """The last row of a map of one sample and head that sees each key, -1 for none."""
    full, (height, width) = tiles.full(), tiles.block
    last = np.full(tiles.kv_len + width, -1, np.int64)
    run, key = spans(full.k0, full.k1)
    np.maximum.at(last, key, full.q1[run] - 1)
    _, _, i, j = tiles.mixed()
    for part in tiles.patterns():
        rows = part.cells.shape[1]
        within = np.where(part.cells.any(axis=1), rows - 1 - part.cells[:, ::-1].argmax(axis=1), -1 - tiles.q_len)
        place = j[part.tiles][:, None] * width + np.arange(within.shape[1])
        np.maximum.at(last, place, within[part.which] + i[part.tiles][:, None] * height)
    return last[: tiles.kv_len]


def first_cell_in(tiles: TileMap) -> tuple[int, int] | None:
    """A cell that is True, or None if there is none."""
    full = tiles.full()
    if len(full.q0):
        return int(full.q0[0]), int(full.k0[0])
    _, _, i, j = tiles.mixed()
    for part in tiles.patterns():
        hits = np.flatnonzero(np.logical_or.reduce(part.cells, axis=(1, 2))[part.which])
        if len(hits):
            tile = part.tiles[hits[0]]
            row, column = np.argwhere(part.cells[part.which[hits[0]]])[0]
            return int(i[tile] * tiles.block[0] + row), int(j[tile] * tiles.block[1] + column)
    return None
