"""Open functions about tokens that are none: which rows are real, what those all see, what is left out on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from truemask.masks.compose.boolean import And, Minus, Not, Or, Xor, conjunction, everything, nothing
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import Select
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.documents import Documents, Same
from truemask.masks.leaves.patterns import Random
from truemask.masks.leaves.per_token import Keys, Padding, Queries
from truemask.masks.leaves.tree import Tree
from truemask.masks.structure.groups import (
    BACKWARD,
    BOOLEAN,
    CELLS,
    CONSTANTS,
    DISTANCES,
    FLAGS,
    LABELS,
    PER_AXIS,
    PLACES,
    REINDEXED,
)
from truemask.masks.structure.open_functions import answer, open_function, register


@open_function
def seen_by_all(mask: Mask) -> Mask:
    """Keys that every query of `mask` sees, not counting those outside `real_queries`; sound, not always complete.

    For registers, which may read what all queries that read them may read. The answer asks nothing of the query.

    >>> from truemask.masks.leaves.bands import causal
    >>> from truemask.masks.leaves.per_token import padding, prefix
    >>> seen_by_all(prefix(4)), seen_by_all(causal), seen_by_all(padding(lengths=[3, 5]))
    (prefix(4), nothing, padding(lengths=[3, 5], on='keys'))
    """
    raise NotImplementedError


@register(seen_by_all, *CONSTANTS, Or, Xor, Minus, Not, *PER_AXIS, Select, *REINDEXED, Packed, Prepended)
@register(seen_by_all, *BACKWARD, *DISTANCES, *PLACES, Random, Keys, *LABELS, Tree, *CELLS)
def _if_the_same_for_all(mask: Mask) -> Mask:
    """All of it where no query matters; else nothing is known."""
    return nothing if mask.varies_with_query else mask


@register(seen_by_all, And)
def _by_all_terms(mask: And) -> Mask:
    return conjunction(*map(seen_by_all, mask.terms)) if mask.varies_with_query else mask


@register(seen_by_all, Queries)
def _whoever_is_real(_: Queries) -> Mask:
    return everything


@register(seen_by_all, Padding)
def _real_keys(mask: Padding) -> Mask:
    return everything if mask.on == "queries" else replace(mask, on="keys")


@register(seen_by_all, Padded)
def _behind_the_pads(mask: Padded) -> Mask:
    return Padding(None, mask.starts, "keys") if seen_by_all(mask.base) == everything else nothing


@open_function
def real_queries(mask: Mask) -> Mask:
    """The rows that `seen_by_all` counts: those that are not padding, as a mask that asks nothing of keys.

    >>> from truemask.masks.leaves.per_token import padding, prefix
    >>> real_queries(prefix(4)), real_queries(padding(lengths=[3, 5]))
    (everything, padding(lengths=[3, 5], on='queries'))
    """
    raise NotImplementedError


answer(real_queries, everything, *CONSTANTS, Or, Xor, Minus, Not, *PER_AXIS, Select, *REINDEXED, Packed, Prepended)
answer(real_queries, everything, *BACKWARD, *DISTANCES, *PLACES, Random, Keys, *LABELS, Tree, *CELLS)


@register(real_queries, And)
def _of_all_terms(mask: And) -> Mask:
    return conjunction(*map(real_queries, mask.terms))


@register(real_queries, Queries)
def _flagged(mask: Queries) -> Mask:
    return mask


@register(real_queries, Padding)
def _within_lengths(mask: Padding) -> Mask:
    return everything if mask.on == "keys" else replace(mask, on="queries")


@register(real_queries, Padded)
def _from_the_start(mask: Padded) -> Mask:
    return Padding(None, mask.starts, "queries")


@open_function
def marks_queries(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, may leave out queries because they are no tokens.

    For generation, which asks for dead rows only where there may be some.
    """
    raise NotImplementedError


answer(marks_queries, True, Queries, Padding, Padded)
answer(marks_queries, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Packed, Prepended)
answer(marks_queries, False, *BACKWARD, *DISTANCES, *PLACES, Random, Keys, *LABELS, Tree, *CELLS)


@open_function
def says_starts(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, says where samples begin: that rows are padded on the left.

    For models that move a mask to where their samples begin, unless it does so itself.
    """
    raise NotImplementedError


answer(says_starts, True, Padded)
answer(says_starts, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Packed, Prepended)
answer(says_starts, False, *BACKWARD, *DISTANCES, *PLACES, Random, *FLAGS, *LABELS, Tree, *CELLS)


@register(says_starts, Padding)
def _has_starts(mask: Padding) -> bool:
    return mask.starts is not None


@open_function
def padding_of_one_axis(mask: Mask) -> Padding | None:
    """The mask if it is right padding that counts queries and keys alike, as tokens of one sequence; None if not.

    For the warning about lengths of one sequence in a call with two.
    """
    raise NotImplementedError


answer(padding_of_one_axis, None, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Packed, Padded, Prepended)
answer(padding_of_one_axis, None, *BACKWARD, *DISTANCES, *PLACES, Random, *FLAGS, *LABELS, Tree, *CELLS)


@register(padding_of_one_axis, Padding)
def _of_both(mask: Padding) -> Padding | None:
    return mask if mask.on == "both" and mask.lengths is not None else None


@open_function
def paddings(mask: Mask) -> Iterator[Mask]:
    """The parts of an expression that leave tokens out, each for the rows and keys of the whole.

    For findings about rows that see nothing: those that a padding leaves out are meant to.

    >>> from truemask.masks.leaves.bands import causal
    >>> from truemask.masks.leaves.per_token import keys
    >>> list(paddings((causal & keys([True, True, False])).packed([3, 3])))
    [keys([True, True, False]).packed([3, 3])]
    """
    raise NotImplementedError


@register(paddings, *CONSTANTS, *BACKWARD, *DISTANCES, *PLACES, Random, Documents, Tree, *CELLS)
@register(paddings, And, Or, Xor, *PER_AXIS, *REINDEXED)
def _of_parts(mask: Mask) -> Iterator[Mask]:
    return (part for child in mask.children for part in paddings(child))


@register(paddings, *FLAGS, Padding, Same)
def _itself(mask: Mask) -> Iterator[Mask]:
    yield mask


@register(paddings, Not)
def _negated(mask: Not) -> Iterator[Mask]:
    return (~part for part in paddings(mask.base))


@register(paddings, Minus)
def _of_both_sides(mask: Minus) -> Iterator[Mask]:
    yield from (*paddings(mask.left), *paddings(~mask.right))


@register(paddings, Padded)
def _with_the_pads(mask: Padded) -> Iterator[Mask]:
    return (replace(mask, base=part) for part in (everything, *paddings(mask.base)))


@register(paddings, Packed, Select, Prepended)
def _moved_alike(mask: Packed | Select | Prepended) -> Iterator[Mask]:
    return (replace(mask, base=part) for part in paddings(mask.base))
