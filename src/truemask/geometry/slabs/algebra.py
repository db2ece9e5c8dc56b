"""The algebra of slabs: unions, intersections and differences, transposition, and the union of any pieces.

All of it is one sweep. The ends of the runs of a slab are sorted; rows are cut where ends cross, so that in each slab
they have one order; then they are gone through from left to right, and a sum of weights says which parts a key is in.

Slabs go through in chunks that stay in the cache. An end, with its slab and weight, is one 64-bit number, so that all
that is known of it moves when it is sorted: slab, place on the slab's first row, slope, weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from truemask.geometry.ranges import spans
from truemask.geometry.slabs.lines import Flags, Ints, after, places, union
from truemask.geometry.slabs.slabs import FAR, NoExactFormError, Slabs, affordable, bands, left_unmerged

Seen = Callable[[Ints], Flags]
CHUNK = 1 << 14  # runs that are looked at together
UNCHOSEN_RUNS = 3  # runs of a slab that are not worth choosing among


def all_of(parts: Sequence[Slabs], but: Sequence[Slabs] = ()) -> Slabs:
    """The cells that are in all `parts` and in none of `but`; `parts` may be empty."""
    return unmerged_all(parts, but).canonical


def any_of(parts: Sequence[Slabs]) -> Slabs:
    """The cells that are in any part."""
    return unmerged_any(parts).canonical


def odd_of(parts: Sequence[Slabs]) -> Slabs:
    """The cells that are in an odd number of parts."""
    return unmerged_odd(parts).canonical


def unmerged_all(parts: Sequence[Slabs], but: Sequence[Slabs] = ()) -> Slabs:
    """`all_of`, as unmerged slabs."""
    if not parts:
        parts = [bands(but[0].rows[0], but[0].rows[-1], -FAR, 0, FAR, 0)]
    if len(parts) == 1 and not but:
        return parts[0]
    n = len(parts)
    weights = [1] * n + [-1] * len(but)
    return _overlay([*parts, *but], weights, lambda total: total == n, partial(_bounded, bounding=n))


def unmerged_any(parts: Sequence[Slabs]) -> Slabs:
    """`any_of`, as unmerged slabs."""
    return parts[0] if len(parts) == 1 else _overlay(parts, [1] * len(parts), lambda total: total > 0)


def unmerged_odd(parts: Sequence[Slabs]) -> Slabs:
    """`odd_of`, as unmerged slabs."""
    if len(parts) == 1:
        return parts[0]
    needed = _unlike if len(parts) == 2 else None
    return _overlay(parts, [1] * len(parts), lambda total: total & 1 == 1, needed)


def cropped(slabs: Slabs, start: int, stop: int) -> Slabs:
    """Keys `[start, stop)` alone."""
    clipped = slabs.clipped(start, stop)
    return slabs if clipped is slabs else clipped.canonical


def pieces(first: int, stop: int, q0: Ints, q1: Ints, lo: Ints, hi: Ints, s: ArrayLike = 0, t: ArrayLike = 0) -> Slabs:
    """The union, on rows `[first, stop)`, of pieces: rows `[q0, q1)` with keys `[lo + s * q, hi + t * q)`.

    They may overlap, cross, and be empty on some of their rows; int64 arrays that broadcast together.
    """
    q0, q1, lo, hi, s, t = (np.ravel(x) for x in np.broadcast_arrays(q0, q1, lo, hi, s, t))
    q0, q1 = np.maximum(q0, first), np.minimum(q1, stop)
    q0 = np.where(s < t, np.maximum(q0, lo - hi + 1), q0)  # where a piece is not empty
    q1 = np.where(s > t, np.minimum(q1, hi - lo), np.where((s == t) & (lo >= hi), q0, q1))
    real = q0 < q1
    q0, q1, lines = q0[real], q1[real], np.stack([2 * lo + s, 2 * hi + t])[:, real]
    rows = union(q0, q1, np.array([first, stop]))
    begin, end = np.searchsorted(rows, q0), np.searchsorted(rows, q1)
    affordable(int((end - begin).sum()))
    piece, slab = spans(begin, end)
    order = np.argsort(slab, kind="stable")
    heap = Slabs(rows, after(np.bincount(slab, minlength=len(rows) - 1)), lines[:, piece[order]])
    return _overlay([heap], [1], lambda total: total > 0).canonical


def transposed(slabs: Slabs, first: int, stop: int) -> Slabs:
    """Queries and keys change places: the keys `[first, stop)` become the rows."""
    slabs = cropped(slabs, first, stop)
    (lo, hi), (s, t) = slabs.ends, slabs.slopes
    top, bottom = slabs.first, slabs.last
    # key k is seen by the rows from max(top, k - hi + 1 if the end moves) to min(bottom, k - lo if the start moves)
    k0, k1 = slabs.at(0, top), slabs.at(1, bottom)
    meet, leave = np.where(t == 1, hi + top, k0), np.where(s == 1, lo + bottom, k1)
    low, high = np.minimum(meet, leave), np.maximum(meet, leave)
    parts = []
    for a, b in ((k0, low), (low, high), (high, k1)):
        moves, leaves = (t == 1) & (a >= meet), (s == 1) & (b <= leave)
        parts.append((a, b, np.where(moves, 1 - hi, top), np.where(leaves, 1 - lo, bottom + 1), moves, leaves))
    q0, q1, start, end, moves, leaves = (np.concatenate(column) for column in zip(*parts, strict=True))
    return pieces(first, stop, q0, q1, start, end, moves.astype(np.int64), leaves.astype(np.int64))


# -- the sweep ---------------------------------------------------------------------------------------------------------


PartRuns = list[tuple[Slabs, Ints, Ints]]  # parts, and from and up to which of their runs each finer slab has


def _overlay(
    parts: Sequence[Slabs],
    weights: Sequence[int],
    seen: Seen,
    needed: Callable[[PartRuns, Ints], PartRuns] | None = None,
) -> Slabs:
    """The cells for which `seen` holds of the sum of the weights of the parts they are in, unmerged; 0 is not seen.

    `needed` chooses, between finer rows, the runs that are looked at.
    """
    rows, there = _common(parts)
    part_runs = [(part, part.starts[at], part.starts[at + 1]) for part, at in zip(parts, there, strict=True)]
    part_runs = needed(part_runs, rows) if needed else part_runs
    sizes = sum((end - begin for _, begin, end in part_runs), np.zeros(len(rows) - 1, np.int64))
    affordable(int(sizes.sum()))
    moves = any(part.moves for part in parts)
    bits = (2 * len(parts)).bit_length()
    swept: list[tuple[Ints, Ints, Ints]] = []
    for a, b in _chunks(sizes):
        batch = [(part, *spans(begin[a:b], end[a:b])) for part, begin, end in part_runs]
        slab = np.concatenate([slab for _, slab, _ in batch])
        lines = np.concatenate([part.lines.take(run, axis=1) for part, _, run in batch], axis=1)
        weight = np.repeat(weights, [len(slab) for _, slab, _ in batch])
        ends = _Ends(rows[a : b + 1], np.concatenate([slab, slab]), lines.ravel(), np.concatenate([weight, -weight]))
        ordered = ends.in_order(bits)
        if moves and (cut := ordered.cut()) is not None:
            ordered = cut.in_order(bits)
        swept.append(ordered.runs(seen))
        affordable(sum(lines.shape[1] for _, _, lines in swept))
    if len(swept) == 1:
        return left_unmerged(*swept[0])
    tops, counts, lines = zip(*swept, strict=True)
    every = np.concatenate([*(top[:-1] for top in tops), rows[-1:]])
    return left_unmerged(every, np.concatenate(counts), np.concatenate(lines, axis=1))


def _common(parts: Sequence[Slabs]) -> tuple[Ints, list[Ints]]:
    """The rows at which a slab of any part begins, and which slab of each part is there."""
    n = len(parts)
    every = np.concatenate([part.rows * n + i for i, part in enumerate(parts)])
    every.sort(kind="stable")  # which is quick on what is sorted in parts
    row, part = np.divmod(every, n)
    last = np.flatnonzero(np.append(row[1:] != row[:-1], True))
    return row[last], [np.cumsum(part == i)[last[:-1]] - 1 for i in range(n)]


def _bounded(part_runs: PartRuns, rows: Ints, bounding: int) -> PartRuns:
    """Without the runs that cannot meet what all of the first parts have."""
    first, last = rows[:-1], rows[1:] - 1
    low, high = np.full(len(first), -FAR), np.full(len(first), FAR)
    for part, begin, end in part_runs[:bounding]:
        low, high = _narrowed(part, begin, end, first, last, low, high)
    some = low < high
    meeting: PartRuns = []
    for part, begin, end in part_runs:
        end = np.where(some, end, begin)
        if part.most > UNCHOSEN_RUNS:
            begin, end = _meeting(part, begin, end, first, last, low, high)
        meeting.append((part, begin, end))
    return meeting


def _unlike(part_runs: PartRuns, rows: Ints) -> PartRuns:
    """Without the runs of rows on which two parts have the same lines."""
    (x, a, b), (y, c, d) = part_runs
    same = b - a == d - c
    slab, run = spans(a, np.where(same, b, a))
    differs = (x.lines[:, run] != y.lines[:, run + (c - a)[slab]]).any(0)
    same &= np.bincount(slab[differs], minlength=len(rows) - 1) == 0
    return [(x, a, np.where(same, a, b)), (y, c, np.where(same, c, d))]


def _narrowed(part: Slabs, begin: Ints, end: Ints, first: Ints, last: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """The keys `[low, high)` of each finer slab, cut to those between which all runs of the part are."""
    some = begin < end
    a, b = np.where(some, begin, 0), np.where(some, end - 1, 0)
    if not some.any():
        return np.full_like(low, FAR), np.full_like(high, -FAR)
    lo, hi = places(part.lines[0].take(a), first), places(part.lines[1].take(b), last)
    return np.where(some, np.maximum(low, lo), FAR), np.where(some, np.minimum(high, hi), -FAR)


def _meeting(part: Slabs, begin: Ints, end: Ints, first: Ints, last: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """The runs of the part that meet the keys `[low, high)` of each finer slab: runs of a slab are in order."""
    begin = _bisect(begin, end, lambda run: places(part.lines[1].take(run), last) > low)
    return begin, _bisect(begin, end, lambda run: places(part.lines[0].take(run), first) >= high)


def _bisect(begin: Ints, end: Ints, test: Callable[[Ints], Flags]) -> Ints:
    """The first number of each `[begin, end)` that passes a test which the later ones pass too, or `end`."""
    left, right = begin, end
    for _ in range(int((end - begin).max(initial=0)).bit_length()):
        undecided = left < right
        middle = np.where(undecided, (left + right) // 2, 0)
        passes = test(middle)
        right = np.where(undecided & passes, middle, right)
        left = np.where(undecided & ~passes, middle + 1, left)
    return left


def _chunks(sizes: Ints) -> Iterator[tuple[int, int]]:
    """Slabs `[a, b)` that are looked at together."""
    total = after(sizes)
    a = 0
    while a < len(sizes):
        b = min(int(np.searchsorted(total, total[a] + CHUNK, "right")) - 1, a + CHUNK)
        b = max(b, a + 1)
        yield a, b
        a = b


class _Ends(NamedTuple):
    """The ends of the runs of some slabs, in any order: the slab, the line, and by how much the sum changes there."""

    rows: Ints
    slab: Ints
    line: Ints
    change: Ints

    def in_order(self, bits: int) -> _Sorted:
        """From slab to slab, from left to right on its first row, and what stands still first; changes take `bits`."""
        place = self.line & 1
        place *= (2 * self.rows).take(self.slab)
        place += self.line
        near = place[np.abs(self.line) < FAR]  # further is the same as `FAR`
        low, high = ((int(near.min()) & -2) - 2, (int(near.max()) & -2) + 2) if len(near) else (-2, 2)
        np.clip(place, low, high, out=place)
        width = (high - low).bit_length()
        if len(self.rows).bit_length() + width + bits > 63:
            raise NoExactFormError(f"{len(self.rows)} slabs of lines over {high - low} places")
        place -= low
        place += self.slab << width
        place <<= bits
        place += self.change
        place += 1 << (bits - 1)
        place.sort()
        return _Sorted(self.rows, place >> bits, (place & ((1 << bits) - 1)) - (1 << (bits - 1)), low, high, width)


class _Sorted(NamedTuple):
    """Ends in order. A spot is, from the highest bit on, the slab, twice the place on its first row, and the slope."""

    rows: Ints
    spot: Ints
    change: Ints
    low: int
    high: int
    width: int

    def read(self, spot: Ints) -> tuple[Ints, Ints]:
        """The slab and the line of spots."""
        slab = spot >> self.width
        line = spot & ((1 << self.width) - 1)
        line += self.low
        out = line <= self.low, line >= self.high
        line -= (line & 1) * (2 * self.rows).take(slab)
        line[out[0]], line[out[1]] = -2 * FAR, 2 * FAR
        return slab, line

    def runs(self, seen: Seen) -> tuple[Ints, Ints, Ints]:
        """Rows, counts and lines where `seen` holds of the sum of changes from the left."""
        last = np.ones(len(self.spot), bool)  # of the same lines
        np.not_equal(self.spot[1:], self.spot[:-1], out=last[:-1])
        value = seen(np.cumsum(self.change)[last])
        turns = value.copy()
        turns[1:] ^= value[:-1]
        slab, line = self.read(self.spot[last][turns])
        return self.rows, np.bincount(slab[::2], minlength=len(self.rows) - 1), line.reshape(-1, 2).T

    def cut(self) -> _Ends | None:
        """With rows cut behind those in which a moving line meets a standing one; None if none crosses one."""
        rows, spot = self.rows, self.spot
        moving = (spot & 1) == 1
        mover, still = np.flatnonzero(moving), spot[~moving]
        if not len(mover) or not len(still):
            return None
        at = spot[mover] - 1
        slab = at >> self.width
        bottom = np.minimum(at + 2 * (rows[1:] - rows[:-1] - 1)[slab], ((slab + 1) << self.width) - 1)
        begin = mover - np.arange(len(mover))  # as many standing ones come before
        meets = np.flatnonzero(np.append(still, 1 << 62)[begin] < bottom)
        if not len(meets):
            return None
        slab, at, begin = slab[meets], at[meets], begin[meets]
        end = np.searchsorted(still, bottom[meets])
        affordable(int((end - begin).sum()))
        which, other = spans(begin, end)
        finer = union(rows, rows[slab[which]] + ((still[other] - at[which]) >> 1) + 1)
        slab, line = self.read(spot)
        into = np.searchsorted(finer, rows)
        begin, end = into[slab], into[slab + 1]
        affordable(int((end - begin).sum()) // 2)
        which, piece = spans(begin, end)
        return _Ends(finer, piece, line[which], self.change[which])
