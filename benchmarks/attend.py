"""Attention under masks: SDPA with the mask, every willing backend of truemask, and `attend` as it is planned.

    python benchmarks/attend.py [--quick] [--json FILE] [--lengths 4096 8192] [--flex] [--x-transformers]

b 1, h 8, d 64, fp32. Contestants take turns; medians. *Ideal* is SDPA's time with the same dense mask times the share
of pairs that the mask lets through. `attend` stands for the backend that the plan chose; backends that are a last
resort are left out, and a rival who is ten times slower than the fastest runs once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from bench_masks import attend_masks
from harness import (
    MEGABYTE,
    Table,
    Timing,
    finish,
    fresh_threads,
    megabytes,
    ms,
    options,
    peak_beyond,
    peak_elsewhere,
    race,
    verdict,
)
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from truemask._cache import CACHE
from truemask.backends.costs import source
from truemask.backends.registry import BACKENDS
from truemask.cli.races import Attention, Course, by_truemask, masked_sdpa
from truemask.cli.timing import Run

LENGTHS, HEADS, HEAD_DIM = (4096, 8192, 16384), 8, 64
BAR_SHARE, BAR_BARE, BAR_BEST = {False: 0.6, True: 0.5}, 1.05, 1.15
BAR_OVERHEAD = {False: 60e-6, True: 150e-6}
BAR_MEMORY = 100 * MEGABYTE
BARE, MASKED, PLANNED = "SDPA, bare", "SDPA, mask", "attend"
SECONDS = 2.0
TINY, CALLS = 16, 50
PADDED, TINY_PADDED = (4, 8, 4096, 64), (2, 1, 200, 8)  # b, h, n, d of the memory row
QUICK_LENGTH = 300
DIRECTIONS = {False: "forward", True: "forward and backward"}


class Row(NamedTuple):
    """One mask at one length in one direction, measured."""

    plan: tm.Plan
    density: float
    found: dict[str, Timing]

    def seconds(self, who: str) -> float:
        """Median seconds."""
        return self.found[who].median

    @property
    def rivals(self) -> dict[str, float]:
        """Seconds of those who are neither SDPA nor the plan's choice."""
        return {who: timing.median for who, timing in self.found.items() if who not in (PLANNED, MASKED, BARE)}

    @property
    def best(self) -> float:
        """Seconds of the fastest way that truemask has."""
        return min([self.seconds(PLANNED), *(took for who, took in self.rivals.items() if who in tm.backends())])

    @property
    def others(self) -> str:
        """The rivals, the fastest first."""
        fastest_first = sorted(self.rivals.items(), key=lambda rival: rival[1])
        return ", ".join(f"{who} {ms(took)}" for who, took in fastest_first) or "-"

    @property
    def share(self) -> float:
        """Of the ideal: 1 is SDPA's own pace on the pairs that count."""
        return self.seconds(MASKED) * self.density / self.seconds(PLANNED)

    def judged(self, grad: bool) -> tuple[str, str, str]:
        """Share of the ideal, bar, verdict; where SDPA needs no mask, the time beside the bare call's."""
        if BARE in self.found:
            ratio = self.seconds(PLANNED) / self.seconds(BARE)
            return f"{ratio:.2f} x bare", f"{BAR_BARE} x", verdict(ratio, BAR_BARE)
        return f"{self.share:.2f}", f"{BAR_SHARE[grad]}", verdict(self.share, BAR_SHARE[grad], at_least=True)


def bare_sdpa(causal: bool) -> Attention:
    """What somebody calls who needs no mask, or the flag."""
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal)


def contestants(plan: tm.Plan, course: Course, given: argparse.Namespace) -> dict[str, Attention]:
    """Everybody who runs under this mask."""
    mask = plan.mask
    willing = [b.name for b in BACKENDS if not b.last_resort and not plan.objections[b.name] and b.name != plan.backend]
    found: dict[str, Attention] = {PLANNED: by_truemask(mask), MASKED: masked_sdpa(mask, course)}
    if mask in (tm.causal, tm.everything):
        found[BARE] = bare_sdpa(mask == tm.causal)
    found.update({backend: by_truemask(mask, backend) for backend in willing})
    if given.flex and not plan.request.grad:
        found["flex, compiled"] = compiled_flex(mask, course)
    if given.x_transformers:
        found["x-transformers"] = x_transformers(mask, course.q.shape[2])
    return found


