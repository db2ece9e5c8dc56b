"""A mask as a value: what a kind of mask says of itself, what it is made of, equality and hashing, and its text.

True means "may attend" and positions are logical, 0-based and absolute (docs/conventions.md). A kind of mask is a
frozen dataclass of numbers, data and other masks that says

* `_truth(b, h, q, k)`: the meaning, index arithmetic on tensors that broadcast together, called on a *bound* copy, in
  which numbers are 0-d tensors and `self.table(name)` is data on the right device;
* `_tile(rectangles)`: EMPTY, MIXED or FULL for whole rectangles, soundly;
* how it is written (`_write`), and how large its data is (`_check`, `batch_size`, `head_count`).

The rest has defaults, which a kind that knows more overrides. What everybody may ask of a mask stands in `mask.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from truemask.common.real_tensors import is_diverted, is_late, ordinary_tensors, remembered
from truemask.errors import MaskError
from truemask.geometry.logic import States
from truemask.geometry.slabs.normal_form import NormalForm
from truemask.geometry.slabs.slabs import Flags, NoExactFormError, Region, Slabs
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.data import Data
from truemask.masks.core.kinds import restore

if TYPE_CHECKING:
    from typing_extensions import Self

ANY = 0  # the size of an axis over which a mask varies without holding a number of entries
MAX_DEPTH = 200  # nesting of an expression: far more than anyone writes, far less than Python's own limit

Written = tuple[str, int]


class Value(ABC):
    """A frozen dataclass whose fields are numbers, data, and other values of its kind."""

    kind: ClassVar[str] = ""
    _numbers: ClassVar[tuple[str, ...]] = ()  # fields that reach `_truth` as 0-d tensors
    _reads_query: ClassVar[bool] = True  # whether `_truth` itself looks at q, its parts aside
    _tiles_exact: ClassVar[bool] = False  # whether `_tile` answers MIXED only where both values occur

    # -- what each kind says ---------------------------------------------------------------------------------------

    @abstractmethod
    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Bool tensor that broadcasts with the indices."""

    @abstractmethod
    def _tile(self, r: Rectangles) -> States:
        """Three-valued answers that broadcast with the rectangles."""

    @abstractmethod
    def _write(self) -> Written:
        """The text of this expression and how tightly it binds."""

    def _slabs(self, r: Region) -> Slabs:
        """What `slabs_in` answers, for kinds that know it themselves."""
        raise NoExactFormError(f"`{self}` has no exact form")

    def _form(self, r: Region) -> NormalForm:
        """The same, which may be unmerged or negated."""
        return NormalForm(self._slabs(r))

    def _distinct_key(self, b: int, h: int) -> Hashable:
        """What tells sample b and head h from others: those that share it have the same mask."""
        row_kinds = [
            part.row_kind(b) for part in self.parts.values() if isinstance(part, Data) and part.tensor.ndim == 2
        ]
        return (*row_kinds, *(child._distinct_key(b, h) for child in self.children))

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        """Numbers that are equal for tiles (of one size) only if their cells are."""
        return [r.q0, r.k0, *([r.b] if self.batch_size != 1 else []), *([r.h] if self.head_count != 1 else [])]

    def _periodic_from(self, k_stop: int) -> tuple[int, int] | None:
        """A row from which on what is seen of the keys below `k_stop` repeats, and with what period; None: never.

        Rows beyond the mask's data do not count.
        """
        answers = [child._periodic_from(k_stop) for child in self.children]
        periodic = [pair for pair in answers if pair is not None]
        if len(periodic) < len(answers) or (not answers and self._reads_query):
            return None  # a leaf whose rows hold data never settles before they end
        return max((row for row, _ in periodic), default=0), math.lcm(*(period for _, period in periodic))

    def _check(self, q_stop: int, k_stop: int) -> None:
        """Raise if positions below `q_stop` and `k_stop` are more than the data answers for."""
        for child in self.children:
            child._check(q_stop, k_stop)

    def _tables(self) -> dict[str, Tensor]:
        """The tensors that `_truth` looks things up in, on the CPU."""
        return {name: part.tensor for name, part in self.parts.items() if isinstance(part, Data)}

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        """Logical positions of rows `q` and keys `k` if this mask re-indexes them; `[n]` or `[b, n]`."""
        moved = [(child, pair) for child in self.children if (pair := child._logical(q, k)) is not None]
        for child, pair in moved[1:]:
            if not all(bool((here == first).all()) for here, first in zip(pair, moved[0][1], strict=True)):
                raise MaskError(
                    f"`{moved[0][0]}` and `{child}` count positions differently, so the rows of `{self}` have no one "
                    "position: pass positions yourself (`pos=`), or re-index the whole expression once"
                )
        return max((pair for _, pair in moved), key=lambda pair: pair[0].ndim + pair[1].ndim, default=None)

    def _plane(self, r: Region) -> Flags:
        """The cells of a region; a view, where the mask is a tensor."""
        q, k = np.arange(r.q0, r.q1)[:, None], np.arange(r.k0, r.k1)
        return self._cells(np.asarray(r.b), np.asarray(r.h), q, k)

    @remembered
    def batch_size(self) -> int:
        """1 if all samples have the same mask, 0 if it varies without holding a number of samples, else that number."""
        return joined("samples", self.children, [child.batch_size for child in self.children])

    @remembered
    def head_count(self) -> int:
        """1 if all heads have the same mask, 0 if it varies without holding a number of heads, else that number."""
        return joined("heads", self.children, [child.head_count for child in self.children])

    @remembered
    def varies_with_query(self) -> bool:
        """False only if every query provably sees the same keys."""
        return self._reads_query or any(child.varies_with_query for child in self.children)

    @remembered
    def functions(self) -> tuple[Any, ...]:
        """The functions of the caller among its parts: what `predicate` made."""
        return tuple(fn for child in self.children for fn in child.functions)

    @remembered
    def holds_cells(self) -> bool:
        """Whether some part is a tensor of cells, so that regions are read faster than places."""
        return any(child.holds_cells for child in self.children)

    def kv_len_for(self, q_len: int) -> int:
        """What `kv_len=None` means for `q_len` queries: as many keys as positions have passed."""
        return q_len

    def q_len_for(self, kv_len: int) -> int:
        """The same from the other side: how many queries go with `kv_len` keys, as `.T` asks."""
        return kv_len

    # -- what follows from it --------------------------------------------------------------------------------------

    def truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q may attend to key k in sample b and head h: int64 tensors that broadcast, to bool.

        It has the signature of FlexAttention's `mask_mod`. Indices beyond the mask's data are the caller's to avoid.
        """
        shape = torch.broadcast_tensors(b, h, q, k)[0].shape
        return self.bound(q.device)._truth(b, h, q, k).expand(shape)

    def _cells(self, b: Any, h: Any, q: Any, k: Any) -> Flags:
        """`truth` on numpy arrays."""
        with ordinary_tensors() if is_diverted() else nullcontext():
            return self.truth(*map(torch.from_numpy, (b, h, q, k))).numpy()

    def form_in(self, r: Region) -> NormalForm:
        """The exact form for a region that is not empty, or `NoExactFormError`; it may be unmerged or negated.

        It is found once in answering a question.
        """
        forms = {} if r.known is None else r.known
        key = (self, *r[:-1])
        if key not in forms:
            forms[key] = self._form(r)
        return forms[key]

    def slabs_in(self, r: Region) -> Slabs:
        """The same as slabs that are neither."""
        return self.form_in(r).canonical

    def bound(self, device: torch.device | str) -> Self:
        """This mask with its numbers and data as tensors on `device`; made once if they are real there."""
        copies = vars(self).setdefault("_bound", {})
        place = str(device)
        if place in copies:
            return copies[place]
        if place == "meta" or self.is_late:
            return self._bind(torch.device(device))
        with ordinary_tensors():
            copies[place] = self._bind(torch.device(device))
        return copies[place]

    def _bind(self, device: torch.device) -> Self:
        new = type(self).__new__(type(self))
        attributes = vars(new)
        attributes.update(self.parts)
        for name in self._numbers:
            number = getattr(self, name)
            attributes[name] = number if is_late(number) else torch.tensor(number, device=device)
        for name in self._child_fields:
            value = getattr(self, name)
            attributes[name] = (
                value.bound(device) if isinstance(value, Value) else tuple(m.bound(device) for m in value)
            )
        attributes["_bound_tables"] = {name: table.to(device) for name, table in self._tables().items()}
        return new

    def table(self, name: str) -> Tensor:
        """A table of the bound mask."""
        return vars(self)["_bound_tables"][name]

    # -- what it is made of ----------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        """The fields that the expression is made of, by name."""
        return {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}

    @remembered
    def _child_fields(self) -> tuple[str, ...]:
        return tuple(name for name, part in self.parts.items() if _holds_masks(part))

    @remembered
    def children(self) -> tuple[Any, ...]:
        """The masks that this one is made of."""
        values = (getattr(self, name) for name in self._child_fields)
        return tuple(m for value in values for m in ((value,) if isinstance(value, Value) else value))

    @remembered
    def depth(self) -> int:
        """How deeply the expression is nested; a leaf has depth 1."""
        return 1 + max((child.depth for child in self.children), default=0)

    def walk(self) -> Iterator[Any]:
        """This mask and all those below it, outermost first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def __post_init__(self) -> None:
        if self.depth > MAX_DEPTH:
            raise MaskError(
                f"this expression is nested more than {MAX_DEPTH} deep: combine masks of one kind flatly instead"
            )
        _ = self.batch_size, self.head_count  # parts that hold data for different numbers of samples are an error here

    @property
    def is_late(self) -> bool:
        """Whether some of its data or numbers come in with each call of a graph that is being recorded."""
        has_late_part = any(part.late if isinstance(part, Data) else is_late(part) for part in self.parts.values())
        return has_late_part or any(child.is_late for child in self.children)

    # -- equality and text -----------------------------------------------------------------------------------------

    @remembered
    def _key(self) -> tuple[object, ...]:
        return (self.kind, *self.parts.values())

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Value) or self.kind != other.kind:
            return self is other
        hashes = vars(self).get("_hash"), vars(other).get("_hash")
        if None in hashes and (self.is_late or other.is_late):  # which have no hash
            return self.is_late and other.is_late and self._key == other._key
        return hash(self) == hash(other) and self._key == other._key

    def __hash__(self) -> int:
        if "_hash" not in vars(self):
            vars(self)["_hash"] = hash(self._key)
        return vars(self)["_hash"]

    def __reduce__(self) -> tuple[Any, ...]:
        return restore, (self.kind,), self.parts

    @remembered
    def text(self) -> str:
        """The expression as text; `tm.parse` reads it back if `has_text`."""
        return self._write()[0]

    @remembered
    def has_text(self) -> bool:
        """Whether the text is complete: no data too large to write, no function."""
        is_complete = all(part.complete for part in self.parts.values() if isinstance(part, Data))
        return is_complete and all(child.has_text for child in self.children)

    def __repr__(self) -> str:
        return self.text


def _holds_masks(value: object) -> bool:
    return isinstance(value, Value) or (isinstance(value, tuple) and bool(value) and isinstance(value[0], Value))


def joined(axis: str, masks: Iterable[Value], sizes: Iterable[int]) -> int:
    """The common size of an axis: 1 gives way to any, ANY to a number, and two numbers must agree."""
    pairs = list(zip(sizes, masks, strict=True))
    numbered = [(size, mask) for size, mask in pairs if size > 1]
    if not numbered:
        return ANY if any(size == ANY for size, _ in pairs) else 1
    a, first = numbered[0]
    for b, second in numbered[1:]:
        if a == b:
            continue
        if first is second:
            raise MaskError(f"the parts of `{first}` hold data for {a} and for {b} {axis}: they must agree")
        raise MaskError(f"cannot combine `{first}`, which holds data for {a} {axis}, with `{second}`, which has {b}")
    return a
