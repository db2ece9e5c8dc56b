"""What a sparse kernel runs: strips of rows with the intervals of keys that they may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from truemask.common.memory import HoldsArrays

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

ALL, FROM_MASK, CAUSAL = -1, -2, -3  # patterns: every key is seen; ask the mask; row i sees the first i + 1 keys
MAX_PATTERN_BYTES = 1 << 26  # bytes of patterns, eight cells in each, that are worth keeping


class Pattern(NamedTuple):
    """Which cells of a strip are seen: `[height, width]` bits, row by row."""

    height: int
    width: int
    bits: bytes

    @classmethod
    def of(cls, cells: Flags) -> Pattern:
        """The pattern of bool `[height, width]`."""
        return cls(cells.shape[0], cells.shape[1], np.packbits(cells).tobytes())

    @property
    def cells(self) -> Flags:
        """Bool `[height, width]`, with the intervals of keys side by side."""
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.height * self.width)
        return bits.view(np.bool_).reshape(self.height, self.width)


@dataclass(frozen=True, eq=False)
class Strips(HoldsArrays):
    """Strips of rows `[q0, q1)` of sample b and head h (0 where the mask does not vary), each row in at most one.

    Strip i sees nothing outside the intervals `keys[starts[i]:starts[i + 1]]`, which are in order and apart. Inside
    them it sees every key (`pattern[i]` is ALL), a triangle (CAUSAL), the cells of `patterns[pattern[i]]`, or what the
    mask says (FROM_MASK). Rows in no strip see nothing.
    """

    q_len: int
    kv_len: int
    shape: tuple[int, int]  # samples and heads that the mask tells apart
    b: Ints
    h: Ints
    q0: Ints
    q1: Ints
    starts: Ints  # [strips + 1]
    keys: Ints  # [intervals, 2]
    pattern: Ints  # [strips]
    patterns: tuple[Pattern, ...]

    def __len__(self) -> int:
        return len(self.q0)

    @property
    def heights(self) -> Ints:
        """Rows of each strip."""
        return self.q1 - self.q0

    @property
    def widths(self) -> Ints:
        """Keys of each strip."""
        sums = np.concatenate([[0], np.cumsum(self.keys[:, 1] - self.keys[:, 0])])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    def columns(self, strip: int) -> Ints:
        """The keys of a strip, side by side."""
        parts = [np.arange(first, stop) for first, stop in self.keys[self.starts[strip] : self.starts[strip + 1]]]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def dead(self) -> Flags:
        """Which rows see nothing, bool `[b, h, q]`; strips whose pattern is not kept count as seeing something."""
        dead = np.ones((*self.shape, self.q_len), bool)
        alive = [pattern.cells.any(1) for pattern in self.patterns]
        for b, h, q0, q1, pattern in zip(self.b, self.h, self.q0, self.q1, self.pattern, strict=True):
            dead[b, h, q0:q1] = ~alive[pattern] if pattern >= 0 else False
        return dead


# -- from cells --------------------------------------------------------------------------------------------------------


def from_cells(cells: Flags) -> Strips:
    """One strip for each sample and head, as high as all rows, of the keys that any of them sees: for few rows."""
    samples, heads, q_len, kv_len = cells.shape
    places: list[tuple[int, int]] = []
    keys: list[Ints] = []
    patterns: dict[Pattern, int] = {}
    numbers: list[int] = []
    for b, h in np.ndindex(samples, heads):
        plane = cells[b, h]
        seen_keys: Flags = plane[0] if q_len == 1 else np.asarray(plane.any(axis=0))
        if not seen_keys.any():
            continue
        edges = np.flatnonzero(seen_keys[1:] != seen_keys[:-1]) + 1
        edges = np.concatenate([[0] if seen_keys[0] else [], edges, [kv_len] if seen_keys[-1] else []]).astype(np.int64)
        places.append((b, h))
        keys.append(edges.reshape(-1, 2))
        if q_len == 1:
            numbers.append(ALL)
            continue
        part = plane[:, seen_keys]
        numbers.append(ALL if part.all() else patterns.setdefault(Pattern.of(part), len(patterns)))
    b, h = np.array(places, np.int64).reshape(-1, 2).T
    starts = np.cumsum([0, *map(len, keys)])
    zero = np.zeros_like(b)
    joined = np.concatenate(keys) if keys else np.zeros((0, 2), np.int64)
    shape = (samples, heads)
    return Strips(
        q_len, kv_len, shape, b, h, zero, zero + q_len, starts, joined, np.array(numbers, np.int64), tuple(patterns)
    )
