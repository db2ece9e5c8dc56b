"""Findings about what a mask lets through: dead rows, a visible future, documents that mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from truemask.common.finding import Finding
from truemask.common.formatting import counted, ranges
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.rules.context import Subject, at_cell
from truemask.masks.structure.data import cells_held, is_opaque
from truemask.masks.structure.order import names_order, turns_around
from truemask.masks.structure.padding import paddings

Rule = Callable[[Subject], Iterator[Finding]]

FEW = 4  # queries below which a mask may be upside down by chance
HIDDEN = 0.99  # share of the future that a tensor hides if it is meant to be causal


def dead_queries(x: Subject) -> Iterator[Finding]:
    """Queries that see nothing: their output is zeros; NaN elsewhere."""
    dead = x.mask.dead_queries(x.q_len, x.kv_len, **x.sizes)
    if not dead.any():
        return
    padded = _is_padding(x, dead)
    what = "they see nothing and nobody sees them, like padding" if padded else "they see nothing"
    fix = "" if padded else "let every query see itself (`mask | local(0)`), or leave these rows out of the loss"
    yield Finding(
        "dead-queries", "note" if padded else "warning", places("query", dead), f"{what}; their output is zeros", fix
    )


def _is_padding(x: Subject, dead: Tensor) -> bool:
    """Whether dead rows `[b, h, q]` are tokens left out on purpose: the same for all heads, and not all of a sample."""
    sizes = (x.q_len, x.kv_len)
    everywhere = dead if x.among is None else x.among.dead_queries(*sizes, **x.sizes)
    if not x.one_axis or not bool((everywhere == dead[:, :1]).all()) or bool(dead.all(-1).any()):
        return False
    if bool((dead & ~x.mask.dead_keys(*sizes, **x.sizes)).any()):
        return False
    at_an_end = bool((dead.int().diff().abs().sum(-1) <= 1).all())
    left_out = (part.dead_queries(*sizes, **x.sizes) | part.dead_keys(*sizes, **x.sizes) for part in paddings(x.mask))
    named = reduce(torch.logical_or, left_out, torch.zeros_like(dead))
    return bool((named | ~dead).all()) or (at_an_end and x.any_part(is_opaque))


def dead_keys(x: Subject) -> Iterator[Finding]:
    """Keys that nobody sees although they are rows that see something, or belong to another text."""
    dead = x.mask.dead_keys(x.q_len, x.kv_len, **x.sizes)
    if x.one_axis:
        dead = dead & ~x.mask.dead_queries(x.q_len, x.kv_len, **x.sizes)
    if dead.any():
        fix = f"leave them out: {x.kv_len} keys are computed" if not x.one_axis else ""
        yield Finding("dead-keys", "note", places("key", dead), "no query sees them", fix)


def future(x: Subject) -> Iterator[Finding]:
    """Later keys that are visible where the mask is meant to be causal."""
    if x.causal is False or not x.in_future or (not x.causal and not _claims_causality(x)):
        return
    cell = x.first(x.future)
    first = f", first {at_cell(cell, x.mask)}" if cell else ""
    said = "" if x.causal else "; the rest of it looks back only (a prefix-LM is fine, then say `causal=False` here)"
    yield Finding(
        "future",
        "error" if x.causal else "warning",
        quoted(x.mask),
        f"{counted(x.in_future, 'pair')} {'sees' if x.in_future == 1 else 'see'} the future{first}{said}",
        str(x.order & x.mask),
    )


def _claims_causality(x: Subject) -> bool:
    """The expression says so, or it is a tensor that hides nearly all of the future; and its parts count alike."""
    if not x.counts_alike:
        return False
    if names_order(x.mask) and not x.any_part(turns_around):
        return True
    later = x.pairs(~x.order)
    return x.mask.holds_cells and later > FEW and x.in_future < (1 - HIDDEN) * later


def upside_down(x: Subject) -> Iterator[Finding]:
    """Queries that see later keys, and of the earlier ones none."""
    if x.causal is False or not FEW <= x.q_len == x.kv_len or not x.in_future:
        return
    cells = cells_held(x.mask) is not None
    if x.in_future == x.total:
        message = "every query sees later keys only, neither itself nor the past: True likely meant masked out"
        fix = "~mask" if cells else str(~x.mask)
        yield Finding("inverted", "error", quoted(x.mask), message, fix)
    elif not x.on_diagonal and not x.pairs(~x.mask - x.order):
        message = "no query sees itself, and all that is hidden looks back: what it hides is likely what is meant"
        fix = "~mask" if cells else str(~x.mask)
        yield Finding("inverted", "error", quoted(x.mask), message, fix)
    elif x.in_future + x.on_diagonal == x.total:
        message = "queries see themselves and later keys, none of the past (if that is meant, say `causal=False` here)"
        fix = "mask.T, if queries and keys changed places" if cells else str(x.mask.T)
        yield Finding("inverted", "warning", quoted(x.mask), message, fix)


def mixed_documents(x: Subject) -> Iterator[Finding]:
    """Pairs across the documents of a packed row."""
    for claimed, given in x.claimed_documents():
        across = x.mask - claimed
        cell = x.first(across)
        if cell is not None:
            found = f"{counted(x.pairs(across), 'pair')} across documents, first {at_cell(cell, across)}"
            where = "the documents given" if given else quoted(claimed)
            fix = "mask.packed(lengths)" if given else "AND the documents last, or use `mask.packed(lengths)`"
            yield Finding("documents-mixed", "error" if given else "warning", where, found, fix)


OUTCOME_RULES: tuple[Rule, ...] = (upside_down, future, mixed_documents, dead_queries, dead_keys)


def places(name: str, flags: Tensor) -> str:
    """Which positions of `[b, h, n]` are meant.

    >>> import torch
    >>> places("query", torch.tensor([[[True, True, False, True]]]))
    'queries 0-1, 3'
    """
    plural = {"query": "queries", "key": "keys"}[name]
    alike = bool((flags == flags[:1, :1]).all())
    if not alike:
        total = int(flags.sum())
        return f"{counted(total, name)} over all samples and heads"
    return f"{plural} {ranges(np.flatnonzero(flags[0, 0].numpy()))}"
