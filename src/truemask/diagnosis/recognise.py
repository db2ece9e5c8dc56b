"""Cells that somebody computed, as an expression: which masks of the language are equal to a dense one.

Parameters are read off the cells (how far a row looks back, where rows begin anew, which keys nobody sees), few
expressions are made of them, and only one that is equal in every cell is an answer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from truemask.errors import MaskError
from truemask.masks.compose.boolean import conjunction, everything, nothing
from truemask.masks.compose.per_axis import per_head, per_sample
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, local, window
from truemask.masks.leaves.documents import documents
from truemask.masks.leaves.patterns import dilated, strided
from truemask.masks.leaves.per_token import global_tokens, keys, padding, prefix, queries
from truemask.masks.structure.placement import offset

Cells = NDArray[np.bool_]

MAX_CELLS = 1 << 24
MAX_MEMBERS = 8  # different masks of samples or heads that are worth writing out
MIN_REPEATS = 3  # times that flags must repeat to be called periodic
MAX_STRIDES = 3  # runs of keys in one period
MAX_GLOBAL_SHARE = 0.25  # share of the rows beyond which full rows are no global tokens


def recognise(
    mask: Mask, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
) -> Mask | None:
    """An expression of the language, without cells of its own, equal to `mask` at these sizes; None if none is found.

    >>> import torch
    >>> from truemask.masks.leaves.matrices import dense
    >>> recognise(dense(torch.ones(8, 8, dtype=torch.bool).tril()), 8)
    causal
    >>> recognise(dense(torch.ones(8, 8, dtype=torch.bool).tril().triu(-2)), 8)
    window(3)
    """
    kv_len = mask.kv_len_for(q_len) if kv_len is None else kv_len
    samples, head_count = (
        held if held != 0 else size or 1 for held, size in ((mask.batch_size, batch), (mask.head_count, heads))
    )
    if q_len * kv_len * samples * head_count > MAX_CELLS or not q_len * kv_len:
        return None
    table = mask.to_dense(q_len, kv_len, batch=samples, heads=head_count).numpy()
    rows = [_of_heads(row) for row in table]
    if any(row is None for row in rows):
        return None
    masks = [row for row in rows if row is not None]
    if len(set(masks)) == 1:
        return masks[0]
    flagged = _flags_apart(table)
    if flagged is not None:
        return flagged
    return per_sample(masks) if len(masks) <= MAX_MEMBERS else None


def _of_heads(cells: Cells) -> Mask | None:
    """Of `[h, q, k]`."""
    if (cells == cells[:1]).all():
        return recognised(cells[0])
    masks = [recognised(head) for head in cells]
    return per_head(masks) if len(masks) <= MAX_MEMBERS and all(mask is not None for mask in masks) else None


def _flags_apart(table: Cells) -> Mask | None:
    """Samples that differ by the keys that nobody sees only: one mask and the flags of each."""
    if table.shape[1] > 1:
        return None
    seen_keys = np.asarray(table[:, 0].any(1))
    base = recognised(np.asarray(table[:, 0].any(0)))
    if base is None:
        return None
    for flags in (_key_flags(seen_keys), _key_flags(seen_keys, "both")):
        whole = conjunction(base, flags)
        if (whole.to_dense(*table.shape[2:], batch=len(table)).numpy() == table).all():
            return whole
    return None


def recognised(cells: Cells) -> Mask | None:
    """The same of one sample and head, `[q, k]`."""
    if cells.all():
        return everything
    if not cells.any():
        return nothing
    for extra in _left_out(np.asarray(cells.any(1)), np.asarray(cells.any(0))):
        for mask in _candidates(_Shape.of(cells)):
            whole = conjunction(mask, extra)
            if _is(whole, cells):
                return whole
    return None


def _left_out(rows: Cells, columns: Cells) -> Iterator[Mask]:
    """What may hide the rows and keys that are dead: nothing, a period, and last flags, which hold for them alone."""
    yield everything
    if rows.all() and columns.all():
        return
    by_key, by_row = (periodic(flags[: flags.nonzero()[0].max() + 1]) for flags in (columns, rows))
    if by_key is not None:
        yield by_key
    if by_key is not None and by_row is not None:
        yield conjunction(by_key, by_row.T)
    dead_keys = everything if columns.all() else _key_flags(columns[None, :])
    yield dead_keys
    tokens = np.array_equal(rows, columns)
    yield _key_flags(columns[None, :], "both") if tokens else conjunction(dead_keys, queries(rows))


def periodic(flags: Cells) -> Mask | None:
    """The keys of the flags, `[k]`, as a rule that goes on for ever; None if they do not repeat often enough to say.

    >>> periodic(np.arange(30) % 3 == 0), periodic(np.arange(30) % 4 != 1)
    (strided(3).at(k_start=2), strided(4, last=3).at(k_start=3))
    """
    if flags.all():
        return everything
    for period in range(2, len(flags) // MIN_REPEATS + 1):
        if not (flags[period:] == flags[:-period]).all():
            continue
        cycle = flags[:period]
        starts = np.flatnonzero(cycle & ~np.roll(cycle, 1)).tolist()
        if not 0 < len(starts) <= MAX_STRIDES:
            return None
        turned = [np.roll(cycle, -start) for start in starts]
        lengths = [int(run.argmin()) for run in turned]
        rules = [strided(period, n).at(k_start=-(start + n) % period) for start, n in zip(starts, lengths, strict=True)]
        return reduce(operator.or_, rules)
    return None


def _is(mask: Mask, cells: Cells) -> bool:
    try:
        return bool((mask.to_dense(*cells.shape, batch=max(1, mask.batch_size))[0, 0].numpy() == cells).all())
    except MaskError:
        return False


def _key_flags(seen_keys: Cells, on: str = "keys") -> Mask:
    """The keys that some row sees, `[b, k]`: as padding if the others lie at one end; or the tokens, of both."""
    n, counts = seen_keys.shape[1], seen_keys.sum(1)
    if (seen_keys == (np.arange(n) < counts[:, None])).all():
        return padding(lengths=counts.tolist(), on=on)
    if (seen_keys == (np.arange(n) >= n - counts[:, None])).all():
        return padding(starts=(n - counts).tolist(), on=on)
    flags = seen_keys[0] if len(seen_keys) == 1 else seen_keys
    return keys(flags) if on == "keys" else keys(flags) & queries(flags)


class _Shape(NamedTuple):
    """What is read off the cells that are on, `[q, k]`: rows that see something, the first and last key of each."""

    cells: Cells
    live: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @classmethod
    def of(cls, cells: Cells) -> _Shape:
        live = np.flatnonzero(cells.any(1))
        return cls(cells, live, cells[live].argmax(1), cells.shape[1] - 1 - cells[live][:, ::-1].argmax(1))


def _candidates(shape: _Shape) -> Iterator[Mask]:
    """Few masks that might be it, the plainest first."""
    n, m = shape.cells.shape
    yield everything
    yield from _aligned(shape, 0, 0)
    if n != m:
        right = (m - n, 0) if m > n else (0, n - m)
        yield from (mask.at(*right) for mask in _aligned(shape, *right) if mask.varies_with_query)
    rows = np.asarray(shape.cells.all(1) & shape.cells.all(0)) if n == m else np.zeros(n, bool)
    if 0 < rows.sum() <= MAX_GLOBAL_SHARE * n:
        rest = shape.cells & ~rows[:, None] & ~rows
        if rest.any():
            tokens = global_tokens(np.flatnonzero(rows).tolist())
            yield from (mask | tokens for mask in _aligned(_Shape.of(rest), 0, 0))


def _aligned(shape: _Shape, down: int, right: int) -> Iterator[Mask]:
    """Where rows begin at position `down` and keys at `right`."""
    q, first, last = shape.live + down, shape.first + right, shape.last + right
    back, ahead = int((q - first).max()), int((last - q).max())
    bases: list[Mask] = []
    steps = [mask for mask in _steps(shape, down - right) if offset(mask).base == mask or not (down or right)]
    if ahead <= 0:
        bases += [causal, window(back + 1)]
        tail = _tail_run(shape)
        if tail <= back:
            bases += [causal & (window(tail) | prefix(int(_lead(shape))))]
        bases += [causal & step for step in steps]
    bases += [prefix(int(_lead(shape))), causal | prefix(int(last[0]) + 1)]
    bases += [local(back)] if back == ahead else []
    bases += _blocks(shape, q, first, last)
    bases += steps
    yield from bases
    seen_to_move = (shape.last < shape.cells.shape[1] - 1).sum() > 1
    if ahead and seen_to_move and not down and not right:
        yield from (mask.at(max(ahead, 0), max(-ahead, 0)) for mask in (causal, window(back + ahead + 1)))
    yield local(max(back, ahead, 0))
    lengths = _documents(shape)
    if len(lengths) > 1 and not down and not right:
        yield documents(lengths)
        longest = int(max((shape.last - shape.first).max() + 1, 1))
        yield from (causal.packed(lengths), window(longest).packed(lengths))


def _lead(shape: _Shape) -> int:
    """How many of the first keys the last row sees without a gap."""
    row = shape.cells[shape.live[-1]]
    return len(row) if row.all() else int(row.argmin())


def _tail_run(shape: _Shape) -> int:
    """How many keys up to its last one the last row sees without a gap."""
    row = shape.cells[shape.live[-1], : shape.last[-1] + 1][::-1]
    return len(row) if row.all() else int(row.argmin())


def _blocks(shape: _Shape, q: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64]) -> list[Mask]:
    """Blocks of the size after which rows change."""
    changes = np.flatnonzero((shape.cells[1:] != shape.cells[:-1]).any(1)) + 1
    size = int(np.gcd.reduce(changes)) if len(changes) else 0
    if size < 2:
        return []
    back, ahead = (max(0, int((a // size - b // size).max())) for a, b in ((q, first), (last, q)))
    return [blocks(size), blocks(size, back, ahead), causal & blocks(size, back, 0)]


def _steps(shape: _Shape, moved: int) -> list[Mask]:
    """The step between all distances."""
    rows = min(len(shape.cells), 64)
    q, k = np.nonzero(shape.cells[-rows:])
    distance = q + len(shape.cells) - rows + moved - k
    if not len(distance):
        return []
    step = int(np.gcd.reduce(distance - distance[0]))
    return [dilated(step).at(q_start=int(-distance[0]) % step)] if step > 1 else []


def _documents(shape: _Shape) -> list[int]:
    """Lengths of the documents, if rows begin anew where the first key that they see is the row itself."""
    if len(shape.live) < len(shape.cells) or shape.cells.shape[0] != shape.cells.shape[1]:
        return []
    starts = np.flatnonzero(shape.first == np.arange(len(shape.first)))
    return np.diff(np.append(starts, len(shape.cells))).tolist() if len(starts) and starts[0] == 0 else []
