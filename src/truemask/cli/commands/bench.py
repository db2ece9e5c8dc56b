"""`truemask bench`: SDPA with a mask against `attend` on this machine; `--calibrate` measures what plans go by."""

from __future__ import annotations

import os
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from truemask.attention.planning.cache import CACHE
from truemask.attention.planning.plan import plan
from truemask.backends.costs import model as costs
from truemask.backends.costs.calibration_file import costs_file, store, this_machine, writable_file
from truemask.benchmarking.calibrate import measured_costs
from truemask.benchmarking.timing import race
from truemask.benchmarking.workloads import Workload, by_truemask, masked_sdpa, race_masks
from truemask.cli.commands.explain import Dtype
from truemask.cli.console import make_console, plain
from truemask.cli.options import Length
from truemask.common.formatting import duration, percent
from truemask.errors import TruemaskError
from truemask.masks.core.mask import Mask
from truemask.masks.formats.parse import parse

SECONDS = 1.0  # for each contestant
KEPT = ("threads", "lanes")  # that are no measurements


def bench(
    expressions: Annotated[
        list[str] | None, typer.Argument(metavar="[EXPRESSION]...", help="Masks to race (default: five usual ones).")
    ] = None,
    length: Length = 4096,
    heads: Annotated[int, typer.Option(min=1, help="How many heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 64,
    dtype: Annotated[Dtype, typer.Option(help="What the tensors hold.")] = Dtype.float32,
    grad: Annotated[bool, typer.Option("--grad", help="Race training: forward and backward.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine and store its costs, by which plans then choose.")
    ] = False,
) -> None:
    """Race masks on this machine, or measure what plans predict with (--calibrate)."""
    console = make_console()
    plain(console, str(this_machine()))
    if calibrate:
        _calibrate(console)
        return
    masks = {text: parse(text) for text in expressions} if expressions else race_masks(length)
    measure_what_nobody_has(console)
    workload = Workload.of(length, heads, head_dim, dtype=getattr(torch, dtype.value))
    direction = "forward and backward" if grad else "forward"
    plain(console, f"{length} tokens, {heads} heads of {head_dim}, {dtype.value}, {direction}; medians, taking turns\n")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(("mask", "pairs", "SDPA, mask", "truemask", "speed-up", "backend", "predicted")):
        table.add_column(name, overflow="fold", justify="right" if 0 < i < 5 or i == 6 else "left")
    with console.status("") as status:
        for name, mask in masks.items():
            status.update(Text(f"racing: {name}"))
            table.add_row(*_raced(name, mask, workload, grad))
    console.print(table)
    plain(console, f"\npredicted from {costs.source()}")


def _raced(name: str, mask: Mask, workload: Workload, grad: bool) -> list[str]:
    """The row of a mask."""
    contestants = {"sdpa": masked_sdpa(mask, workload), "truemask": by_truemask(mask)}
    timings = race({who: workload.run(call, grad) for who, call in contestants.items()}, SECONDS)
    sdpa, truemask = timings["sdpa"].median, timings["truemask"].median
    (batch, heads, n, d), dtype = workload.q.shape, workload.q.dtype
    prediction = plan(mask, n, n, batch=batch, heads=heads, head_dim=d, dtype=dtype, grad=grad)
    density = mask.density(n, n, batch=batch, heads=heads)
    ratio = f"{sdpa / truemask:.1f} x"
    forecast = duration(prediction.costs[prediction.backend])
    return [name, percent(density, 1), duration(sdpa), duration(truemask), ratio, prediction.backend, forecast]


def measure_what_nobody_has(console: Console) -> None:
    """Beside AMX, plans leave bf16 to torch until the kernel's own use of it has been measured."""
    unmeasured = costs.table().unmeasured
    if not (unmeasured and costs.has_amx() and costs_file()):
        return
    plain(console, f"native with {unmeasured} was never measured beside an SDPA with AMX, to which plans leave bf16")
    try:
        _calibrate(console)
    except TruemaskError as error:
        plain(console, str(error))


def _calibrate(console: Console) -> None:
    """Measure, show beside the shipped costs, store."""
    writable_file()
    if busy():
        plain(console, "other programs keep this machine busy: what is measured now may be refused; better to wait")
    with console.status("") as status:
        measured = measured_costs(lambda text: status.update(Text(f"measuring {text}")))
    check_believed(measured)
    before = costs.shipped()[0]
    file = store(measured)
    costs.forget()
    CACHE.clear()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(("backend", "cost", "shipped", "measured")):
        table.add_column(name, justify="right" if i > 1 else "left")
    for row in beside(before, costs.table()):
        table.add_row(*row)
    console.print(table)
    plain(console, f"stored in {file}; plans are now predicted from {costs.source()}")


def check_believed(measured: dict[str, Any]) -> None:
    """`TruemaskError` if a constant cannot be this machine's: nothing is stored then."""
    try:
        costs.believed(measured)
    except ValueError as error:
        raise TruemaskError(
            f"{error}: other programs ran while it was measured. {costs_file()} stays as it was: "
            "run `truemask bench --calibrate` again when this machine has nothing else to do"
        ) from None


def busy() -> bool:
    """Whether other programs wanted more than half a processor in the last minute, as far as the system tells."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5


def beside(shipped: costs.Table, measured: costs.Table) -> list[tuple[str, str, str, str]]:
    """Backend, constant, shipped and measured value, of all that the two do not share."""
    rows = []
    for backend in costs.BACKENDS:
        before, now = (getattr(table, backend).flat() for table in (shipped, measured))
        changed = (path for path in now if path not in KEPT and now[path] != before.get(path))
        was = {path: constant(path, before[path]) if path in before else "not known" for path in now}
        rows += [(backend, path, was[path], constant(path, now[path])) for path in changed]
    return rows


def constant(path: str, value: float) -> str:
    """A constant as people read it.

    >>> constant("call", 7e-05), constant("fp32.forward.rows32", 0.613), constant("join", 3.7e9), constant("mixed", 1.3)
    ('70 us', '61%', '3.7 G/s', '1.3 x')
    """
    name = path.split(".")[-1]
    if name.startswith("call") or name == "step":
        return duration(value)
    if name.startswith("rows"):
        return f"{value:.0%}"
    return f"{value:.2g} x" if name == "mixed" else f"{value / 1e9:.3g} G/s"
