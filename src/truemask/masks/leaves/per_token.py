"""Masks that hold data along one axis: prefixes, padding, flags, global tokens.

Data is copied once; a mask with data of length n answers for positions below n, and asking beyond is an error.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.formatting import describe, shortened
from truemask.common.real_tensors import remembered, surely
from truemask.errors import MaskError
from truemask.geometry.logic import States, kleene_and, tri_state
from truemask.geometry.ranges import Counts, spans
from truemask.geometry.slabs.lines import after, union
from truemask.geometry.slabs.slabs import FAR, Region, Slabs, affordable, bands, flag_runs, for_rows, from_cells
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.data import MAX_TOKENS, Data, as_tensor, integers
from truemask.masks.core.data import flags as as_flags
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.lookup import look_up, low_high, rows_of
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import call
from truemask.masks.core.value import Written

SHOWN_CHARACTERS = 160  # characters of a mask in an error about its data


def beyond(mask: Mask, data: Data | int, stop: int, what: str) -> None:
    """Raise if data of a certain length is asked beyond it."""
    size = data.tensor.shape[-1] if isinstance(data, Data) else data
    if surely(stop > size):
        text = shortened(mask.text, SHOWN_CHARACTERS)
        raise MaskError(f"`{text}` holds data for {size} {what}, but was asked about {stop}")


# -- prefix and padding ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    """`k < length`, one length or one per sample."""

    length: int | Data
    kind: ClassVar[str] = "prefix"
    _reads_query: ClassVar[bool] = False
    _tiles_exact: ClassVar[bool] = True

    @remembered
    def batch_size(self) -> int:
        return self.length.tensor.shape[0] if isinstance(self.length, Data) else 1

    def _tables(self) -> dict[str, Tensor]:
        return {"length": self.length.tensor if isinstance(self.length, Data) else as_tensor(self.length)}

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k < per_sample_number(self.table("length"), b)

    def _tile(self, r: Rectangles) -> States:
        length = np.asarray(self.length) if isinstance(self.length, int) else self.length.array[r.b]
        return tri_state(r.k0 >= length, r.k1 <= length)

    def _slabs(self, r: Region) -> Slabs:
        return bands(r.q0, r.q1, -FAR, 0, number_for(self.length, r.b), 0)

    def _distinct_key(self, b: int, h: int) -> Hashable:
        return number_for(self.length, b)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        length = np.asarray(self.length) if isinstance(self.length, int) else self.length.array[r.b]
        return [np.clip(length - r.k0, 0, r.k1 - r.k0)]

    def _write(self) -> Written:
        return call("prefix", self.length)


def per_sample_number(table: Tensor, b: Tensor) -> Tensor:
    """A 0-d number, or the sample's own of `[b]`."""
    return table if table.ndim == 0 else look_up(table, b, b)


def number_for(number: int | Data, b: int) -> int:
    """A number, or the sample's own."""
    return number if isinstance(number, int) else int(number.array[min(b, len(number.array) - 1)])


def _number_or_each(value: object, name: str) -> int | Data:
    """A whole number, or one for each sample."""
    if isinstance(value, (list, tuple, np.ndarray, Data)) or (isinstance(value, Tensor) and value.ndim):
        data = integers(value, name, (1,), "[b]", late=True)
        if data.tensor.numel() == 0 or low_high(data)[0] < 0:
            raise MaskError(f"{name} must be 0 or more for each of at least one sample, got {data.text}")
        return whole(int(data.tensor[0]), name) if not data.late and len(data.tensor) == 1 else data
    return whole(value, name)


@deferrable
def prefix(length: object) -> Mask:
    """The first `length` keys, for everyone: `k < length`; attention sinks, or the bidirectional part of a prefix-LM.

    `length` is a number of tokens, or one for each sample. `causal | prefix(n)` is a prefix-LM (T5, UniLM);
    `causal & (window(w) | prefix(4))` is StreamingLLM's sinks + window (arXiv 2309.17453).

    >>> (prefix(1) | prefix(2)).to_dense(2, 4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0]]
    """
    return Prefix(_number_or_each(length, "prefix(length)"))


