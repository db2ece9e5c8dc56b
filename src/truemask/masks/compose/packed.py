"""Packing, padding and prepending: the same mask where samples share a row, begin late, or stand behind registers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.real_tensors import remembered, surely
from truemask.errors import MaskError
from truemask.geometry.logic import EMPTY, FULL, MIXED, States, kleene_and, tri_state
from truemask.geometry.ranges import spans
from truemask.geometry.slabs.algebra import all_of, any_of, cropped
from truemask.geometry.slabs.lines import after
from truemask.geometry.slabs.slabs import FAR, Region, Slabs, affordable, bands, blank, stacked
from truemask.geometry.tiles.tile_map import Rectangles
from truemask.masks.core.construction import operand
from truemask.masks.core.data import Data, integers
from truemask.masks.core.lookup import look_up, low_high, row_by_row, rows_of
from truemask.masks.core.mask import Mask
from truemask.masks.core.segments import Segments, document_lengths
from truemask.masks.core.unparse import call, method
from truemask.masks.core.value import Written, joined


@dataclass(frozen=True, eq=False, repr=False)
class Packed(Mask):
    """`base` inside each document, at positions that restart there; nothing between documents."""

    base: Mask
    lengths: Data
    kv_lengths: Data | None
    kind: ClassVar[str] = "packed"

    @classmethod
    def make(cls, *args: Any) -> Mask:
        base, lengths, kv_lengths = args
        q, k = document_lengths(lengths, kv_lengths)
        return cls(base, q, k)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.base._check(*(low_high(side)[1] for side in (self.lengths, self.kv_lengths or self.lengths)))

    @remembered
    def batch_size(self) -> int:
        sizes = [self.base.batch_size, rows_of(self.lengths), rows_of(self.kv_lengths or self.lengths)]
        return joined("samples", [self] * 3, sizes)

    @remembered
    def _sides(self) -> tuple[Segments, Segments]:
        q = Segments(self.lengths)
        return q, q if self.kv_lengths is None else Segments(self.kv_lengths)

    def _tables(self) -> dict[str, Tensor]:
        q, k = self._sides
        return {"q_document": q.document, "q_offset": q.offset, "k_document": k.document, "k_offset": k.offset}

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = look_up(self.table("q_document"), b, q) == look_up(self.table("k_document"), b, k)
        q, k = look_up(self.table("q_offset"), b, q), look_up(self.table("k_offset"), b, k)
        return same & self.base._truth(b, h, q, k)

    def _tile(self, r: Rectangles) -> States:
        """Disjoint documents are EMPTY; where one side is a single document, `base` answers for the common part."""
        q, k = self._sides
        (qa, qb), (ka, kb) = q.between(r.b, r.q0, r.q1), k.between(r.b, r.k0, r.k1)
        apart = (qb < ka) | (kb < qa)
        document = np.where(qa == qb, qa, ka)  # the single document of one side, if there is one
        q_first, q_last = q.span(r.b, document)
        k_first, k_last = k.span(r.b, document)
        q0, q1 = np.maximum(r.q0, q_first), np.minimum(r.q1, q_last)
        k0, k1 = np.maximum(r.k0, k_first), np.minimum(r.k1, k_last)
        single = ((qa == qb) | (ka == kb)) & (q0 < q1) & (k0 < k1)
        safe = [
            np.where(single, x, i)
            for x, i in ((q0 - q_first, 0), (q1 - q_first, 1), (k0 - k_first, 0), (k1 - k_first, 1))
        ]
        inner = self.base._tile(Rectangles(r.b, r.h, *safe))
        inside = single & (qa == qb) & (ka == kb)
        states = np.where(inside | (inner == EMPTY), inner, MIXED)
        return np.where(apart, EMPTY, np.where(single, states, MIXED)).astype(np.int8)

    def _slabs(self, r: Region) -> Slabs:
        """The base's slabs once for each document, moved there and cut to it."""
        q, k = self._sides
        (q_first, q_stop), (k_first, k_stop) = q.row(r.b), k.row(r.b)
        real = np.flatnonzero((q_first < q_stop) & (q_stop > r.q0) & (q_first < r.q1))
        q_first, q_stop, k_first, k_stop = (x[real] for x in (q_first, q_stop, k_first, k_stop))
        sizes, widths = q_stop - q_first, k_stop - k_first
        rows, some = np.append(q_first, q_stop[-1]), (widths > 0).astype(np.int64)
        if not some.any():
            return blank(r.q0, r.q1)
        base = self.base.slabs_in(Region(r.b, r.h, 0, int(sizes.max()), 0, int(widths.max()), r.known))
        base = cropped(base, 0, int(widths.max()))
        document, slab = spans(np.zeros_like(sizes), np.searchsorted(base.rows, sizes))
        affordable(int(base.sizes[slab].sum()))
        place, run = spans(base.starts[slab], base.starts[slab + 1])
        down, right = q_first[document[place]], k_first[document[place]]
        lines = base.lines[:, run]
        lines += 2 * (right - (lines & 1) * down)
        inside = Slabs(np.append(q_first[document] + base.rows[slab], rows[-1]), after(base.sizes[slab]), lines)
        if (inside.at(1, inside.last) > k_stop[document[place]]).any():
            spare = some > 0
            inside = all_of([inside, Slabs(rows, after(some), 2 * np.stack([k_first, k_stop])[:, spare])])
        return inside.between(r.q0, r.q1)

    def _periodic_from(self, k_stop: int) -> None:
        return None  # every document begins anew, and there are no rows beyond the last

    def _check(self, q_stop: int, k_stop: int) -> None:
        for side, stop, name in ((self.lengths, q_stop, "queries"), (self.kv_lengths or self.lengths, k_stop, "keys")):
            total = int(side.array.sum(-1).max())
            if surely(stop > total):
                raise MaskError(f"`{self}` packs documents of {total} {name} in all, but was asked about {stop}")

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (row_by_row(side.offset, i) for side, i in zip(self._sides, (q, k), strict=True))
        return self.base._logical(q, k) or (q, k)

    def kv_len_for(self, q_len: int) -> int:
        return q_len if self.kv_lengths is None else int(self.kv_lengths.array.sum(-1).max())

    def q_len_for(self, kv_len: int) -> int:
        return kv_len if self.kv_lengths is None else int(self.lengths.array.sum(-1).max())

    def _write(self) -> Written:
        return method(self.base, call("packed", self.lengths, kv_lengths=self.kv_lengths)[0])


