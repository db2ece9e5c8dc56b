"""Masks that need nothing but positions: causal, window, local, blocks, dilated, strided, random, grid.

Each says its inequality in the first lines of its docstring; the laws behind them stand in docs/conventions.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from truemask.errors import MaskError, describe
from truemask.geometry.logic import EMPTY, FULL, MIXED, Flags, States, kleene_and, three
from truemask.geometry.tiles import Ints, Rectangles
from truemask.masks.core import Mask, Written
from truemask.masks.data_store import LARGEST, whole
from truemask.masks.hashing import WORD, hash32, threshold
from truemask.masks.writing import ATOM, call


def band(r: Rectangles, low: int | None, high: int | None) -> States:
    """Tiles of `low <= q - k <= high`: a rectangle takes every difference between its extremes, so this is exact."""
    least, most = r.q0 - r.k1 + 1, r.q1 - 1 - r.k0
    low = -LARGEST * 4 if low is None else low
    high = LARGEST * 4 if high is None else high
    return three((most < low) | (least > high), (least >= low) & (most <= high))


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    """`k <= q`: a query sees itself and the past."""

    kind: ClassVar[str] = "causal"
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def _tile(self, r: Rectangles) -> States:
        return band(r, 0, None)

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

    def _write(self) -> Written:
        return call("window", self.size)


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

    def _write(self) -> Written:
        return call("local", self.radius)


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

    def _write(self) -> Written:
        return call("blocks", self.size, back=self.back or None, ahead=self.ahead or None)


def blocks(size: int, back: int = 0, ahead: int = 0) -> Mask:
    """Within blocks of `size` positions, and with `back` blocks before and `ahead` blocks after the query's own.

    `q // size - back <= k // size <= q // size + ahead`. `causal & blocks(size)` is chunked attention (Llama 4);
    `blocks(size, back=1)` the block-local attention of the Longformer and BigBird families.

    >>> blocks(2, back=1).to_dense(4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    return Blocks(whole(size, "blocks(size)", 1), whole(back, "blocks(back=...)"), whole(ahead, "blocks(ahead=...)"))


@dataclass(frozen=True, eq=False, repr=False)
class Dilated(Mask):
    """`(q - k) % step == 0`."""

    step: int
    kind: ClassVar[str] = "dilated"
    _numbers: ClassVar[tuple[str, ...]] = ("step",)
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % self.step == 0

    def _tile(self, r: Rectangles) -> States:
        least, most = r.q0 - r.k1 + 1, r.q1 - 1 - r.k0
        none = most // self.step * self.step < least
        return three(none, ~none & ((self.step == 1) | (least == most)))

    def _write(self) -> Written:
        return call("dilated", self.step)


def dilated(step: int) -> Mask:
    """Every `step`-th key, counted from the query: `(q - k) % step == 0`. Sees both ways: `causal & dilated(4)`.

    >>> dilated(2).to_dense(4)[0, 0].int().tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    return Dilated(whole(step, "dilated(step)", 1))


@dataclass(frozen=True, eq=False, repr=False)
class Strided(Mask):
    """`k % step >= step - last`."""

    step: int
    last: int = 1
    kind: ClassVar[str] = "strided"
    _reads_query: ClassVar[bool] = False
    _numbers: ClassVar[tuple[str, ...]] = ("step", "last")
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k % self.step >= self.step - self.last

    def _before(self, k: Ints) -> Ints:
        """How many of the first k keys are summary columns."""
        return k // self.step * self.last + np.maximum(k % self.step - (self.step - self.last), 0)

    def _tile(self, r: Rectangles) -> States:
        seen = self._before(r.k1) - self._before(r.k0)
        return three(seen == 0, seen == r.k1 - r.k0)

    def _write(self) -> Written:
        return call("strided", self.step, last=None if self.last == 1 else self.last)


def strided(step: int, last: int = 1) -> Mask:
    """The last `last` keys of every `step`: `k % step >= step - last`, Sparse Transformer's summary columns.

    (Child et al., arXiv 1904.10509, the "fixed" pattern: `causal & (blocks(step) | strided(step, last))`.)

    >>> strided(3).to_dense(1, 7)[0, 0].int().tolist()
    [[0, 0, 1, 0, 0, 1, 0]]
    """
    step, last = whole(step, "strided(step)", 1), whole(last, "strided(last=...)", 1)
    if last > step:
        raise MaskError(f"strided: last={last} columns of every step={step} is more than there are")
    return Strided(step, last)


@dataclass(frozen=True, eq=False, repr=False)
class Random(Mask):
    """`hash(seed, q // block, k // block) < rate`."""

    rate: float
    block: int = 1
    seed: int = 0
    per_head: bool = False
    kind: ClassVar[str] = "random"
    _numbers: ClassVar[tuple[str, ...]] = ("block", "seed", "limit")

    @property
    def limit(self) -> int:
        """Hashes below this are let through."""
        return threshold(self.rate)

    @property
    def head_count(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 0 if self.per_head else 1

    def _draw(self, h: Tensor | Ints, row: Tensor | Ints, column: Tensor | Ints) -> Tensor | Ints:
        return hash32(self.seed, h, row, column) if self.per_head else hash32(self.seed, row, column)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = self._draw(h, q // self.block, k // self.block) < vars(self)["limit"]
        return seen & (q == q) & (k == k)  # pyright: ignore[reportReturnType]

    def _tile(self, r: Rectangles, most: int = 8) -> States:
        """Blocks are hashed where a rectangle meets at most `most` of them a side; beyond that, MIXED."""
        if self.limit in (0, WORD + 1):
            return np.broadcast_to(EMPTY if self.limit == 0 else FULL, np.broadcast_shapes(r.q0.shape, r.k0.shape))
        n = self.block
        top, bottom, left, right = r.q0 // n, (r.q1 - 1) // n, r.k0 // n, (r.k1 - 1) // n
        height, width = bottom - top, right - left
        few = (height < most) & (width < most)
        seen_all, seen_any = True, False
        for i in range(min(most, int(height.max(initial=0)) + 1)):
            for j in range(min(most, int(width.max(initial=0)) + 1)):
                place = (r.h, np.minimum(top + i, bottom), np.minimum(left + j, right))
                seen: Flags = np.asarray(self._draw(*place) < self.limit)
                seen_all, seen_any = seen_all & seen, seen_any | seen
        return np.where(few, three(~np.asarray(seen_any), np.asarray(seen_all)), MIXED).astype(np.int8)

    def _write(self) -> Written:
        options = {"block": None if self.block == 1 else self.block, "seed": self.seed or None}
        return call("random", self.rate, **options, per_head=self.per_head or None)


def random(rate: float, block: int = 1, seed: int = 0, per_head: bool = False) -> Mask:
    """Each cell, or each `block` x `block` of them, with probability `rate`: the same ones everywhere, always.

    `hash(seed, q // block, k // block) < rate`, with the head hashed in too if `per_head`; the hash is integer-only and
    written out in docs/conventions.md. With `block` > 1 it is BigBird's random pattern (arXiv 2007.14062).

    >>> random(0.5, seed=1).to_dense(3)[0, 0].int().tolist()
    [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise MaskError(f"random(rate) is a probability between 0 and 1, got {describe(rate)}")
    seed = whole(seed, "random(seed=...)")
    if seed > WORD:
        raise MaskError(f"random(seed=...) must be below 2**32, got {seed}")
    if not isinstance(per_head, bool):
        raise MaskError(f"random(per_head=...) is True or False, got {describe(per_head)}")
    return Random(float(rate), whole(block, "random(block=...)", 1), seed, per_head)


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Mask):
    """Rows and columns of the image each differ by at most `radius`."""

    height: int
    width: int
    radius: int
    kind: ClassVar[str] = "grid"
    _numbers: ClassVar[tuple[str, ...]] = ("width", "radius")

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        rows, columns = q // self.width - k // self.width, q % self.width - k % self.width
        return (rows.abs() <= self.radius) & (columns.abs() <= self.radius)

    def _tile(self, r: Rectangles) -> States:
        w = self.width
        rows = Rectangles(r.b, r.h, r.q0 // w, (r.q1 - 1) // w + 1, r.k0 // w, (r.k1 - 1) // w + 1)
        (qa, qb), (ka, kb) = self._columns(r.q0, r.q1), self._columns(r.k0, r.k1)
        columns = Rectangles(r.b, r.h, qa, qb, ka, kb)
        return kleene_and(band(rows, -self.radius, self.radius), band(columns, -self.radius, self.radius))

    def _columns(self, first: Ints, stop: Ints) -> tuple[Ints, Ints]:
        """The columns of the image between which positions `[first, stop)` lie."""
        w = self.width
        one_row = first // w == (stop - 1) // w
        return np.where(one_row, first % w, 0), np.where(one_row, (stop - 1) % w + 1, w)

    def _check(self, q_stop: int, k_stop: int) -> None:
        if max(q_stop, k_stop) > self.height * self.width:
            raise MaskError(
                f"`{self}` is an image of {self.height} x {self.width} = {self.height * self.width} positions, but was "
                f"asked about {max(q_stop, k_stop)}"
            )

    def _write(self) -> Written:
        return call("grid", self.height, self.width, self.radius)


def grid(height: int, width: int, radius: int) -> Mask:
    """2-D neighbourhoods of an image in row order: both coordinates differ by at most `radius`.

    Position p is row `p // width`, column `p % width`. (Neighbourhood attention without its shifted borders,
    arXiv 2204.07143: at the edge of the image the neighbourhood is cut, not moved.)

    >>> grid(2, 3, 1).to_dense(6)[0, 0, 0].int().tolist()  # the corner sees four pixels
    [1, 1, 0, 1, 1, 0]
    """
    sizes = whole(height, "grid(height)", 1), whole(width, "grid(width)", 1), whole(radius, "grid(radius)")
    return Grid(*sizes)
