"""Open functions that change an expression: another part in the place of one, a term left out, a single head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from truemask.masks.compose.boolean import And, Minus, Not, Or, Xor, conjunction
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import PerHead, PerSample, Select
from truemask.masks.compose.reindex import At, Take, Transposed
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.matrices import Dense, dense
from truemask.masks.leaves.patterns import Random
from truemask.masks.leaves.per_token import Padding
from truemask.masks.leaves.predicate import Predicate
from truemask.masks.leaves.tree import Tree
from truemask.masks.structure.groups import (
    BACKWARD,
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
from truemask.masks.structure.open_functions import open_function, register

Put = Callable[[Mask], Mask]  # another part, and the whole with it


@open_function
def replaceable_parts(mask: Mask) -> Iterator[tuple[Mask, Put]]:
    """The direct parts in whose place another may be put without asking anew what data fits it, and how to put it.

    For findings, which try what an expression means with another part.

    >>> from truemask.masks.leaves.bands import causal, local, window
    >>> [(part, put(local(1))) for part, put in replaceable_parts(causal | window(3))]
    [(causal, local(1) | window(3)), (window(3), causal | local(1))]
    """
    raise NotImplementedError


@register(replaceable_parts, *CONSTANTS, Xor, *PER_AXIS, Select, *REINDEXED, Prepended, *LEAVES)
def _none(_: Mask) -> Iterator[tuple[Mask, Put]]:
    return iter(())


@register(replaceable_parts, And, Or)
def _terms(mask: And | Or) -> Iterator[tuple[Mask, Put]]:
    for i, term in enumerate(mask.terms):
        yield term, lambda new, i=i: joined(type(mask), [*mask.terms[:i], new, *mask.terms[i + 1 :]])


@register(replaceable_parts, Minus)
def _sides(mask: Minus) -> Iterator[tuple[Mask, Put]]:
    yield mask.left, lambda new: new - mask.right
    yield mask.right, lambda new: mask.left - new


@register(replaceable_parts, Not, Packed, Padded)
def _base(mask: Not | Packed | Padded) -> Iterator[tuple[Mask, Put]]:
    yield mask.base, lambda new: replace(mask, base=new)


def all_parts(mask: Mask) -> Iterator[tuple[Mask, Put]]:
    """The mask and every part below it that is replaceable, and how to put another in its place."""
    yield mask, lambda new: new
    for child, put_child in replaceable_parts(mask):
        for part, put in all_parts(child):
            yield part, lambda new, put=put, put_child=put_child: put_child(put(new))


@open_function
def droppable_terms(mask: Mask) -> Iterator[tuple[Mask, Mask]]:
    """The terms of the mask that may be left out, each with the mask without it.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> list(droppable_terms(causal - window(3)))
    [(window(3), causal)]
    """
    raise NotImplementedError


@register(droppable_terms, *CONSTANTS, Xor, Not, *PER_AXIS, Select, *REINDEXED, *LAID_OUT, *LEAVES)
def _no_term(_: Mask) -> Iterator[tuple[Mask, Mask]]:
    return iter(())


@register(droppable_terms, And, Or)
def _each_term(mask: And | Or) -> Iterator[tuple[Mask, Mask]]:
    for i, term in enumerate(mask.terms):
        yield term, joined(type(mask), [*mask.terms[:i], *mask.terms[i + 1 :]])


@register(droppable_terms, Minus)
def _right_side(mask: Minus) -> Iterator[tuple[Mask, Mask]]:
    yield mask.right, mask.left


def joined(operator: type[And] | type[Or], terms: list[Mask]) -> Mask:
    """The terms, equal ones once: `a & a` and `a | a` are `a`."""
    distinct = list(dict.fromkeys(terms))
    return distinct[0] if len(distinct) == 1 else operator.make(*distinct)


@open_function
def conjuncts(mask: Mask) -> tuple[Mask, ...]:
    """The terms of which a mask is written as the AND; any other mask is the only one."""
    raise NotImplementedError


@register(conjuncts, *CONSTANTS, Or, Xor, Minus, Not, *PER_AXIS, Select, *REINDEXED, *LAID_OUT, *LEAVES)
def _alone(mask: Mask) -> tuple[Mask, ...]:
    return (mask,)


@register(conjuncts, And)
def _all_of(mask: And) -> tuple[Mask, ...]:
    return mask.terms


@open_function
def of_head(mask: Mask, head: int) -> Mask:
    """The mask of one head, written as one would for it alone.

    >>> from truemask.masks.compose.per_axis import per_head
    >>> from truemask.masks.leaves.bands import causal, window
    >>> from truemask.masks.leaves.per_token import padding
    >>> of_head(per_head([causal, window(3)]) & padding(lengths=[3, 5]), 1)
    window(3) & padding(lengths=[3, 5])
    """
    raise NotImplementedError


@register(of_head, *CONSTANTS, Xor, Minus, Not, PerSample, Select, *REINDEXED, *LAID_OUT)
@register(of_head, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, Predicate)
def _selected(mask: Mask, head: int) -> Mask:
    return mask if mask.head_count == 1 else mask.select(heads=[head])


@register(of_head, PerHead)
def _its_own(mask: PerHead, head: int) -> Mask:
    return mask if mask.head_count == 1 else of_head(mask.masks[head], head)


@register(of_head, And, Or)
def _in_each_term(mask: And | Or, head: int) -> Mask:
    return mask if mask.head_count == 1 else type(mask).make(*(of_head(term, head) for term in mask.terms))


@register(of_head, Dense)
def _cut_out(mask: Dense, head: int) -> Mask:
    return mask if mask.head_count == 1 else dense(mask.tensor.tensor[:, head : head + 1])


@open_function
def with_term(mask: Mask, term: Mask) -> Mask | None:
    """The mask AND a term that counts positions as the mask does: from the begin of each document, behind padding.

    None where the mask does not say from where: outside of what it negates, or where it chooses heads that differ.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> with_term(causal, window(3)), with_term(causal.packed([2, 2]), window(3))
    (causal & window(3), (causal & window(3)).packed([2, 2]))
    """
    raise NotImplementedError


@register(with_term, *CONSTANTS, *LEAVES, Transposed, Prepended)
def _beside(mask: Mask, term: Mask) -> Mask:
    return conjunction(mask, term)


@register(with_term, Packed, Padded, At, Take)
def _in_the_base(mask: Packed | Padded | At | Take, term: Mask) -> Mask | None:
    base = with_term(mask.base, term)
    return None if base is None else replace(mask, base=base)


@register(with_term, Select)
def _of_the_chosen(mask: Select, term: Mask) -> Mask | None:
    if not _is_laid_out(mask):
        return conjunction(mask, term)
    base = None if mask.heads is not None and term.head_count > 1 else with_term(mask.base, term)
    return None if base is None else replace(mask, base=base)


@register(with_term, And)
def _in_laid_out_terms(mask: And, term: Mask) -> Mask | None:
    if not _is_laid_out(mask):
        return conjunction(mask, term)
    terms = [with_term(part, term) if _is_laid_out(part) else part for part in mask.terms]
    known = [part for part in terms if part is not None]
    return joined(And, known) if len(known) == len(terms) else None


@register(with_term, Or, Xor)
def _in_each(mask: Or | Xor, term: Mask) -> Mask | None:
    if not _is_laid_out(mask):
        return conjunction(mask, term)
    terms = [with_term(part, term) for part in mask.terms]
    return None if None in terms else replace(mask, terms=tuple(terms))


@register(with_term, *PER_AXIS)
def _in_each_choice(mask: PerHead | PerSample, term: Mask) -> Mask | None:
    if not _is_laid_out(mask):
        return conjunction(mask, term)
    masks = [with_term(part, term) for part in mask.masks]
    return None if None in masks else replace(mask, masks=tuple(masks))


@register(with_term, Minus)
def _in_the_left(mask: Minus, term: Mask) -> Mask | None:
    left = with_term(mask.left, term)
    if not _is_laid_out(mask):
        return conjunction(mask, term)
    return None if left is None else replace(mask, left=left)


@register(with_term, Not)
def _outside(mask: Not, term: Mask) -> Mask | None:
    return None if _is_laid_out(mask) else conjunction(mask, term)


def _is_laid_out(mask: Mask) -> bool:
    return any(isinstance(part, (Packed, Padded, At, Take)) for part in mask.walk())
