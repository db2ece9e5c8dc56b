"""The algebra of slabs: unions, intersections and differences, transposition, and the union of any pieces.

All of it is one sweep. Rows are cut where ends of runs cross, so that in each slab the ends have one order; then they
are gone through from left to right, and a sum of weights says which parts a key is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from truemask.geometry.ranges import spans
from truemask.geometry.slabs import FAR, Flags, Ints, NoExactFormError, Slabs, affordable, bands, stacked, tidy

Lines = tuple[Ints, Ints, Ints, Ints]  # of each run: its slab, ends [2, runs], slopes [2, runs], weight


def all_of(parts: Sequence[Slabs], but: Sequence[Slabs] = ()) -> Slabs:
    """The cells that are in all `parts` and in none of `but`; `parts` may be empty."""
    weights = [1] * len(parts) + [-1] * len(but)
    return _overlay([*parts, *but], weights, lambda n: n == len(parts), len(parts))


def any_of(parts: Sequence[Slabs]) -> Slabs:
    """The cells that are in any part."""
    return _overlay(parts, [1] * len(parts), lambda n: n > 0, 0)


def odd_of(parts: Sequence[Slabs]) -> Slabs:
    """The cells that are in an odd number of parts."""
    return _overlay(parts, [1] * len(parts), lambda n: n % 2 == 1, 0)


def cropped(slabs: Slabs, start: int, stop: int) -> Slabs:
    """Keys `[start, stop)` alone. Only the slabs that reach beyond are looked at again, if few stand between others."""
    beyond = (slabs.at(0, slabs.first) < start) | (slabs.at(1, slabs.last) > stop)
    if not beyond.any():
        return slabs
    steps = np.diff(np.pad(np.bincount(slabs.owner, beyond, len(slabs.sizes)) > 0, 1).view(np.int8))
    first, last = slabs.rows[np.flatnonzero(steps == 1)], slabs.rows[np.flatnonzero(steps == -1)]
    if len(first) > 8:
        first, last = slabs.rows[:1], slabs.rows[-1:]
    parts, done = [], int(slabs.rows[0])
    for q0, q1 in zip(first.tolist(), last.tolist(), strict=True):
        parts += [slabs.between(done, q0)] if done < q0 else []
        parts.append(all_of([slabs.between(q0, q1), bands(q0, q1, start, 0, stop, 0)]))
        done = q1
    parts += [slabs.between(done, int(slabs.rows[-1]))] if done < slabs.rows[-1] else []
    return parts[0] if len(parts) == 1 else stacked(parts)


def pieces(first: int, stop: int, q0: Ints, q1: Ints, lo: Ints, hi: Ints, s: ArrayLike = 0, t: ArrayLike = 0) -> Slabs:
    """The union, on rows `[first, stop)`, of pieces: rows `[q0, q1)` with keys `[lo + s * q, hi + t * q)`.

    They may overlap, cross, and be empty on some of their rows; int64 arrays that broadcast together.
    """
    q0, q1, lo, hi, s, t = (np.ravel(x) for x in np.broadcast_arrays(q0, q1, lo, hi, s, t))
    q0, q1 = np.maximum(q0, first), np.minimum(q1, stop)
    q0, q1, lo, hi, s, t = (x[q0 < q1] for x in (q0, q1, lo, hi, s, t))

    def gather(above: Ints, below: Ints) -> Lines:
        begin, end = np.searchsorted(above, q0), np.searchsorted(above, q1)
        affordable(int((end - begin).sum()))
        piece, slab = spans(begin, end)
        ends, slopes = np.stack([lo[piece], hi[piece]]), np.stack([s[piece], t[piece]])
        top, bottom = (ends + slopes * row[slab] for row in (above, below))
        real = (top[0] < top[1]) | (bottom[0] < bottom[1])
        return slab[real], ends[:, real], slopes[:, real], np.ones(int(real.sum()), np.int64)

    def seen(total: Ints) -> Flags:
        return total > 0

    return _resolved(_union(q0, q1, np.array([first, stop])), gather, seen, bool(s.any() or t.any()))


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


def _overlay(parts: Sequence[Slabs], weights: Sequence[int], seen: Callable[[Ints], Flags], bounding: int) -> Slabs:
    """The cells for which `seen` holds of the sum of the weights of the parts that they are in.

    The first `bounding` parts contain the result: what the others say elsewhere is left out.
    """
    rows = parts[0].rows if len(parts) == 1 else _union(*[part.rows for part in parts])
    moves = any(part.moves for part in parts)
    return _resolved(rows, lambda first, last: _gathered(parts, weights, first, last, bounding), seen, moves)


Gather = Callable[[Ints, Ints], Lines]  # from the first and the last row of slabs


def _resolved(rows: Ints, gather: Gather, seen: Callable[[Ints], Flags], moves: bool) -> Slabs:
    """The cells for which `seen` holds of the sum of the weights around them, with rows cut where that needs it."""
    lines = gather(rows[:-1], rows[1:] - 1)
    if moves and len(cuts := _crossings(rows, *lines[:3])):
        rows = _union(rows, cuts)
        lines = gather(rows[:-1], rows[1:] - 1)
    slab, ends, slopes = _swept(rows[:-1], rows[1:] - 1, *lines, seen)
    if moves and len(late := _late(rows, slab, ends, slopes)):
        row, ends_there, slopes_there = _swept(late, late, *gather(late, late), seen)
        finer = _union(rows, late)
        slab = np.concatenate([np.searchsorted(finer, rows[slab]), np.searchsorted(finer, late[row])])
        order = np.argsort(slab, kind="stable")
        ends, slopes = (np.concatenate(x, axis=1)[:, order] for x in ((ends, ends_there), (slopes, slopes_there)))
        rows, slab = finer, slab[order]
    return tidy(rows, np.bincount(slab, minlength=len(rows) - 1), ends, slopes)


def _gathered(parts: Sequence[Slabs], weights: Sequence[int], first: Ints, last: Ints, bounding: int) -> Lines:
    """The runs of all parts between finer rows, without those that the bounding parts leave out."""
    found = []
    low, high = np.full(len(first), -FAR), np.full(len(first), FAR)
    for n, part in enumerate(parts):
        place = np.searchsorted(part.rows, first, "right") - 1
        begin, end = part.starts[place], part.starts[place + 1]
        found.append((part, begin, end))
        if n < bounding:
            low, high = _narrowed(part, begin, end, first, last, low, high)
    if bounding:
        found = [
            (part, *(_meeting(part, begin, end, first, last, low, high) if part.most > 1 else (begin, end)))
            for part, begin, end in found
        ]
    affordable(int(sum((end - begin).sum() for _, begin, end in found)))
    columns = []
    for (part, begin, end), weight in zip(found, weights, strict=True):
        slab, run = spans(begin, end)
        columns.append((slab, part.ends[:, run], part.slopes[:, run], np.full(len(slab), weight)))
    slab, ends, slopes, weight = (np.concatenate(column, axis=-1) for column in zip(*columns, strict=True))
    return slab, ends, slopes, weight


def _narrowed(part: Slabs, begin: Ints, end: Ints, first: Ints, last: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """The keys `[low, high)` of each finer slab, cut to those between which all runs of the part are."""
    some = begin < end
    a, b = np.where(some, begin, 0), np.where(some, end - 1, 0)
    if not some.any():
        return np.full_like(low, FAR), np.full_like(high, -FAR)
    lo, hi = part.ends[0, a] + part.slopes[0, a] * first, part.ends[1, b] + part.slopes[1, b] * last
    return np.where(some, np.maximum(low, lo), FAR), np.where(some, np.minimum(high, hi), -FAR)


def _meeting(part: Slabs, begin: Ints, end: Ints, first: Ints, last: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """The runs of the part that meet the keys `[low, high)` of each finer slab: runs of a slab are in order."""
    (lo, hi), (s, t) = part.ends, part.slopes
    begin = _bisect(begin, end, lambda run: hi[run] + t[run] * last > low)
    return begin, _bisect(begin, end, lambda run: lo[run] + s[run] * first >= high)


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


def _crossings(rows: Ints, slab: Ints, ends: Ints, slopes: Ints) -> Ints:
    """The rows after those in which a moving line meets a standing one: cut there, and no two lines cross inside."""
    moves = slopes.ravel() == 1
    if not moves.any() or moves.all():
        return np.zeros(0, np.int64)
    slab, line = np.concatenate([slab, slab]), ends.ravel()
    still, line, slab, of = line[~moves], line[moves], slab[moves], slab[~moves]
    low, high = int(rows[0]) + int(line.min()), int(rows[-1]) + int(line.max())
    span = high - low + 2  # where no line that moves comes, the others need no place of their own
    if len(rows) * span >= 1 << 62:
        raise NoExactFormError(f"{len(rows)} slabs of lines over {span} keys")
    place = np.sort(of * span + np.clip(still - low, 0, span - 1), kind="stable")
    begin = np.searchsorted(place, slab * span + (line + rows[slab] - low))
    end = np.searchsorted(place, slab * span + (line + rows[slab + 1] - 1 - low))
    affordable(int((end - begin).sum()))
    mover, other = spans(begin, end)
    return place[other] - (slab * span + line - low)[mover] + 1


def _union(*numbers: Ints) -> Ints:
    """Different numbers, in order. (`np.unique` hashes integers, which takes longer.)"""
    every = np.sort(np.concatenate(numbers), kind="stable")
    return every[np.append(True, every[1:] != every[:-1])] if len(every) else every


def _swept(
    first: Ints, last: Ints, slab: Ints, ends: Ints, slopes: Ints, weight: Ints, seen: Callable[[Ints], Flags]
) -> tuple[Ints, Ints, Ints]:
    """Go through the ends of each slab from left to right, adding weights: the runs where `seen` holds.

    A slab, ends and slopes for each, in order.
    """
    slab, line, slope = np.concatenate([slab, slab]), ends.ravel(), slopes.ravel()
    change = np.concatenate([weight, -weight])
    beyond = bool(seen(np.zeros(1, np.int64))[0])  # whether cells in no part are seen
    if beyond:
        every, still = np.arange(len(first)), np.zeros(len(first), np.int64)
        slab = np.concatenate([slab, every, every])
        line, slope = np.concatenate([line, still - FAR, still + FAR]), np.concatenate([slope, still, still])
        change = np.concatenate([change, still, still])
    top, alone = first[slab], first == last
    if alone.any():
        alone = alone[slab]
        line, slope = np.where(alone, line + slope * top, line), np.where(alone, 0, slope)
    order, same = _in_order(slab, line + slope * top, slope)
    total, order = np.cumsum(change[order])[~same], order[~same]
    slab, line, slope = slab[order], line[order], slope[order]
    value = seen(total) & (line < FAR)
    before = np.zeros(len(value), bool)
    before[1:] = value[:-1] & (slab[1:] == slab[:-1])
    opens, closes = value & ~before, before & ~value
    return slab[opens], np.stack([line[opens], line[closes]]), np.stack([slope[opens], slope[closes]])


def _late(rows: Ints, slab: Ints, ends: Ints, slopes: Ints) -> Ints:
    """The last rows of slabs in which a run vanishes, or touches the next one: they stand alone."""
    last = rows[slab + 1] - 1
    start, stop = ends + slopes * last
    closed = start == stop
    closed[:-1] |= (stop[:-1] == start[1:]) & (slab[1:] == slab[:-1])
    return _union(last[closed])


def _in_order(slab: Ints, place: Ints, slope: Ints) -> tuple[Ints, Flags]:
    """Lines by slab, place on its first row, and slope; and which of them are followed by the same line."""
    same = np.zeros(len(slab), bool)
    if not len(slab):
        return slab, same
    low, high = int(place.min()), int(place.max())
    if (int(slab.max()) + 1) * (high - low + 1) * 2 < 1 << 63:
        key = (slab * (high - low + 1) + (place - low)) * 2 + slope
        order = np.argsort(key, kind="stable")  # which is quick on what is sorted in parts
        key = key[order]
        same[:-1] = key[1:] == key[:-1]
        return order, same
    order = np.lexsort((slope, place, slab))
    same[:-1] = np.all([x[order][1:] == x[order][:-1] for x in (slab, place, slope)], axis=0)
    return order, same
