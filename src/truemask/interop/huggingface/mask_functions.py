"""The mask functions of transformers as expressions: recognised by structure; what nobody knows stays a `predicate`.

transformers composes closures `f(b, h, q, k) -> bool` in `transformers.masking_utils` (5.23). The names of those
closures and the variables that they hold say exactly what they mean. A function from elsewhere is opaque: it is asked
cell by cell, and never dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.interop.padding import alike
from truemask.masks.compose.boolean import conjunction, everything, nothing
from truemask.masks.compose.per_axis import per_sample
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, local, window
from truemask.masks.leaves.documents import documents, same
from truemask.masks.leaves.per_token import keys
from truemask.masks.leaves.predicate import predicate
from truemask.masks.structure.order import window_size

MaskFunction = Callable[..., Any]
HOME = "transformers.masking_utils"


@dataclass(frozen=True)
class Packing:
    """Several documents in a row: the document of each token and its position there, int64 `[n]` or `[b, n]`."""

    ids: Tensor
    positions: Tensor

    def of(self, mask: Mask) -> Mask:
        """The mask inside each document, at positions that restart there (law 2 in docs/conventions.md)."""
        lengths = self._lengths()
        if lengths is not None:
            return mask.packed(lengths)
        return documents(ids=self.ids) & mask.take(q=self.positions, k=self.positions)

    def _lengths(self) -> list[Any] | None:
        """Tokens per document, if each document is one run of tokens that counts from 0."""
        rows = [ids.unique_consecutive(return_counts=True)[1].tolist() for ids in torch.atleast_2d(self.ids)]
        for lengths, positions in zip(rows, torch.atleast_2d(self.positions), strict=True):
            if not torch.equal(positions, torch.cat([torch.arange(n) for n in lengths])):
                return None
        return rows[0] if len(rows) == 1 else rows


@dataclass(frozen=True)
class Lifted:
    """A mask function as an expression over absolute positions, and what was met on the way.

    `looks_back`: a causal function is part of it, so keys behind the last query are not written yet. `packing`: the
    documents that it keeps apart; `unpacked` is the mask without them, over the rows as they lie.
    """

    mask: Mask
    looks_back: bool = False
    packing: Packing | None = None
    unpacked: Mask | None = None

    @property
    def bare(self) -> Mask:
        """The mask without documents."""
        return self.mask if self.unpacked is None else self.unpacked


def lift(function: MaskFunction, *, cell_by_cell: bool = False) -> Lifted:
    """A mask function of transformers as an expression.

    Args:
        function: `f(b, h, q, k) -> bool`, as `transformers.masking_utils` composes them, or anybody's.
        cell_by_cell: an unknown function may only be asked about single cells, as transformers asks `or_mask_function`
            and `and_mask_function` (its `use_vmap=True`).

    >>> lift(lambda b, h, q, k: q + k < 5).mask
    predicate(<lambda>)
    """
    name, held = _name(function), _held_by(function)
    if name == "causal_mask_function":
        return Lifted(causal, looks_back=True)
    if name in LEAVES:
        return Lifted(LEAVES[name](held))
    if name == ADD_OFFSETS:
        inner = lift(held["mask_function"], cell_by_cell=cell_by_cell)
        starts = {"q_start": int(held["q_offset"]), "k_start": int(held["kv_offset"])}
        unpacked = None if inner.unpacked is None else inner.unpacked.at(**starts)
        return Lifted(inner.mask.at(**starts), inner.looks_back, inner.packing, unpacked)
    if name in (AND, OR):
        functions = held["mask_functions"]
        if [_name(part) for part in functions] == [PACKED, REMAPPED]:
            return _packed(_held_by(functions[0]), _held_by(functions[1]), cell_by_cell)
        parts = [lift(part, cell_by_cell=cell_by_cell) for part in functions]
        joined = _all_of if name == AND else _any_of
        mask, unpacked = joined([part.mask for part in parts]), joined([part.bare for part in parts])
        packing = next((part.packing for part in parts if part.packing is not None), None)
        return Lifted(mask, any(part.looks_back for part in parts), packing, unpacked)
    if not callable(function):
        raise MaskError(f"a mask function of transformers takes (b, h, q, k), got {describe(function)}")
    return Lifted(predicate(each_cell(function) if cell_by_cell else function))


def each_cell(function: MaskFunction) -> MaskFunction:
    """A function of single cells as one of index tensors that broadcast."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    def cells(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        places = torch.broadcast_tensors(b, h, q, k)
        with TransformGetItemToIndex():  # a tensor may then be indexed by a cell's numbers
            answers = torch.vmap(function)(*[place.reshape(-1) for place in places])
        return answers.view(places[0].shape)

    cells.__qualname__ = getattr(function, "__qualname__", type(function).__name__)
    return cells


