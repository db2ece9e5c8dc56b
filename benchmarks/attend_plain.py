"""The table of `attend.py` about calls that need no mask or only the flag: `attend` must not be slower than SDPA there.

Each cell is `attend`'s time as a share of SDPA's in the same dtype, and the backend that the plan chose.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import NamedTuple

import torch
from attend_peers import BARE, DTYPES, PLANNED, bare_sdpa
from harness import Table, race, verdict

import truemask as tm
from truemask.benchmarking.workloads import Workload, by_truemask

PLAIN_DTYPES = {**DTYPES, "fp16": torch.float16}
BATCHES, LENGTHS, HEADS, DIM = (1, 8, 32), (16, 64, 256, 1024, 4096), 8, 64
MOST_PAIRS, MOST_KEYS = 4096**2, 32 * 1024  # of the samples together: what is longer takes minutes, and batches no more
SECONDS = 0.15  # for each contestant
SLOWER = 1.05  # of SDPA's time: less is no difference


class Kind(NamedTuple):
    """A row's call: causal or not, with gradients or not, of all queries or of the last one."""

    name: str
    causal: bool
    grad: bool = False
    one_query: bool = False

    def fits(self, batch: int, n: int) -> bool:
        """Whether such a call is short enough to be raced."""
        return batch * n <= MOST_KEYS if self.one_query else batch * n * n <= MOST_PAIRS


KINDS = (
    Kind("causal, forward", True),
    Kind("causal, forward and backward", True, grad=True),
    Kind("unmasked, forward", False),
    Kind("unmasked, forward and backward", False, grad=True),
    Kind("one query, forward", False, one_query=True),
)


class Cell(NamedTuple):
    """One call, measured: median seconds of both, and who ran it for `attend`."""

    attend: float
    sdpa: float
    backend: str

    @property
    def share(self) -> float:
        """Of SDPA's time."""
        return self.attend / self.sdpa

    def __str__(self) -> str:
        return f"{self.share:.2f} {self.backend}"


def plain_table(given: argparse.Namespace) -> Table:
    """Every kind of call in every dtype and batch size, a column for each length."""
    lengths = LENGTHS[:2] if given.quick else given.lengths or LENGTHS
    header = ("call", "dtype", "b", *(f"n {n}" for n in lengths), "slower", "bar", "")
    table = Table(f"Plain calls, h {HEADS}, d {DIM}: of SDPA's time", header)
    slower = cells = 0
    for kind in KINDS:
        for dtype in given.dtypes or PLAIN_DTYPES:
            for batch in BATCHES[:1] if given.quick else BATCHES:
                row = {n: measured(kind, dtype, batch, n, given) for n in lengths if kind.fits(batch, n)}
                late = sum(cell.share > SLOWER for cell in row.values())
                slower, cells = slower + late, cells + len(row)
                shown = [str(row.get(n, "")) for n in lengths]
                table.add(
                    *(kind.name, dtype, f"{batch}", *shown, f"{late} of {len(row)}", "0", verdict(late, 0)),
                    **kind._asdict(), dtype=dtype, batch=batch, cells={n: cell._asdict() for n, cell in row.items()},
                )  # fmt: skip
    table.note = f"slower than SDPA by more than {SLOWER - 1:.0%}: {slower} of {cells} calls"
    return table


def measured(kind: Kind, dtype: str, batch: int, n: int, given: argparse.Namespace) -> Cell:
    """`attend` and SDPA take turns."""
    workload = Workload.of(n, HEADS, DIM, batch=batch, dtype=PLAIN_DTYPES[dtype])
    mask = tm.causal if kind.causal else tm.everything
    if kind.one_query:
        workload, mask = replace(workload, q=workload.q[:, :, -1:].contiguous()), tm.causal.at(q_start=n - 1)
    plan = tm.plan(
        mask, workload.q.shape[2], n, batch=batch, heads=HEADS, head_dim=DIM, dtype=workload.q.dtype, grad=kind.grad
    )
    calls = {PLANNED: by_truemask(mask), BARE: bare_sdpa(kind.causal)}
    runs = {who: workload.run(call, kind.grad) for who, call in calls.items()}
    found = race(runs, 0.0 if given.quick else SECONDS, outsiders=[BARE])
    return Cell(found[PLANNED].median, found[BARE].median, plan.backend)
