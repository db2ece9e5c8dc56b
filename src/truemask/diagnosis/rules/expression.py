"""Findings about how a mask is written: parts without effect, windows longer than the text, cells that have a name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import and_

from truemask.common.finding import Finding
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.naming import name_of
from truemask.diagnosis.rules.context import RuleContext
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.data import is_opaque
from truemask.masks.structure.documents import is_documents_only, lengths_of_documents, restarts_positions
from truemask.masks.structure.order import band, counts_from_start, is_order, window_size
from truemask.masks.structure.parts import all_parts, conjuncts, droppable_terms
from truemask.masks.structure.placement import moves_positions

MAX_TERMS = 16  # of an expression, that are left out one by one


def not_restarted(context: RuleContext) -> Iterator[Finding]:
    """Parts that count from the start of the row, beside documents: only the first document has them."""
    for documents in filter(is_documents_only, _outside_packed(context.mask)):
        counting = list(filter(counts_from_start, _outside_packed(context.mask)))
        packed = _restarted(context.mask, documents)
        if not counting or (packed is not None and context.means_the_same(packed)):
            continue
        what = " and ".join(quoted(part) for part in dict.fromkeys(counting))
        message = (
            f"{what} {'counts' if len(counting) == 1 else 'count'} from the start of the row, not of each document"
        )
        yield Finding(
            "not-restarted", "warning", what, message, "mask.packed(lengths)" if packed is None else str(packed)
        )


def _outside_packed(mask: Mask) -> Iterator[Mask]:
    yield mask
    if not restarts_positions(mask):
        for child in mask.children:
            yield from _outside_packed(child)


def _restarted(mask: Mask, documents: Mask) -> Mask | None:
    """The other terms inside each document, where the documents are one of several terms and numbered in order."""
    lengths, terms = lengths_of_documents(documents), conjuncts(mask)
    others = dict.fromkeys(term for term in terms if term != documents)
    if lengths is None or documents not in terms or not others:
        return None
    try:
        return reduce(and_, others).packed(lengths.tensor)
    except MaskError:
        return None


def long_windows(context: RuleContext) -> Iterator[Finding]:
    """Windows and neighbourhoods that reach beyond the text."""
    for part, put in all_parts(context.mask):
        if _is_long(context, part) and context.means_the_same(put(causal)):
            message = "the window is longer than what there is to see: it means `causal` here"
            yield Finding("long-window", "note", quoted(part), message, str(put(causal)))
        if _is_wide(context, part):
            yield Finding("long-window", "note", quoted(part), "the radius is longer than the text: everything is near")


def _is_long(context: RuleContext, part: Mask) -> bool:
    size = window_size(part)
    return size is not None and size >= min(context.q_len, context.kv_len)


def _is_wide(context: RuleContext, part: Mask) -> bool:
    """Whether it is a neighbourhood, to both sides, that reaches beyond the text."""
    reach = None if is_order(part) else band(part)
    return reach is not None and reach.ahead is not None and reach.ahead + 1 >= max(context.q_len, context.kv_len)


def no_effect(context: RuleContext) -> Iterator[Finding]:
    """Terms without which the expression means the same."""
    shorter = list(_shorter(context.mask))
    if len(shorter) > MAX_TERMS:
        return
    for part, without in shorter:
        if _backs_a_window(context.mask, part) or _is_long(context, part):
            continue
        if context.means_the_same(without):
            here = (
                ""
                if context.means_the_same_longer(without)
                else f", at {context.q_len:,} queries and {context.kv_len:,} keys"
            )
            message = f"the expression means the same without it{here}"
            yield Finding("no-effect", "note", quoted(part), message, str(without))


def _backs_a_window(mask: Mask, part: Mask) -> bool:
    """`causal & window(n)` is the usual way to write it: no need to mention that a window is causal already."""
    return part == causal and any(window_size(term) is not None for term in conjuncts(mask))


def _shorter(mask: Mask) -> Iterator[tuple[Mask, Mask]]:
    """Every term that may be left out, with the expression without it."""
    for part, put in all_parts(mask):
        for term, rest in droppable_terms(part):
            yield term, put(rest)


def known_by_name(context: RuleContext) -> Iterator[Finding]:
    """Cells that are an expression of the language."""
    for part in context.mask.walk():
        if not is_opaque(part) or (part is not context.mask and context.any_part(moves_positions)):
            continue
        name = name_of(part, context.q_len, context.kv_len, **context.sizes)
        if name is not None:
            yield Finding("has-a-name", "note", quoted(part), name.words(), "" if name.differs else str(name.mask))


EXPRESSION_RULES = (not_restarted, long_windows, no_effect)
