"""Findings about words that do not count what one may think: rows of a tree, and the label of padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from truemask.common.finding import Finding
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.rules.context import Subject
from truemask.diagnosis.rules.expression import ABSOLUTE, parts_of
from truemask.masks.compose.reindex import At
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.documents import Same
from truemask.masks.leaves.tree import Tree

DISTANCES = ("window", "local", "dilated")
LONGEST_FIX = 160  # characters of a fix that is written out


def rows_not_depth(x: Subject) -> Iterator[Finding]:
    """Windows and the like beside a tree: they count rows, and its rows are no positions."""
    trees = [part for part in x.mask.walk() if isinstance(part, Tree)]
    if len(trees) != 1:
        return
    depth = depths(trees[0])
    for part, put in _parts(x.mask):
        if part.kind not in (*DISTANCES, *ABSOLUTE):
            continue
        deep = part.take(q=depth, k=depth)
        if x.means_the_same(put(deep)):
            continue
        message = f"{quoted(part)} counts rows, and the rows of a tree are no positions: a node's is its depth"
        short = f"{part}.take(q=depths, k=depths), with depths = tree.to_dense(n)[:, 0].sum(-1) - 1"
        fix = str(put(deep))
        yield Finding("rows-not-depth", "warning", quoted(part), message, fix if len(fix) <= LONGEST_FIX else short)


def _parts(mask: Mask) -> Iterator[tuple[Mask, Callable[[Mask], Mask]]]:
    """`parts_of`, of later rows too."""
    if not isinstance(mask, At):
        yield from parts_of(mask)
        return
    for part, put in parts_of(mask.base):
        yield part, lambda new, put=put: replace(mask, base=put(new))


def depths(tree: Tree) -> Tensor:
    """How many tokens stand before each on its own path, int64 `[n]` or `[b, n]`.

    >>> from truemask.masks.leaves.tree import tree
    >>> depths(tree([-1, 0, 0], lengths=[2, 1, 2])).tolist()
    [0, 1, 2, 2, 3]
    """
    parents = np.atleast_2d(tree.parents.array)
    rows = []
    for b, (own, *_) in enumerate(tree._nodes):  # pyright: ignore[reportPrivateUsage]
        up = parents[min(b, len(parents) - 1)]
        start, above = np.zeros(len(up), np.int64), up
        while (above >= 0).any():  # one step nearer to the roots each time
            start += np.where(above >= 0, own[above], 0)
            above = np.where(above >= 0, up[above], -1)
        rows.append(np.repeat(start - np.cumsum(own) + own, own) + np.arange(own.sum()))
    return torch.from_numpy(rows[0] if len(rows) == 1 else np.stack(rows))


def padding_is_a_group(x: Subject) -> Iterator[Finding]:
    """`same` of flags: what is flagged 0 is a group too, whose tokens see each other."""
    for part, put in _parts(x.mask):
        if not isinstance(part, Same) or part.none in (0, 1):
            continue
        labels = torch.cat([side.tensor.flatten() for side in (part.values, part.kv_values) if side is not None])
        if set(labels.unique().tolist()) == {0, 1}:
            message = "label 0 is a group like 1, so tokens with 0 see each other; if they are padding, say `none=0`"
            yield Finding("padding-sees-padding", "note", quoted(part), message, str(put(replace(part, none=0))))


TRAP_RULES = (rows_not_depth, padding_is_a_group)
