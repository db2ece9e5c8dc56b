"""Masks that are patterns of positions: dilated, strided, random, grid."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.formatting import describe
from truemask.common.real_tensors import remembered
from truemask.errors import MaskError
from truemask.geometry.logic import EMPTY, FULL, MIXED, Flags, States, kleene_and, tri_state
from truemask.geometry.slabs.algebra import pieces
from truemask.geometry.slabs.slabs import FAR, Region, Slabs, affordable, bands, from_cells
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import call
from truemask.masks.core.value import Written
from truemask.masks.hashing import WORD, hash32, threshold
from truemask.masks.leaves.bands import band


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
        return tri_state(none, ~none & ((self.step == 1) | (least == most)))

    def _slabs(self, r: Region) -> Slabs:
        first, stop = (r.k0 - r.q1) // self.step, (r.k1 - r.q0) // self.step + 1
        affordable(stop - first)
        start = np.arange(first, stop) * self.step
        return (
            bands(r.q0, r.q1, start[0], 1, start[-1] + 1, 1)
            if self.step == 1
            else bands(r.q0, r.q1, start, 1, start + 1, 1)
        )

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return [(r.k0 - r.q0) % self.step]

    def _periodic_from(self, k_stop: int) -> tuple[int, int]:
        return 0, self.step

    def _write(self) -> Written:
        return call("dilated", self.step)


@deferrable
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
        true_cells = self._before(r.k1) - self._before(r.k0)
        return tri_state(true_cells == 0, true_cells == r.k1 - r.k0)

    def _slabs(self, r: Region) -> Slabs:
        if self.last == self.step:
            return bands(r.q0, r.q1, -FAR, 0, FAR, 0)
        first, stop = r.k0 // self.step, r.k1 // self.step + 1
        affordable(stop - first)
        end = (np.arange(first, stop) + 1) * self.step
        return bands(r.q0, r.q1, end - self.last, 0, end, 0)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return [r.k0 % self.step]

    def _write(self) -> Written:
        return call("strided", self.step, last=None if self.last == 1 else self.last)


@deferrable
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

    @remembered
    def head_count(self) -> int:
        return 0 if self.per_head else 1

    def _draw(self, h: Tensor | Ints, row: Tensor | Ints, column: Tensor | Ints) -> Tensor | Ints:
        return hash32(self.seed, h, row, column) if self.per_head else hash32(self.seed, row, column)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        drawn = self._draw(h, q // self.block, k // self.block) < vars(self)["limit"]
        return drawn & (q == q) & (k == k)  # pyright: ignore[reportReturnType]

    def _tile(self, r: Rectangles, most: int = 8) -> States:
        """Blocks are hashed where a rectangle meets at most `most` of them a side; beyond that, MIXED."""
        if self.limit in (0, WORD + 1):
            return np.broadcast_to(EMPTY if self.limit == 0 else FULL, np.broadcast_shapes(r.q0.shape, r.k0.shape))
        n = self.block
        top, bottom, left, right = r.q0 // n, (r.q1 - 1) // n, r.k0 // n, (r.k1 - 1) // n
        height, width = bottom - top, right - left
        few = (height < most) & (width < most)
        tallest, widest = (int(np.broadcast_to(x, few.shape)[few].max(initial=-1)) + 1 for x in (height, width))
        seen_all, seen_any = True, False
        for i in range(tallest):
            for j in range(widest):
                place = (r.h, np.minimum(top + i, bottom), np.minimum(left + j, right))
                true_cells: Flags = np.asarray(self._draw(*place) < self.limit)
                seen_all, seen_any = seen_all & true_cells, seen_any | true_cells
        return np.where(few, tri_state(~np.asarray(seen_any), np.asarray(seen_all)), MIXED).astype(np.int8)

    def _slabs(self, r: Region) -> Slabs:
        """Where all blocks may be hashed: runs of the blocks of each row of blocks."""
        n = self.block
        sides = [range(first // n, (stop - 1) // n + 1) for first, stop in ((r.q0, r.q1), (r.k0, r.k1))]
        affordable(len(sides[0]) * len(sides[1]))
        row, column = (np.arange(side.start, side.stop) for side in sides)
        drawn = np.asarray(self._draw(np.asarray(r.h), row[:, None], column) < self.limit)
        return from_cells(np.append(np.maximum(row * n, r.q0), r.q1), np.append(column, column[-1] + 1) * n, drawn)

    def _distinct_key(self, b: int, h: int) -> Hashable:
        return h if self.per_head else 0

    def _periodic_from(self, k_stop: int) -> tuple[int, int] | None:
        return (0, 1) if self.limit in (0, WORD + 1) else None

    def _write(self) -> Written:
        options = {"block": None if self.block == 1 else self.block, "seed": self.seed or None}
        return call("random", self.rate, **options, per_head=self.per_head or None)


@deferrable
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

    def _slabs(self, r: Region) -> Slabs:
        """For each row of the image and each row near it: from the left edge, in the middle, to the right edge."""
        w, radius = self.width, self.radius
        reach = min(radius, self.height)
        affordable(self.height * (2 * reach + 1))
        top = np.arange(r.q0 // w, (r.q1 - 1) // w + 1)[:, None, None] * w
        near = top + np.arange(-reach, reach + 1)[None, :, None] * w
        left, right = min(radius, w), max(w - radius, 0)
        cuts = np.array([0, min(left, right), max(left, right), w])
        begin, at_left, at_right = cuts[:-1], cuts[:-1] < left, cuts[:-1] >= right
        inside = (near >= 0) & (near < self.height * w)
        lo, hi = np.where(at_left, near, near - top - radius), np.where(at_right, near + w, near - top + radius + 1)
        s, t = np.where(at_left, 0, 1), np.where(at_right, 0, 1)
        return pieces(r.q0, r.q1, top + begin, np.where(inside, top + cuts[1:], top), lo, hi, s, t)

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


@deferrable
def grid(height: int, width: int, radius: int) -> Mask:
    """2-D neighbourhoods of an image in row order: both coordinates differ by at most `radius`.

    Position p is row `p // width`, column `p % width`. (Neighbourhood attention without its shifted borders,
    arXiv 2204.07143: at the edge of the image the neighbourhood is cut, not moved.)

    >>> grid(2, 3, 1).to_dense(6)[0, 0, 0].int().tolist()  # the corner sees four pixels
    [1, 1, 0, 1, 1, 0]
    """
    sizes = whole(height, "grid(height)", 1), whole(width, "grid(width)", 1), whole(radius, "grid(radius)")
    return Grid(*sizes)
