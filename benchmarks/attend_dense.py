"""The table of `attend.py` about boolean tensors that are new in every call, so that nothing is known of them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from itertools import product

import torch
from attend_peers import DTYPES
from attend_small import DIRECTIONS
from harness import Table, clock, ms, verdict
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from truemask.backends.native.library import isa
from truemask.benchmarking.workloads import Attention, Workload

BAR_FRESH = 1.3  # times SDPA's time with the same tensor, where it has no structure
TURNS = 7
LENGTHS, SWEEP, QUICK = (2048, 4096), (2048, 4096, 8192, 16384), (300,)
DIMS, HEADS = (8, 64), (1, 8)


def random_cells(n: int, turn: int) -> Tensor:
    """Half of all cells."""
    return torch.rand(n, n, generator=torch.Generator().manual_seed(turn)) > 0.5


def window_cells(n: int, turn: int) -> Tensor:
    """Causal and within a window, another one in each turn."""
    return (tm.causal & tm.window(n // 8 + turn)).to_dense(n)[0, 0]


def block_cells(n: int, turn: int) -> Tensor:
    """A third of all blocks of 64."""
    rows = -(-n // 64)
    chosen = torch.rand(rows, rows, generator=torch.Generator().manual_seed(turn)) > 0.7
    return chosen.repeat_interleave(64, 0).repeat_interleave(64, 1)[:n, :n].contiguous()


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "random cells": random_cells,
    "causal and window": window_cells,
    "blocks of 64": block_cells,
}


def dense_table(given: argparse.Namespace) -> Table:
    """`attend` against SDPA, both given the same new tensor in every turn."""
    header = ("mask", "tokens", "heads", "d", "dtype", "direction", "SDPA, ms", "attend, ms", "of SDPA's", "bar", "")
    table = Table("A new boolean tensor in every call", (*header, "backend"))
    table.note = f"kernel: {isa() or 'none'}; medians of {turns_of(given)} turns, of SDPA's: the median of ratios"
    for name, n, heads, d, dtype, grad in courses(given):
        workload = Workload.of(n, heads, d, dtype=DTYPES[dtype])
        theirs, ours, share = beside(workload, KINDS[name], grad, turns_of(given))
        plan = tm.plan(workload.q, workload.k, workload.v, KINDS[name](n, 0))
        bar = ("", "") if name != "random cells" else (f"{BAR_FRESH} x", verdict(share, BAR_FRESH))
        table.add(
            *(name, f"{n}", f"{heads}", f"{d}", dtype, DIRECTIONS[grad], ms(theirs), ms(ours), f"{share:.2f} x", *bar),
            plan.backend,
            name=name, n=n, heads=heads, d=d, dtype=dtype, grad=grad, sdpa=theirs, attend=ours, share=share,
            backend=plan.backend,
        )  # fmt: skip
    return table


def courses(given: argparse.Namespace) -> Iterator[tuple[str, int, int, int, str, bool]]:
    """Masks, tokens, heads, head sizes, dtypes and directions."""
    lengths = QUICK if given.quick else given.lengths or (SWEEP if given.sweep else LENGTHS)
    dims = given.head_dims or DIMS
    wanted = [name for name in KINDS if not given.rows or any(text in name for text in given.rows)]
    heads, dtypes = HEADS[:1] if given.quick else HEADS, given.dtypes or tuple(DTYPES)
    return product(wanted, lengths, heads, dims, dtypes, DIRECTIONS)


def turns_of(given: argparse.Namespace) -> int:
    """How often both run."""
    return 2 if given.quick else TURNS


def beside(
    workload: Workload, tensor_of: Callable[[int, int], Tensor], grad: bool, turns: int
) -> tuple[float, float, float]:
    """Median seconds of SDPA and of `attend`, and the median of their ratios: both run on each tensor."""
    found: list[tuple[float, float]] = []
    for turn in range(turns + 1):
        mask = tensor_of(workload.q.shape[2], turn)
        found.append((clock(workload.run(by_sdpa(mask), grad)), clock(workload.run(by_attend(mask), grad))))
    theirs, ours = zip(*found[1:], strict=True)  # the first turn warms up
    return statistics.median(theirs), statistics.median(ours), statistics.median(b / a for a, b in found[1:])


def by_sdpa(mask: Tensor) -> Attention:
    """SDPA with a boolean tensor."""
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_attend(mask: Tensor) -> Attention:
    """`attend` with it."""
    return lambda q, k, v: tm.attend(q, k, v, mask)
