"""How long it takes to know a mask: tile maps at a million tokens, counts and equality, beside `create_block_mask`.

    python benchmarks/plan.py [--quick] [--json FILE]

Every repeat asks about a mask with new numbers, so that nothing that is kept from the last one can help. Making the
mask has a clock of its own; the bars of tile maps are on making and asking together, those of expressions on each
question. Memory: the highest that a process of its own grows by, after imports.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import NamedTuple

import torch
from bench_masks import Expression, Make, lengths
from harness import (
    MEGABYTE,
    Table,
    clock,
    finish,
    fresh_threads,
    megabytes,
    ms,
    options,
    peak_beyond,
    peak_elsewhere,
    timing,
    verdict,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import truemask as tm

Mod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MILLION, PACKED, DOCUMENTS, COMPARED = 1 << 20, 800_000, 32, 16_384
BAR, BAR_MEMORY, BAR_TIMES = 0.050, 50 * MEGABYTE, 200
BAR_PIECES = {100: 0.010, 10_000: 0.100}
REPEATS, SLOW_REPEATS = 11, 3
LEAVES = 10


class Case(NamedTuple):
    """A mask at a length, with new numbers for every seed."""

    name: str
    n: int
    make: Callable[[int], Make]
    bar_memory: float | None = None


def cases(quick: bool) -> list[Case]:
    """The masks of the bars."""
    million, packed = (2048, 1500) if quick else (MILLION, PACKED)

    def of_lengths(join: Callable[[list[int]], tm.Mask]) -> Callable[[int], Make]:
        def make(seed: int) -> Make:
            drawn = lengths(Random(seed), packed, DOCUMENTS)
            return lambda: join(drawn)

        return make

    return [
        Case("causal & window(512)", million, lambda i: lambda: tm.causal & tm.window(512 + i), BAR_MEMORY),
        Case(
            "causal & (window(512) | prefix(4))",
            million,
            lambda i: lambda: tm.causal & (tm.window(512 + i) | tm.prefix(4 + i)),
            BAR_MEMORY,
        ),
        Case("causal.packed(lengths)", packed, of_lengths(tm.causal.packed)),
        Case("causal & documents(lengths)", packed, of_lengths(lambda drawn: tm.causal & tm.documents(drawn))),
    ]


def ask(mask: tm.Mask, n: int) -> tm.TileMap:
    """What a planner wants to know: the tiles, their number of each kind, the rows."""
    tiles = mask.tiles(n)
    assert sum(tiles.counts) > 0
    assert len(tiles.rows[0]) >= 0
    return tiles


def timed(case: Case, repeats: int) -> tuple[float, float]:
    """Median seconds of making the mask and of asking it, a new one in every repeat."""
    making, asking = [], []
    for seed in range(repeats + 1):
        made: list[tm.Mask] = []
        make = case.make(seed)
        making.append(clock(lambda make=make, made=made: made.append(make())))
        asking.append(clock(partial(ask, made[0], case.n)))
    return timing(making[1:]).median, timing(asking[1:]).median  # the first one warms up


def at_a_million(quick: bool) -> Table:
    """Tile maps of long masks."""
    header = ("mask", "tokens", "making, ms", "asking, ms", "bar", "", "memory", "bar", "", "unsure tiles")
    table = Table("Tile maps", header)
    table.note = "asking: the tile map's counts and rows"
    for case in cases(quick):
        made, asked = timed(case, 3 if quick else REPEATS)
        memory = memory_of(case.name, True) if quick else peak_elsewhere(__file__, case.name)
        bar = case.bar_memory
        judged = ("", "") if bar is None or memory is None else (f"{bar / MEGABYTE:.0f} MB", verdict(memory, bar))
        unsure = ask(case.make(1)(), case.n).unsure
        table.add(
            *(case.name, f"{case.n:,}", ms(made), ms(asked), f"{BAR * 1e3:.0f}", verdict(made + asked, BAR)),
            *(megabytes(memory), *judged, str(unsure)),
            name=case.name, n=case.n, made=made, asked=asked, memory=memory, unsure=unsure,
        )  # fmt: skip
    return table


def against_create_block_mask(quick: bool) -> Table:
    """The same knowledge by evaluating every cell, in the same turns, from the function that its users write."""
    n, repeats = (512, 1) if quick else (COMPARED, SLOW_REPEATS)
    header = ("mask", "tokens", "tiles, ms", "to_block_mask, ms", "create_block_mask, ms", "times faster", "bar", "")
    table = Table("Beside torch's create_block_mask (eager)", header)
    for name, make in peers(n).items():
        found: dict[str, list[float]] = {"tiles": [], "to_block_mask": [], "create_block_mask": []}
        for seed in range(repeats + 1):
            (tiled, mod), (exported, _) = make(2 * seed), make(2 * seed + 1)
            found["tiles"].append(clock(partial(ask, tiled, n)))
            found["to_block_mask"].append(clock(partial(exported.to_block_mask, n)))
            found["create_block_mask"].append(clock(partial(create_block_mask, mod, None, None, n, n, device="cpu")))
        medians = {who: timing(times[1:]).median for who, times in found.items()}  # the first one warms up
        times = medians["create_block_mask"] / medians["tiles"]
        table.add(
            *(name, f"{n:,}", *map(ms, medians.values())),
            *(f"{times:,.0f}", str(BAR_TIMES), verdict(times, BAR_TIMES, at_least=True)),
            name=name, n=n, times=times, **medians,
        )  # fmt: skip
    return table


def peers(n: int) -> dict[str, Callable[[int], tuple[tm.Mask, Mod]]]:
    """A mask with numbers of its own for each seed, and the `mask_mod` that says the same."""
    drawn = lengths(Random(0), n, max(2, n // 700))

    def window(i: int) -> tuple[tm.Mask, Mod]:
        return tm.causal & tm.window(300 + i), lambda _b, _h, q, k: (k <= q) & (q - k < 300 + i)

    def sinks(i: int) -> tuple[tm.Mask, Mod]:
        mask = tm.causal & (tm.window(300 + i) | tm.prefix(4 + i))
        return mask, lambda _b, _h, q, k: (k <= q) & ((q - k < 300 + i) | (k < 4 + i))

    def packed(i: int) -> tuple[tm.Mask, Mod]:
        turned = [*drawn[i:], *drawn[:i]]
        ids = torch.repeat_interleave(torch.arange(len(turned)), torch.tensor(turned))
        return tm.causal.packed(turned), lambda _b, _h, q, k: (ids[q] == ids[k]) & (k <= q)

    return {"causal, window": window, "causal, window, sinks": sinks, "causal, packed documents": packed}


def expressions(quick: bool) -> Table:
    """Exact counts and equality of random expressions."""
    n = 512 if quick else MILLION
    header = (
        *("pieces in a leaf", "tokens", "making, ms", "count, ms", "equivalent, ms", "other leaves, ms"),
        *("bar", "count", "equivalent", "other leaves"),
    )
    table = Table(f"Expressions of {LEAVES} leaves", header)
    table.note = (
        "pieces: blocks or documents, at most; `equivalent`: with the same expression by De Morgan's laws, and with "
        "those on leaves that are spelled by others (`causal.packed(x)` as `causal & documents(x)`)"
    )
    for pieces, bar in BAR_PIECES.items():
        found: list[tuple[float, ...]] = []
        for seed in range(1 + (2 if quick else REPEATS)):
            found.append(_one_expression(Expression.drawn(Random(seed), n, LEAVES, min(pieces, n // 8)), n))
        made, *asked = (timing(list(column)).median for column in zip(*found[1:], strict=True))
        table.add(
            *(f"{pieces:,}", f"{n:,}", ms(made), *map(ms, asked), f"{bar * 1e3:.0f}"),
            *(verdict(seconds, bar) for seconds in asked),
            pieces=pieces, n=n, made=made, **dict(zip(("counted", "compared", "respelled"), asked, strict=True)),
        )  # fmt: skip
    return table


def _one_expression(expression: Expression, n: int) -> tuple[float, ...]:
    """Seconds of making one, of counting it, and of comparing two, twice, that were not asked anything before."""
    masks: list[tm.Mask] = []
    made = clock(lambda: masks.append(expression.mask()))
    seconds = [made, clock(lambda: masks[0].count(n))]
    for rewrite in (expression.rewritten, expression.respelled):
        one, other = expression.mask(), rewrite()
        verdicts: list[object] = []
        seconds.append(clock(lambda a=one, b=other, found=verdicts: found.append(a.equivalent(b, n))))
        assert verdicts[0], f"{one} is not {other}"
    return tuple(seconds)


def memory_of(name: str, quick: bool) -> int:
    """What asking about one mask takes; run in a process of its own."""
    fresh_threads()
    case = next(case for case in cases(quick) if case.name == name)
    ask(case.make(3)(), 512)  # code and tables that every mask shares
    return peak_beyond(lambda: ask(case.make(7)(), case.n))


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the tables."""
    given = options(__doc__, arguments, memory={"help": argparse.SUPPRESS})
    if given.memory:
        print(memory_of(given.memory, given.quick))
        return ""
    return finish([make(given.quick) for make in TABLES], given)


TABLES: tuple[Callable[[bool], Table], ...] = (at_a_million, against_create_block_mask, expressions)


if __name__ == "__main__":
    main()
