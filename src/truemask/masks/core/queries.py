"""The answers to what `Mask` is asked about given sizes: tiles, cells, counts, dead rows, equivalence.

Each question is a method of `Mask`, where it is explained, and a function here, where it is answered.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from truemask.common.arguments import MAX_POSITION, whole
from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.geometry.slabs.algebra import cropped
from truemask.geometry.slabs.measure import first_cell, keys_in_runs, last_rows, live_rows, pairs, seen_keys
from truemask.geometry.slabs.slabs import NoExactFormError, Region
from truemask.geometry.tiles.measure import first_cell_in, last_rows_in, live_in, pairs_in
from truemask.geometry.tiles.tile_map import BATCH_CELLS, Ints, TileMap, shared
from truemask.masks.core.exact_form import exact_slabs, for_each, searched_tiles, tile_map, unmerged_slabs, variants
from truemask.masks.core.slab_tensors import SlabTensors, slab_tensors
from truemask.masks.core.value import ANY, Value
from truemask.masks.core.verdict import Cell, Verdict

TILED_FROM_CELLS = 1 << 16  # cells from which on a dense mask is filled tile by tile


class Sizes(NamedTuple):
    """Checked sizes of an answer; `samples` and `heads` are 1 where the mask does not vary."""

    samples: int
    heads: int
    q_len: int
    kv_len: int


def sizes_of(mask: Value, q_len: int, kv_len: int | None, batch: int | None, heads: int | None) -> Sizes:
    """The sizes of a question, or a MaskError if the mask cannot answer for them."""
    q_len = int(whole(q_len, "q_len"))  # an answer is of one size, also while a graph for many is recorded
    kv_len = int(mask.kv_len_for(q_len) if kv_len is None else whole(kv_len, "kv_len"))
    check(mask, q_len, kv_len, batch, heads)
    samples = _axis(mask, "batch", mask.batch_size, batch)
    return Sizes(samples, _axis(mask, "heads", mask.head_count, heads), q_len, kv_len)


def _axis(mask: Value, name: str, size: int, asked_size: int | None) -> int:
    """The size of the batch or head axis of an answer: 1 where the mask does not vary."""
    if size == ANY and asked_size is None:
        axis = {"batch": "samples", "heads": "heads"}[name]
        raise MaskError(f"the mask `{mask}` varies over {axis} and holds no number of them: pass `{name}=`")
    return 1 if size == 1 else size or (asked_size or 0)


def check(mask: Value, q_len: int, kv_len: int, batch: int | None, heads: int | None) -> None:
    """Raise a MaskError if the mask cannot answer for these sizes."""
    for name, size, held in (("samples", batch, mask.batch_size), ("heads", heads, mask.head_count)):
        if size is not None and whole(size, name) != held and held not in (ANY, 1):
            raise MaskError(f"the mask `{mask}` holds data for {held} {name}, but was asked about {size}")
    mask._check(q_len, kv_len)


# -- tiles and cells ---------------------------------------------------------------------------------------------------


def tiles(mask: Value, sizes: Sizes, block: int | tuple[int, int]) -> TileMap:
    """Which tiles are EMPTY, MIXED or FULL."""
    samples, heads, q_len, kv_len = sizes
    pair = (block, block) if not isinstance(block, tuple) else block
    if len(pair) != 2:
        raise MaskError(f"block is an int or a pair (queries, keys), got {describe(block)}")
    extent = (whole(pair[0], "block", 1), whole(pair[1], "block", 1))
    members, which = variants(mask, samples, heads)
    maps = [tile_map(mask, b, h, q_len, kv_len, extent) for b, h in members or [(0, 0)]]
    if which.size == 1:
        return maps[0]
    return shared(maps, which, mask._cells, mask._tile_key, mask._plane if mask.holds_cells else None)


def dense(mask: Value, sizes: Sizes, device: torch.device | str) -> Tensor:
    """Every cell, `[b, h, q, k]`."""
    if torch.device(device).type == "cpu" and sizes.q_len * sizes.kv_len > TILED_FROM_CELLS:
        return torch.from_numpy(_planes(mask, sizes) if mask.holds_cells else tiles(mask, sizes, 128).dense())
    return mask.truth(*indices(*sizes, device)).contiguous()


def _planes(mask: Value, sizes: Sizes) -> NDArray[np.bool_]:
    """Every cell `[b, h, q, k]`, some rows at a time: what is combined with the mask's tensors takes memory too."""
    cells = np.zeros(sizes, bool)
    step = max(1, BATCH_CELLS // max(1, sizes.kv_len))
    for b, h in np.ndindex(sizes.samples, sizes.heads):
        for row in range(0, sizes.q_len, step):
            last = min(row + step, sizes.q_len)
            cells[b, h, row:last] = mask._plane(Region(b, h, row, last, 0, sizes.kv_len))
    return cells


def indices(b: int, h: int, q: int, k: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tensors `[b, 1, 1, 1]`, `[1, h, 1, 1]`, `[1, 1, q, 1]` and `[1, 1, 1, k]`."""
    first, second, third, last = (torch.arange(size, device=device) for size in (b, h, q, k))
    return first.view(-1, 1, 1, 1), second.view(1, -1, 1, 1), third.view(1, 1, -1, 1), last.view(1, 1, 1, -1)


def cell(mask: Value, place: tuple[int, int]) -> bool:
    """Whether query `place[0]` may attend to key `place[1]`, of a mask that does not vary."""
    if not (isinstance(place, tuple) and len(place) == 2):
        raise MaskError(f"a cell is `mask[q, k]`, two whole numbers; got {describe(place)}")
    q, k = whole(place[0], "q"), whole(place[1], "k")
    check(mask, q + 1, k + 1, None, None)
    if (mask.batch_size, mask.head_count) != (1, 1):
        raise MaskError(
            f"the mask `{mask}` varies over {'samples' if mask.batch_size != 1 else 'heads'}: choose one first, "
            "with `mask.select(samples=[0], heads=[0])[q, k]`"
        )
    zero = torch.zeros((), dtype=torch.int64)
    return bool(mask.truth(zero, zero, zero + q, zero + k))


def sees(mask: Value, b: int, h: int, q: int, k: int) -> bool:
    """One cell, without tables of all positions where slabs know it."""
    try:
        return len(cropped(mask.slabs_in(Region(b, h, q, q + 1, k, k + 1)), k, k + 1).owner) > 0
    except NoExactFormError:
        return bool(mask.truth(*(torch.tensor(i) for i in (b, h, q, k))))


def slabs(mask: Value, sizes: Sizes) -> SlabTensors:
    """The exact form as plain tensors."""
    samples, heads, q_len, kv_len = sizes
    members, which = variants(mask, samples, heads)
    parts = [part for b, h in members if (part := exact_slabs(mask, b, h, q_len, kv_len)) is not None]
    if len(parts) < len(members):
        raise MaskError(
            f"`{mask}` has no exact form for {q_len} queries and {kv_len} keys: `tiles(...)` and `to_dense(...)` "
            "answer for such masks"
        )
    return slab_tensors(parts, which)


# -- counts and rows ---------------------------------------------------------------------------------------------------


def count(mask: Value, sizes: Sizes) -> Tensor:
    """The number of pairs let through, int64 `[b, h]`."""
    samples, heads, q_len, kv_len = sizes

    def pairs_of(b: int, h: int) -> int:
        form = unmerged_slabs(mask, b, h, q_len, kv_len)
        number = pairs_in(searched_tiles(mask, b, h, q_len, kv_len)) if form is None else pairs(form)
        if number >= 1 << 63:
            raise MaskError(f"`{mask}` lets {number} pairs through, more than int64 holds: ask about fewer queries")
        return number

    return for_each(mask, pairs_of, samples, heads)


def live_queries(mask: Value, sizes: Sizes) -> Tensor:
    """Which queries see some key, bool `[b, h, q]`."""
    samples, heads, q_len, kv_len = sizes

    def live(b: int, h: int) -> NDArray[np.bool_]:
        form = exact_slabs(mask, b, h, q_len, kv_len)
        return live_in(searched_tiles(mask, b, h, q_len, kv_len), 0) if form is None else live_rows(form)

    return for_each(mask, live, samples, heads, q_len).bool()


def seen(mask: Value, sizes: Sizes) -> Tensor:
    """Which keys some query sees, bool `[b, h, k]`."""
    samples, heads, q_len, kv_len = sizes

    def live(b: int, h: int) -> NDArray[np.bool_]:
        form = exact_slabs(mask, b, h, q_len, kv_len)
        return live_in(searched_tiles(mask, b, h, q_len, kv_len), 1) if form is None else seen_keys(form, kv_len)

    return for_each(mask, live, samples, heads, kv_len).bool()


def last_seen(mask: Value, sizes: Sizes, most_cells: int) -> Ints | None:
    """The last query, over all samples and heads, that sees each key: int64 `[k]`, -1 for none.

    None if more than `most_cells` cells of one sample and head would have to be looked at.
    """
    samples, heads, q_len, kv_len = sizes
    last = np.full(kv_len, -1, np.int64)
    for b, h in variants(mask, samples, heads)[0]:
        own = _last_seen_by(mask, Region(b, h, 0, q_len, 0, kv_len), most_cells)
        if own is None:
            return None
        last = np.maximum(last, own)
    return last


def _last_seen_by(mask: Value, r: Region, most_cells: int) -> Ints | None:
    form = exact_slabs(mask, r.b, r.h, r.q1, r.k1)
    if form is not None:
        return last_rows(form, r.k1) if keys_in_runs(form) <= most_cells else None
    tiles = tile_map(mask, r.b, r.h, r.q1, r.k1, (128, 128))
    return last_rows_in(tiles) if tiles.cells_to_evaluate <= most_cells else None


def first(mask: Value, sizes: Sizes) -> Cell | None:
    """A cell that is True, or None if there is none."""
    samples, heads, q_len, kv_len = sizes
    for b, h in variants(mask, samples, heads)[0]:
        form = unmerged_slabs(mask, b, h, q_len, kv_len)
        place = first_cell_in(searched_tiles(mask, b, h, q_len, kv_len)) if form is None else first_cell(form)
        if place is not None:
            return Cell(b, h, *place)
    return None


def last_query(mask: Value, q_start: int, kv_len: int) -> int:
    """A row behind which no query sees any of the first keys that none before saw."""
    periodic = mask._periodic_from(kv_len)
    rows = rows_held(mask)
    if periodic is None and rows is None:
        raise MaskError(
            f"live_keys: what `{mask}` lets later queries see of {kv_len} keys never repeats, and nothing says "
            "where queries end: pass `q_stop=`, the number of queries that there will be"
        )
    stop = rows if periodic is None else max(q_start, periodic[0]) + periodic[1]
    return min(stop, rows) if stop is not None and rows is not None else stop or 0


def rows_held(mask: Value) -> int | None:
    """How many queries the mask's data answer for; None if for any number."""

    def answers(q_stop: int) -> bool:
        try:
            mask._check(q_stop, 0)
        except MaskError:
            return False
        return True

    if answers(MAX_POSITION - 1):
        return None
    low, high = 0, MAX_POSITION - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if answers(middle) else (low, middle)
    return low


# -- two masks ---------------------------------------------------------------------------------------------------------


def refuted(
    mask: Value, other: Value, against: Value, q_len: int, kv_len: int | None, batch: int | None, heads: int | None
) -> Verdict:
    """What a cell of `against`, if there is one, says of a mask and another."""
    kv_len = mask.kv_len_for(whole(q_len, "q_len")) if kv_len is None else kv_len
    place = first(against, sizes_of(against, q_len, kv_len, batch, heads))
    if place is None:
        return Verdict(None)
    sees_it, hides_it = (mask, other) if sees(mask, *place) else (other, mask)
    axes = zip(("sample", "head"), place, (against.batch_size, against.head_count), strict=False)
    where = "".join(f" in {name} {index}" for name, index, size in axes if size != 1)
    text = f"query {place.query} may see key {place.key}{where} under `{sees_it}`"
    return Verdict(place, f"no: {text}, but not under `{hides_it}`")


def positions(mask: Value, q_len: int, kv_len: int | None) -> tuple[Tensor, Tensor]:
    """The logical positions of rows and keys."""
    kv_len = mask.kv_len_for(q_len) if kv_len is None else kv_len
    q, k = torch.arange(q_len), torch.arange(kv_len)
    mask._check(q_len, kv_len)
    return mask._logical(q, k) or (q, k)