@dataclass(frozen=True, eq=False, repr=False)
class Padding(Mask):
    """Real tokens: positions below `lengths[b]`, or from `starts[b]` on."""

    lengths: int | Data | None
    starts: int | Data | None
    on: str
    kind: ClassVar[str] = "padding"

    def __post_init__(self) -> None:
        if (self.lengths is None) == (self.starts is None):
            raise MaskError(
                "padding needs one of `lengths=` (right padding) and `starts=` (left padding), not both or none"
            )
        if self.on not in ("both", "keys", "queries"):
            raise MaskError(f"padding(on=...) is 'both', 'keys' or 'queries', got {describe(self.on)}")
        super().__post_init__()

    @property
    def _edge(self) -> int | Data:
        edge = self.starts if self.lengths is None else self.lengths
        assert edge is not None
        return edge

    @remembered
    def batch_size(self) -> int:
        return self._edge.tensor.shape[0] if isinstance(self._edge, Data) else 1

    @remembered
    def varies_with_query(self) -> bool:
        return self.on != "keys"

    def _tables(self) -> dict[str, Tensor]:
        return {"edge": self._edge.tensor if isinstance(self._edge, Data) else as_tensor(self._edge)}

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        edge = per_sample_number(self.table("edge"), b)
        sides = {"both": (q, k), "keys": (k,), "queries": (q,)}[self.on]
        first, *rest = [(i >= edge) if self.lengths is None else (i < edge) for i in sides]
        return first & rest[0] if rest else first

    def _tile(self, r: Rectangles) -> States:
        edge = np.asarray(self._edge) if isinstance(self._edge, int) else self._edge.array[r.b]
        sides = {"both": [(r.q0, r.q1), (r.k0, r.k1)], "keys": [(r.k0, r.k1)], "queries": [(r.q0, r.q1)]}[self.on]
        left = self.lengths is None
        states = [tri_state(hi <= edge, lo >= edge) if left else tri_state(lo >= edge, hi <= edge) for lo, hi in sides]
        return kleene_and(states[0], states[-1])

    def _slabs(self, r: Region) -> Slabs:
        edge = number_for(self._edge, r.b)
        lo, hi = (edge, FAR) if self.lengths is None else (-FAR, edge)
        slabs = bands(r.q0, r.q1, *((-FAR, 0, FAR, 0) if self.on == "queries" else (lo, 0, hi, 0)))
        return slabs if self.on == "keys" else for_rows(slabs, lo, hi)

    def _distinct_key(self, b: int, h: int) -> Hashable:
        return number_for(self._edge, b)

    def _periodic_from(self, k_stop: int) -> tuple[int, int]:
        edge = self._edge
        return edge if isinstance(edge, int) else int(edge.array.max()), 1

    def _write(self) -> Written:
        return call("padding", lengths=self.lengths, starts=self.starts, on=None if self.on == "both" else self.on)


@deferrable
def padding(lengths: object = None, starts: object = None, on: str = "both") -> Mask:
    """Real tokens only: right padding by `lengths=`, left padding by `starts=`, one number of tokens for each sample.

    `on="both"` hides pads as keys and gives their rows nothing; `on="keys"` only hides them (contexts). It does not
    move positions: for left-padded samples that mean the same as alone use `mask.padded(starts)`.

    >>> padding(lengths=[1, 3]).to_dense(3).int().tolist()
    [[[[1, 0, 0], [0, 0, 0], [0, 0, 0]]], [[[1, 1, 1], [1, 1, 1], [1, 1, 1]]]]
    """
    edges = [
        None if x is None else _number_or_each(x, f"padding({n}=...)")
        for n, x in (("lengths", lengths), ("starts", starts))
    ]
    return Padding(edges[0], edges[1], on)


# -- flags -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class _Flagged(Mask):
    """Flags along one axis, `[n]` or `[b, n]`."""

    flags: Data
    _tiles_exact: ClassVar[bool] = True

    @remembered
    def batch_size(self) -> int:
        return rows_of(self.flags)

    @remembered
    def _counts(self) -> Counts:
        return Counts(np.atleast_2d(self.flags.array))

    def _states(self, b: Ints, lo: Ints, hi: Ints) -> States:
        count = self._counts.between(b, lo, hi)
        return tri_state(count == 0, count == hi - lo)

    def _of(self, b: int) -> np.ndarray:
        """The flags of a sample."""
        flags = np.atleast_2d(self.flags.array)
        return flags[min(b, len(flags) - 1)]

    def _write(self) -> Written:
        return call(self.kind, self.flags)


class Keys(_Flagged):
    """`flags[k]`."""

    kind: ClassVar[str] = "keys"
    _reads_query: ClassVar[bool] = False

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return look_up(self.table("flags"), b, k)

    def _tile(self, r: Rectangles) -> States:
        return self._states(r.b, r.k0, r.k1)

    def _slabs(self, r: Region) -> Slabs:
        start, stop = flag_runs(self._of(r.b)[r.k0 : r.k1], r.k0)
        return bands(r.q0, r.q1, start, 0, stop, 0)

    def _check(self, q_stop: int, k_stop: int) -> None:
        beyond(self, self.flags, k_stop, "keys")


