"""Random masks for `soak.py`: expressions over every leaf and every operator of the language, drawn from a `Random`.

The draw goes from the outside in and knows how far positions may reach, so every leaf's data is long enough; widths
are drawn by their logarithm, so that tiles of 64 are EMPTY, MIXED and FULL in all proportions.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch

import truemask as tm

FEW = 3  # different masks in one `per_head` or `per_sample`


class Reach(NamedTuple):
    """How far a mask must answer: positions below q and k, in so many samples and heads."""

    q: int
    k: int
    batch: int
    heads: int

    @property
    def square(self) -> int:
        """Positions of either axis."""
        return max(self.q, self.k)


class Drawing:
    """A draw, and the words of the language that it used."""

    def __init__(self, draw: Random) -> None:
        self.draw = draw
        self.words: set[str] = set()

    def mask(self, reach: Reach, depth: int) -> tm.Mask:
        """An expression of at most `depth` levels."""
        operator = depth > 1 and self.draw.random() < 0.75
        name = self.draw.choice(OPERATOR_NAMES if operator else LEAF_NAMES)
        self.words.add(name)
        return OPERATORS[name](self, reach, depth - 1) if operator else LEAVES[name](self, reach)

    def wide(self, most: int) -> int:
        """Between 1 and `most`, small numbers as likely as large ones."""
        return min(most, int(2 ** self.draw.uniform(0, max(most, 1).bit_length())))

    def coin(self) -> bool:
        """True every second time."""
        return self.draw.random() < 0.5

    def flags(self, *shape: int) -> torch.Tensor:
        """Booleans of which a random share is True, in runs or alone."""
        share, run = self.draw.random(), self.wide(70)
        seed = torch.Generator().manual_seed(self.draw.getrandbits(32))
        cells = torch.rand(*shape[:-1], -(-shape[-1] // run), generator=seed) < share
        return cells.repeat_interleave(run, -1)[..., : shape[-1]]

    def numbers(self, below: int, *shape: int) -> torch.Tensor:
        """Whole numbers from 0 on."""
        seed = torch.Generator().manual_seed(self.draw.getrandbits(32))
        return torch.randint(max(below, 1), shape, generator=seed)

    def lengths(self, total: int) -> list[int]:
        """Lengths of documents, empty ones among them, that cover `total` or a little more."""
        cuts = sorted(self.draw.randint(0, total) for _ in range(self.wide(9) - 1))
        ends = [*cuts, total + self.draw.randint(0, 2)]
        return [b - a for a, b in zip([0, *cuts], ends, strict=True)]

    def both_sides(self, reach: Reach) -> tuple[list[int], list[int] | None]:
        """Documents of queries and, half of the time, other lengths for as many documents of keys."""
        if self.coin():
            return self.lengths(reach.square), None
        q, k = self.lengths(reach.q), self.lengths(reach.k)
        pieces = max(len(q), len(k))
        return q + [0] * (pieces - len(q)), k + [0] * (pieces - len(k))

    def each(self, reach: Reach, most: int) -> list[int]:
        """A number for every sample."""
        return [self.draw.randint(0, most) for _ in range(reach.batch)]

    def rows(self, reach: Reach, length: int) -> tuple[int, ...]:
        """The shape of data along one axis: for all samples, or a row for each."""
        return (reach.batch, length) if reach.batch > 1 and self.coin() else (length,)


# -- leaves ------------------------------------------------------------------------------------------------------------


def _prefix(x: Drawing, r: Reach) -> tm.Mask:
    return tm.prefix(x.each(r, r.k + 2) if r.batch > 1 and x.coin() else x.wide(r.k + 2))


def _global_tokens(x: Drawing, r: Reach) -> tm.Mask:
    return tm.global_tokens([x.draw.randint(0, r.square + 3) for _ in range(x.draw.randint(0, 4))])


def _block_pattern(x: Drawing, r: Reach) -> tm.Mask:
    size = x.wide(80)
    cells = (-(-r.q // size), -(-r.k // size))
    return tm.block_pattern(x.flags(r.heads, *cells) if r.heads > 1 and x.coin() else x.flags(*cells), size)


def _strided(x: Drawing, r: Reach) -> tm.Mask:
    step = x.wide(90)
    return tm.strided(step, last=x.draw.randint(1, step))


def _random(x: Drawing, r: Reach) -> tm.Mask:
    rate, per_head = x.draw.choice([0.0, 0.02, 0.3, 0.9, 1.0]), x.coin()
    return tm.random(rate, block=x.wide(70), seed=x.draw.getrandbits(31), per_head=per_head)


def _grid(x: Drawing, r: Reach) -> tm.Mask:
    width = x.wide(40)
    return tm.grid(-(-r.square // width), width, x.draw.randint(0, 9))


def _documents(x: Drawing, r: Reach) -> tm.Mask:
    lengths, kv_lengths = x.both_sides(r)
    return tm.documents(lengths, kv_lengths=kv_lengths)


def _ids(x: Drawing, r: Reach) -> tm.Mask:
    labels = x.numbers(x.wide(5), *x.rows(r, r.square)).sort(-1).values
    return tm.documents(ids=labels, kv_ids=x.numbers(4, *x.rows(r, r.k)) if x.coin() else None)


def _same(x: Drawing, r: Reach) -> tm.Mask:
    return tm.same(
        x.numbers(4, *x.rows(r, r.square)) - 1,
        none=x.draw.choice([-1, 2]),
        kv_labels=x.numbers(4, *x.rows(r, r.k)) - 1 if x.coin() else None,
    )


def _padding(x: Drawing, r: Reach) -> tm.Mask:
    kind, on = x.draw.choice(["lengths", "starts"]), x.draw.choice(["both", "keys", "queries"])
    numbers = x.each(r, r.square + 1)
    return tm.padding(lengths=numbers, on=on) if kind == "lengths" else tm.padding(starts=numbers, on=on)


def _tree(x: Drawing, r: Reach) -> tm.Mask:
    lengths = x.lengths(r.square) if x.coin() else None
    nodes = r.square if lengths is None else len(lengths)
    reach_back = x.wide(nodes)
    parents = [x.draw.randint(max(-1, i - reach_back), i - 1) for i in range(nodes)]
    return tm.tree(parents, lengths=lengths)


def _dense(x: Drawing, r: Reach) -> tm.Mask:
    samples, heads = x.draw.choice([1, r.batch]), x.draw.choice([1, r.heads])
    return tm.dense(x.flags(r.q, r.k) if x.coin() else x.flags(samples, heads, r.q, r.k))


def _predicate(x: Drawing, r: Reach) -> tm.Mask:
    a, c, modulus, below = x.draw.randint(0, 9), x.draw.randint(1, 9), x.draw.randint(2, 70), x.draw.randint(1, 60)
    return tm.predicate(lambda b, h, q, k: (q * a + k * c + h + 2 * b) % modulus < below)


LEAVES: dict[str, Callable[[Drawing, Reach], tm.Mask]] = {
    "everything": lambda x, r: tm.everything,
    "nothing": lambda x, r: tm.nothing,
    "causal": lambda x, r: tm.causal,
    "window": lambda x, r: tm.window(x.wide(r.k + 2)),
    "local": lambda x, r: tm.local(x.wide(r.k + 2) - 1),
    "prefix": _prefix,
    "global_tokens": _global_tokens,
    "blocks": lambda x, r: tm.blocks(x.wide(100), back=x.draw.randint(0, 2), ahead=x.draw.randint(0, 2)),
    "block_pattern": _block_pattern,
    "dilated": lambda x, r: tm.dilated(x.wide(90)),
    "strided": _strided,
    "random": _random,
    "grid": _grid,
    "documents": _documents,
    "document ids": _ids,
    "same": _same,
    "keys": lambda x, r: tm.keys(x.flags(*x.rows(r, r.k))),
    "queries": lambda x, r: tm.queries(x.flags(*x.rows(r, r.q))),
    "padding": _padding,
    "tree": _tree,
    "dense": _dense,
    "predicate": _predicate,
}


# -- operators ---------------------------------------------------------------------------------------------------------


def _at(x: Drawing, r: Reach, depth: int) -> tm.Mask:
    q, k = x.wide(200) - 1, x.draw.choice([0, x.wide(200) - 1])
    return x.mask(r._replace(q=r.q + q, k=r.k + k), depth).at(q_start=q, k_start=k)


def _take(x: Drawing, r: Reach, depth: int) -> tm.Mask:
    q, k = r.q + x.draw.randint(0, 3), r.k + x.draw.randint(0, 3)
    which = x.draw.choice(["q", "k", "qk"])
    rows = x.numbers(q, *x.rows(r, r.q)) if "q" in which else None
    keys = x.numbers(k, *x.rows(r, r.k)) if "k" in which else None
    return x.mask(r._replace(q=q, k=k), depth).take(q=rows, k=keys)


def _select(x: Drawing, r: Reach, depth: int) -> tm.Mask:
    batch, heads = x.draw.randint(1, 3), x.draw.randint(1, 3)
    samples = x.numbers(batch, r.batch).tolist() if x.coin() else None
    chosen = x.numbers(heads, r.heads).tolist() if samples is None or x.coin() else None
    base = r._replace(batch=r.batch if samples is None else batch, heads=r.heads if chosen is None else heads)
    return x.mask(base, depth).select(samples=samples, heads=chosen)


def _packed(x: Drawing, r: Reach, depth: int) -> tm.Mask:
    lengths, kv_lengths = x.both_sides(r)
    longest, longest_keys = max(1, *lengths), max(1, *(kv_lengths or lengths))
    return x.mask(r._replace(q=longest, k=longest_keys), depth).packed(lengths, kv_lengths=kv_lengths)


def _prepended(x: Drawing, r: Reach, depth: int) -> tm.Mask:
    q, k = x.draw.randint(0, 3), x.draw.randint(0, 3)
    own = r._replace(q=max(r.q - q, 1), k=max(r.k - k, 1))
    seen = x.draw.choice([tm.everything, tm.prefix(2)])
    return x.mask(own, depth).prepended(q=q, k=k, seen=seen)


def _per_head(x: Drawing, r: Reach, depth: int) -> tm.Mask:
    masks = [x.mask(r, depth) for _ in range(min(FEW, r.heads))]
    return tm.per_head([x.draw.choice(masks) for _ in range(r.heads)])


def _per_sample(x: Drawing, r: Reach, depth: int) -> tm.Mask:
    return tm.per_sample([x.mask(r, depth) for _ in range(r.batch)])


OPERATORS: dict[str, Callable[[Drawing, Reach, int], tm.Mask]] = {
    "&": lambda x, r, depth: x.mask(r, depth) & x.mask(r, depth),
    "|": lambda x, r, depth: x.mask(r, depth) | x.mask(r, depth),
    "^": lambda x, r, depth: x.mask(r, depth) ^ x.mask(r, depth),
    "-": lambda x, r, depth: x.mask(r, depth) - x.mask(r, depth),
    "~": lambda x, r, depth: ~x.mask(r, depth),
    "T": lambda x, r, depth: x.mask(r._replace(q=r.k, k=r.q), depth).T,
    "at": _at,
    "take": _take,
    "select": _select,
    "packed": _packed,
    "padded": lambda x, r, depth: x.mask(r, depth).padded(x.each(r, r.square + 1)),
    "prepended": _prepended,
    "per_head": _per_head,
    "per_sample": _per_sample,
}
LEAF_NAMES, OPERATOR_NAMES = tuple(LEAVES), tuple(OPERATORS)
