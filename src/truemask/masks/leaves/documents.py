"""Masks of documents and labels: who belongs together, kept as runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.memory import HoldsArrays
from truemask.common.real_tensors import remembered
from truemask.errors import MaskError
from truemask.geometry.logic import States, tri_state
from truemask.geometry.ranges import RunTable, spans
from truemask.geometry.slabs.slabs import Region, Slabs, affordable, tidy
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.construction import is_known
from truemask.masks.core.data import Data, integers
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.lookup import look_up, rows_of
from truemask.masks.core.mask import Mask
from truemask.masks.core.segments import document_lengths
from truemask.masks.core.unparse import call
from truemask.masks.core.value import Written, joined
from truemask.masks.leaves.per_token import beyond, keys, queries
from truemask.masks.leaves.predicate import predicate


class Labels(HoldsArrays):
    """A label for each position, `[n]` or `[b, n]`, stored as runs of equal labels."""

    def __init__(self, ends: Data, values: Data) -> None:
        self.ends, self.values = np.atleast_2d(ends.array), np.atleast_2d(values.array)
        self.size = int(self.ends[0, -1]) if self.ends.size else 0
        self._flat = ends.tensor.ndim == 1

    @remembered
    def each(self) -> Tensor:
        """The label of every position."""
        sizes = np.diff(self.ends, axis=1, prepend=0)
        each = np.stack([np.repeat(v, n) for v, n in zip(self.values, sizes, strict=True)])
        return torch.from_numpy(each[0] if self._flat else each)

    @remembered
    def runs(self) -> RunTable:
        return RunTable(self.ends, self.values)

    @property
    def lengths(self) -> Data:
        """Tokens of each run, in the shape of the labels."""
        sizes = torch.from_numpy(np.diff(self.ends, axis=1, prepend=0))
        return Data(sizes[0] if self._flat else sizes)

    def segments(self, b: int, first: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """The runs of sample b within `[first, stop)`: start, stop and label of each."""
        ends, values = (x[min(b, len(x) - 1)] for x in (self.ends, self.values))
        starts = np.append(0, ends[:-1]) if len(ends) else ends
        starts, ends = np.maximum(starts, first), np.minimum(ends, stop)
        some = starts < ends
        return starts[some], ends[some], values[some]

    @property
    def numbered(self) -> bool:
        """Whether the labels are 0, 1, 2, ... from left to right, each in one run (perhaps an empty one)."""
        runs = self.ends.shape[1]
        return bool(runs and (self.values == np.arange(runs)).all())


def as_runs(labels: Tensor) -> tuple[Data, Data]:
    """Labels `[n]` or `[b, n]` as (ends, values) of their runs; shorter lists of runs repeat their last one."""
    rows = np.atleast_2d(labels.numpy())
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    for row in rows:
        last = np.flatnonzero(np.append(row[1:] != row[:-1], True)) if row.size else np.zeros(0, np.int64)
        runs.append((last + 1, row[last]))
    most = max(len(ends) for ends, _ in runs)
    padded = [[np.pad(x, (0, most - len(x)), "edge") if len(x) else x for x in pair] for pair in runs]
    ends, values = (torch.from_numpy(np.stack(column)) for column in zip(*padded, strict=True))
    return (Data(ends), Data(values)) if labels.ndim == 2 else (Data(ends[0]), Data(values[0]))


@dataclass(frozen=True, eq=False, repr=False)
class _Labelled(Mask):
    """Equal labels of q and k; the labels are kept as runs (ends, values)."""

    ends: Data
    values: Data
    kv_ends: Data | None
    kv_values: Data | None

    @remembered
    def _sides(self) -> tuple[Labels, Labels]:
        q = Labels(self.ends, self.values)
        return q, q if self.kv_ends is None or self.kv_values is None else Labels(self.kv_ends, self.kv_values)

    @remembered
    def batch_size(self) -> int:
        return joined("samples", [self] * 2, [rows_of(self.ends), rows_of(self.kv_ends or self.ends)])

    def _tables(self) -> dict[str, Tensor]:
        q, k = self._sides
        return {"q": q.each, "k": k.each}

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return look_up(self.table("q"), b, q) == look_up(self.table("k"), b, k)

    def _extremes(self, r: Rectangles) -> tuple[Ints, Ints, Ints, Ints]:
        q, k = self._sides
        return *q.runs.between(r.b, r.q0, r.q1), *k.runs.between(r.b, r.k0, r.k1)

    def _tile(self, r: Rectangles) -> States:
        qa, qb, ka, kb = self._extremes(r)
        return tri_state((qb < ka) | (kb < qa), (qa == qb) & (ka == kb) & (qa == ka))

    def _slabs(self, r: Region) -> Slabs:
        """Each run of rows sees the runs of keys with its label."""
        q, k = self._sides
        rows, _, row_label = q.segments(r.b, r.q0, r.q1)
        start, stop, label = k.segments(r.b, r.k0, r.k1)
        visible = self._visible(label)
        start, stop, label = start[visible], stop[visible], label[visible]
        order = np.argsort(label, kind="stable")
        begin, end = (np.searchsorted(label[order], row_label, side) for side in ("left", "right"))
        affordable(int((end - begin).sum()))
        run = order[spans(begin, end)[1]]
        ends = np.stack([start[run], stop[run]])
        return tidy(np.append(rows, r.q1), end - begin, ends, np.zeros_like(ends))

    def _visible(self, label: Ints) -> np.ndarray:
        """Whether keys with a label are seen at all."""
        return np.ones(len(label), bool)

    def _check(self, q_stop: int, k_stop: int) -> None:
        q, k = self._sides
        beyond(self, q.size, q_stop, "queries")
        beyond(self, k.size, k_stop, "keys")

    def kv_len_for(self, q_len: int) -> int:
        return q_len if self.kv_ends is None else self._sides[1].size

    def q_len_for(self, kv_len: int) -> int:
        return kv_len if self.kv_ends is None else self._sides[0].size


@dataclass(frozen=True, eq=False, repr=False)
class Documents(_Labelled):
    """q and k in the same document."""

    kind: ClassVar[str] = "documents"

    @remembered
    def _shown(self) -> tuple[Data, Data | None]:
        """Lengths where the documents are numbered 0, 1, 2, ..., otherwise ids."""
        q, k = (side.lengths if self._numbered else Data(side.each) for side in self._sides)
        return q, k if self.kv_ends else None

    @remembered
    def _numbered(self) -> bool:
        q, k = self._sides
        return q.numbered and k.numbered and q.ends.shape == k.ends.shape

    @remembered
    def has_text(self) -> bool:
        return all(side is None or side.complete for side in self._shown)

    def _write(self) -> Written:
        q, k = self._shown
        return call("documents", q, kv_lengths=k) if self._numbered else call("documents", ids=q, kv_ids=k)


@dataclass(frozen=True, eq=False, repr=False)
class Same(_Labelled):
    """Equal labels that are not `none`."""

    none: int = -1
    kind: ClassVar[str] = "same"
    _numbers: ClassVar[tuple[str, ...]] = ("none",)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        label = look_up(self.table("q"), b, q)
        return (label == look_up(self.table("k"), b, k)) & (label != self.none)

    def _tile(self, r: Rectangles) -> States:
        qa, qb, ka, kb = self._extremes(r)
        none = self.none
        apart = (qb < ka) | (kb < qa) | ((qa == none) & (qb == none)) | ((ka == none) & (kb == none))
        return tri_state(apart, (qa == qb) & (ka == kb) & (qa == ka) & (qa != none))

    def _visible(self, label: Ints) -> np.ndarray:
        return label != self.none

    @remembered
    def _shown(self) -> tuple[Data, Data | None]:
        q, k = self._sides
        return Data(q.each), Data(k.each) if self.kv_ends else None

    @remembered
    def has_text(self) -> bool:
        return all(side is None or side.complete for side in self._shown)

    def _write(self) -> Written:
        q, k = self._shown
        return call("same", q, none=None if self.none == -1 else self.none, kv_labels=k)


@deferrable
def documents(lengths: object = None, ids: object = None, kv_lengths: object = None, kv_ids: object = None) -> Mask:
    """q and k in the same document of a packed row; `lengths` in tokens, or an id for each token.

    `lengths` is `[m]`, or one list per sample of the same total; `ids` is `[n]` or `[b, n]` in any order. `kv_lengths`
    and `kv_ids` are for packed cross-attention. Positions do not restart: `causal.packed(lengths)` does that (law 2 in
    docs/conventions.md).

    >>> documents([1, 2]).to_dense(3)[0, 0].int().tolist()
    [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    """
    if (lengths is None) == (ids is None):
        raise MaskError("documents needs one of `lengths` (tokens per document) and `ids=` (a document for each token)")
    if (kv_lengths is not None and lengths is None) or (kv_ids is not None and ids is None):
        raise MaskError("documents: `kv_lengths` goes with `lengths`, and `kv_ids` with `ids`")
    if lengths is not None:
        q_data, k_data = document_lengths(lengths, kv_lengths)
        return Documents(*_numbered(q_data), *((None, None) if k_data is None else _numbered(k_data)))
    q = integers(ids, "documents(ids=...)", late=True).tensor
    k = None if kv_ids is None else integers(kv_ids, "documents(kv_ids=...)", late=True).tensor
    if not is_known((q, k)):
        return _late_labels(q, k)
    return Documents(*as_runs(q), *((None, None) if k is None else as_runs(k)))


def _late_labels(q: Tensor, k: Tensor | None) -> Mask:
    """Equal labels that come in with each call of a graph that is recorded: nobody knows their runs."""
    k = q if k is None else k
    flags = (torch.ones_like(x, dtype=torch.bool) for x in (q, k))  # say for how many positions and samples they hold
    equal = predicate(lambda b, h, i, j: look_up(q, b, i) == look_up(k, b, j))
    return queries(next(flags)) & keys(next(flags)) & equal


def _numbered(lengths: Data) -> tuple[Data, Data]:
    """Documents of these lengths as runs, numbered from 0."""
    ends = lengths.tensor.cumsum(-1)
    return Data(ends), Data(torch.arange(ends.shape[-1]).expand_as(ends))


@deferrable
def same(labels: object, none: int = -1, kv_labels: object = None) -> Mask:
    """Equal labels, and not the label `none`: image tokens, speakers, groups, in any order.

    >>> same([0, -1, 0, 1]).to_dense(4)[0, 0].int().tolist()
    [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    """
    if isinstance(none, bool) or not isinstance(none, int):
        raise MaskError(
            f"same(none=...) is the label of tokens that belong to nothing, a whole number; got {describe(none)}"
        )
    if _is_flags(labels):
        raise MaskError(
            f"same(labels) takes a label for each token, whole numbers, got {describe(labels)}: as labels, False would "
            "see False. Flags of real tokens are `keys(flags) & queries(flags)`; the label of what belongs to nothing "
            "is -1"
        )
    q = integers(labels, "same(labels)", late=True).tensor
    k = None if kv_labels is None else integers(kv_labels, "same(kv_labels=...)", late=True).tensor
    if not is_known((q, k)):
        return _late_labels(q, k) & keys((q if k is None else k) != none)
    return Same(*as_runs(q), *((None, None) if k is None else as_runs(k)), none)


def _is_flags(labels: object) -> bool:
    """Whether they are booleans, in a tensor, an array or lists."""
    if isinstance(labels, (list, tuple)):
        return any(map(_is_flags, labels))
    return isinstance(labels, bool) or str(getattr(labels, "dtype", "")).endswith("bool")