def _name(function: MaskFunction) -> str:
    """What transformers calls the closure; nothing for anybody else's, whose code stands in another file."""
    home, code = sys.modules.get(HOME), getattr(function, "__code__", None)
    ours = home is not None and code is not None and code.co_filename == home.causal_mask_function.__code__.co_filename
    return getattr(function, "__qualname__", "") if ours else ""


def _held_by(function: MaskFunction) -> dict[str, Any]:
    """The variables that a closure holds, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return (
        {} if code is None else dict(zip(code.co_freevars, [cell.cell_contents for cell in cells or ()], strict=True))
    )


def _packed(same_document: dict[str, Any], remapped: dict[str, Any], cell_by_cell: bool) -> Lifted:
    """What `packed_sequence_compatibility_function` makes: a mask inside documents, at positions that restart."""
    packing = Packing(alike(same_document["packed_sequence_mask"]), alike(remapped["position_ids"]))
    inside = lift(remapped["mask_function"], cell_by_cell=cell_by_cell)
    return Lifted(packing.of(inside.mask), inside.looks_back, packing, inside.mask)


def _all_of(masks: Sequence[Mask]) -> Mask:
    """The conjunction, in the words that the language has for it: `not before the window` and causal are `window`."""
    windows = [near for mask in masks if (near := _window_of(mask)) is not None]
    if windows and causal in masks:
        masks = [*windows, *[mask for mask in masks if mask != causal and _window_of(mask) is None]]
    return conjunction(*masks)


def _any_of(masks: Sequence[Mask]) -> Mask:
    return reduce(or_, masks)


def _not_before(size: int) -> Mask:
    """k > q - size: what a sliding window hides of the past, and nothing else; of no size (Qwen2-MoE) it hides all."""
    return window(size) | ~causal if size > 0 else ~causal.at(q_start=-size)


def _within(size: int) -> Mask:
    """|q - k| <= size."""
    return local(size) if size >= 0 else nothing


def _window_of(mask: Mask) -> Mask | None:
    """The window of a `_not_before`."""
    first = next(iter(mask.children), everything)
    size = window_size(first)
    return first if size is not None and mask == _not_before(size) else None


def _chunks(held: dict[str, Any]) -> Mask:
    """Blocks that begin behind each sample's left padding."""
    size, padding = int(held["chunk_size"]), held["left_padding"].tolist()
    moved = [blocks(size).at(q_start=-pads % size, k_start=-pads % size) for pads in padding]
    return moved[0] if len(set(moved)) == 1 else per_sample(moved)


def _groups(held: dict[str, Any]) -> Mask:
    """Tokens of one group see each other; negative numbers are no group."""
    return same(alike(held["block_sequence_ids"]).clamp(min=-1), none=-1)


def _taken(held: dict[str, Any]) -> Mask:
    positions = alike(held["position_ids"])
    return lift(held["mask_function"]).mask.take(q=positions, k=positions)


INNER = "{}.<locals>.inner_mask"
AND, OR = "and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"
PACKED, REMAPPED = INNER.format("packed_sequence_mask_function"), INNER.format("remap_positions_for_packed_sequence")
ADD_OFFSETS = INNER.format("add_offsets_to_mask_function")
LEAVES: dict[str, Callable[[dict[str, Any]], Mask]] = {
    "bidirectional_mask_function": lambda held: everything,
    INNER.format("sliding_window_overlay"): lambda held: _not_before(int(held["sliding_window"])),
    INNER.format("sliding_window_bidirectional_overlay"): lambda held: _within(int(held["sliding_window"])),
    INNER.format("chunked_overlay"): _chunks,
    INNER.format("blockwise_overlay"): _groups,
    INNER.format("padding_mask_function"): lambda held: keys(alike(held["padding_mask"].bool())),
    PACKED: lambda held: documents(ids=alike(held["packed_sequence_mask"])),
    REMAPPED: _taken,
}
