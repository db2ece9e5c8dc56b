"""The small tables of `attend.py`: short lengths, decoding, what a call costs with nothing to compute, memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from attend_peers import BARE, DTYPES, MASKED, NATIVE, PLANNED, bare_sdpa
from harness import MEGABYTE, Table, fresh_threads, megabytes, ms, peak_beyond, peak_elsewhere, race, verdict
from torch import Tensor

import truemask as tm
from truemask.benchmarking.timing import Run
from truemask.benchmarking.workloads import Workload, by_truemask, masked_sdpa

DIRECTIONS = {False: "forward", True: "forward and backward"}
SECONDS, MOST = 1.0, 300  # for each contestant

SHORT, SHORT_BATCH, SHORT_HEADS, SHORT_DIM = (64, 128, 256, 512), 8, 8, 64
BAR_SHORT = 1.0  # times SDPA's pace


class Decode(NamedTuple):
    """One query and what it reads."""

    keys: int = 8192
    heads: int = 32
    kv_heads: int = 8
    d: int = 128


BAR_DECODE = 1.25  # times the reading of keys and values
WAYS: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda x: x.sum(),
    "largest": lambda x: x.amax(),
    "dot product": lambda x: torch.dot(x, x),
    "matrix times vector": lambda x: x.view(-1, 32) @ x[:32],
}

TINY, CALLS = 16, 50
BAR_OVERHEAD = {False: 60e-6, True: 150e-6}
PADDED, TINY_PADDED = (4, 8, 4096, 64), (2, 1, 200, 8)  # b, h, n, d of the memory row
BAR_MEMORY = 100 * MEGABYTE
SCRIPT = str(Path(__file__).with_name("attend.py"))


def short_table(given: argparse.Namespace) -> Table:
    """Causal attention over short rows, where the work around the kernel counts."""
    batch, heads = (2, 2) if given.quick else (SHORT_BATCH, SHORT_HEADS)
    header = ("tokens", "direction", "dtype", "SDPA, us", "attend, us", "spread", "backend", "native, us")
    table = Table(f"Short and causal: b {batch}, h {heads}, d {SHORT_DIM}", (*header, "faster", "bar", ""))
    for n in SHORT[:2] if given.quick else SHORT:
        for dtype, grad in ((dtype, grad) for grad in DIRECTIONS for dtype in DTYPES):
            workload = Workload.of(n, heads, SHORT_DIM, batch=batch, dtype=DTYPES[dtype])
            plan = tm.plan(
                tm.causal, n, n, batch=batch, heads=heads, head_dim=SHORT_DIM, dtype=DTYPES[dtype], grad=grad
            )
            calls = {PLANNED: by_truemask(tm.causal), BARE: bare_sdpa(True)}
            if _beside(plan):
                calls[NATIVE] = by_truemask(tm.causal, NATIVE)
            found = race({who: workload.run(call, grad) for who, call in calls.items()}, _seconds(given))
            ours, theirs = found[PLANNED].median, found[BARE].median
            bar = ("", "") if grad else (f"{BAR_SHORT} x", verdict(theirs / ours, BAR_SHORT, at_least=True))
            table.add(
                *(f"{n}", DIRECTIONS[grad], dtype, _us(theirs), _us(ours), f"{found[PLANNED].spread:.0%}"),
                *(plan.backend, _us(found[NATIVE].median) if NATIVE in found else "", f"{theirs / ours:.2f} x", *bar),
                n=n, grad=grad, dtype=dtype, backend=plan.backend,
                timings={who: timing._asdict() for who, timing in found.items()},
            )  # fmt: skip
    return table


def _beside(plan: tm.Plan) -> bool:
    """Whether the native kernel could have been chosen, but was not."""
    return plan.backend != NATIVE and not plan.objections[NATIVE]


def _seconds(given: argparse.Namespace) -> float:
    return 0.0 if given.quick else SECONDS


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


# -- decoding ----------------------------------------------------------------------------------------------------------


def decode_table(given: argparse.Namespace) -> Table:
    """One query: nothing can be faster than reading keys and values once."""
    sizes = Decode(200, 4, 2, 16) if given.quick else Decode()
    title = f"Decoding: one query, {sizes.keys} keys, h {sizes.heads}, kv heads {sizes.kv_heads}, d {sizes.d}, causal"
    header = ("dtype", "keys and values", "reading, ms", "GB/s", "SDPA, ms", "attend, ms", "spread", "backend")
    table = Table(title, (*header, "native, ms", "faster", "of reading", "bar", ""))
    mask = tm.causal.at(q_start=sizes.keys - 1)
    for name, dtype in DTYPES.items():
        q = torch.randn(1, sizes.heads, 1, sizes.d).to(dtype)
        k, v = (torch.randn(1, sizes.kv_heads, sizes.keys, sizes.d).to(dtype) for _ in range(2))
        plan = tm.plan(q, k, v, mask)
        calls = {PLANNED: by_truemask(mask), BARE: bare_sdpa(False)}
        if _beside(plan):
            calls[NATIVE] = by_truemask(mask, NATIVE)
        runs = {who: lambda call=call, q=q, k=k, v=v: call(q, k, v) for who, call in calls.items()}
        found = race({**runs, **readers(k, v)}, _seconds(given), most=MOST)
        fastest = min(WAYS, key=lambda way: found[way].median)
        ours, theirs, least = (found[who].median for who in (PLANNED, BARE, fastest))
        nbytes = k.nbytes + v.nbytes
        table.add(
            *(name, megabytes(nbytes), ms(least), f"{nbytes / least / 1e9:.1f}", ms(theirs), ms(ours)),
            *(f"{found[PLANNED].spread:.0%}", plan.backend, ms(found[NATIVE].median) if NATIVE in found else ""),
            *(f"{theirs / ours:.1f} x", f"{ours / least:.2f} x", f"{BAR_DECODE} x", verdict(ours / least, BAR_DECODE)),
            dtype=name, nbytes=nbytes, reader=fastest, backend=plan.backend,
            timings={who: timing._asdict() for who, timing in found.items()},
        )  # fmt: skip
    table.note = f"reading: with {torch.get_num_threads()} threads, the fastest of {', '.join(WAYS)}"
    return table


def readers(k: Tensor, v: Tensor) -> dict[str, Run]:
    """Ways to read as many bytes as keys and values have, each its own: what others read may still be in the cache."""

    def reader(way: Callable[[Tensor], object]) -> Run:
        floats = [torch.rand(x.nbytes // 4) for x in (k, v)]
        return lambda: [way(x) for x in floats]

    return {name: reader(way) for name, way in WAYS.items()}


# -- overhead and memory -----------------------------------------------------------------------------------------------


def overhead_table(given: argparse.Namespace) -> Table:
    """What `attend` with a cached plan adds to the bare kernel where there is nearly nothing to compute."""
    workload, repeats = Workload.of(TINY, 1, 8), 5 if given.quick else 101
    header = ("mask", "direction", "bare, us", "attend, us", "adds, us", "bar", "")
    table = Table(f"Overhead at {TINY} tokens, 1 head of 8, the plan cached", header)
    few = tm.causal & tm.window(5)
    for grad in (False, True):
        kernels = {"everything": (tm.everything, bare_sdpa(False)), "causal": (tm.causal, bare_sdpa(True))}
        kernels[str(few)] = (few, masked_sdpa(few, workload))
        for name, (mask, kernel) in kernels.items():
            runs = {MASKED: many(workload.run(kernel, grad)), PLANNED: many(workload.run(by_truemask(mask), grad))}
            found = race(runs, 0.0, least=repeats)
            bare, ours = (found[who].median / CALLS for who in (MASKED, PLANNED))
            bar = BAR_OVERHEAD[grad]
            table.add(
                *(name, DIRECTIONS[grad], _us(bare), _us(ours), _us(ours - bare)),
                *(_us(bar), verdict(ours - bare, bar)),
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
        found = memory_of(grad, True) if given.quick else peak_elsewhere(SCRIPT, str(int(grad)))
        judged = verdict(found, BAR_MEMORY) if found is not None else ""
        table.add(direction, megabytes(found), megabytes(BAR_MEMORY), judged, grad=grad, memory=found)
    return table


def memory_of(grad: bool, quick: bool) -> int:
    """Bytes beyond inputs and outputs (of the backward too: gradients), in this process."""
    fresh_threads()
    batch, heads, n, d = TINY_PADDED if quick else PADDED
    lengths = [max(1, n * share // 4) for share in (4, 3, 2, 1)][:batch]
    mask, workload = tm.causal & tm.padding(lengths=lengths), Workload.of(n, heads, d, batch=batch)
    outputs = workload.q.nbytes * (4 if grad else 1)
    return peak_beyond(workload.run(by_truemask(mask), grad)) - outputs
