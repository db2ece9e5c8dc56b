"""Masks as plain tuples, and what they mean, in numpy: the oracle that the library is held to. It imports no truemask.

A description is `(name, argument, ...)`: `("window", 3)`, `("and", a, b)`, `("at", a, 2, 0)`, data as nested tuples of
numbers. `oracle(description, b, h, q, k)` says for index arrays which cells may attend; each leaf is one line, copied
from the inequality in the table of the language.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Description = tuple[Any, ...]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def oracle(mask: Description, b: Any, h: Any, q: Any, k: Any) -> Bools:
    """Which of the cells (b, h, q, k) may attend, as bool of the shape that the four broadcast to."""
    b, h, q, k = (np.asarray(x, np.int64) for x in (b, h, q, k))
    name, *arguments = mask
    allowed = RE_INDEXED[name](b, h, q, k, *arguments) if name in RE_INDEXED else LEAVES[name](b, h, q, k, *arguments)
    return np.broadcast_to(allowed, np.broadcast_shapes(b.shape, h.shape, q.shape, k.shape))


def dense(mask: Description, q_len: int, kv_len: int, batch: int = 1, heads: int = 1) -> Bools:
    """The whole picture, bool `[batch, heads, q_len, kv_len]`."""
    return oracle(mask, *np.ix_(*map(np.arange, (batch, heads, q_len, kv_len))))


def of_sample(table: Any, b: Ints, i: Ints) -> NDArray[Any]:
    """`table[i]`, or `table[b, i]` if it has a row for each sample."""
    table = np.asarray(table)
    return table[i] if table.ndim == 1 else table[b, i]


def each(value: Any, b: Ints) -> NDArray[Any]:
    """A number for all samples, or the one of sample b."""
    value = np.asarray(value)
    return value if value.ndim == 0 else value[b]


def segments(lengths: Any) -> Ints:
    """Document numbers: 0 repeated lengths[0] times, 1 repeated lengths[1] times, and so on."""
    return np.repeat(np.arange(len(lengths)), lengths)


def restarted(lengths: Any) -> Ints:
    """Positions that begin again at 0 in every document."""
    return np.concatenate([np.arange(n) for n in (*lengths, 0)]).astype(np.int64)


# -- leaves: (b, h, q, k, *arguments) -> bool ------------------------------------------------------------------------


def _grid(b: Ints, h: Ints, q: Ints, k: Ints, height: int, width: int, radius: int) -> Bools:
    return (abs(q // width - k // width) <= radius) & (abs(q % width - k % width) <= radius)


def _same(b: Ints, h: Ints, q: Ints, k: Ints, labels: Any, none: int = -1, kv_labels: Any = None) -> Bools:
    of_q, of_k = of_sample(labels, b, q), of_sample(labels if kv_labels is None else kv_labels, b, k)
    return (of_q == of_k) & (of_q != none)


def _documents(b: Ints, h: Ints, q: Ints, k: Ints, lengths: Any, kv_lengths: Any = None) -> Bools:
    return segments(lengths)[q] == segments(lengths if kv_lengths is None else kv_lengths)[k]


def _document_ids(b: Ints, h: Ints, q: Ints, k: Ints, ids: Any, kv_ids: Any = None) -> Bools:
    return of_sample(ids, b, q) == of_sample(ids if kv_ids is None else kv_ids, b, k)


def _padding(b: Ints, h: Ints, q: Ints, k: Ints, kind: str, numbers: Any, on: str) -> Bools:
    def real(i: Ints) -> Bools:
        return i < each(numbers, b) if kind == "lengths" else i >= each(numbers, b)

    return {"both": lambda: real(q) & real(k), "keys": lambda: real(k), "queries": lambda: real(q)}[on]()


def _tree(b: Ints, h: Ints, q: Ints, k: Ints, parents: Any, lengths: Any = None) -> Bools:
    """`parents` of nodes, -1 at a root; with `lengths`, node i is a segment of so many tokens, a chain."""
    if lengths is not None:
        return _tree(b, h, q, k, token_parents(parents, lengths))
    sees = np.eye(len(parents), dtype=bool)
    for node in range(len(parents)):
        above = node
        while (above := parents[above]) >= 0:
            sees[node, above] = True
    return sees[q, k]


def token_parents(parents: Any, lengths: Any) -> list[int]:
    """A tree of segments as a tree of tokens: each token hangs on the one before, the first on the last one above."""
    ends = np.cumsum(lengths)
    parents_of = []
    for parent, length, end in zip(parents, lengths, ends, strict=True):
        while parent >= 0 and lengths[parent] == 0:  # an empty segment has no token to hang on
            parent = parents[parent]
        root = int(ends[parent]) - 1 if parent >= 0 else -1
        parents_of += [root, *range(int(end) - length, int(end) - 1)][:length]
    return parents_of


def _dense(b: Ints, h: Ints, q: Ints, k: Ints, cells: Any) -> Bools:
    """(q, k), or (b, h, q, k) where size 1 broadcasts."""
    table = np.asarray(cells, bool)
    if table.ndim == 2:
        return table[q, k]
    return table[b if table.shape[0] > 1 else 0, h if table.shape[1] > 1 else 0, q, k]


def _block_pattern(b: Ints, h: Ints, q: Ints, k: Ints, matrix: Any, size: int) -> Bools:
    table = np.asarray(matrix, bool)
    return table[q // size, k // size] if table.ndim == 2 else table[h, q // size, k // size]


def hash32(*words: int) -> int:
    """The counter-based hash in Python ints: words first to last, then back without the last."""

    def mix(x: int) -> int:
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        return (x >> 16) ^ x

    state = 0x9E3779B9
    for word in words + words[-2::-1]:
        state = mix(state ^ (word % 2**32))
    return state


def random_cell(q: int, k: int, rate: float, block: int = 1, seed: int = 0, head: int | None = None) -> bool:
    """One cell of `random`, in Python's own integers."""
    words = (seed, q // block, k // block) if head is None else (seed, head, q // block, k // block)
    return hash32(*words) < round(rate * 2**32)


def _random(
    b: Ints, h: Ints, q: Ints, k: Ints, rate: float, block: int = 1, seed: int = 0, per_head: bool = False
) -> Any:
    def cell(h: int, q: int, k: int) -> bool:
        return random_cell(int(q), int(k), rate, block, seed, int(h) if per_head else None)

    return np.vectorize(cell, otypes=[bool])(*np.broadcast_arrays(h, q, k)) if q.size * k.size * h.size else False


def formula(b: Any, h: Any, q: Any, k: Any) -> Any:
    """A predicate of whole-number arithmetic that numpy arrays and torch tensors both understand."""
    return ((q * 3 + k * 5 + h + 2 * b) % 7) < 3


LEAVES: dict[str, Callable[..., Any]] = {
    "everything": lambda b, h, q, k: True,
    "nothing": lambda b, h, q, k: False,
    "causal": lambda b, h, q, k: k <= q,
    "window": lambda b, h, q, k, size: (q - size < k) & (k <= q),
    "local": lambda b, h, q, k, radius: abs(q - k) <= radius,
    "prefix": lambda b, h, q, k, length: k < each(length, b),
    "global_tokens": lambda b, h, q, k, positions: np.isin(q, positions) | np.isin(k, positions),
    "blocks": lambda b, h, q, k, size, back, ahead: (q // size - back <= k // size) & (k // size <= q // size + ahead),
    "block_pattern": _block_pattern,
    "dilated": lambda b, h, q, k, step: (q - k) % step == 0,
    "strided": lambda b, h, q, k, step, last: k % step >= step - last,
    "random": _random,
    "grid": _grid,
    "documents": _documents,
    "document_ids": _document_ids,
    "same": _same,
    "keys": lambda b, h, q, k, flags: of_sample(flags, b, k),
    "queries": lambda b, h, q, k, flags: of_sample(flags, b, q),
    "padding": _padding,
    "tree": _tree,
    "dense": _dense,
    "predicate": lambda b, h, q, k: formula(b, h, q, k),
}


# -- operators and re-indexing: (b, h, q, k, *arguments) -> bool ------------------------------------------------------


def _packed(b: Ints, h: Ints, q: Ints, k: Ints, base: Description, lengths: Any, kv_lengths: Any) -> Bools:
    kv_lengths = lengths if kv_lengths is None else kv_lengths
    alike = segments(lengths)[q] == segments(kv_lengths)[k]
    return alike & oracle(base, b, h, restarted(lengths)[q], restarted(kv_lengths)[k])


def _padded(b: Ints, h: Ints, q: Ints, k: Ints, base: Description, starts: Any) -> Bools:
    start = each(starts, b)
    inside = (q >= start) & (k >= start)
    return inside & oracle(base, b, h, np.maximum(q - start, 0), np.maximum(k - start, 0))


def _prepended(
    b: Ints, h: Ints, q: Ints, k: Ints, base: Description, rows: int, extra: int, seen: Description
) -> Bools:
    q_own, k_own = np.maximum(q - rows, 0), np.maximum(k - extra, 0)
    tokens = np.where(q < rows, oracle(seen, b, h, np.zeros_like(q), k_own), oracle(base, b, h, q_own, k_own))
    return (k < extra) | tokens


def _take(b: Ints, h: Ints, q: Ints, k: Ints, base: Description, q_at: Any, k_at: Any) -> Bools:
    q = q if q_at is None else of_sample(q_at, b, q)
    return oracle(base, b, h, q, k if k_at is None else of_sample(k_at, b, k))


def _select(b: Ints, h: Ints, q: Ints, k: Ints, base: Description, samples: Any, heads: Any) -> Bools:
    b = b if samples is None else np.asarray(samples, np.int64)[b]
    return oracle(base, b, h if heads is None else np.asarray(heads, np.int64)[h], q, k)


def _chosen(index: Ints, masks: Any, ask: Callable[[Description], Bools]) -> Bools:
    answers = [ask(mask) for mask in masks]
    return np.select([index == i for i in range(len(masks))], answers, default=False)


RE_INDEXED: dict[str, Callable[..., Any]] = {
    "and": lambda b, h, q, k, *terms: np.logical_and.reduce([oracle(t, b, h, q, k) for t in terms]),
    "or": lambda b, h, q, k, *terms: np.logical_or.reduce([oracle(t, b, h, q, k) for t in terms]),
    "xor": lambda b, h, q, k, *terms: np.logical_xor.reduce([oracle(t, b, h, q, k) for t in terms]),
    "minus": lambda b, h, q, k, left, right: oracle(left, b, h, q, k) & ~oracle(right, b, h, q, k),
    "not": lambda b, h, q, k, base: ~oracle(base, b, h, q, k),
    "T": lambda b, h, q, k, base: oracle(base, b, h, k, q),
    "at": lambda b, h, q, k, base, q_start, k_start: oracle(base, b, h, q + q_start, k + k_start),
    "take": _take,
    "select": _select,
    "packed": _packed,
    "padded": _padded,
    "prepended": _prepended,
    "per_head": lambda b, h, q, k, *masks: _chosen(h, masks, lambda m: oracle(m, b, h, q, k)),
    "per_sample": lambda b, h, q, k, *masks: _chosen(b, masks, lambda m: oracle(m, b, h, q, k)),
}
