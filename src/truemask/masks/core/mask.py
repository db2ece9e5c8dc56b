"""What a mask is: an immutable expression that answers `truth` for cells and `tile` for rectangles.

True means "may attend" and positions are logical, 0-based and absolute (docs/conventions.md). A kind of mask is a
frozen dataclass that says

* `_truth(b, h, q, k)`: the meaning, index arithmetic on tensors that broadcast together, called on a *bound* copy, in
  which numbers are 0-d tensors and `self.table(name)` is data on the right device;
* `_tile(rectangles)`: EMPTY, MIXED or FULL for whole rectangles, soundly;
* how large its data is (`_check`, `batch_size`, `head_count`) and how it is written (`_write`).

What operators and re-indexing methods build (`combine.py`, `reindex.py`) is found through the registry of kinds.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.real_tensors import is_late, ordinary_tensors, remembered
from truemask.errors import MaskError
from truemask.geometry.logic import States
from truemask.geometry.slabs.algebra import cropped
from truemask.geometry.slabs.normal_form import Form
from truemask.geometry.slabs.slabs import NoExactFormError, Region, Slabs
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.data import Data
from truemask.masks.core.memory import mask_memory
from truemask.masks.core.queries import ANY, Questions
from truemask.masks.core.registry import KINDS, build, names_of, operand
from truemask.masks.core.value import Value, joined
from truemask.masks.core.verdict import Verdict


class Mask(Value, Questions):
    """A rule that says which query may attend to which key, in each sample and head.

    Masks are values: immutable, hashable, picklable; `==` compares expressions, `equivalent` compares meaning. Combine
    them with `&`, `|`, `~`, `^` and `-` (and not); re-index them with `at`, `take`, `select`, `packed`, `padded`, `T`.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> from truemask.masks.leaves.per_token import prefix
    >>> mask = causal & (window(3) | prefix(1))
    >>> mask
    causal & (window(3) | prefix(1))
    >>> mask.to_dense(5)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]
    """

    kind: ClassVar[str] = ""
    _numbers: ClassVar[tuple[str, ...]] = ()  # fields that reach `_truth` as 0-d tensors
    _reads_query: ClassVar[bool] = True  # whether `_truth` itself looks at q, its parts aside

    ticket: Tensor  # this mask in a compiled graph (building.py)
    number: str  # the same while `torch.export` traces by way of dynamo

    def __new__(cls, *_: object, **__: object) -> Any:
        new = super().__new__(cls)
        vars(new).update({} if torch.compiler.is_dynamo_compiling() else names_of(new))
        return new

    def __init_subclass__(cls) -> None:
        if cls.kind:
            KINDS[cls.kind] = cls

    # -- what each kind says ---------------------------------------------------------------------------------------

    children: tuple[Mask, ...]  # pyright: ignore[reportIncompatibleVariableOverride]

    @abstractmethod
    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Bool tensor that broadcasts with the indices."""

    def _slabs(self, r: Region) -> Slabs:
        """What `slabs_in` answers, for kinds that know it themselves."""
        raise NoExactFormError(f"`{self}` has no exact form")

    def _form(self, r: Region) -> Form:
        """The same, which may be rough or negated."""
        return Form(self._slabs(r))

    def form_in(self, r: Region) -> Form:
        """The same, found once in answering a question."""
        known = {} if r.known is None else r.known
        key = (self, *r[:-1])
        if key not in known:
            known[key] = self._form(r)
        return known[key]

    def slabs_in(self, r: Region) -> Slabs:
        """The exact form for a region that is not empty, or `NoExactFormError`."""
        return self.form_in(r).settled

    def _variant(self, b: int, h: int) -> Hashable:
        """What tells sample b and head h from others: those that share it have the same mask."""
        own = [part.row_kind(b) for part in self.parts.values() if isinstance(part, Data) and part.tensor.ndim == 2]
        return (*own, *(child._variant(b, h) for child in self.children))

    def _phase(self, r: Rectangles) -> Sequence[Ints]:
        """Numbers that are equal for tiles (of one size) only if their cells are."""
        return [r.q0, r.k0, *([r.b] if self.batch_size != 1 else []), *([r.h] if self.head_count != 1 else [])]

    def _settles(self, k_stop: int) -> tuple[int, int] | None:
        """A row from which on what is seen of the keys below `k_stop` repeats, and with what period; None: never.

        Rows beyond the mask's data do not count.
        """
        found = [child._settles(k_stop) for child in self.children]
        known = [pair for pair in found if pair is not None]
        if len(known) < len(found) or (not found and self._reads_query):
            return None  # a leaf whose rows hold data never settles before they end
        return max((row for row, _ in known), default=0), math.lcm(*(period for _, period in known))

    def _check(self, q_stop: int, k_stop: int) -> None:
        """Raise if positions below `q_stop` and `k_stop` are more than the data answers for."""
        for child in self.children:
            child._check(q_stop, k_stop)

    def _tables(self) -> dict[str, Tensor]:
        """The tensors that `_truth` looks things up in, on the CPU."""
        return {name: part.tensor for name, part in self.parts.items() if isinstance(part, Data)}

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        """Logical positions of rows `q` and keys `k` if this mask re-indexes them; `[n]` or `[b, n]`."""
        found = [(child, pair) for child in self.children if (pair := child._logical(q, k)) is not None]
        for child, pair in found[1:]:
            if not all(bool((own == first).all()) for own, first in zip(pair, found[0][1], strict=True)):
                raise MaskError(
                    f"`{found[0][0]}` and `{child}` count positions differently, so the rows of `{self}` have no one "
                    "position: pass positions yourself (`pos=`), or re-index the whole expression once"
                )
        return max((pair for _, pair in found), key=lambda pair: pair[0].ndim + pair[1].ndim, default=None)

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

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the mask holds, and of what it has worked out and remembers; shared ones once.

        >>> from truemask.masks.leaves.per_token import keys
        >>> flags = keys([True] * 500)
        >>> flags.nbytes, (flags & flags).nbytes
        (500, 500)
        """
        return sum(mask_memory(self).values())

    def kv_len_for(self, q_len: int) -> int:
        """What `kv_len=None` means for `q_len` queries: as many keys as positions have passed."""
        return q_len

    def q_len_for(self, kv_len: int) -> int:
        """The same from the other side: how many queries go with `kv_len` keys, as `.T` asks."""
        return kv_len

    # -- operators ---------------------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        return build("and", self, other)

    def __or__(self, other: Mask) -> Mask:
        return build("or", self, other)

    def __xor__(self, other: Mask) -> Mask:
        return build("xor", self, other)

    def __sub__(self, other: Mask) -> Mask:
        return build("minus", self, other)

    def __invert__(self) -> Mask:
        return build("not", self)

    def __rand__(self, other: object) -> Mask:
        return build("and", other, self)

    def __ror__(self, other: object) -> Mask:
        return build("or", other, self)

    def __rxor__(self, other: object) -> Mask:
        return build("xor", other, self)

    def __rsub__(self, other: object) -> Mask:
        return build("minus", other, self)

    def __bool__(self) -> bool:
        raise MaskError(
            f"the mask `{self}` is neither true nor false: Python's `and`, `or`, `not` and `if` cannot combine masks. "
            "Use `&`, `|` and `~`"
        )

    def __call__(self, *args: object, **kwargs: object) -> Mask:
        name = self.text
        raise MaskError(
            f"`{name}` is a value, not a function: write `{name}` without parentheses (its cells are `mask[q, k]`, "
            "its meaning on index tensors `mask.truth(b, h, q, k)`)"
        )

    # -- re-indexing -------------------------------------------------------------------------------------------------

    @property
    def T(self) -> Mask:
        """Queries and keys change places."""
        return build("transposed", self)

    def at(self, q_start: int = 0, k_start: int = 0) -> Mask:
        """The same mask for rows that start at position `q_start` and keys that start at `k_start`.

        Row i of the result is position q_start + i. This is how chunks, prefill and decoding ask: never rewrite a
        mask, re-index it (law 2 in docs/conventions.md). `m.at(a).at(b)` is `m.at(a + b)`.

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.at(q_start=3).to_dense(1)[0, 0].int().tolist()  # decoding position 3: four keys so far
        [[1, 1, 1, 1]]
        """
        return build("at", self, q_start, k_start)

    def take(self, q: object = None, k: object = None) -> Mask:
        """The same mask for any rows and keys: logical positions, int64 `[n]` or `[b, n]`; None keeps an axis."""
        return build("take", self, q, k)

    def select(self, samples: object = None, heads: object = None) -> Mask:
        """The same mask for chosen samples and heads, in that order (beams, compaction, tensor parallel)."""
        return build("select", self, samples, heads)

    def packed(self, lengths: object, kv_lengths: object = None) -> Mask:
        """The same document, and this mask at positions that restart in each document (law 2 in docs/conventions.md).

        `lengths` are tokens per document, `[m]` or one list per sample; `kv_lengths` for packed cross-attention.

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.packed([2, 3]).to_dense(5)[0, 0].int().tolist()
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
        """
        return build("packed", self, lengths, kv_lengths)

    def padded(self, starts: object) -> Mask:
        """Left padding: sample b begins at `starts[b]`, and this mask counts from there (law 2 in docs/conventions.md).

        `starts` are tokens, one for each sample; what stands before sees nothing and is seen by nobody.

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.padded([1]).to_dense(3)[0, 0].int().tolist()
        [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
        """
        return build("padded", self, starts)

    def prepended(self, q: int = 0, k: int = 0, seen: Mask | None = None) -> Mask:
        """With `q` extra rows and `k` extra keys before the mask's own, which do not count them (registers, memory).

        The extra keys are seen by every row. The extra rows see them, and those of the mask's own keys that `seen`
        lets through (default: all); `seen` must be the same for every query.
        """
        return build("prepended", self, q, k, build("everything") if seen is None else seen)

    @classmethod
    def make(cls, *args: Any, **parts: Any) -> Mask:
        """Build from what a user may write; kinds with canonical fields override it."""
        return cls(*args, **parts)

    # -- meaning -----------------------------------------------------------------------------------------------------

    def truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q may attend to key k in sample b and head h: int64 tensors that broadcast, to bool.

        It has the signature of FlexAttention's `mask_mod`. Indices beyond the mask's data are the caller's to avoid.
        """
        shape = torch.broadcast_tensors(b, h, q, k)[0].shape
        return self.bound(q.device)._truth(b, h, q, k).expand(shape)

    def tile(self, rectangles: Rectangles) -> States:
        """EMPTY (0), MIXED (1) or FULL (2) for whole rectangles; EMPTY and FULL are proofs, MIXED promises nothing.

        They must lie within the mask's data (`check`).

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.tile(Rectangles.of(q=([0, 0, 4], [4, 4, 8]), k=([4, 0, 0], [8, 4, 4]))).tolist()
        [0, 1, 2]
        """
        return self._tile(rectangles)

    def bound(self, device: torch.device | str) -> Mask:
        """This mask with its numbers and data as tensors on `device`; made once if they are real there."""
        cache = vars(self).setdefault("_bound", {})
        place = str(device)
        if place in cache:
            return cache[place]
        if place == "meta" or self.is_late:
            return self._bind(torch.device(device))
        with ordinary_tensors():
            cache[place] = self._bind(torch.device(device))
        return cache[place]

    def _bind(self, device: torch.device) -> Mask:
        new = copy.copy(self)
        place = vars(new)
        for name in self._numbers:
            number = getattr(self, name)
            place[name] = number if is_late(number) else torch.tensor(number, device=device)
        for name in self._child_fields:
            value = getattr(self, name)
            place[name] = value.bound(device) if isinstance(value, Mask) else tuple(m.bound(device) for m in value)
        place["_bound_tables"] = {name: table.to(device) for name, table in self._tables().items()}
        return new

    def table(self, name: str) -> Tensor:
        """A table of the bound mask."""
        return vars(self)["_bound_tables"][name]

    def check(self, q_len: int, kv_len: int, *, batch: int | None = None, heads: int | None = None) -> None:
        """The door: raise a MaskError if the mask cannot answer for these sizes."""
        for name, size, own in (("samples", batch, self.batch_size), ("heads", heads, self.head_count)):
            if size is not None and whole(size, name) != own and own not in (ANY, 1):
                raise MaskError(f"the mask `{self}` holds data for {own} {name}, but was asked about {size}")
        self._check(q_len, kv_len)

    def equivalent(
        self, other: Mask, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Verdict:
        """Whether both masks let the same pairs through at these sizes; `==` compares the expressions instead.

        The answer is true or false like a bool, and says which cell refutes it (`.witness`).

        >>> from truemask.masks.leaves.bands import causal, window
        >>> window(8).equivalent(causal, 8)
        yes
        >>> window(8).equivalent(causal, 9)
        no: query 8 may see key 0 under `causal`, but not under `window(8)`
        """
        other = operand("equivalent", other)
        return self._refuted(self ^ other, other, q_len, kv_len, batch, heads)

    def implies(
        self, other: Mask, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Verdict:
        """Whether `other` lets through at least what this mask does; when not, `.witness` is a cell that it hides.

        >>> from truemask.masks.leaves.bands import causal, window
        >>> window(8).implies(causal, 1000)
        yes
        >>> causal.implies(window(8), 1000).witness
        Cell(sample=0, head=0, query=8, key=0)
        """
        other = operand("implies", other)
        return self._refuted(self - other, other, q_len, kv_len, batch, heads)

    def _refuted(
        self, against: Mask, other: Mask, q_len: int, kv_len: int | None, batch: int | None, heads: int | None
    ) -> Verdict:
        """What a cell of `against`, if there is one, says of this mask and another."""
        kv_len = self.kv_len_for(whole(q_len, "q_len")) if kv_len is None else kv_len
        cell = against._first(*against._sizes(q_len, kv_len, batch, heads))
        if cell is None:
            return Verdict(None)
        sees, hides = (self, other) if self._sees(*cell) else (other, self)
        sizes = zip(("sample", "head"), cell, (against.batch_size, against.head_count), strict=False)
        where = "".join(f" in {name} {place}" for name, place, size in sizes if size != 1)
        seen = f"query {cell.query} may see key {cell.key}{where} under `{sees}`"
        return Verdict(cell, f"no: {seen}, but not under `{hides}`")

    def _sees(self, b: int, h: int, q: int, k: int) -> bool:
        """One cell, without tables of all positions where slabs know it."""
        try:
            return len(cropped(self.slabs_in(Region(b, h, q, q + 1, k, k + 1)), k, k + 1).owner) > 0
        except NoExactFormError:
            return bool(self.truth(*(torch.tensor(i) for i in (b, h, q, k))))

    def positions(self, q_len: int, kv_len: int | None = None) -> tuple[Tensor, Tensor]:
        """The logical positions of rows and keys, int64 `[n]` or `[b, n]`: what rotary embeddings need.

        Raises MaskError where parts of the expression are re-indexed differently.

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.packed([2, 3]).positions(5)[0].tolist()
        [0, 1, 0, 1, 2]
        """
        kv_len = self.kv_len_for(q_len) if kv_len is None else kv_len
        q, k = torch.arange(q_len), torch.arange(kv_len)
        self._check(q_len, kv_len)
        return self._logical(q, k) or (q, k)
