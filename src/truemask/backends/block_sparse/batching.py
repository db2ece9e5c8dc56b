"""Strips put into few large calls: which strips run side by side, padded to what, and under which additive mask.

| the strips                        | run                                                                  |
|-----------------------------------|----------------------------------------------------------------------|
| see every key of their intervals  | with those as wide as they are, without a mask                       |
| share a pattern                   | together under one mask, or under the kernel's flag if it is causal  |
| are few of their kind             | padded to the widest of a batch, each under a mask of its own        |

A batch whose rows and keys move in equal steps is run on overlapping views of q, k and v; the others are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from truemask.backends.block_sparse.interleave import Interleaved, interleaved
from truemask.backends.block_sparse.strips import ALL, CAUSAL, FROM_MASK, Strips

Ints = NDArray[np.int64]

MAX_FLOAT_BYTES = 1 << 25  # bytes of additive masks that are kept as numbers; the others are kept as bits
CALL_BYTES = 1 << 19  # copied keys and values that are worth a call
CALL_CELLS = 1 << 15  # cells, over the heads, that a call's own seconds are worth


class Steps(NamedTuple):
    """Where strips begin, if each begins as far behind the one before."""

    first: int
    step: int


@dataclass(frozen=True, eq=False)
class Masking:
    """The additive masks of a group: distinct ones as numbers, or as bits, and which strip has which."""

    table: Tensor | None  # [patterns, 1, height, width], 0 and -inf
    bits: Tensor | None  # uint8 [patterns, bytes]
    which: Tensor | None  # int64 [strips]; None: strip i has pattern i, or all have the only one

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.table, self.bits, self.which) if x is not None)

    def additive(self, part: slice, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """`[1 or strips, 1, height, width]`."""
        held = self.table if self.table is not None else self.bits
        assert held is not None
        if self.which is not None:
            held = held.index_select(0, self.which[part])
        elif len(held) > 1:
            held = held[part]
        if self.table is not None:
            return held
        cells = np.unpackbits(held.numpy(), axis=1, count=height * width)
        allowed = torch.from_numpy(cells.view(np.bool_)).view(-1, 1, height, width)
        return torch.where(allowed, torch.zeros((), dtype=dtype), -torch.inf)


@dataclass(frozen=True, eq=False)
class Group:
    """Strips of one height and width that run in one call, or in a few if they are many.

    Padded rows repeat a strip's last row, and padded keys its first; neither is seen, or is told by `real`.
    """

    height: int
    width: int
    size: int
    rows: Steps | None
    keys: Steps | None
    row_places: Tensor | None  # int64 [strips, height], if `rows` is None
    key_places: Tensor | None  # int64 [strips, width], if `keys` is None
    real: Tensor | None  # bool [strips, height]: rows that are no padding; None if there is none
    widths: Tensor | None  # int64 [strips] if some are padded
    masking: Masking | None
    causal: bool = False
    from_mask: bool = False
    interleaved: Interleaved | None = None  # where the keys are, if they are in neither of the above

    @property
    def nbytes(self) -> int:
        """Bytes held beside the masks."""
        held = (self.row_places, self.key_places, self.real, self.widths)
        return sum(x.nbytes for x in held if x is not None) + (self.interleaved.keys.nbytes if self.interleaved else 0)

    def row_index(self, part: slice) -> Tensor:
        """The rows of some strips, `[strips, height]`."""
        return _index(self.rows, self.row_places, self.height, part)

    def key_index(self, part: slice) -> Tensor:
        """The keys of some strips, `[strips, width]`."""
        if self.interleaved is not None:
            return self.interleaved.keys.unfold(0, self.width, self.interleaved.step)[part]
        return _index(self.keys, self.key_places, self.width, part)

    def parts(self, most: int) -> Iterator[slice]:
        """The strips, at most so many at a time."""
        return (slice(i, min(i + most, self.size)) for i in range(0, self.size, most))


class Plane(NamedTuple):
    """The groups of one sample and head (0 where the mask does not vary)."""

    b: int
    h: int
    groups: tuple[Group, ...]


def _index(steps: Steps | None, places: Tensor | None, size: int, part: slice) -> Tensor:
    if steps is None:
        assert places is not None
        return places[part]
    starts = steps.first + steps.step * torch.arange(part.start, part.stop)
    return starts[:, None] + torch.arange(size)


# -- grouping ----------------------------------------------------------------------------------------------------------


def planes(strips: Strips, dtype: torch.dtype, heads: int, key_bytes: int) -> tuple[Plane, ...]:
    """The groups of every sample and head; `heads` share a strip, one key of which is so many bytes in all of them."""
    maker = _Maker(strips, dtype, max(1, CALL_CELLS // heads), CALL_BYTES // key_bytes)
    places: dict[tuple[int, int], list[int]] = {}
    for n, (b, h, width) in enumerate(zip(strips.b.tolist(), strips.h.tolist(), maker.widths.tolist(), strict=True)):
        if width:
            places.setdefault((b, h), []).append(n)
    return tuple(Plane(b, h, tuple(maker.groups(members))) for (b, h), members in places.items())


class _Maker:
    """What the groups of all planes share."""

    def __init__(self, strips: Strips, dtype: torch.dtype, call_cells: int, call_keys: int) -> None:
        self.strips, self.dtype, self.call_cells, self.call_keys = strips, dtype, call_cells, call_keys
        self.single = np.diff(strips.starts) == 1
        self.masks: dict[tuple[int, int, int], Masking] = {}
        self.heights, self.widths = strips.heights, strips.widths
        self.floats = MAX_FLOAT_BYTES

    def groups(self, members: list[int]) -> list[Group]:
        """The strips of one plane in groups: those alike first, then what is left over, by width."""
        if len(members) == 1:
            return [self._one(members[0])]
        pattern = self.strips.pattern
        alike: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            alike.setdefault((int(pattern[i]), int(self.heights[i]), int(self.widths[i])), []).append(int(i))
        groups: list[Group] = []
        left: dict[bool, list[int]] = {True: [], False: []}
        for (kind, height, width), alike_strips in alike.items():
            enough = len(alike_strips) * height * width >= self.call_cells or len(members) == len(alike_strips)
            if kind == CAUSAL or (kind != FROM_MASK and enough):
                parts = self._even(np.array(alike_strips)) if width > self.call_keys else [np.array(alike_strips)]
                groups += [self._made(part, causal=kind == CAUSAL) for part in parts]
            else:
                left[kind == FROM_MASK] += alike_strips
        for from_mask, alike_strips in left.items():
            groups += [
                self._made(batch, from_mask=from_mask) for batch in self._batches(np.array(alike_strips, np.int64))
            ]
        return groups

    def _one(self, i: int) -> Group:
        """A group of one strip, as decoding has it: no time is lost on it."""
        strips, height, width = self.strips, int(self.heights[i]), int(self.widths[i])
        kind, start = int(strips.pattern[i]), int(strips.starts[i])
        keys, places = Steps(int(strips.keys[start, 0]), 0), None
        if not self.single[i]:
            keys, places = None, torch.from_numpy(strips.columns(i))[None]
        masking = self._masking(np.array([i]), height, width, None) if kind >= 0 else None
        rows = Steps(int(strips.q0[i]), 0)
        return Group(height, width, 1, rows, keys, None, places, None, None, masking, kind == CAUSAL, kind == FROM_MASK)

    def _even(self, members: Ints) -> list[Ints]:
        """Strips that are worth a call each, cut to those that move in equal steps: they need not be copied."""
        if not self.single[members].all():
            return [members]
        starts = np.stack([self.strips.q0[members], self.strips.keys[self.strips.starts[members], 0]])
        parts, first = [], 0
        while first < len(members):
            steps = np.diff(starts[:, first:], axis=1)
            odd = np.flatnonzero((steps != steps[:, :1]).any(0)) if steps.shape[1] else []
            stop = first + 1 + (int(odd[0]) if len(odd) else steps.shape[1])
            stop = first + 1 if stop == first + 2 and stop < len(members) else stop
            parts.append(members[first:stop])
            first = stop
        return parts

    def _batches(self, members: Ints) -> Iterator[Ints]:
        """The widest first; a batch ends where another call costs less than padding up to its first strip."""
        order = members[np.lexsort((self.strips.q0[members], -self.widths[members], -self.heights[members]))]
        first = padding = 0
        for n, i in enumerate(order):
            top = order[first]
            area = self.heights[i] * self.widths[i]
            padding += self.heights[top] * self.widths[top] - area
            if padding > self.call_cells and n > first:
                yield np.sort(order[first:n])
                first, padding = n, 0
        if first < len(order):
            yield np.sort(order[first:])

    def _made(self, members: Ints, *, causal: bool = False, from_mask: bool = False) -> Group:
        heights, widths = self.heights[members], self.widths[members]
        height, width = int(heights.max()), int(widths.max())
        even_rows, even_keys = bool((heights == height).all()), bool((widths == width).all())
        q0 = self.strips.q0[members]
        rows = _steps(q0) if even_rows else None
        row_places = None
        if rows is None:
            row_places = q0[:, None] + np.minimum(np.arange(height), heights[:, None] - 1)
        starts = self.strips.starts
        single = bool(self.single[members].all())
        keys = _steps(self.strips.keys[starts[members], 0]) if single and even_keys else None
        key_places = None
        interleaving = (
            self._interleaved(members) if keys is None and even_keys and not causal and not from_mask else None
        )
        if interleaving is not None:
            width = interleaving.width
        elif keys is None:
            key_places = np.stack([_padded(self.strips.columns(i), width) for i in members])
        real = None if even_rows else np.arange(height) < heights[:, None]
        free = causal or from_mask or (even_rows and even_keys and bool((self.strips.pattern[members] == ALL).all()))
        return Group(
            height,
            width,
            len(members),
            rows,
            keys,
            _tensor(row_places),
            _tensor(key_places),
            _tensor(real),
            None if even_keys else torch.from_numpy(widths.copy()),
            None if free and interleaving is None else self._masking(members, height, width, interleaving),
            causal,
            from_mask,
            interleaving,
        )

    def _interleaved(self, members: Ints) -> Interleaved | None:
        """The keys of strips that have the same number of intervals, interleaved."""
        starts = self.strips.starts[members]
        counts = self.strips.starts[members + 1] - starts
        if (counts != counts[0]).any():
            return None
        return interleaved(self.strips.keys[starts[:, None] + np.arange(counts[0])])

    def _masking(self, members: Ints, height: int, width: int, interleaving: Interleaved | None) -> Masking:
        """The additive masks of strips, padded; distinct patterns once."""
        kinds = np.stack([self.strips.pattern[members], self.heights[members], self.widths[members]], 1)
        numbers: dict[tuple[int, int, int], int] = {}
        which = [numbers.setdefault((a, b, c), len(numbers)) for a, b, c in kinds.tolist()]
        only = next(iter(numbers)) if len(numbers) == 1 and interleaving is None else None
        if only in self.masks and only[1:] == (height, width):
            return self.masks[only]
        nbytes = len(numbers) * height * width * self.dtype.itemsize
        keep = nbytes <= self.floats
        self.floats -= nbytes if keep else 0
        apart = len(numbers) in (1, len(members))
        places = None if apart else torch.tensor(which)
        cells = (self._cells(*kind, height, width) for kind in numbers)
        if interleaving is not None:
            parts = (self._cells(*kind, height, kind[2]) for kind in numbers)
            cells = (part[:, interleaving.source] & (interleaving.source >= 0) for part in parts)
        if not keep:
            bits = np.stack([np.packbits(part) for part in cells])
            return Masking(None, torch.from_numpy(bits), places)
        table = torch.zeros(len(numbers), 1, height, width, dtype=self.dtype)
        for row, part in zip(table, cells, strict=True):
            row[0].masked_fill_(torch.from_numpy(~part), -torch.inf)
        masking = Masking(table, None, places)
        if only is not None and only[1:] == (height, width):
            self.masks[only] = masking
        return masking

    def _cells(self, pattern: int, rows: int, columns: int, height: int, width: int) -> NDArray[np.bool_]:
        cells = np.zeros((height, width), bool)
        cells[:rows, :columns] = self.strips.patterns[pattern].cells if pattern >= 0 else True
        return cells


def _steps(starts: Ints) -> Steps | None:
    """The steps between starts, if they are equal and none is backwards."""
    apart = np.diff(starts)
    if len(apart) and (apart[0] < 0 or (apart != apart[0]).any()):
        return None
    return Steps(int(starts[0]), int(apart[0]) if len(apart) else 0)


def _padded(columns: Ints, width: int) -> Ints:
    return np.concatenate([columns, np.full(width - len(columns), columns[0])])


def _tensor(array: NDArray[np.generic] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array))