def compiled_flex(mask: tm.Mask, course: Course) -> Attention:
    """FlexAttention compiled for this length, with the mask's own block mask; forward only on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    block_mask = mask.to_block_mask(course.q.shape[2])
    compiled = torch.compile(flex_attention, fullgraph=True)
    compiled(course.q, course.k, course.v, block_mask=block_mask)  # compiling is nobody's first run
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def x_transformers(mask: tm.Mask, n: int) -> Attention:
    """Its flash attention with the same dense mask."""
    from x_transformers.attend import Attend

    module, dense = Attend(flash=True, causal=False), mask.to_dense(n)
    return lambda q, k, v: module(q, k, v, mask=dense)[0]


def measured(mask: tm.Mask, course: Course, grad: bool, given: argparse.Namespace) -> Row:
    """Race everybody."""
    _, heads, n, d = course.q.shape
    CACHE.clear()  # of the last mask's dense form, among others
    plan = tm.plan(mask, n, n, heads=heads, head_dim=d, grad=grad)
    runs = {who: course.run(call, grad) for who, call in contestants(plan, course, given).items()}
    rivals = [who for who in runs if who not in (PLANNED, MASKED, BARE)]
    return Row(plan, mask.density(n), race(runs, 0.0 if given.quick else SECONDS, most=15, outsiders=rivals))


def masks_table(n: int, grad: bool, given: argparse.Namespace) -> Table:
    """All masks at one length in one direction."""
    course = Course.of(n, 1 if given.quick else HEADS, HEAD_DIM)
    header = (
        *("mask", "pairs", "SDPA, ms", "attend, ms", "spread", "faster", "of ideal", "bar", ""),
        *("backend", "predicted, ms", "others, ms", "chosen"),
    )
    table = Table(f"{n} tokens, {course.q.shape[1]} heads of {HEAD_DIM}, {DIRECTIONS[grad]}", header)
    table.note = f"predicted from {source()}"
    for name, mask in attend_masks(n).items():
        row = measured(mask, course, grad, given)
        ours, theirs, chosen = row.seconds(PLANNED), row.seconds(MASKED), row.plan.backend
        timings = {who: timing._asdict() for who, timing in row.found.items()}
        table.add(
            *(name, f"{row.density:.1%}", ms(theirs), ms(ours), f"{row.found[PLANNED].spread:.0%}"),
            *(f"{theirs / ours:.1f} x", *row.judged(grad)),
            *(chosen, ms(row.plan.costs[chosen]), row.others, verdict(ours / row.best, BAR_BEST)),
            n=n, grad=grad, name=name, mask=repr(mask), density=row.density, share=row.share, timings=timings,
            backend=chosen, predicted=row.plan.costs,
        )  # fmt: skip
    return table


# -- overhead and memory -----------------------------------------------------------------------------------------------


def overhead_table(given: argparse.Namespace) -> Table:
    """What `attend` with a cached plan adds to the bare kernel where there is nearly nothing to compute."""
    course, repeats = Course.of(TINY, 1, 8), 5 if given.quick else 101
    header = ("mask", "direction", "bare, us", "attend, us", "adds, us", "bar", "")
    table = Table(f"Overhead at {TINY} tokens, 1 head of 8, the plan cached", header)
    few = tm.causal & tm.window(5)
    for grad in (False, True):
        kernels = {"everything": (tm.everything, bare_sdpa(False)), "causal": (tm.causal, bare_sdpa(True))}
        kernels[str(few)] = (few, masked_sdpa(few, course))
        for name, (mask, kernel) in kernels.items():
            runs = {"bare": many(course.run(kernel, grad)), "attend": many(course.run(by_truemask(mask), grad))}
            found = race(runs, 0.0, least=repeats)
            bare, ours = (found[who].median / CALLS for who in ("bare", "attend"))
            bar = BAR_OVERHEAD[grad]
            table.add(
                *(name, DIRECTIONS[grad], f"{bare * 1e6:.0f}", f"{ours * 1e6:.0f}", f"{(ours - bare) * 1e6:.0f}"),
                *(f"{bar * 1e6:.0f}", verdict(ours - bare, bar)),
                name=name, grad=grad, bare=bare, attend=ours,
            )  # fmt: skip
    return table


def many(run: Run) -> Run:
    """`CALLS` calls as one."""

    def calls() -> None:
        for _ in range(CALLS):
            run()

    return calls


def memory_table(given: argparse.Namespace) -> Table:
    """The highest that a process grows by, beyond inputs and outputs."""
    batch, heads, n, d = TINY_PADDED if given.quick else PADDED
    table = Table(f"Memory: causal, padded, b {batch}, h {heads}, n {n}, d {d}", ("direction", "memory", "bar", ""))
    for grad, direction in DIRECTIONS.items():
        found = memory_of(grad, True) if given.quick else peak_elsewhere(__file__, str(int(grad)))
        judged = verdict(found, BAR_MEMORY) if found is not None else ""
        table.add(direction, megabytes(found), megabytes(BAR_MEMORY), judged, grad=grad, memory=found)
    return table


def memory_of(grad: bool, quick: bool) -> int:
    """Bytes beyond inputs and outputs (of the backward too: gradients), in this process."""
    fresh_threads()
    batch, heads, n, d = TINY_PADDED if quick else PADDED
    lengths = [max(1, n * share // 4) for share in (4, 3, 2, 1)][:batch]
    mask, course = tm.causal & tm.padding(lengths=lengths), Course.of(n, heads, d, batch=batch)
    outputs = course.q.nbytes * (4 if grad else 1)
    return peak_beyond(course.run(by_truemask(mask), grad)) - outputs


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the tables."""
    flag = {"action": "store_true"}
    lengths = {"type": int, "nargs": "+", "default": LENGTHS, "metavar": "N"}
    hidden = {"help": argparse.SUPPRESS}
    given = options(__doc__, arguments, memory=hidden, lengths=lengths, flex=flag, x_transformers=flag)
    if given.memory:
        print(memory_of(given.memory == "1", given.quick))
        return ""
    given.lengths = (QUICK_LENGTH,) if given.quick else given.lengths
    tables = [masks_table(n, grad, given) for n in given.lengths for grad in DIRECTIONS]
    return finish([*tables, overhead_table(given), memory_table(given)], given)


if __name__ == "__main__":
    main()
