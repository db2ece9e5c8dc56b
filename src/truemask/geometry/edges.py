"""Where the rows of a boolean array change, eight cells in a byte: the ends of the runs of a dense mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Bytes = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Edges:
    """Bits `[..., rows, bytes]`: bit j of a row is set if its cell j differs from the one before.

    Before the first and after the last cell there is False, so that the changes of a row are start, stop, start, ...
    """

    bits: Bytes

    @classmethod
    def of(cls, cells: Flags) -> Edges:
        """Those of `cells [..., rows, columns]`."""
        bits = np.zeros((*cells.shape[:-1], cells.shape[-1] // 8 + 1), np.uint8)
        bits[..., : -(-cells.shape[-1] // 8)] = np.packbits(cells, axis=-1)
        before = bits >> 1
        before[..., 1:] |= bits[..., :-1] << 7
        return cls(bits ^ before)

    @property
    def count(self) -> int:
        """How many there are: two for each run."""
        return _lit(self.bits)

    @property
    def lines(self) -> int:
        """How many go on in no line from the row above, straight or by one to the right.

        >>> Edges.of(np.tri(64, dtype=bool)).lines, Edges.of(np.tile(np.arange(64) % 2 == 0, (64, 1))).lines
        (0, 0)
        """
        above, here = self.bits[..., :-1, :], self.bits[..., 1:, :]
        beside = above >> 1
        beside[..., 1:] |= above[..., :-1] << 7
        return _lit(here & ~(above | beside))

    def places(self) -> tuple[Ints, Ints]:
        """The row and the column of each, of two axes, in reading order.

        >>> [side.tolist() for side in Edges.of(np.array([[True, True, False], [False, False, True]])).places()]
        [[0, 0, 1, 1], [0, 2, 2, 3]]
        """
        flat = self.bits.ravel()
        some = np.flatnonzero(flat != 0)
        byte, bit = np.nonzero(np.unpackbits(flat[some, None], axis=1))
        row, column = np.divmod(some[byte], self.bits.shape[-1])
        return row, 8 * column + bit


def _lit(bits: Bytes) -> int:
    return int(np.count_nonzero(np.unpackbits(np.ascontiguousarray(bits)).view(bool)))