class Queries(_Flagged):
    """`flags[q]`."""

    kind: ClassVar[str] = "queries"

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return look_up(self.table("flags"), b, q)

    def _tile(self, r: Rectangles) -> States:
        return self._states(r.b, r.q0, r.q1)

    def _slabs(self, r: Region) -> Slabs:
        return rows_with(self._of(r.b), r)

    def _check(self, q_stop: int, k_stop: int) -> None:
        beyond(self, self.flags, q_stop, "queries")


@deferrable
def keys(flags: object) -> Mask:
    """Keys with a flag, for every query: `flags[k]`, bool `[n]` or `[b, n]`.

    Key padding, True = a real token (law 1 in docs/conventions.md).

    >>> keys([True, False, True]).to_dense(2, 3)[0, 0].int().tolist()
    [[1, 0, 1], [1, 0, 1]]
    """
    return Keys(as_flags(flags, "keys(flags)"))


@deferrable
def queries(flags: object) -> Mask:
    """Queries with a flag see everything, the others nothing: `flags[q]`, bool `[n]` or `[b, n]`.

    >>> queries([True, False]).to_dense(2, 3)[0, 0].int().tolist()
    [[1, 1, 1], [0, 0, 0]]
    """
    return Queries(as_flags(flags, "queries(flags)"))


def rows_with(flags: np.ndarray, r: Region) -> Slabs:
    """Rows with a flag see everything, the others nothing; beyond the table there is no flag."""
    start, stop = flag_runs(flags[r.q0 : r.q1], r.q0)
    edges = np.unique(np.concatenate([start, stop, [r.q0, r.q1]]))
    return from_cells(edges, np.array([-FAR, FAR]), np.isin(edges[:-1], start)[:, None])


@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(Mask):
    """q or k is one of the positions."""

    positions_: Data
    kind: ClassVar[str] = "global_tokens"
    _tiles_exact: ClassVar[bool] = True

    @remembered
    def _flags(self) -> Tensor:
        """One flag per position up to the last global one, then one False for all that follow."""
        positions = self.positions_.tensor
        table = torch.zeros(int(positions.max()) + 2 if len(positions) else 1, dtype=torch.bool)
        table[positions] = True
        return table

    @remembered
    def _counts(self) -> Counts:
        return Counts(self._flags.numpy()[None])

    def _tables(self) -> dict[str, Tensor]:
        return {"flags": self._flags}

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table = self.table("flags")
        return look_up(table, b, q) | look_up(table, b, k)

    def _tile(self, r: Rectangles) -> States:
        zero = np.zeros((), np.int64)
        rows, columns = self._counts.between(zero, r.q0, r.q1), self._counts.between(zero, r.k0, r.k1)
        return tri_state((rows == 0) & (columns == 0), (rows == r.q1 - r.q0) | (columns == r.k1 - r.k0))

    def _slabs(self, r: Region) -> Slabs:
        """Rows among the positions see everything, those between them the positions."""
        (top, bottom), (start, stop) = self._within(r.q0, r.q1), self._within(r.k0, r.k1)
        rows = union(np.array([r.q0, r.q1]), top, bottom)
        whole = np.isin(rows[:-1], top)
        counts = np.where(whole, 1, len(start))
        affordable(int(counts.sum()))
        runs = np.stack([np.append(-FAR, start), np.append(FAR, stop)])
        first = np.where(whole, 0, 1)
        return Slabs(rows, after(counts), 2 * runs[:, spans(first, first + counts)[1]])

    def _within(self, first: int, stop: int) -> tuple[Ints, Ints]:
        """Where runs of positions from `first` up to `stop` begin and end."""
        positions = self.positions_.array
        positions = positions[(positions >= first) & (positions < stop)]
        new = np.diff(positions, prepend=-2) > 1
        return positions[new], positions[np.append(new[1:], True)[: len(positions)]] + 1

    def _periodic_from(self, k_stop: int) -> tuple[int, int]:
        return len(self._flags), 1

    def _write(self) -> Written:
        return call("global_tokens", self.positions_)


@deferrable
def global_tokens(positions: object) -> Mask:
    """Tokens that see all and are seen by all: q or k is one of `positions` (Longformer, arXiv 2004.05150).

    >>> global_tokens([1]).to_dense(3)[0, 0].int().tolist()
    [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """
    data = integers(positions, "global_tokens(positions)", (1,), "[m]")
    if data.tensor.numel() and not 0 <= int(data.tensor.min()) <= int(data.tensor.max()) < MAX_TOKENS:
        raise MaskError(f"global_tokens(positions) must be 0 or more and below {MAX_TOKENS}, got {data.text}")
    return GlobalTokens(Data(data.tensor.unique()))
