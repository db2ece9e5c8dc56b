"""A sample of a dense tensor's tiles: whether looking at all its cells for structure could be worth it.

Looking for the runs of a tensor, or for its tiles that are all alike, takes several passes over it, and a tensor may be
new in every call. So a fixed number of tiles is looked at first, drawn by a hash: the same ones in every process.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from truemask.geometry.edges import Edges
from truemask.masks.hashing import WORD, hash32

TILES, SIDE = 64, 64  # how many are drawn, and their rows and columns
SAMPLED_FROM = 2 * TILES * SIDE**2  # cells from which on a tensor is not looked at whole at once
ALIKE = 16  # one tile of so many must be all alike, or the others are not looked for
LINED, ENDED = 32, 16  # cells for each end of a run that starts a line, and for each end: every one is gone through
FEW_ENDS = 1 << 19  # that take no time worth saving


class Sample(NamedTuple):
    """What was seen: so many tiles, how many of them are alike throughout, and whether runs are worth looking for."""

    tiles: int
    alike: int
    shows_runs: bool

    @property
    def shows_tiles(self) -> bool:
        """Whether so many tiles are EMPTY or FULL that it is worth knowing which."""
        return self.alike * ALIKE >= self.tiles

    @property
    def text(self) -> str:
        """What a plan says of it; nothing where there is structure, because then the cells themselves count."""
        if self.shows_runs or self.shows_tiles:
            return ""
        return f"looked at a sample of {self.tiles} tiles of {SIDE} x {SIDE}: no structure, so all count as mixed"


def sample_of(cells: NDArray[np.bool_]) -> Sample:
    """A sample of `cells [b, h, q, k]`, which is not empty.

    >>> sample_of(np.tri(512, dtype=bool)[None, None])
    Sample(tiles=64, alike=61, shows_runs=True)
    """
    size = tuple(min(SIDE, n) for n in cells.shape[2:])
    number = np.arange(TILES)
    b, h, i, j = (
        (hash32(number, axis) * count // (WORD + 1)).tolist()
        for axis, count in enumerate((*cells.shape[:2], *(-(-n // SIDE) for n in cells.shape[2:])))
    )
    tiles = np.zeros((TILES, *size), bool)
    for place, tile in zip(zip(b, h, i, j, strict=True), tiles, strict=True):
        top, left = (min(at * SIDE, n - len_) for at, n, len_ in zip(place[2:], cells.shape[2:], size, strict=True))
        tile[:] = cells[place[0], place[1], top : top + size[0], left : left + size[1]]
    lit = np.count_nonzero(tiles, axis=(1, 2))
    return Sample(TILES, int(np.count_nonzero((lit == 0) | (lit == size[0] * size[1]))), runs_are_few(tiles))


def runs_are_few(cells: NDArray[np.bool_]) -> bool:
    """Whether the runs of `[..., q, k]` take less room than its cells: they are few, and their ends go on in lines.

    >>> rows = np.arange(64)[:, None]
    >>> runs_are_few(rows >= np.arange(64)), runs_are_few((rows * 37 + np.arange(64)) % 5 == 0)
    (True, False)
    """
    edges = Edges.of(cells)
    return edges.lines <= cells.size // LINED and edges.count <= max(FEW_ENDS, cells.size // ENDED)
