"""Masks that are bands of positions or of blocks: causal, window, local, blocks.

Each says its inequality in the first lines of its docstring; the laws behind them stand in docs/conventions.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from truemask.common.arguments import MAX_POSITION, whole
from truemask.geometry.logic import States, tri_state
from truemask.geometry.slabs.slabs import FAR, Region, Slabs, affordable, bands
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import ATOM, call
from truemask.masks.core.value import Written


def band(r: Rectangles, low: int | None, high: int | None) -> States:
    """Tiles of `low <= q - k <= high`: a rectangle takes every difference between its extremes, so this is exact."""
    least, most = r.q0 - r.k1 + 1, r.q1 - 1 - r.k0
    low = -MAX_POSITION * 4 if low is None else low
    high = MAX_POSITION * 4 if high is None else high
    return tri_state((most < low) | (least > high), (least >= low) & (most <= high))


def offset(r: Rectangles, moved: int = 0) -> Ints:
    """How far a tile stands right of the line `k = q + moved`; all the same where it is quite to one side."""
    return np.clip(r.k0 - r.q0 - moved, r.k0 - r.k1, r.q1 - r.q0)


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    """`k <= q`: a query sees itself and the past."""

    kind: ClassVar[str] = "causal"
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def _tile(self, r: Rectangles) -> States:
        return band(r, 0, None)

    def _slabs(self, r: Region) -> Slabs:
        return bands(r.q0, r.q1, -FAR, 0, 1, 1)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return [offset(r)]

    def _periodic_from(self, k_stop: int) -> tuple[int, int]:
        return k_stop, 1

    def _write(self) -> Written:
        return "causal", ATOM


causal: Mask = Causal()


@dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    """`q - size < k <= q`."""

    size: int
    kind: ClassVar[str] = "window"
    _numbers: ClassVar[tuple[str, ...]] = ("size",)
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k < self.size)

    def _tile(self, r: Rectangles) -> States:
        return band(r, 0, self.size - 1)

    def _slabs(self, r: Region) -> Slabs:
        return bands(r.q0, r.q1, 1 - self.size, 1, 1, 1)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return [offset(r), offset(r, -self.size)]

    def _periodic_from(self, k_stop: int) -> tuple[int, int]:
        return k_stop + self.size, 1

    def _write(self) -> Written:
        return call("window", self.size)


@deferrable
def window(size: int) -> Mask:
    """The last `size` keys, the query's own included: `q - size < k <= q`. Causal already.

    `size` counts keys as in Mistral and Hugging Face's `sliding_window`; FlashAttention's `window_size=(left, 0)` and
    x-transformers' `attn_max_attend_past` do not count the query's own, so theirs is `size - 1`.

    >>> print(window(2).show(4))
    window(2)
      0 1 2 3
    0 ■ · · ·
    1 ■ ■ · ·
    2 · ■ ■ ·
    3 · · ■ ■
    7 of 16 pairs (43.8 %); queries down, keys across; ■ may attend, · may not
    """
    return Window(whole(size, "window(size)", 1))


@dataclass(frozen=True, eq=False, repr=False)
class Local(Mask):
    """`abs(q - k) <= radius`."""

    radius: int
    kind: ClassVar[str] = "local"
    _numbers: ClassVar[tuple[str, ...]] = ("radius",)
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() <= self.radius

    def _tile(self, r: Rectangles) -> States:
        return band(r, -self.radius, self.radius)

    def _slabs(self, r: Region) -> Slabs:
        return bands(r.q0, r.q1, -self.radius, 1, self.radius + 1, 1)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return [offset(r, self.radius), offset(r, -self.radius - 1)]

    def _periodic_from(self, k_stop: int) -> tuple[int, int]:
        return k_stop + self.radius, 1

    def _write(self) -> Written:
        return call("local", self.radius)


@deferrable
def local(radius: int) -> Mask:
    """`radius` keys on both sides and the query's own: `abs(q - k) <= radius`, local attention.

    >>> local(1).to_dense(4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """
    return Local(whole(radius, "local(radius)"))


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask):
    """`q // size - back <= k // size <= q // size + ahead`."""

    size: int
    back: int = 0
    ahead: int = 0
    kind: ClassVar[str] = "blocks"
    _numbers: ClassVar[tuple[str, ...]] = ("size", "back", "ahead")
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, column = q // self.size, k // self.size
        return (column >= row - self.back) & (column <= row + self.ahead)

    def _tile(self, r: Rectangles) -> States:
        n = self.size
        rows = Rectangles(r.b, r.h, r.q0 // n, (r.q1 - 1) // n + 1, r.k0 // n, (r.k1 - 1) // n + 1)
        return band(rows, -self.ahead, self.back)

    def _slabs(self, r: Region) -> Slabs:
        n = self.size
        if n == 1:
            return bands(r.q0, r.q1, -self.back, 1, self.ahead + 1, 1)
        first, stop = r.q0 // n, (r.q1 - 1) // n + 1
        affordable(stop - first)
        block = np.arange(first, stop)
        rows = np.append(np.maximum(block * n, r.q0), r.q1)
        far = FAR // n  # so that no product overflows
        ends = np.clip(np.stack([block - self.back, block + self.ahead + 1]), -far, far) * n
        return Slabs(rows, np.arange(len(rows)), 2 * ends)

    def _periodic_from(self, k_stop: int) -> tuple[int, int]:
        return k_stop + (self.back + 1) * self.size, 1

    def _write(self) -> Written:
        return call("blocks", self.size, back=self.back or None, ahead=self.ahead or None)


@deferrable
def blocks(size: int, back: int = 0, ahead: int = 0) -> Mask:
    """Within blocks of `size` positions, and with `back` blocks before and `ahead` blocks after the query's own.

    `q // size - back <= k // size <= q // size + ahead`. `causal & blocks(size)` is chunked attention (Llama 4);
    `blocks(size, back=1)` the block-local attention of the Longformer and BigBird families.

    >>> blocks(2, back=1).to_dense(4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    return Blocks(whole(size, "blocks(size)", 1), whole(back, "blocks(back=...)"), whole(ahead, "blocks(ahead=...)"))
