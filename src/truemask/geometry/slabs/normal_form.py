"""Boolean expressions of slabs in a normal form, so that one meaning is worked out once, however it is spelled.

Everything is an intersection or a parity of slabs that may be negated: `a | b` is what `~a & ~b` leaves out. Nothing is
done for a negation until it meets something that it can be taken from, and the same terms are never joined twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from truemask.geometry.slabs.algebra import all_of, unmerged_all, unmerged_any, unmerged_odd
from truemask.geometry.slabs.slabs import Slabs, bands, blank

RUNS_AT_ONCE = 1 << 11  # runs that are joined in one sweep; with more of them it grows with the square of the parts
EARLY_RUNS = 2  # runs of a slab; parts with more, like global tokens, are joined when the others are done


class NormalForm(NamedTuple):
    """The cells of slabs, which may be unmerged, or if `negated` the others; equal if the slabs are the same object."""

    slabs: Slabs
    negated: bool = False

    def __invert__(self) -> NormalForm:
        return NormalForm(self.slabs, not self.negated)

    def moved(self, rows: int, keys: int) -> NormalForm:
        """The same picture `rows` further down and `keys` further right."""
        return NormalForm(self.slabs.moved(rows, keys), self.negated)

    @property
    def canonical(self) -> Slabs:
        """Its cells as slabs."""
        return all_of([], but=[self.slabs]) if self.negated else self.slabs.canonical

    def clipped(self, kv_len: int) -> Slabs:
        """Its cells on keys `[0, kv_len)` as slabs, unmerged."""
        if not self.negated:
            return self.slabs.clipped(0, kv_len)
        return unmerged_all([bands(self.slabs.rows[0], self.slabs.rows[-1], 0, 0, kv_len, 0)], but=[self.slabs])


def intersection(forms: Iterable[NormalForm], remembered: dict[Any, NormalForm]) -> NormalForm:
    """The cells that all forms have."""
    terms = dict.fromkeys(forms)
    key = "all", frozenset(terms)
    if key not in remembered:
        inside = [form.slabs for form in terms if not form.negated]
        outside = [form.slabs for form in terms if form.negated]
        if not set(inside).isdisjoint(outside):
            remembered[key] = _none(inside[0])
        else:
            remembered[key] = (
                NormalForm(_all(inside, outside)) if inside else NormalForm(_joined(outside, unmerged_any), True)
            )
    return remembered[key]


def parity(forms: Iterable[NormalForm], remembered: dict[Any, NormalForm]) -> NormalForm:
    """The cells that an odd number of forms has."""
    forms = list(forms)
    negated = sum(form.negated for form in forms) % 2 == 1
    odd = [slabs for slabs, times in Counter(form.slabs for form in forms).items() if times % 2]
    key = "odd", frozenset(odd)
    if key not in remembered:
        remembered[key] = NormalForm(_joined(odd, unmerged_odd)) if odd else _none(forms[0].slabs)
    return ~remembered[key] if negated else remembered[key]


def _all(inside: list[Slabs], outside: list[Slabs]) -> Slabs:
    """Few runs at once; many one part after the other, the smallest first."""
    if _runs([*inside, *outside]) <= RUNS_AT_ONCE:
        return unmerged_all(inside, outside)
    total, *others = sorted(inside, key=_order)
    for part in others:
        total = unmerged_all([total, part])
    for part in sorted(outside, key=_order):
        total = unmerged_all([total], [part])
    return total


def _joined(parts: list[Slabs], join: Callable[[list[Slabs]], Slabs]) -> Slabs:
    """The same for operations that take parts in any order."""
    if _runs(parts) <= RUNS_AT_ONCE:
        return join(parts)
    total, *others = sorted(parts, key=_order)
    for part in others:
        total = join([total, part])
    return total


def _order(part: Slabs) -> tuple[bool, int]:
    return part.most > EARLY_RUNS, part.runs


def _runs(parts: list[Slabs]) -> int:
    return sum(part.runs for part in parts)


def _none(like: Slabs) -> NormalForm:
    return NormalForm(blank(like.rows[0], like.rows[-1]))