@dataclass(frozen=True, eq=False, repr=False)
class Padded(Mask):
    """`base` counted from each sample's start; the pads before it see nothing and are not seen."""

    base: Mask
    starts: Data
    kind: ClassVar[str] = "padded"

    @classmethod
    def make(cls, *args: Any) -> Mask:
        base, starts = args
        return cls(base, integers(starts, "starts", (1,), "[b]", late=True))

    def __post_init__(self) -> None:
        if self.starts.tensor.numel() == 0 or low_high(self.starts)[0] < 0:
            raise MaskError(f"padded needs the number of pads of each sample, 0 or more: got {self.starts.text}")
        super().__post_init__()

    @remembered
    def batch_size(self) -> int:
        return joined("samples", [self] * 2, [self.base.batch_size, self.starts.tensor.shape[0]])

    def _start(self, b: np.ndarray) -> np.ndarray:
        return self.starts.array[np.minimum(b, len(self.starts.array) - 1)]

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        start = look_up(self.table("starts"), b, b)
        real = (q >= start) & (k >= start)
        return real & self.base._truth(b, h, (q - start).clamp(min=0), (k - start).clamp(min=0))

    def _tile(self, r: Rectangles) -> States:
        start = self._start(r.b)
        outside = (r.q1 <= start) | (r.k1 <= start)
        real = tri_state(outside, (r.q0 >= start) & (r.k0 >= start))
        q0, k0 = np.maximum(r.q0 - start, 0), np.maximum(r.k0 - start, 0)
        q1, k1 = np.maximum(r.q1 - start, q0 + 1), np.maximum(r.k1 - start, k0 + 1)
        return kleene_and(real, np.where(outside, EMPTY, self.base._tile(Rectangles(r.b, r.h, q0, q1, k0, k1))))

    def _slabs(self, r: Region) -> Slabs:
        start = int(self._start(np.array(r.b)))
        q0, k0 = max(r.q0, start), max(r.k0, start)
        if q0 >= r.q1 or k0 >= r.k1:
            return blank(r.q0, r.q1)
        base = self.base.slabs_in(r._replace(q0=q0, k0=k0).moved(-start, -start)).moved(start, start)
        real = all_of([base, bands(q0, r.q1, start, 0, FAR, 0)])
        return stacked([blank(r.q0, q0), real]) if r.q0 < q0 else real

    def _distinct_key(self, b: int, h: int) -> Hashable:
        return int(self._start(np.array(b))), self.base._distinct_key(b, h)

    def _periodic_from(self, k_stop: int) -> tuple[int, int] | None:
        period = self.base._periodic_from(k_stop)
        return None if period is None else (period[0] + low_high(self.starts)[1], period[1])

    def _check(self, q_stop: int, k_stop: int) -> None:
        least = low_high(self.starts)[0]
        self.base._check(max(0, q_stop - least), max(0, k_stop - least))

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        start = self.starts.tensor[:, None]
        q, k = (q - start).clamp(min=0), (k - start).clamp(min=0)
        return self.base._logical(q, k) or (q, k)

    def _write(self) -> Written:
        return method(self.base, call("padded", self.starts)[0])


