"""Random mask expressions: each drawn as a description, built by the library and understood by the oracle alone.

The draw goes from the outside in and knows how far positions may reach: a term must answer for queries below `q` and
keys below `k` in `batch` samples and `heads` heads, and a re-indexing asks its base for as many as it can point at. So
every leaf's data is long enough and nothing is filtered away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

import truemask as tm
from tests.support.descriptions import Description, formula
from truemask.masks.core.mask import Mask

Draw = Callable[[st.SearchStrategy[Any]], Any]
DEEPEST = 5


@dataclass(frozen=True)
class Reach:
    """How far a mask must answer: positions below q and k, in so many samples and heads."""

    q: int
    k: int
    batch: int = 1
    heads: int = 1


class Drawn(NamedTuple):
    """A description with the sizes it answers for."""

    description: Description
    reach: Reach

    @property
    def mask(self) -> Mask:
        return build(self.description)


# -- the library's side ------------------------------------------------------------------------------------------------


def build(description: Description) -> Mask:
    """The mask of a description."""
    name, *arguments = description
    return BUILDERS[name](*(build(a) if is_description(a) else a for a in arguments))


def is_description(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], str)


def flags(cells: Any) -> torch.Tensor:
    return torch.tensor(cells, dtype=torch.bool)


def table(numbers: Any) -> torch.Tensor | None:
    return None if numbers is None else torch.tensor(numbers, dtype=torch.int64)


BUILDERS: dict[str, Callable[..., Mask]] = {
    "everything": lambda: tm.everything,
    "nothing": lambda: tm.nothing,
    "causal": lambda: tm.causal,
    "window": tm.window,
    "local": tm.local,
    "prefix": tm.prefix,
    "global_tokens": tm.global_tokens,
    "blocks": lambda size, back, ahead: tm.blocks(size, back=back, ahead=ahead),
    "block_pattern": lambda matrix, size: tm.block_pattern(flags(matrix), size),
    "dilated": tm.dilated,
    "strided": lambda step, last: tm.strided(step, last=last),
    "random": lambda rate, block, seed, per_head: tm.random(rate, block=block, seed=seed, per_head=per_head),
    "grid": tm.grid,
    "documents": lambda lengths, kv=None: tm.documents(lengths, kv_lengths=kv),
    "document_ids": lambda ids, kv=None: tm.documents(ids=table(ids), kv_ids=table(kv)),
    "same": lambda labels, none=-1, kv=None: tm.same(table(labels), none=none, kv_labels=table(kv)),
    "keys": lambda cells: tm.keys(flags(cells)),
    "queries": lambda cells: tm.queries(flags(cells)),
    "padding": lambda kind, numbers, on: tm.padding(**{kind: numbers}, on=on),
    "tree": lambda parents, lengths=None: tm.tree(parents, lengths=lengths),
    "dense": lambda cells: tm.dense(flags(cells)),
    "predicate": lambda: tm.predicate(formula),
    "and": lambda first, *rest: fold(first, rest, lambda a, b: a & b),
    "or": lambda first, *rest: fold(first, rest, lambda a, b: a | b),
    "xor": lambda first, *rest: fold(first, rest, lambda a, b: a ^ b),
    "minus": lambda left, right: left - right,
    "not": lambda base: ~base,
    "T": lambda base: base.T,
    "at": lambda base, q, k: base.at(q_start=q, k_start=k),
    "take": lambda base, q, k: base.take(q=table(q), k=table(k)),
    "select": lambda base, samples, heads: base.select(samples=samples, heads=heads),
    "packed": lambda base, lengths, kv: base.packed(lengths, kv_lengths=kv),
    "padded": lambda base, starts: base.padded(starts),
    "prepended": lambda base, q, k, seen: base.prepended(q=q, k=k, seen=seen),
    "per_head": lambda *masks: tm.per_head(list(masks)),
    "per_sample": lambda *masks: tm.per_sample(list(masks)),
}


def fold(first: Mask, rest: Sequence[Mask], combine: Callable[[Mask, Mask], Mask]) -> Mask:
    for mask in rest:
        first = combine(first, mask)
    return first


# -- leaves ------------------------------------------------------------------------------------------------------------


def split(draw: Draw, total: int) -> tuple[int, ...]:
    """Lengths of documents, empty ones among them, that cover `total` positions or a few more."""
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=4)))
    ends = [*cuts, total + draw(st.integers(0, 2))]
    return tuple(b - a for a, b in zip([0, *cuts], ends, strict=True))


def both_sides(draw: Draw, reach: Reach) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Documents of queries and, half of the time, other lengths for as many documents of keys."""
    if draw(st.booleans()):
        return split(draw, _square(reach)), None
    q, k = split(draw, reach.q), split(draw, reach.k)
    pieces = max(len(q), len(k))
    return q + (0,) * (pieces - len(q)), k + (0,) * (pieces - len(k))


