"""Findings about how a mask is written: parts without effect, windows longer than the text, cells that have a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from truemask.common.finding import Finding
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.naming import name_of
from truemask.diagnosis.rules.context import CELLS, Subject
from truemask.errors import MaskError
from truemask.masks.compose.boolean import And, Minus, Not, Or
from truemask.masks.compose.packed import Packed, Padded
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import Local, Window, causal
from truemask.masks.leaves.documents import Documents

MOST_PARTS = 16  # of an expression, that are left out one by one
ABSOLUTE = ("prefix", "blocks", "strided", "global_tokens", "block_pattern", "grid")  # they count from the row's start


def not_restarted(x: Subject) -> Iterator[Finding]:
    """Parts that count from the start of the row, beside documents: only the first document has them."""
    for claimed in (part for part in _outside_packed(x.mask) if isinstance(part, Documents)):
        counting = [part for part in _outside_packed(x.mask) if part.kind in ABSOLUTE]
        packed = _restarted(x.mask, claimed)
        if not counting or (packed is not None and x.means_the_same(packed)):
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
    if not isinstance(mask, Packed):
        for child in mask.children:
            yield from _outside_packed(child)


def _restarted(mask: Mask, claimed: Documents) -> Mask | None:
    """The other terms inside each document, where the documents are one of several terms and numbered in order."""
    shown, other = claimed._shown  # pyright: ignore[reportPrivateUsage]
    if not isinstance(mask, And) or claimed not in mask.terms or not claimed._numbered or other:  # pyright: ignore
        return None
    rest = _joined(And, [term for term in mask.terms if term != claimed])
    try:
        return rest.packed(shown.tensor)
    except MaskError:
        return None


def long_windows(x: Subject) -> Iterator[Finding]:
    """Windows and neighbourhoods that reach beyond the text."""
    for part, put in parts_of(x.mask):
        if _is_long(x, part) and x.means_the_same(put(causal)):
            message = "the window is longer than what there is to see: it means `causal` here"
            yield Finding("long-window", "note", quoted(part), message, str(put(causal)))
        if isinstance(part, Local) and part.radius + 1 >= max(x.q_len, x.kv_len):
            yield Finding("long-window", "note", quoted(part), "the radius is longer than the text: everything is near")


def _is_long(x: Subject, part: Mask) -> bool:
    return isinstance(part, Window) and part.size >= min(x.q_len, x.kv_len)


def no_effect(x: Subject) -> Iterator[Finding]:
    """Terms without which the expression means the same."""
    shorter = list(_shorter(x.mask))
    if len(shorter) > MOST_PARTS:
        return
    for part, without in shorter:
        if _backs_a_window(x.mask, part) or _is_long(x, part):
            continue
        if x.means_the_same(without):
            here = "" if x.means_the_same_longer(without) else f", at {x.q_len:,} queries and {x.kv_len:,} keys"
            message = f"the expression means the same without it{here}"
            yield Finding("no-effect", "note", quoted(part), message, str(without))


def _backs_a_window(mask: Mask, part: Mask) -> bool:
    """`causal & window(n)` is the usual way to write it: no need to mention that a window is causal already."""
    return part == causal and isinstance(mask, And) and any(isinstance(term, Window) for term in mask.terms)


def parts_of(mask: Mask) -> Iterator[tuple[Mask, Callable[[Mask], Mask]]]:
    """Every part, and how to put another in its place."""
    yield mask, lambda new: new
    for put_child, child in _children(mask):
        for part, put in parts_of(child):
            yield part, lambda new, put=put, put_child=put_child: put_child(put(new))


def _shorter(mask: Mask) -> Iterator[tuple[Mask, Mask]]:
    """Every term of `&`, `|` and `-` with the expression without it."""
    for part, put in parts_of(mask):
        if isinstance(part, (And, Or)):
            for i, term in enumerate(part.terms):
                yield term, put(_joined(type(part), [*part.terms[:i], *part.terms[i + 1 :]]))
        if isinstance(part, Minus):
            yield part.right, put(part.left)


def _children(mask: Mask) -> Iterator[tuple[Callable[[Mask], Mask], Mask]]:
    """The parts that can be replaced without asking anew what data fits them."""
    if isinstance(mask, (And, Or)):
        for i, term in enumerate(mask.terms):
            yield lambda new, i=i: _joined(type(mask), [*mask.terms[:i], new, *mask.terms[i + 1 :]]), term
    elif isinstance(mask, Minus):
        yield lambda new: new - mask.right, mask.left
        yield lambda new: mask.left - new, mask.right
    elif isinstance(mask, (Not, Packed, Padded)):
        yield lambda new: replace(mask, base=new), mask.base


def _joined(kind: type[And] | type[Or], terms: list[Mask]) -> Mask:
    """The terms, equal ones once: `a & a` and `a | a` are `a`."""
    once = list(dict.fromkeys(terms))
    return once[0] if len(once) == 1 else kind.make(*once)


def known_by_name(x: Subject) -> Iterator[Finding]:
    """Cells that are an expression of the language."""
    for part in x.mask.walk():
        if part.kind not in CELLS or (part is not x.mask and x.kinds & {"at", "take", "packed", "padded", "prepended"}):
            continue
        found = name_of(part, x.q_len, x.kv_len, **x.sizes)
        if found is not None:
            yield Finding("has-a-name", "note", quoted(part), found.words(), "" if found.differs else str(found.mask))


WORDING_RULES = (not_restarted, long_windows, no_effect)
