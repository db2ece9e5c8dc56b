"""Re-indexing: the same mask asked about other rows, keys, samples and heads (law 2: re-indexed, never rewritten)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from truemask.common.arguments import MAX_POSITION, whole
from truemask.common.real_tensors import is_late, remembered, surely
from truemask.errors import MaskError
from truemask.geometry.logic import States
from truemask.geometry.ranges import RangeTable
from truemask.geometry.slabs.algebra import all_of, any_of, transposed
from truemask.geometry.slabs.normal_form import NormalForm
from truemask.geometry.slabs.slabs import Flags, NoExactFormError, Region, Slabs, bands, from_cells, stacked
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.data import Data, integers
from truemask.masks.core.lookup import look_up, low_high, row_by_row, rows_of
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import call, method
from truemask.masks.core.value import Written, joined


@dataclass(frozen=True, eq=False, repr=False)
class At(Mask):
    """`base` for rows from position `q_start` and keys from `k_start` on."""

    base: Mask
    q_start: int
    k_start: int
    kind: ClassVar[str] = "at"
    _reads_query: ClassVar[bool] = False
    _numbers: ClassVar[tuple[str, ...]] = ("q_start", "k_start")

    @classmethod
    def make(cls, *args: Any) -> Mask:
        base, q_start, k_start = args[0], whole(args[1], "q_start"), whole(args[2], "k_start")
        if not (is_late(q_start) or is_late(k_start)) and q_start == k_start == 0:
            return base
        if isinstance(base, At):
            base, q_start, k_start = base.base, base.q_start + q_start, base.k_start + k_start
        # Decoding makes one in every step: no handle (deferred.py writes it out), and nothing asked twice.
        new = object.__new__(cls)
        held = {name: getattr(base, name) for name in ("batch_size", "head_count", "varies_with_query")}
        held |= {"base": base, "q_start": q_start, "k_start": k_start}
        vars(new).update(held, children=(base,), _key=("at", base, q_start, k_start))
        return new

    @property
    def _tiles_exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base._tiles_exact

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.base._truth(b, h, q + self.q_start, k + self.k_start)

    def _plane(self, r: Region) -> Flags:
        return self.base._plane(r.moved(self.q_start, self.k_start))

    def _tile(self, r: Rectangles) -> States:
        q, k = np.int64(self.q_start), np.int64(self.k_start)
        return self.base._tile(r.moved(q0=r.q0 + q, q1=r.q1 + q, k0=r.k0 + k, k1=r.k1 + k))

    def _form(self, r: Region) -> NormalForm:
        there = r.moved(self.q_start, self.k_start)
        if max(there.q1, there.k1) > 2 * MAX_POSITION:
            raise NoExactFormError(f"`{self}` asks about positions beyond 2**41")
        return self.base.form_in(there).moved(-self.q_start, -self.k_start)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        q, k = np.int64(self.q_start), np.int64(self.k_start)
        return self.base._tile_key(r.moved(q0=r.q0 + q, q1=r.q1 + q, k0=r.k0 + k, k1=r.k1 + k))

    def _periodic_from(self, k_stop: int) -> tuple[int, int] | None:
        period = self.base._periodic_from(k_stop + self.k_start)
        return None if period is None else (max(0, period[0] - self.q_start), period[1])

    def _check(self, q_stop: int, k_stop: int) -> None:
        self.base._check(q_stop + self.q_start, k_stop + self.k_start)

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q + self.q_start, k + self.k_start
        return self.base._logical(q, k) or (q, k)

    def kv_len_for(self, q_len: int) -> int:
        return max(0, self.base.kv_len_for(self.q_start + q_len) - self.k_start)

    def _write(self) -> Written:
        options = [f"{name}={value}" for name in ("q_start", "k_start") if (value := getattr(self, name))]
        return method(self.base, f"at({', '.join(options)})")


@dataclass(frozen=True, eq=False, repr=False)
class Take(Mask):
    """`base` for rows and keys at any positions."""

    base: Mask
    q: Data | None
    k: Data | None
    kind: ClassVar[str] = "take"
    _reads_query: ClassVar[bool] = False

    @classmethod
    def make(cls, *args: Any) -> Mask:
        base, q, k = args
        return cls(base, _positions(q, "q"), _positions(k, "k"))

    def __post_init__(self) -> None:
        if self.q is None and self.k is None:
            raise MaskError("take needs positions: `take(q=positions)`, `take(k=positions)` or both")
        super().__post_init__()
        self.base._check(*(0 if side is None else _stop(side) for side in (self.q, self.k)))

    @remembered
    def batch_size(self) -> int:
        sides = [rows_of(side) for side in (self.q, self.k) if side is not None]
        return joined("samples", [self] * (1 + len(sides)), [self.base.batch_size, *sides])

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q if self.q is None else look_up(self.table("q"), b, q)
        k = k if self.k is None else look_up(self.table("k"), b, k)
        return self.base._truth(b, h, q, k)

    @remembered
    def _ranges(self) -> tuple[RangeTable | None, RangeTable | None]:
        q, k = (None if side is None else RangeTable(np.atleast_2d(side.array)) for side in (self.q, self.k))
        return q, k

    def _tile(self, r: Rectangles) -> States:
        """The rectangle around the positions taken: what holds on all of it holds on those."""
        q, k = self._ranges
        (q0, q1), (k0, k1) = (r.q0, r.q1), (r.k0, r.k1)
        if q is not None:
            low, high = q.between(r.b, q0, q1)
            q0, q1 = low, high + 1
        if k is not None:
            low, high = k.between(r.b, k0, k1)
            k0, k1 = low, high + 1
        return self.base._tile(r.moved(q0=q0, q1=q1, k0=k0, k1=k1))

    def _slabs(self, r: Region) -> Slabs:
        """Runs of positions that follow each other are shifts of the base; there must be few of keys."""
        rows = _consecutive(self.q, r.b, r.q0, r.q1)
        columns = _consecutive(self.k, r.b, r.k0, r.k1)
        shifts, cells = len(rows) * len(columns), (r.q1 - r.q0) * (r.k1 - r.k0)
        if (shifts > FEW_SHIFTS and cells <= FEW_CELLS) or (shifts > 1 and cells <= FEWEST_CELLS):
            return self._looked_at_whole(r)
        if len(columns) > MAX_MOVES or len(rows) * len(columns) > MAX_SHIFTS:
            raise NoExactFormError(f"`{self}` takes positions in {len(rows)} x {len(columns)} runs")
        parts = [
            any_of([self._shifted(r, row, column) for column in columns])
            if len(columns) > 1
            else self._shifted(r, row, columns[0])
            for row in rows
        ]
        return stacked(parts)

    def _looked_at_whole(self, r: Region) -> Slabs:
        """From the cells, where they are fewer than all the shifting is worth."""
        q, k = np.arange(r.q0, r.q1), np.arange(r.k0, r.k1)
        cells = self._cells(np.array(r.b), np.array(r.h), q[:, None], k)
        return from_cells(np.append(q, r.q1), np.append(k, r.k1), cells)

    def _shifted(self, r: Region, row: tuple[int, int, int], column: tuple[int, int, int]) -> Slabs:
        """The base for rows and keys (first, stop, position of the first) that follow each other, where those stand."""
        (q0, q1, q), (k0, k1, k) = row, column
        base = self.base.slabs_in(Region(r.b, r.h, q, q + q1 - q0, k, k + k1 - k0, r.known)).moved(q0 - q, k0 - k)
        return base if self.k is None else all_of([base, bands(q0, q1, k0, 0, k1, 0)])

    def _periodic_from(self, k_stop: int) -> tuple[int, int] | None:
        if self.q is not None:
            return None  # any row may see any key, up to the last one taken
        return self.base._periodic_from(k_stop if self.k is None else _stop(self.k))

    def _check(self, q_stop: int, k_stop: int) -> None:
        for side, stop, name in ((self.q, q_stop, "queries"), (self.k, k_stop, "keys")):
            if side is not None and surely(stop > side.tensor.shape[-1]):
                raise MaskError(f"`{self}` takes {side.tensor.shape[-1]} {name}, but was asked about {stop}")
        self.base._check(0 if self.q else q_stop, 0 if self.k else k_stop)

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = q if self.q is None else row_by_row(self.q.tensor, q)
        k = k if self.k is None else row_by_row(self.k.tensor, k)
        return self.base._logical(q, k) or (q, k)

    def kv_len_for(self, q_len: int) -> int:
        if self.k is not None:
            return self.k.tensor.shape[-1]
        return self.base.kv_len_for(q_len if self.q is None else _stop(self.q))

    def _write(self) -> Written:
        return method(self.base, call("take", q=self.q, k=self.k)[0])


@dataclass(frozen=True, eq=False, repr=False)
class Transposed(Mask):
    """Queries and keys change places."""

    base: Mask
    kind: ClassVar[str] = "transposed"

    @classmethod
    def make(cls, *args: Any) -> Mask:
        (base,) = args
        return base.base if isinstance(base, cls) else cls(base)

    @property
    def _tiles_exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base._tiles_exact

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.base._truth(b, h, k, q)

    def _plane(self, r: Region) -> Flags:
        return self.base._plane(Region(r.b, r.h, r.k0, r.k1, r.q0, r.q1)).T

    def _tile(self, r: Rectangles) -> States:
        return self.base._tile(Rectangles(r.b, r.h, r.k0, r.k1, r.q0, r.q1))

    def _slabs(self, r: Region) -> Slabs:
        base = self.base.slabs_in(Region(r.b, r.h, r.k0, r.k1, r.q0, r.q1, r.known))
        return transposed(base, r.q0, r.q1)

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return self.base._tile_key(Rectangles(r.b, r.h, r.k0, r.k1, r.q0, r.q1))

    def _periodic_from(self, k_stop: int) -> tuple[int, int] | None:
        return None  # the base would have to say it of its rows

    def _check(self, q_stop: int, k_stop: int) -> None:
        self.base._check(k_stop, q_stop)

    def kv_len_for(self, q_len: int) -> int:
        return self.base.q_len_for(q_len)

    def q_len_for(self, kv_len: int) -> int:
        return self.base.kv_len_for(kv_len)

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        pair = self.base._logical(k, q)
        return None if pair is None else (pair[1], pair[0])

    def _write(self) -> Written:
        return method(self.base, "T")


MAX_MOVES, MAX_SHIFTS = 64, 1024  # runs of keys, and of rows times keys, that are worth shifting one by one
FEW_SHIFTS, FEW_CELLS = 4, 1 << 14  # above so many, so few cells are looked at instead
FEWEST_CELLS = 1 << 11  # and these instead of any two: the row of a step of decoding


def _consecutive(taken: Data | None, b: int, first: int, stop: int) -> list[tuple[int, int, int]]:
    """Places `[first, stop)` as runs (start, stop, position of the first) of positions that follow each other."""
    if taken is None:
        return [(first, stop, first)]
    positions = np.atleast_2d(taken.array)
    positions = positions[min(b, len(positions) - 1), first:stop]
    begins = np.flatnonzero(np.append(True, np.diff(positions) != 1))
    stops = np.append(begins[1:], len(positions))
    return [(first + int(i), first + int(j), int(positions[i])) for i, j in zip(begins, stops, strict=True)]


def _positions(value: object, name: str) -> Data | None:
    if value is None:
        return None
    data = integers(value, f"take({name}=...)", late=True)
    if low_high(data)[0] < 0:
        raise MaskError(
            f"take({name}=...): positions are 0 or more, got {low_high(data)[0]}; leave out rows that do not exist"
        )
    if low_high(data)[1] >= MAX_POSITION:
        raise MaskError(f"take({name}=...): positions are below 2**40, got {low_high(data)[1]}")
    return data


def _stop(data: Data) -> int:
    return low_high(data)[1] + 1 if not data.late and data.tensor.numel() else 0
