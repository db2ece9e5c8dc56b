"""Whether plans choose well: every backend that can run a call is timed, and the chosen one is held to the fastest.

    python benchmarks/choices.py [--quick] [--json FILE] [--lengths N ...] [--dtypes NAME ...] [--seconds S]
                                 [--least]

Plain, causal and window calls of one sample and of eight, in both directions, and decoding. Contestants take turns,
medians (`--least`: least times, where other programs keep the machine busy); a choice is right that takes no more than
1.15 times the fastest. `TRUEMASK_ISA` holds the native kernel to an instruction set.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from harness import Table, finish, ms, options, race

import truemask as tm
from truemask.attention.planning.cache import CACHE
from truemask.attention.planning.selection import select
from truemask.backends.costs.model import source
from truemask.backends.native.library import isa
from truemask.benchmarking.probes import DTYPES, Probe

LENGTHS, DTYPES_SHOWN = (16, 32, 64, 128, 256, 1024, 4096), ("fp32", "bf16", "fp16")
MOST_TOKENS = 16384  # of all samples, heads and directions: more takes minutes
BACKENDS = ("sdpa", "block_sparse", "native")
RIGHT = 1.15


class Case(NamedTuple):
    """A call and what it is called."""

    name: str
    probe: Probe


def cases(lengths: Sequence[int], dtypes: Sequence[str]) -> Iterator[Case]:
    """All calls, the longest last."""
    for n in lengths:
        for batch, d in ((1, 64), (1, 128), (8, 64), (8, 128)):
            masks = {"causal": tm.causal, "everything": tm.everything, "window": tm.causal & tm.window(max(8, n // 8))}
            for name, mask in masks.items() if batch * n <= MOST_TOKENS else ():
                for dtype in dtypes:
                    yield from (Case(name, Probe(mask, n, 8, d, dtype, grad, batch)) for grad in (False, True))
    for keys in (n for n in lengths if n >= 256):
        for rows, dtype in ((rows, dtype) for rows in (1, 4, 16) for dtype in dtypes):
            mask = tm.causal.at(q_start=keys - rows)
            yield Case("decoding", Probe(mask, keys, 32, 128, dtype, rows=rows, kv_heads=8))


def choices_table(given: argparse.Namespace) -> Table:
    """A line for each call, and the share of those that were planned well."""
    lengths = given.lengths or ((33,) if given.quick else LENGTHS)
    header = ("mask", "sizes", *(f"{name}, ms" for name in BACKENDS), "chosen", "predicted, ms", "of the best", "")
    table, ratios = Table("Choices", header), list[float]()
    for name, probe in cases(lengths, given.dtypes or DTYPES_SHOWN):
        CACHE.clear()
        selection = select(probe.job(), None)
        chosen, answers = selection.choice.backend.name, selection.answers
        assert answers is not None
        able = [backend for backend in BACKENDS if not answers.objections[backend]]
        found = race({backend: probe.run(backend) for backend in able}, 0.0 if given.quick else given.seconds, least=5)
        took = {backend: timing.least if given.least else timing.median for backend, timing in found.items()}
        ratios.append(took[chosen] / min(took.values()))
        times = (ms(took[backend]) if backend in took else "" for backend in BACKENDS)
        judged = "right" if ratios[-1] <= RIGHT else "WRONG"
        sizes = str(probe).removesuffix(f", {probe.mask}")
        table.add(
            *(name, sizes, *times, chosen, ms(answers.costs[chosen]), f"{ratios[-1]:.2f}", judged),
            name=name, sizes=sizes, chosen=chosen, predicted=answers.costs,
            timings={backend: timing._asdict() for backend, timing in found.items()},
        )  # fmt: skip
    right = statistics.mean(ratio <= RIGHT for ratio in ratios)
    table.note = f"right: {right:.1%} of {len(ratios)}; kernel: {isa() or 'none'}; predicted from {source()}"
    return table


def main(arguments: Sequence[str] | None = None) -> str:
    """Time and judge."""
    given = options(
        __doc__,
        arguments,
        lengths={"nargs": "+", "type": int, "metavar": "N"},
        dtypes={"nargs": "+", "choices": tuple(DTYPES)},
        least={"action": "store_true", "help": "judge by least times, not medians"},
        seconds={"type": float, "default": 0.1, "help": "for each contestant"},
    )
    return finish([choices_table(given)], given)


if __name__ == "__main__":
    main()
