"""How a mask is known: exactly, by its slabs; else by its tiles, and by the cells of those that stay MIXED.

Samples and heads that have the same mask are looked at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from truemask.common.real_tensors import is_diverted, ordinary_tensors
from truemask.errors import MaskError
from truemask.geometry.logic import States
from truemask.geometry.slabs.measure import tile_runs
from truemask.geometry.slabs.normal_form import Form
from truemask.geometry.slabs.slabs import Flags, NoExactFormError, Region, Slabs, blank
from truemask.geometry.tiles.quadtree import TooManyTilesError, classify_tiles
from truemask.geometry.tiles.tile_map import Evaluate, Ints, Phase, Plane, Rectangles, TileMap

MOST_ROWS = 1 << 24  # of tiles, that a map may have
MOST_EVALUATED, MOST_MIXED = 1 << 30, 1 << 23  # cells that a question may evaluate (a minute or a few), and tiles
KEPT, KEPT_RUNS = 4, 1 << 16  # exact forms that a mask remembers, and how many runs one may have

Answer = TypeVar("Answer")


class Exact(ABC):
    """What the questions stand on."""

    _tiles_exact: ClassVar[bool] = False  # whether `_tile` answers MIXED only where both values occur

    holds_cells: Any  # bool: whether some cells are read from a tensor, so that regions are read faster than places

    @abstractmethod
    def truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q may attend to key k, on index tensors that broadcast."""

    @abstractmethod
    def _tile(self, r: Rectangles) -> States:
        """Three-valued answers that broadcast with the rectangles."""

    @abstractmethod
    def form_in(self, r: Region) -> Form:
        """The exact form for a region that is not empty, or `NoExactFormError`; it may be rough or negated."""

    @abstractmethod
    def _variant(self, b: int, h: int) -> Hashable:
        """What tells sample b and head h from others."""

    @abstractmethod
    def _phase(self, r: Rectangles) -> Sequence[Ints]:
        """Numbers that are equal for tiles only if their cells are."""

    def _variants(self, samples: int, heads: int) -> tuple[list[tuple[int, int]], Ints]:
        """A sample and head of each distinct mask, and which of them `[samples, heads]` have."""
        if (samples, heads) == (1, 1):
            return [(0, 0)], np.zeros((1, 1), np.int64)
        numbers: dict[Hashable, int] = {}
        members: list[tuple[int, int]] = []
        which = np.zeros((samples, heads), np.int64)
        for b, h in np.ndindex(samples, heads):
            number = numbers.setdefault(self._variant(b, h), len(numbers))
            which[b, h] = number
            if number == len(members):
                members.append((b, h))
        return members, which

    def _for_each(self, answer: Callable[[int, int], Answer], samples: int, heads: int, *size: int) -> Tensor:
        """An answer of this size for each sample and head, `[samples, heads, *size]`."""
        members, which = self._variants(samples, heads)
        found = [np.asarray(answer(b, h)) for b, h in members]
        return (
            torch.from_numpy(np.stack(found)[which]) if found else torch.zeros(samples, heads, *size, dtype=torch.int64)
        )

    def _exact(self, b: int, h: int, q_len: int, kv_len: int) -> Slabs | None:
        """The slabs of one sample and head, cut to the keys there are; None if the mask has no such form."""
        found = self._rough(b, h, q_len, kv_len)
        return None if found is None else found.settled

    def _rough(self, b: int, h: int, q_len: int, kv_len: int) -> Slabs | None:
        """The same as rough slabs, which is enough to count."""
        known: dict[Any, Slabs | None] = vars(self).setdefault("_known", {})
        key = (b, h, q_len, kv_len)
        found = known.get(key, "unknown")  # asked once: another thread may clear it at any time
        if not isinstance(found, str):
            return found
        try:
            found = None if min(key[2:]) == 0 else self.form_in(Region(b, h, 0, q_len, 0, kv_len, {}))
            found = blank(0, q_len) if found is None else found.clipped(kv_len)
        except NoExactFormError:
            found = None
        if found is None or found.ends.shape[1] <= KEPT_RUNS:
            if len(known) >= KEPT:
                known.clear()
            known[key] = found
        return found

    def _map(
        self, b: int, h: int, q_len: int, kv_len: int, block: tuple[int, int], most_mixed: int | None = None
    ) -> TileMap:
        """The tiles of one sample and head: `[1, 1, rows, columns]`."""
        shape = (1, 1, -(-q_len // block[0]), -(-kv_len // block[1]))
        if shape[2] > MOST_ROWS:
            raise MaskError(f"{q_len} queries are {shape[2]} rows of tiles of {block[0]}: ask with larger blocks")
        slabs = self._exact(b, h, q_len, kv_len)
        if slabs is not None:
            starts, runs = tile_runs(slabs, kv_len, block)
        else:
            try:
                starts, runs = classify_tiles(self._tile, q_len, kv_len, block, b, h, most_mixed)
            except TooManyTilesError as error:
                raise self._beyond(f"{error} of {block[0]} x {block[1]} are too many", q_len, kv_len) from None
        evaluate, phase, plane = self._looked_at(b, h)
        known = slabs is not None or self._tiles_exact
        return TileMap(q_len, kv_len, block, shape, starts, runs, evaluate, known, phase, plane)

    def _beyond(self, why: str, q_len: int, kv_len: int) -> MaskError:
        """What to say where tiles or cells are more than can be looked at."""
        return MaskError(
            f"`{self}` has no exact form, and {why} for {q_len} queries and {kv_len} keys: ask about fewer rows at a "
            "time (`mask.at(q_start=...)`), or about larger tiles (`tiles(..., block=1024)`)"
        )

    def _looked_at(self, b: int, h: int) -> tuple[Evaluate, Phase, Plane | None]:
        """What cells and tiles answer in sample b and head h, which a map of one calls 0."""

        def evaluate(b_: Ints, h_: Ints, q: Ints, k: Ints) -> Flags:
            return self._cells(b_ + b, h_ + h, q, k)

        def phase(r: Rectangles) -> Sequence[Ints]:
            return self._phase(r.moved(b=r.b + b, h=r.h + h))

        def plane(r: Region) -> Flags:
            return self._plane(r._replace(b=r.b + b, h=r.h + h))

        return evaluate, phase, plane if self.holds_cells else None

    def _searched(self, b: int, h: int, q_len: int, kv_len: int) -> TileMap:
        """The tiles of a mask without exact form, if looking at their cells is affordable."""
        tiles = self._map(b, h, q_len, kv_len, (128, 128), MOST_MIXED)
        cells = tiles.cells_to_evaluate
        if cells > MOST_EVALUATED:
            raise self._beyond(f"{cells} cells to evaluate are too many", q_len, kv_len)
        return tiles

    def _plane(self, r: Region) -> Flags:
        """The cells of a region; a view, where the mask is a tensor."""
        q, k = np.arange(r.q0, r.q1)[:, None], np.arange(r.k0, r.k1)
        return self._cells(np.asarray(r.b), np.asarray(r.h), q, k)

    def _cells(self, b: Any, h: Any, q: Any, k: Any) -> Flags:
        """`truth` on numpy arrays."""
        with ordinary_tensors() if is_diverted() else nullcontext():
            return self.truth(*map(torch.from_numpy, (b, h, q, k))).numpy()
