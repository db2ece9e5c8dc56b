"""What a model's own rule removes of a mask that is ANDed with it, and was asked for: nothing is dropped silently."""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from typing import NamedTuple

from truemask.common.warning import warn
from truemask.errors import MaskError
from truemask.geometry.slabs.slabs import NoExactFormError, Region
from truemask.masks.compose.boolean import everything, nothing
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.data import asks_for_keys
from truemask.masks.structure.order import looks_back

MIN_LENGTH, MAX_LENGTH_WITHOUT_FORM = 64, 2048  # positions that are looked at, at least; and at most, cell by cell


class RemovedPairs(NamedTuple):
    """What the model's `rule` removes of `mask` at this length, over the mask's distinct samples and heads."""

    mask: Mask
    rule: Mask
    pairs: int
    length: int
    query: int
    key: int

    def __str__(self) -> str:
        return (
            f"the mask `{self.mask}` lets queries see keys that the model's own rule `{self.rule}` hides, which "
            f"removed {self.pairs:,} of its pairs at length {self.length}, query {self.query} and key {self.key} "
            "among them"
        )


def asks_beyond(mask: Mask) -> bool:
    """Whether a mask names keys to be seen. One that only says what remains of a model's own rule asks for none.

    Documents, trees, padding, labels, dilation and causality restrict;
    windows, prefixes, blocks and the like reach somewhere.

    >>> from truemask.masks.leaves.per_token import prefix
    >>> from truemask.masks.leaves.documents import documents
    >>> asks_beyond(causal | prefix(6)), asks_beyond(causal & documents([3, 4]))
    (True, False)
    """
    return any(map(asks_for_keys, mask.walk()))


def removed_pairs(mask: Mask | None, rule: Mask, length: int, batch: int = 1, heads: int = 1) -> RemovedPairs | None:
    """What a model's own rule removes of the mask that was asked for, both at positions below `length`; or None.

    Of keys ahead, which a causal model hides, a mask asks only if it speaks of causality, as `causal | prefix(6)` does:
    the others are written for models of either kind.

    >>> from truemask.masks.leaves.per_token import prefix
    >>> from truemask.masks.leaves.bands import window
    >>> print(removed_pairs(causal | prefix(6), window(8), 24))
    the mask `causal | prefix(6)` lets queries see keys that the model's own rule `window(8)` hides, which removed ...
    >>> removed_pairs(window(8), causal, 24) is None
    True
    """
    if mask is None or rule == everything or not asks_beyond(mask):
        return None
    speaks_of_causality = causal in mask.walk()
    if rule == causal and (not speaks_of_causality or looks_back(mask)):
        return None
    removed = mask - rule
    asked_pairs = removed if speaks_of_causality or not looks_back(rule) else removed & causal
    first = _first_length(asked_pairs, length, batch, heads)
    if first is None or first > length:
        return None
    sizes = _sizes(removed, batch, heads)
    cell = asked_pairs.equivalent(nothing, first, first, **sizes).witness
    assert cell is not None
    return RemovedPairs(mask, rule, int(removed.count(length, length, **sizes).sum()), length, cell.query, cell.key)


def _first_length(mask: Mask, length: int, batch: int, heads: int) -> int | None:
    """The smallest length at which a mask lets something through; None if it is beyond `length`."""
    top = max(MIN_LENGTH, 1 << (length - 1).bit_length())
    try:
        mask.check(top, top)
    except MaskError:  # it holds data for fewer
        top = length
    return _first_below(mask, top, batch, heads)


@lru_cache(maxsize=128)
def _first_below(mask: Mask, top: int, batch: int, heads: int) -> int | None:
    if top > MAX_LENGTH_WITHOUT_FORM and not _has_form(mask, top):
        top = MAX_LENGTH_WITHOUT_FORM
    sizes = _sizes(mask, batch, heads)
    if not bool(mask.count(top, top, **sizes).any()):
        return None
    low, high = 0, top  # nothing at low, something at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bool(mask.count(middle, middle, **sizes).any()) else (middle, high)
    return high


def _has_form(mask: Mask, length: int) -> bool:
    try:
        mask.slabs_in(Region(0, 0, 0, length, 0, length, {}))
    except NoExactFormError:
        return False
    return True


def _sizes(mask: Mask, batch: int, heads: int) -> dict[str, int]:
    return {"batch": mask.batch_size or batch, "heads": mask.head_count or heads}


# -- said once in a use ------------------------------------------------------------------------------------------------


WARNED: OrderedDict[tuple[int, Mask, Mask], None] = OrderedDict()  # the latest uses' numbers, masks and rules
MAX_REMEMBERED_WARNINGS = 1024


def warn_of_removed_pairs(
    used: int, where: str, mask: Mask | None, rule: Mask, length: int, batch: int = 1, heads: int = 1
) -> None:
    """Say, once in each use, which has a number, what the own rule of a layer removes of a mask."""
    if mask is None or (used, mask, rule) in WARNED:
        return
    pairs = removed_pairs(mask, rule, length, batch, heads)
    if pairs is None:
        return
    WARNED[used, mask, rule] = None
    while len(WARNED) > MAX_REMEMBERED_WARNINGS:
        WARNED.popitem(last=False)
    warn(f"{pairs} (first in `{where}`). To run the mask as it is written: `tm.use(model, mask, replace=True)`")
