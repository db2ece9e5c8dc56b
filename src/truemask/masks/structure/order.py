"""Open functions about order and distance: who looks back, how far, and from where positions are counted."""

from __future__ import annotations

from typing import NamedTuple

from truemask.masks.compose.boolean import And, Everything, Minus, Not, Nothing, Or, Xor, nothing
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import Select
from truemask.masks.compose.reindex import At, Take, Transposed
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import Causal, Local, Window
from truemask.masks.leaves.patterns import Dilated, Random
from truemask.masks.leaves.per_token import Padding
from truemask.masks.leaves.tree import Tree
from truemask.masks.structure.groups import (
    BACKWARD,
    CELLS,
    COMPOSED,
    CONSTANTS,
    DISTANCES,
    FLAGS,
    LABELS,
    LAID_OUT,
    PER_AXIS,
    PLACES,
    REINDEXED,
)
from truemask.masks.structure.open_functions import answer, open_function, register


@open_function
def looks_back(mask: Mask) -> bool:
    """Whether the form of the expression proves that no query sees a later key; False proves nothing.

    For modules that are causal themselves, which say what that removes of a mask.

    >>> from truemask.masks.leaves.bands import causal, local
    >>> looks_back(causal & local(2)), looks_back(causal | local(2))
    (True, False)
    """
    raise NotImplementedError


answer(looks_back, True, *BACKWARD, Nothing)
answer(looks_back, False, Everything, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, *CELLS)
answer(looks_back, False, Xor, Not, *PER_AXIS, Select, *REINDEXED, Prepended)


@register(looks_back, And)
def _any_term(mask: And) -> bool:
    return any(map(looks_back, mask.terms))


@register(looks_back, Or)
def _all_terms(mask: Or) -> bool:
    return all(map(looks_back, mask.terms))


@register(looks_back, Minus)
def _left_side(mask: Minus) -> bool:
    return looks_back(mask.left)


@register(looks_back, Packed)
def _in_documents(mask: Packed) -> bool:
    return mask.kv_lengths is None and looks_back(mask.base)


@register(looks_back, Padded)
def _behind_pads(mask: Padded) -> bool:
    return looks_back(mask.base)


def is_order(mask: Mask) -> bool:
    """Whether the mask is a word of the language that says by itself that queries look back: `causal` or a window."""
    return not mask.children and mask != nothing and looks_back(mask)


def names_order(mask: Mask) -> bool:
    """Whether some word of the expression says that queries look back, whatever becomes of it in the whole."""
    return any(map(is_order, mask.walk()))


@open_function
def turns_around(mask: Mask) -> bool:
    """Whether what a part proves of later keys may be the opposite of what the whole does with them.

    For findings that take `causal` within an expression for what it is meant to be.
    """
    raise NotImplementedError


answer(turns_around, True, Not, Minus, Xor, Transposed)
answer(turns_around, False, *CONSTANTS, And, Or, *PER_AXIS, Select, At, Take, *LAID_OUT)
answer(turns_around, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, *CELLS)


class Band(NamedTuple):
    """`-ahead <= q - k <= back`, where None is as far as there are keys."""

    back: int | None
    ahead: int | None


@open_function
def band(mask: Mask) -> Band | None:
    """How far back and ahead every query sees, if distance alone decides and all within is seen; None if not.

    For findings about windows longer than the text, and for windows that another library spells in parts.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> band(window(4)), band(causal), band(causal & window(4)) is None
    (Band(back=3, ahead=0), Band(back=None, ahead=0), True)
    """
    raise NotImplementedError


answer(band, Band(None, 0), Causal)
answer(band, Band(None, None), Everything)
answer(band, None, Nothing, *COMPOSED)
answer(band, None, Dilated, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, *CELLS)


@register(band, Window)
def _window(mask: Window) -> Band:
    return Band(mask.size - 1, 0)


@register(band, Local)
def _local(mask: Local) -> Band:
    return Band(mask.radius, mask.radius)


def window_size(mask: Mask) -> int | None:
    """How many keys the mask lets every query see, if it is a window of the last ones; None if it is none.

    >>> from truemask.masks.leaves.bands import causal, local, window
    >>> window_size(window(4)), window_size(causal), window_size(local(0))
    (4, None, None)
    """
    reach = band(mask) if is_order(mask) else None
    return None if reach is None or reach.back is None else reach.back + 1


@open_function
def counts_from_start(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, says something of the start of the row, or of places counted from it.

    For findings about documents and trees, in which the first row is no start.
    """
    raise NotImplementedError


answer(counts_from_start, True, *PLACES)
answer(counts_from_start, False, *CONSTANTS, *COMPOSED)
answer(counts_from_start, False, *BACKWARD, *DISTANCES, Random, Padding, *FLAGS, *LABELS, Tree, *CELLS)


@open_function
def counts_distance(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, counts the rows between query and key, and not only their order.

    For findings about trees, whose rows are no positions.
    """
    raise NotImplementedError


answer(counts_distance, True, Window, *DISTANCES)
answer(counts_distance, False, *CONSTANTS, *COMPOSED)
answer(counts_distance, False, Causal, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, *CELLS)
