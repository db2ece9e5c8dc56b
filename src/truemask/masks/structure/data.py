"""Open functions about what a mask holds: cells, data of tokens, numbers that are drawn."""

from __future__ import annotations

from collections.abc import Iterable

from truemask.masks.compose.boolean import And, Minus, Not, Or, Xor
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import Select
from truemask.masks.compose.reindex import At, Take, Transposed
from truemask.masks.core.data import Data
from truemask.masks.core.mask import Mask
from truemask.masks.core.queries import rows_held
from truemask.masks.leaves.bands import Blocks, Causal, Local, Window
from truemask.masks.leaves.matrices import BlockPattern, Dense
from truemask.masks.leaves.patterns import Dilated, Grid, Random, Strided
from truemask.masks.leaves.per_token import GlobalTokens, Padding, Prefix
from truemask.masks.leaves.predicate import Predicate
from truemask.masks.leaves.tree import Tree
from truemask.masks.structure.groups import (
    BACKWARD,
    BOOLEAN,
    CELLS,
    COMPOSED,
    CONSTANTS,
    DISTANCES,
    FLAGS,
    LABELS,
    PER_AXIS,
    PLACES,
    REINDEXED,
)
from truemask.masks.structure.open_functions import answer, open_function, register
from truemask.masks.structure.padding import says_starts


@open_function
def is_opaque(mask: Mask) -> bool:
    """Whether the mask is known by its cells alone: it does not say why it hides a pair.

    For whoever looks for an expression that such cells are equal to.
    """
    raise NotImplementedError


answer(is_opaque, True, *CELLS)
answer(is_opaque, False, *CONSTANTS, *COMPOSED)
answer(is_opaque, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree)


@open_function
def cells_held(mask: Mask) -> Data | None:
    """The tensor `[b, h, q, k]` if the mask is one, with size 1 where it does not vary; None if not.

    For whoever reads cells instead of asking for them, and says what shape they have.
    """
    raise NotImplementedError


answer(cells_held, None, *CONSTANTS, *COMPOSED)
answer(cells_held, None, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, Predicate)


@register(cells_held, Dense)
def _tensor(mask: Dense) -> Data:
    return mask.tensor


@open_function
def sampling_note(mask: Mask) -> str:
    """What a plan says of a tensor of which a sample was looked at only; nothing where all that matters was."""
    raise NotImplementedError


answer(sampling_note, "", *CONSTANTS, *COMPOSED)
answer(sampling_note, "", *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, Predicate)


@register(sampling_note, Dense)
def _of_the_sample(mask: Dense) -> str:
    return "" if mask.sample is None else mask.sample.text


@open_function
def is_function(mask: Mask) -> bool:
    """Whether the mask is a function of the caller, which answers at any length and may raise anything there."""
    raise NotImplementedError


answer(is_function, True, Predicate)
answer(is_function, False, *CONSTANTS, *COMPOSED)
answer(is_function, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, Dense)


@open_function
def is_drawn(mask: Mask) -> bool:
    """Whether the cells of the mask itself, its parts aside, come from a hash: arithmetic that wraps around.

    For compilers that cannot be trusted with it.
    """
    raise NotImplementedError


answer(is_drawn, True, Random)
answer(is_drawn, False, *CONSTANTS, *COMPOSED)
answer(is_drawn, False, *BACKWARD, *DISTANCES, *PLACES, Padding, *FLAGS, *LABELS, Tree, *CELLS)


@open_function
def names_tokens(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, speaks of certain tokens or samples: flags, lengths, labels, cells.

    For whoever offers a mask as a rule for other texts, which such data are not.
    """
    raise NotImplementedError


answer(names_tokens, True, Select, Take, Packed, Padded, Padding, *FLAGS, *LABELS, Tree, Dense, BlockPattern)
answer(names_tokens, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, At, Transposed, Prepended)
answer(names_tokens, False, *BACKWARD, *DISTANCES, Blocks, Strided, Grid, GlobalTokens, Random, Predicate)


@register(names_tokens, Prefix)
def _of_each_sample(mask: Prefix) -> bool:
    return isinstance(mask.length, Data)


@open_function
def describes_rows(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, holds data along the rows of a packed batch.

    For `lies_in_rows`, which asks for more.
    """
    raise NotImplementedError


answer(describes_rows, True, Packed, *FLAGS, *LABELS, Tree, Dense)
answer(describes_rows, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Padded, Prepended)
answer(describes_rows, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, Predicate)


def lies_in_rows(mask: Mask, *, packed: bool) -> bool:
    """Whether a mask says itself how tokens lie in the rows of a batch that is `packed`, or else padded on the left.

    Packed rows are described by documents, and by data for each token; padded ones by where samples begin.

    >>> from truemask.masks.leaves.bands import causal
    >>> lies_in_rows(causal.packed([3, 7]), packed=True), lies_in_rows(causal, packed=True)
    (True, False)
    """
    parts = list(mask.walk())
    return any(map(says_starts, parts)) or (packed and any(map(describes_rows, parts)))


def tokens_held(masks: Iterable[Mask]) -> int | None:
    """How many tokens the data of masks answer for, as queries and as keys; None if for any number.

    >>> from truemask.masks.leaves.bands import causal
    >>> from truemask.masks.leaves.per_token import keys
    >>> tokens_held([causal, keys([True] * 9)])
    9
    """
    sides = [side for mask in masks for side in (mask, mask.T)]
    return min((n for side in sides if (n := rows_held(side)) is not None), default=None)


@open_function
def asks_for_keys(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, names keys to be seen, and not only what remains of another rule.

    Documents, trees, padding, labels, dilation and causality restrict; windows, prefixes, blocks and the like reach
    somewhere. For the warning that a model's own rule removes what was asked for.
    """
    raise NotImplementedError


answer(asks_for_keys, True, Or, Xor, Transposed, Prepended, Window, Local, *PLACES, *CELLS)
answer(asks_for_keys, False, *CONSTANTS, And, Minus, Not, *PER_AXIS, Select, At, Take, Packed, Padded)
answer(asks_for_keys, False, Causal, Dilated, Random, Padding, *FLAGS, *LABELS, Tree)
