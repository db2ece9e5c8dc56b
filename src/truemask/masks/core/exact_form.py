"""How a mask is known: exactly, by its slabs; else by its tiles, and by the cells of those that stay MIXED.

Samples and heads that have the same mask are looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from truemask.errors import MaskError
from truemask.geometry.slabs.measure import tile_runs
from truemask.geometry.slabs.slabs import Flags, NoExactFormError, Region, Slabs, blank
from truemask.geometry.tiles.quadtree import TooManyTilesError, classify_tiles
from truemask.geometry.tiles.tile_map import Evaluate, Ints, Plane, Rectangles, TileKey, TileMap
from truemask.masks.core.value import Value

MAX_TILE_ROWS = 1 << 24  # of tiles, that a map may have
MAX_QUESTION_CELLS = 1 << 30  # that a question may evaluate: a minute or a few
MAX_MIXED_TILES = 1 << 23  # that a question may look at
KEPT_FORMS, KEPT_RUNS = 4, 1 << 16  # exact forms that a mask remembers, and how many runs one may have

Answer = TypeVar("Answer")


def variants(mask: Value, samples: int, heads: int) -> tuple[list[tuple[int, int]], Ints]:
    """A sample and head of each distinct mask, and which of them `[samples, heads]` have."""
    if (samples, heads) == (1, 1):
        return [(0, 0)], np.zeros((1, 1), np.int64)
    numbers: dict[Hashable, int] = {}
    members: list[tuple[int, int]] = []
    which = np.zeros((samples, heads), np.int64)
    for b, h in np.ndindex(samples, heads):
        number = numbers.setdefault(mask._distinct_key(b, h), len(numbers))
        which[b, h] = number
        if number == len(members):
            members.append((b, h))
    return members, which


def for_each(mask: Value, answer: Callable[[int, int], Answer], samples: int, heads: int, *size: int) -> Tensor:
    """An answer of this size for each sample and head, `[samples, heads, *size]`."""
    members, which = variants(mask, samples, heads)
    answers = [np.asarray(answer(b, h)) for b, h in members]
    return (
        torch.from_numpy(np.stack(answers)[which]) if answers else torch.zeros(samples, heads, *size, dtype=torch.int64)
    )


def exact_slabs(mask: Value, b: int, h: int, q_len: int, kv_len: int) -> Slabs | None:
    """The slabs of one sample and head, cut to the keys there are; None if the mask has no such form."""
    slabs = unmerged_slabs(mask, b, h, q_len, kv_len)
    return None if slabs is None else slabs.canonical


def unmerged_slabs(mask: Value, b: int, h: int, q_len: int, kv_len: int) -> Slabs | None:
    """The same as unmerged slabs, which is enough to count."""
    remembered: dict[Any, Slabs | None] = vars(mask).setdefault("_known", {})
    key = (b, h, q_len, kv_len)
    slabs = remembered.get(key, "unknown")  # asked once: another thread may clear it at any time
    if not isinstance(slabs, str):
        return slabs
    try:
        form = None if min(key[2:]) == 0 else mask.form_in(Region(b, h, 0, q_len, 0, kv_len, {}))
        slabs = blank(0, q_len) if form is None else form.clipped(kv_len)
    except NoExactFormError:
        slabs = None
    if slabs is None or slabs.ends.shape[1] <= KEPT_RUNS:
        if len(remembered) >= KEPT_FORMS:
            remembered.clear()
        remembered[key] = slabs
    return slabs


def tile_map(
    mask: Value, b: int, h: int, q_len: int, kv_len: int, block: tuple[int, int], most_mixed: int | None = None
) -> TileMap:
    """The tiles of one sample and head: `[1, 1, rows, columns]`."""
    shape = (1, 1, -(-q_len // block[0]), -(-kv_len // block[1]))
    if shape[2] > MAX_TILE_ROWS:
        raise MaskError(f"{q_len} queries are {shape[2]} rows of tiles of {block[0]}: ask with larger blocks")
    slabs = exact_slabs(mask, b, h, q_len, kv_len)
    if slabs is not None:
        starts, runs = tile_runs(slabs, kv_len, block)
    else:
        try:
            starts, runs = classify_tiles(mask._tile, q_len, kv_len, block, b, h, most_mixed)
        except TooManyTilesError as error:
            raise _too_large(mask, f"{error} of {block[0]} x {block[1]} are too many", q_len, kv_len) from None
    evaluate, tile_key, plane = _looked_at(mask, b, h)
    is_exact = slabs is not None or mask._tiles_exact
    return TileMap(q_len, kv_len, block, shape, starts, runs, evaluate, is_exact, tile_key, plane)


def searched_tiles(mask: Value, b: int, h: int, q_len: int, kv_len: int) -> TileMap:
    """The tiles of a mask without exact form, if looking at their cells is affordable."""
    tiles = tile_map(mask, b, h, q_len, kv_len, (128, 128), MAX_MIXED_TILES)
    cells = tiles.cells_to_evaluate
    if cells > MAX_QUESTION_CELLS:
        raise _too_large(mask, f"{cells} cells to evaluate are too many", q_len, kv_len)
    return tiles


def _too_large(mask: Value, why: str, q_len: int, kv_len: int) -> MaskError:
    """What to say where tiles or cells are more than can be looked at."""
    return MaskError(
        f"`{mask}` has no exact form, and {why} for {q_len} queries and {kv_len} keys: ask about fewer rows at a "
        "time (`mask.at(q_start=...)`), or about larger tiles (`tiles(..., block=1024)`)"
    )


def _looked_at(mask: Value, b: int, h: int) -> tuple[Evaluate, TileKey, Plane | None]:
    """What cells and tiles answer in sample b and head h, which a map of one calls 0."""

    def evaluate(b_: Ints, h_: Ints, q: Ints, k: Ints) -> Flags:
        return mask._cells(b_ + b, h_ + h, q, k)

    def tile_key(r: Rectangles) -> Sequence[Ints]:
        return mask._tile_key(r.moved(b=r.b + b, h=r.h + h))

    def plane(r: Region) -> Flags:
        return mask._plane(r._replace(b=r.b + b, h=r.h + h))

    return evaluate, tile_key, plane if mask.holds_cells else None