@dataclass(frozen=True, eq=False, repr=False)
class Prepended(Mask):
    """`base` behind `q` extra rows and `k` extra keys, which it does not count."""

    base: Mask
    q: int
    k: int
    seen: Mask
    kind: ClassVar[str] = "prepended"
    _numbers: ClassVar[tuple[str, ...]] = ("q", "k")

    @classmethod
    def make(cls, *args: Any) -> Mask:
        base, q, k, seen = args
        return cls(base, whole(q, "q"), whole(k, "k"), operand("prepended(seen=...)", seen))

    def __post_init__(self) -> None:
        if self.seen.varies_with_query:
            raise MaskError(f"prepended: `seen` must be the same for every query, but `{self.seen}` varies with it")
        super().__post_init__()

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, key = (q - self.q).clamp(min=0), (k - self.k).clamp(min=0)
        extra = q < self.q
        inside = (extra & self.seen._truth(b, h, row, key)) | (~extra & self.base._truth(b, h, row, key))
        return (k < self.k) | inside

    def _tile(self, r: Rectangles) -> States:
        (q0, q1), (k0, k1) = (
            (np.maximum(lo - n, 0), hi - n) for lo, hi, n in ((r.q0, r.q1, self.q), (r.k0, r.k1, self.k))
        )
        inner = Rectangles(r.b, r.h, q0, np.maximum(q1, q0 + 1), k0, np.maximum(k1, k0 + 1))
        base, seen = self.base._tile(inner), self.seen._tile(inner)
        both = np.where(base == seen, base, MIXED)
        behind = np.where(r.q1 <= self.q, seen, np.where(r.q0 >= self.q, base, both))
        partly = np.where(behind == FULL, FULL, MIXED)  # some extra keys, some of the mask's own
        return np.where(r.k1 <= self.k, FULL, np.where(r.k0 >= self.k, behind, partly)).astype(np.int8)

    def _slabs(self, r: Region) -> Slabs:
        """Above the extra rows' own, below the base's, both behind the extra keys."""
        k0, k1 = (max(x, self.k) - self.k for x in (r.k0, r.k1))
        parts = []
        for mask, q0, q1, up in ((self.seen, r.q0, min(r.q1, self.q), 0), (self.base, max(r.q0, self.q), r.q1, self.q)):
            if q0 < q1:
                extra = bands(q0, q1, 0, 0, self.k, 0) if self.k else blank(q0, q1)
                part = blank(q0, q1)
                if k0 < k1:
                    part = mask.slabs_in(Region(r.b, r.h, q0 - up, q1 - up, k0, k1, r.known)).moved(up, self.k)
                parts.append(any_of([extra, all_of([part, bands(q0, q1, self.k, 0, FAR, 0)])]))
        return stacked(parts)

    def _periodic_from(self, k_stop: int) -> tuple[int, int] | None:
        period = self.base._periodic_from(max(0, k_stop - self.k))
        return None if period is None else (period[0] + self.q, period[1])

    def _check(self, q_stop: int, k_stop: int) -> None:
        q_stop, k_stop = max(0, q_stop - self.q), max(0, k_stop - self.k)
        self.base._check(q_stop, k_stop)
        self.seen._check(0, k_stop)

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        return None

    def kv_len_for(self, q_len: int) -> int:
        return self.k + self.base.kv_len_for(max(0, q_len - self.q))

    @remembered
    def varies_with_query(self) -> bool:
        return self.base.varies_with_query or (self.q > 0 and self.base != self.seen)

    def _write(self) -> Written:
        return method(self.base, f"prepended(q={self.q}, k={self.k}, seen={self.seen})")
