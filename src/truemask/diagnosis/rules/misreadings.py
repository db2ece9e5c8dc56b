"""Findings about words that do not count what one may think: rows of a tree, and the label of padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from truemask.common.finding import Finding
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.rules.context import RuleContext
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.documents import Documents, Same
from truemask.masks.leaves.patterns import Random
from truemask.masks.leaves.per_token import Padding
from truemask.masks.leaves.tree import Tree
from truemask.masks.structure.documents import depths
from truemask.masks.structure.groups import BACKWARD, CELLS, COMPOSED, CONSTANTS, DISTANCES, FLAGS, PLACES
from truemask.masks.structure.open_functions import answer, open_function, register
from truemask.masks.structure.order import counts_distance, counts_from_start
from truemask.masks.structure.parts import all_parts
from truemask.masks.structure.placement import offset

MAX_FIX_LENGTH = 160  # characters of a fix that is written out


def rows_not_depth(context: RuleContext) -> Iterator[Finding]:
    """Windows and the like beside a tree: they count rows, and its rows are no positions."""
    on_paths = [depth for part in context.mask.walk() if (depth := depths(part)) is not None]
    if len(on_paths) != 1:
        return
    (depth,) = on_paths
    for part, put in _parts(context.mask):
        if not (counts_distance(part) or counts_from_start(part)):
            continue
        deep = part.take(q=depth, k=depth)
        if context.means_the_same(put(deep)):
            continue
        message = f"{quoted(part)} counts rows, and the rows of a tree are no positions: a node's is its depth"
        short = f"{part}.take(q=depths, k=depths), with depths = tree.to_dense(n)[:, 0].sum(-1) - 1"
        fix = str(put(deep))
        yield Finding("rows-not-depth", "warning", quoted(part), message, fix if len(fix) <= MAX_FIX_LENGTH else short)


def _parts(mask: Mask) -> Iterator[tuple[Mask, Callable[[Mask], Mask]]]:
    """`all_parts`, of later rows too."""
    base, q_start, k_start = offset(mask)
    for part, put in all_parts(base):
        yield part, lambda new, put=put: put(new).at(q_start=q_start, k_start=k_start)


@open_function
def without_group_zero(mask: Mask) -> Mask | None:
    """The mask with label 0 for what belongs to nothing, if its labels are 0 and 1 and both are groups; None if not."""
    raise NotImplementedError


answer(without_group_zero, None, *CONSTANTS, *COMPOSED, *BACKWARD, *DISTANCES, *PLACES, Random)
answer(without_group_zero, None, Padding, *FLAGS, Documents, Tree, *CELLS)


@register(without_group_zero, Same)
def _of_flags(mask: Same) -> Mask | None:
    if mask.none in (0, 1):
        return None
    labels = torch.cat([side.tensor.flatten() for side in (mask.values, mask.kv_values) if side is not None])
    return replace(mask, none=0) if set(labels.unique().tolist()) == {0, 1} else None


def padding_is_a_group(context: RuleContext) -> Iterator[Finding]:
    """`same` of flags: what is flagged 0 is a group too, whose tokens see each other."""
    for part, put in _parts(context.mask):
        padded = without_group_zero(part)
        if padded is not None:
            message = "label 0 is a group like 1, so tokens with 0 see each other; if they are padding, say `none=0`"
            yield Finding("padding-sees-padding", "note", quoted(part), message, str(put(padded)))


MISREADING_RULES = (rows_not_depth, padding_is_a_group)
