"""Masks combined: everything, nothing, and the operators `&`, `|`, `^`, `-`, `~` in Kleene's three-valued logic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from truemask.geometry.logic import EMPTY, FULL, States, kleene_and, kleene_not, kleene_or, kleene_xor
from truemask.geometry.slabs import normal_form
from truemask.geometry.slabs.normal_form import NormalForm
from truemask.geometry.slabs.slabs import FAR, Flags, Region, Slabs, bands, blank
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.construction import operand
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import AND, ATOM, MINUS, NOT, OR, XOR, within
from truemask.masks.core.value import Written


@dataclass(frozen=True, eq=False, repr=False)
class Everything(Mask):
    """Every query may attend to every key."""

    kind: ClassVar[str] = "everything"
    _reads_query: ClassVar[bool] = False
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == q) & (k == k)

    def _tile(self, r: Rectangles) -> States:
        return np.broadcast_to(FULL, np.broadcast_shapes(r.q0.shape, r.k0.shape))

    def _slabs(self, r: Region) -> Slabs:
        return bands(r.q0, r.q1, -FAR, 0, FAR, 0)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return []

    def _write(self) -> Written:
        return "everything", ATOM


@dataclass(frozen=True, eq=False, repr=False)
class Nothing(Mask):
    """No query may attend to any key."""

    kind: ClassVar[str] = "nothing"
    _reads_query: ClassVar[bool] = False
    _tiles_exact: ClassVar[bool] = True

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q != q) & (k != k)

    def _tile(self, r: Rectangles) -> States:
        return np.broadcast_to(EMPTY, np.broadcast_shapes(r.q0.shape, r.k0.shape))

    def _slabs(self, r: Region) -> Slabs:
        return blank(r.q0, r.q1)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return []

    def _write(self) -> Written:
        return "nothing", ATOM


@dataclass(frozen=True, eq=False, repr=False)
class _Combination(Mask):
    """Two or more masks under one associative operator, flat."""

    terms: tuple[Mask, ...]
    _reads_query: ClassVar[bool] = False
    sign: ClassVar[str]
    level: ClassVar[int]
    fold: ClassVar[Callable[[States, States], States]]

    @classmethod
    def make(cls, *args: Any) -> Mask:
        """Flat: `(a & b) & c` and `a & (b & c)` are the same three terms."""
        masks = [operand(cls.sign, mask) for mask in args]
        return cls(tuple(term for m in masks for term in (m.terms if isinstance(m, cls) else (m,))))

    def _tile(self, r: Rectangles) -> States:
        return reduce(type(self).fold, [term._tile(r) for term in self.terms])

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return [number for term in self.terms for number in term._tile_key(r)]

    def _write(self) -> Written:
        return f" {self.sign} ".join(within(term, self.level + 1) for term in self.terms), self.level

    def kv_len_for(self, q_len: int) -> int:
        return max(term.kv_len_for(q_len) for term in self.terms)


class And(_Combination):
    """What every term lets through. Tiles: the minimum."""

    kind: ClassVar[str] = "and"
    sign, level, fold = "&", AND, staticmethod(kleene_and)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return reduce(torch.logical_and, [term._truth(b, h, q, k) for term in self.terms])

    def _plane(self, r: Region) -> Flags:
        return reduce(np.logical_and, [term._plane(r) for term in self.terms])

    def _form(self, r: Region) -> NormalForm:
        return all_forms(self, r)


class Or(_Combination):
    """What any term lets through. Tiles: the maximum."""

    kind: ClassVar[str] = "or"
    sign, level, fold = "|", OR, staticmethod(kleene_or)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return reduce(torch.logical_or, [term._truth(b, h, q, k) for term in self.terms])

    def _plane(self, r: Region) -> Flags:
        return reduce(np.logical_or, [term._plane(r) for term in self.terms])

    def _form(self, r: Region) -> NormalForm:
        return ~all_forms(Not(self), r)


class Xor(_Combination):
    """What an odd number of terms lets through. Tiles: decided where all are."""

    kind: ClassVar[str] = "xor"
    sign, level, fold = "^", XOR, staticmethod(kleene_xor)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return reduce(torch.logical_xor, [term._truth(b, h, q, k) for term in self.terms])

    def _plane(self, r: Region) -> Flags:
        return reduce(np.logical_xor, [term._plane(r) for term in self.terms])

    def _form(self, r: Region) -> NormalForm:
        return normal_form.parity([_literal(*term, r) for term in _addends(self)], {} if r.known is None else r.known)


@dataclass(frozen=True, eq=False, repr=False)
class Minus(Mask):
    """What `left` lets through and `right` does not: `left & ~right`."""

    left: Mask
    right: Mask
    kind: ClassVar[str] = "minus"
    _reads_query: ClassVar[bool] = False

    @classmethod
    def make(cls, *args: Any) -> Mask:
        left, right = (operand("-", mask) for mask in args)
        return cls(left, right)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left._truth(b, h, q, k) & ~self.right._truth(b, h, q, k)

    def _plane(self, r: Region) -> Flags:
        return self.left._plane(r) & ~self.right._plane(r)

    def _tile(self, r: Rectangles) -> States:
        return kleene_and(self.left._tile(r), kleene_not(self.right._tile(r)))

    def _form(self, r: Region) -> NormalForm:
        return all_forms(self, r)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return [*self.left._tile_key(r), *self.right._tile_key(r)]

    def _write(self) -> Written:
        left = self.left.text if isinstance(self.left, Minus) else within(self.left, MINUS)
        return f"{left} - {within(self.right, MINUS)}", MINUS

    def kv_len_for(self, q_len: int) -> int:
        return max(self.left.kv_len_for(q_len), self.right.kv_len_for(q_len))


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """What `base` does not let through. Tiles: EMPTY and FULL change places."""

    base: Mask
    kind: ClassVar[str] = "not"
    _reads_query: ClassVar[bool] = False

    @classmethod
    def make(cls, *args: Any) -> Mask:
        base = operand("~", args[0])
        return base.base if isinstance(base, cls) else cls(base)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.base._truth(b, h, q, k)

    def _plane(self, r: Region) -> Flags:
        return ~self.base._plane(r)

    def _tile(self, r: Rectangles) -> States:
        return kleene_not(self.base._tile(r))

    def _form(self, r: Region) -> NormalForm:
        return ~self.base.form_in(r)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return self.base._tile_key(r)

    def _write(self) -> Written:
        return f"~{within(self.base, NOT)}", NOT

    def kv_len_for(self, q_len: int) -> int:
        return self.base.kv_len_for(q_len)


# -- exact forms: the same one for all spellings by De Morgan's laws ---------------------------------------------------


def all_forms(mask: Mask, r: Region) -> NormalForm:
    """The exact form of a mask as the conjunction of its factors."""
    return normal_form.intersection(
        [_literal(*factor, r) for factor in _factors(mask)], {} if r.known is None else r.known
    )


def _literal(mask: Mask, negated: bool, r: Region) -> NormalForm:
    return ~mask.form_in(r) if negated else mask.form_in(r)


def _factors(mask: Mask, negated: bool = False) -> Iterator[tuple[Mask, bool]]:
    """Masks, or negated ones, that together let through what the mask does; no conjunctions any more."""
    match mask:
        case Not(base):
            yield from _factors(base, not negated)
        case And(terms) if not negated:
            yield from (factor for term in terms for factor in _factors(term))
        case Or(terms) if negated:
            yield from (factor for term in terms for factor in _factors(term, True))
        case Minus(left, right) if not negated:
            yield from (*_factors(left), *_factors(right, True))
        case _:
            yield mask, negated


def _addends(mask: Mask, negated: bool = False) -> Iterator[tuple[Mask, bool]]:
    """Masks, or negated ones, an odd number of which lets through what the mask does; no `^` any more."""
    match mask:
        case Not(base):
            yield from _addends(base, not negated)
        case Xor((first, *others)):
            yield from _addends(first, negated)
            yield from (addend for term in others for addend in _addends(term))
        case _:
            yield mask, negated


everything: Mask = Everything()
nothing: Mask = Nothing()


def conjunction(*masks: Mask) -> Mask:
    """What all of the masks let through, without the terms that say nothing.

    `&` keeps every term, because an expression is what its author wrote; this is for masks that programs put together.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> conjunction(everything, causal, window(3)), conjunction(), conjunction(causal, nothing)
    (causal & window(3), everything, nothing)
    """
    terms = [mask for mask in masks if mask != everything]
    if nothing in terms:
        return nothing
    return reduce(and_, terms) if terms else everything