def per_sample(draw: Draw, reach: Reach, entry: st.SearchStrategy[Any]) -> Any:
    """One entry for all samples, or a row of entries if there is more than one sample."""
    if reach.batch > 1 and draw(st.booleans()):
        return tuple(draw(entry) for _ in range(reach.batch))
    return draw(entry)


def row(entry: st.SearchStrategy[Any], length: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(entry, min_size=length, max_size=length).map(tuple)


def matrix(entry: st.SearchStrategy[Any], rows: int, columns: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return row(row(entry, columns), rows)


def _square(reach: Reach) -> int:
    return max(reach.q, reach.k)


def _prefix(draw: Draw, r: Reach) -> Description:
    return "prefix", per_sample(draw, r, st.integers(0, r.k + 2))


def _global_tokens(draw: Draw, r: Reach) -> Description:
    return "global_tokens", tuple(draw(st.lists(st.integers(0, _square(r) + 3), max_size=4)))


def _blocks(draw: Draw, r: Reach) -> Description:
    return "blocks", draw(st.integers(1, 7)), draw(st.integers(0, 2)), draw(st.integers(0, 2))


def _block_pattern(draw: Draw, r: Reach) -> Description:
    size = draw(st.integers(1, 7))
    cells = matrix(st.booleans(), -(-r.q // size), -(-r.k // size))
    heads = r.heads > 1 and draw(st.booleans())
    return "block_pattern", draw(row(cells, r.heads) if heads else cells), size


def _strided(draw: Draw, r: Reach) -> Description:
    step = draw(st.integers(1, 6))
    return "strided", step, draw(st.integers(1, step))


def _random(draw: Draw, r: Reach) -> Description:
    rate = draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]))
    per_head = r.heads > 1 and draw(st.booleans())
    return "random", rate, draw(st.integers(1, 5)), draw(st.integers(0, 2**31)), per_head


def _grid(draw: Draw, r: Reach) -> Description:
    width = draw(st.integers(1, 7))
    return "grid", -(-_square(r) // width), width, draw(st.integers(0, 3))


def _documents(draw: Draw, r: Reach) -> Description:
    return "documents", *both_sides(draw, r)


def _labels(name: str, low: int) -> Callable[[Draw, Reach], Description]:
    def leaf(draw: Draw, r: Reach) -> Description:
        label = st.integers(low, 3)
        own_keys = draw(st.booleans())
        first = per_sample(draw, r, row(label, r.q if own_keys else _square(r)))
        second = per_sample(draw, r, row(label, r.k)) if own_keys else None
        if name == "same":
            return name, first, draw(st.sampled_from([-1, 2])), second
        return name, first, second

    return leaf


def _keys(draw: Draw, r: Reach) -> Description:
    return "keys", per_sample(draw, r, row(st.booleans(), r.k))


def _queries(draw: Draw, r: Reach) -> Description:
    return "queries", per_sample(draw, r, row(st.booleans(), r.q))


def _padding(draw: Draw, r: Reach) -> Description:
    numbers = tuple(draw(st.integers(0, _square(r) + 1)) for _ in range(r.batch))
    kind, on = draw(st.sampled_from(["lengths", "starts"])), draw(st.sampled_from(["both", "keys", "queries"]))
    return "padding", kind, numbers, on


def _tree(draw: Draw, r: Reach) -> Description:
    if draw(st.booleans()):
        return "tree", tuple(draw(st.integers(-1, i - 1)) for i in range(_square(r)))
    lengths = split(draw, _square(r))
    return "tree", tuple(draw(st.integers(-1, i - 1)) for i in range(len(lengths))), lengths


def _dense(draw: Draw, r: Reach) -> Description:
    cells = matrix(st.booleans(), r.q, r.k)
    if draw(st.booleans()):
        return "dense", draw(cells)
    samples, heads = draw(st.sampled_from([1, r.batch])), draw(st.sampled_from([1, r.heads]))
    return "dense", draw(row(row(cells, heads), samples))


LEAVES: dict[str, Callable[[Draw, Reach], Description]] = {
    "everything": lambda draw, r: ("everything",),
    "nothing": lambda draw, r: ("nothing",),
    "causal": lambda draw, r: ("causal",),
    "window": lambda draw, r: ("window", draw(st.integers(1, r.k + 2))),
    "local": lambda draw, r: ("local", draw(st.integers(0, r.k + 2))),
    "prefix": _prefix,
    "global_tokens": _global_tokens,
    "blocks": _blocks,
    "block_pattern": _block_pattern,
    "dilated": lambda draw, r: ("dilated", draw(st.integers(1, 6))),
    "strided": _strided,
    "random": _random,
    "grid": _grid,
    "documents": _documents,
    "document_ids": _labels("document_ids", 0),
    "same": _labels("same", -1),
    "keys": _keys,
    "queries": _queries,
    "padding": _padding,
    "tree": _tree,
    "dense": _dense,
    "predicate": lambda draw, r: ("predicate",),
}


# -- operators and re-indexing -----------------------------------------------------------------------------------------


class Inner(NamedTuple):
    """How an operator draws its terms: one level less deep."""

    draw: Draw
    depth: int
    leaves: tuple[str, ...]

    def __call__(self, reach: Reach) -> Description:
        return grow(self.draw, reach, self.depth - 1, self.leaves)


def _at(draw: Draw, r: Reach, inner: Inner) -> Description:
    q, k = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return "at", inner(replace(r, q=r.q + q, k=r.k + k)), q, k


def _take(draw: Draw, r: Reach, inner: Inner) -> Description:
    q, k = r.q + draw(st.integers(0, 3)), r.k + draw(st.integers(0, 3))
    which = draw(st.sampled_from(["q", "k", "qk"]))
    q_at = per_sample(draw, r, row(st.integers(0, max(q - 1, 0)), r.q)) if "q" in which else None
    k_at = per_sample(draw, r, row(st.integers(0, max(k - 1, 0)), r.k)) if "k" in which else None
    return "take", inner(replace(r, q=max(q, 1), k=max(k, 1))), q_at, k_at


def _select(draw: Draw, r: Reach, inner: Inner) -> Description:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    samples = draw(row(st.integers(0, batch - 1), r.batch))
    chosen = draw(row(st.integers(0, heads - 1), r.heads))
    which = draw(st.sampled_from(["samples", "heads", "both"]))
    base = replace(r, batch=r.batch if which == "heads" else batch, heads=r.heads if which == "samples" else heads)
    return "select", inner(base), None if which == "heads" else samples, None if which == "samples" else chosen


def _packed(draw: Draw, r: Reach, inner: Inner) -> Description:
    lengths, kv_lengths = both_sides(draw, r)
    longest_q, longest_k = max(lengths), max(lengths if kv_lengths is None else kv_lengths)
    return "packed", inner(replace(r, q=max(longest_q, 1), k=max(longest_k, 1))), lengths, kv_lengths


def _padded(draw: Draw, r: Reach, inner: Inner) -> Description:
    return "padded", inner(r), tuple(draw(st.integers(0, _square(r) + 1)) for _ in range(r.batch))


def _prepended(draw: Draw, r: Reach, inner: Inner) -> Description:
    q, k = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    own = replace(r, q=max(r.q - q, 1), k=max(r.k - k, 1))
    seen = draw(st.sampled_from([("everything",), ("prefix", 2), _keys(draw, own)]))
    return "prepended", inner(own), q, k, seen


OPERATORS: dict[str, Callable[[Draw, Reach, Inner], Description]] = {
    "and": lambda draw, r, inner: ("and", *(inner(r) for _ in range(draw(st.integers(2, 3))))),
    "or": lambda draw, r, inner: ("or", *(inner(r) for _ in range(draw(st.integers(2, 3))))),
    "xor": lambda draw, r, inner: ("xor", inner(r), inner(r)),
    "minus": lambda draw, r, inner: ("minus", inner(r), inner(r)),
    "not": lambda draw, r, inner: ("not", inner(r)),
    "T": lambda draw, r, inner: ("T", inner(replace(r, q=r.k, k=r.q))),
    "at": _at,
    "take": _take,
    "select": _select,
    "packed": _packed,
    "padded": _padded,
    "prepended": _prepended,
    "per_head": lambda draw, r, inner: ("per_head", *(inner(r) for _ in range(r.heads))),
    "per_sample": lambda draw, r, inner: ("per_sample", *(inner(r) for _ in range(r.batch))),
}
FREE = ("everything", "nothing", "causal", "window", "local", "blocks", "dilated", "strided", "random", "global_tokens")


def grow(draw: Draw, reach: Reach, depth: int, leaves: tuple[str, ...], *, root: bool = False) -> Description:
    """A description of at most `depth` levels, and at least two if it may be that deep."""
    if depth > 1 and (root or draw(st.integers(0, 9)) > 2):
        return OPERATORS[draw(st.sampled_from(sorted(OPERATORS)))](draw, reach, Inner(draw, depth, leaves))
    return LEAVES[draw(st.sampled_from(leaves))](draw, reach)


@st.composite
def reaches(draw: Draw, largest: int = 13) -> Reach:
    return Reach(*(draw(st.integers(1, n)) for n in (largest, largest, 3, 3)))


@st.composite
def expressions(
    draw: Draw, depth: int = DEEPEST, leaves: Sequence[str] = tuple(LEAVES), reach: Reach | None = None
) -> Drawn:
    """A random expression over `leaves` and the sizes that it answers for."""
    sizes: Reach = draw(reaches()) if reach is None else reach
    return Drawn(grow(draw, sizes, depth, tuple(leaves), root=True), sizes)
