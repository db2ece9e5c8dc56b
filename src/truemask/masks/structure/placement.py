"""Open functions about re-indexing: which rows and keys of its own a mask asks its parts about."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from truemask.masks.compose.boolean import everything, nothing
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import PerHead, PerSample, Select
from truemask.masks.compose.reindex import At, Take, Transposed
from truemask.masks.core.mask import Mask
from truemask.masks.core.verdict import Cell
from truemask.masks.leaves.matrices import Dense
from truemask.masks.leaves.patterns import Random
from truemask.masks.leaves.per_token import Padding, number_for
from truemask.masks.leaves.predicate import Predicate
from truemask.masks.leaves.tree import Tree
from truemask.masks.structure.documents import entry, labels_at
from truemask.masks.structure.groups import (
    BACKWARD,
    BOOLEAN,
    CONSTANTS,
    DISTANCES,
    FLAGS,
    LABELS,
    LAID_OUT,
    LEAVES,
    PER_AXIS,
    PLACES,
    REINDEXED,
)
from truemask.masks.structure.open_functions import answer, open_function, register


class Offset(NamedTuple):
    """The mask is `base.at(q_start, k_start)`."""

    base: Mask
    q_start: int
    k_start: int


@open_function
def offset(mask: Mask) -> Offset:
    """The mask without its outermost `at`, and what that adds to rows and keys: 0 and 0 where there is none.

    For whoever moves indices instead of the mask, and for findings about where rows begin.

    >>> from truemask.masks.leaves.bands import causal
    >>> offset(causal.at(q_start=5)), offset(causal)
    (Offset(base=causal, q_start=5, k_start=0), Offset(base=causal, q_start=0, k_start=0))
    """
    raise NotImplementedError


@register(offset, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, Take, Transposed, *LAID_OUT, *LEAVES)
def _in_place(mask: Mask) -> Offset:
    return Offset(mask, 0, 0)


@register(offset, At)
def _moved(mask: At) -> Offset:
    return Offset(mask.base, mask.q_start, mask.k_start)


@open_function
def without_positions(mask: Mask) -> Mask:
    """The mask without its outermost offsets and positions: what steps of decoding share.

    >>> from truemask.masks.leaves.bands import causal
    >>> without_positions(causal.take(q=[4, 7]).at(q_start=1))
    causal
    """
    raise NotImplementedError


@register(without_positions, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, Transposed, *LAID_OUT, *LEAVES)
def _itself(mask: Mask) -> Mask:
    return mask


@register(without_positions, At, Take)
def _of_the_base(mask: At | Take) -> Mask:
    return without_positions(mask.base)


@open_function
def moves_positions(mask: Mask) -> bool:
    """Whether the mask asks its parts about other rows or keys than it was asked about, sides changed aside.

    For findings about cells and rows of a part, which are no rows of the whole then.
    """
    raise NotImplementedError


answer(moves_positions, True, At, Take, *LAID_OUT)
answer(moves_positions, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, Transposed, *LEAVES)


@open_function
def swaps_axes(mask: Mask) -> bool:
    """Whether the mask asks its parts about its rows as keys and its keys as rows."""
    raise NotImplementedError


answer(swaps_axes, True, Transposed)
answer(swaps_axes, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, At, Take, *LAID_OUT, *LEAVES)


@open_function
def parts_axes(mask: Mask) -> bool:
    """Whether row i and key i may be different tokens, because the mask places rows and keys each for itself.

    For findings that take the diagonal for what a token says of itself.
    """
    raise NotImplementedError


answer(parts_axes, True, *REINDEXED)
answer(parts_axes, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *LAID_OUT, *LEAVES)


@open_function
def chooses_samples(mask: Mask) -> bool:
    """Whether the mask asks its parts about other samples or heads than it was asked about."""
    raise NotImplementedError


answer(chooses_samples, True, Select)
answer(chooses_samples, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, *REINDEXED, *LAID_OUT, *LEAVES)


@open_function
def places_rows(mask: Mask) -> bool:
    """Whether the mask itself says which row and key of a call is which: by `at`, `take` or a tensor of its cells.

    For models whose positions are not known.
    """
    raise NotImplementedError


answer(places_rows, True, At, Take, Dense)
answer(places_rows, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, Transposed, *LAID_OUT)
answer(places_rows, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, Predicate)


@open_function
def is_boolean(mask: Mask) -> bool:
    """Whether each cell of the mask follows from the same cell of its parts: `&`, `|`, `^`, `-` and `~`."""
    raise NotImplementedError


answer(is_boolean, True, *BOOLEAN)
answer(is_boolean, False, *CONSTANTS, *PER_AXIS, Select, *REINDEXED, *LAID_OUT, *LEAVES)


def says_rows(mask: Mask, keys_known: bool = True) -> bool:
    """Whether a mask says itself which row and key of a call is which: by `at`, `take` or a tensor, in all its parts.

    >>> from truemask.masks.leaves.bands import local
    >>> says_rows(local(1).at(q_start=10)), says_rows(local(1))
    (True, False)
    """
    if is_boolean(mask):
        return all(says_rows(part, keys_known) for part in mask.children)
    return places_rows(mask) or mask in (everything, nothing) or (keys_known and not mask.varies_with_query)


@open_function
def reindexed_like(mask: Mask, plain: Mask) -> Mask | None:
    """`plain` for the rows and keys of the mask; None where parts of it that look at the query are re-indexed apart.

    For findings that compare a mask with `causal` and others where its own parts count.

    >>> from truemask.masks.leaves.bands import causal, local
    >>> from truemask.masks.leaves.per_token import prefix
    >>> reindexed_like((causal | prefix(4)).at(q_start=5) & prefix(9), local(1))
    local(1).at(q_start=5)
    """
    raise NotImplementedError


@register(reindexed_like, At, Take, Select, Prepended)
def _like_the_base(mask: At | Take | Select | Prepended, plain: Mask) -> Mask | None:
    base = reindexed_like(mask.base, plain)
    return None if base is None else replace(mask, base=base)


@register(reindexed_like, Packed, Padded, Transposed)
def _only_as_it_is(mask: Packed | Padded | Transposed, plain: Mask) -> Mask | None:
    """What counts from elsewhere within them is nowhere in the row."""
    return plain if reindexed_like(mask.base, plain) == plain else None


@register(reindexed_like, *CONSTANTS, *BOOLEAN, *PER_AXIS, *LEAVES)
def _like_all_parts(mask: Mask, plain: Mask) -> Mask | None:
    answers = {reindexed_like(child, plain) for child in mask.children if child.varies_with_query} or {plain}
    return answers.pop() if len(answers) == 1 else None


class Step(NamedTuple):
    """The part that decides a cell, by its place among the mask's children, and the cell of its own that it is asked.

    `part` is None where the mask decides the cell itself: `cell` is then where it would have asked.
    """

    part: int | None
    cell: Cell


@open_function
def step_into(mask: Mask, cell: Cell) -> Step | None:
    """Which part decides a cell, and which cell of its own it is asked about.

    None of masks that no single part decides: words of the language, and the operators. For explanations.

    >>> from truemask.masks.leaves.bands import causal
    >>> step_into(causal.packed([2, 3]), Cell(0, 0, 4, 2))
    Step(part=0, cell=Cell(sample=0, head=0, query=2, key=0))
    """
    raise NotImplementedError


answer(step_into, None, *CONSTANTS, *BOOLEAN, *LEAVES)


@register(step_into, PerHead)
def _of_head(mask: PerHead, cell: Cell) -> Step:
    return Step(min(cell.head, len(mask.masks) - 1), cell)


@register(step_into, PerSample)
def _of_sample(mask: PerSample, cell: Cell) -> Step:
    return Step(min(cell.sample, len(mask.masks) - 1), cell)


@register(step_into, Select)
def _chosen(mask: Select, cell: Cell) -> Step:
    sample, head = mask._places(cell.sample, cell.head)  # pyright: ignore[reportPrivateUsage]
    return Step(0, cell._replace(sample=sample, head=head))


@register(step_into, At)
def _further_on(mask: At, cell: Cell) -> Step:
    return Step(0, cell._replace(query=cell.query + mask.q_start, key=cell.key + mask.k_start))


@register(step_into, Take)
def _taken(mask: Take, cell: Cell) -> Step:
    query, key = (
        place if side is None else entry(side.tensor, cell.sample, place)
        for side, place in ((mask.q, cell.query), (mask.k, cell.key))
    )
    return Step(0, cell._replace(query=query, key=key))


@register(step_into, Transposed)
def _swapped(_: Transposed, cell: Cell) -> Step:
    return Step(0, cell._replace(query=cell.key, key=cell.query))


@register(step_into, Packed)
def _in_document(mask: Packed, cell: Cell) -> Step:
    q, k = mask._sides  # pyright: ignore[reportPrivateUsage]
    query, key = entry(q.offset, cell.sample, cell.query), entry(k.offset, cell.sample, cell.key)
    document, other = labels_at(mask, cell) or (0, 0)
    return Step(0 if document == other else None, cell._replace(query=query, key=key))


@register(step_into, Padded)
def _behind_pads(mask: Padded, cell: Cell) -> Step:
    start = number_for(mask.starts, cell.sample)
    there = cell._replace(query=cell.query - start, key=cell.key - start)
    return Step(0 if min(cell.query, cell.key) >= start else None, there)


@register(step_into, Prepended)
def _behind_extra_rows(mask: Prepended, cell: Cell) -> Step:
    there = cell._replace(query=max(cell.query - mask.q, 0), key=cell.key - mask.k)
    if cell.key < mask.k:
        return Step(None, there)
    return Step(1 if cell.query < mask.q else 0, there)
