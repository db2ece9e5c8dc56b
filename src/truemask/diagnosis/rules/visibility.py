"""Findings about what a mask lets through: dead rows, a visible future, documents that mix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from truemask.common.finding import Finding
from truemask.common.formatting import counted, ranges
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.rules.context import Rule, RuleContext, at_cell
from truemask.masks.structure.data import cells_held, is_opaque
from truemask.masks.structure.order import names_order, turns_around
from truemask.masks.structure.padding import paddings

MIN_QUERIES = 4  # queries below which a mask may be upside down by chance
HIDDEN_SHARE = 0.99  # share of the future that a tensor hides if it is meant to be causal


def dead_queries(context: RuleContext) -> Iterator[Finding]:
    """Queries that see nothing: their output is zeros; NaN elsewhere."""
    dead = context.mask.dead_queries(context.q_len, context.kv_len, **context.sizes)
    if not dead.any():
        return
    padded = _is_padding(context, dead)
    what = "they see nothing and nobody sees them, like padding" if padded else "they see nothing"
    fix = "" if padded else "let every query see itself (`mask | local(0)`), or leave these rows out of the loss"
    yield Finding(
        "dead-queries", "note" if padded else "warning", places("query", dead), f"{what}; their output is zeros", fix
    )


def _is_padding(context: RuleContext, dead: Tensor) -> bool:
    """Whether dead rows `[b, h, q]` are tokens left out on purpose: the same for all heads, and not all of a sample."""
    sizes = (context.q_len, context.kv_len)
    everywhere = dead if context.among is None else context.among.dead_queries(*sizes, **context.sizes)
    if not context.one_axis or not bool((everywhere == dead[:, :1]).all()) or bool(dead.all(-1).any()):
        return False
    if bool((dead & ~context.mask.dead_keys(*sizes, **context.sizes)).any()):
        return False
    at_an_end = bool((dead.int().diff().abs().sum(-1) <= 1).all())
    left_out = (
        part.dead_queries(*sizes, **context.sizes) | part.dead_keys(*sizes, **context.sizes)
        for part in paddings(context.mask)
    )
    by_name = reduce(torch.logical_or, left_out, torch.zeros_like(dead))
    return bool((by_name | ~dead).all()) or (at_an_end and context.any_part(is_opaque))


def dead_keys(context: RuleContext) -> Iterator[Finding]:
    """Keys that nobody sees although they are rows that see something, or belong to another text."""
    dead = context.mask.dead_keys(context.q_len, context.kv_len, **context.sizes)
    if context.one_axis:
        dead = dead & ~context.mask.dead_queries(context.q_len, context.kv_len, **context.sizes)
    if dead.any():
        fix = f"leave them out: {context.kv_len} keys are computed" if not context.one_axis else ""
        yield Finding("dead-keys", "note", places("key", dead), "no query sees them", fix)


def future(context: RuleContext) -> Iterator[Finding]:
    """Later keys that are visible where the mask is meant to be causal."""
    if context.causal is False or not context.in_future or (not context.causal and not _claims_causality(context)):
        return
    cell = context.first(context.future)
    first = f", first {at_cell(cell, context.mask)}" if cell else ""
    rest = (
        "" if context.causal else "; the rest of it looks back only (a prefix-LM is fine, then say `causal=False` here)"
    )
    yield Finding(
        "future",
        "error" if context.causal else "warning",
        quoted(context.mask),
        f"{counted(context.in_future, 'pair')} {'sees' if context.in_future == 1 else 'see'} the future{first}{rest}",
        str(context.order & context.mask),
    )


def _claims_causality(context: RuleContext) -> bool:
    """The expression says so, or it is a tensor that hides nearly all of the future; and its parts count alike."""
    if not context.counts_alike:
        return False
    if names_order(context.mask) and not context.any_part(turns_around):
        return True
    later = context.pairs(~context.order)
    return context.mask.holds_cells and later > MIN_QUERIES and context.in_future < (1 - HIDDEN_SHARE) * later


def upside_down(context: RuleContext) -> Iterator[Finding]:
    """Queries that see later keys, and of the earlier ones none."""
    if context.causal is False or not MIN_QUERIES <= context.q_len == context.kv_len or not context.in_future:
        return
    cells = cells_held(context.mask) is not None
    if context.in_future == context.total:
        message = "every query sees later keys only, neither itself nor the past: True likely meant masked out"
        fix = "~mask" if cells else str(~context.mask)
        yield Finding("inverted", "error", quoted(context.mask), message, fix)
    elif not context.on_diagonal and not context.pairs(~context.mask - context.order):
        message = "no query sees itself, and all that is hidden looks back: what it hides is likely what is meant"
        fix = "~mask" if cells else str(~context.mask)
        yield Finding("inverted", "error", quoted(context.mask), message, fix)
    elif context.in_future + context.on_diagonal == context.total:
        message = "queries see themselves and later keys, none of the past (if that is meant, say `causal=False` here)"
        fix = "mask.T, if queries and keys changed places" if cells else str(context.mask.T)
        yield Finding("inverted", "warning", quoted(context.mask), message, fix)


def mixed_documents(context: RuleContext) -> Iterator[Finding]:
    """Pairs across the documents of a packed row."""
    for documents, is_given in context.claimed_documents():
        across = context.mask - documents
        cell = context.first(across)
        if cell is not None:
            message = f"{counted(context.pairs(across), 'pair')} across documents, first {at_cell(cell, across)}"
            where = "the documents given" if is_given else quoted(documents)
            fix = "mask.packed(lengths)" if is_given else "AND the documents last, or use `mask.packed(lengths)`"
            yield Finding("documents-mixed", "error" if is_given else "warning", where, message, fix)


VISIBILITY_RULES: tuple[Rule, ...] = (upside_down, future, mixed_documents, dead_queries, dead_keys)


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
