"""Tile maps as FlexAttention's lists of blocks: for each row the columns to visit, and for each column the rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from truemask.geometry.logic import FULL
from truemask.geometry.tiles.tile_map import Ints, TileMap

Numbers = NDArray[np.int32]


class BlockLists(NamedTuple):
    """Counts `[b, h, rows]` and indices `[b, h, rows, columns]`: the first `count` indices of a row are its blocks.

    `kv_*` are blocks to which the mask is applied, `full_kv_*` blocks that it lets through whole; `q_*` are the same
    blocks listed for each column. What follows the first `count` indices is 0.
    """

    kv_num_blocks: Numbers
    kv_indices: Numbers
    full_kv_num_blocks: Numbers
    full_kv_indices: Numbers
    q_num_blocks: Numbers
    q_indices: Numbers
    full_q_num_blocks: Numbers
    full_q_indices: Numbers


def block_lists(tiles: TileMap) -> BlockLists:
    """The lists of an exact map. A block that overhangs the last query or key is never full: kernels run whole ones.

    Cost follows the blocks that are not empty, and the size of the lists: four times `rows * columns` numbers, which
    is the form that torch 2.13 wants.
    """
    samples, heads, rows, columns = tiles.shape
    size = tiles.runs[:, 1] - tiles.runs[:, 0]
    row = np.repeat(np.repeat(np.arange(len(tiles.row_starts) - 1), np.diff(tiles.row_starts)), size)
    column = np.repeat(tiles.runs[:, 0] - (np.cumsum(size) - size), size) + np.arange(len(row))
    whole = (row % rows + 1 <= tiles.q_len // tiles.block[0]) & (column + 1 <= tiles.kv_len // tiles.block[1])
    full = whole & (np.repeat(tiles.runs[:, 2], size) == FULL)
    panel, row = np.divmod(row, rows)
    lists: list[Numbers] = []
    for across, down, shape in (
        (panel * rows + row, column, (samples, heads, rows, columns)),
        (panel * columns + column, row, (samples, heads, columns, rows)),
    ):
        for subset in (~full, full):
            lists += _ordered(across[subset], down[subset], shape)
    return BlockLists(*lists)


def _ordered(line: Ints, place: Ints, shape: tuple[int, int, int, int]) -> tuple[Numbers, Numbers]:
    """The places on each line: how many there are, and which, in increasing order."""
    lines = math.prod(shape[:3])
    if len(line) and (line[1:] < line[:-1]).any():  # entries come in the order of rows: columns must be sorted
        kind = np.uint16 if lines <= 1 << 16 else np.int64  # numpy sorts 16 bits by digits
        order = np.argsort(line.astype(kind), kind="stable")
        line, place = line[order], place[order]
    counts = np.bincount(line, minlength=lines)
    indices = np.zeros((lines, shape[3]), np.int32)
    indices[line, np.arange(len(line)) - np.repeat(np.cumsum(counts) - counts, counts)] = place
    return counts.astype(np.int32).reshape(shape[:3]), indices.reshape(shape)
