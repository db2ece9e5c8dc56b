"""`truemask doctor`: what is installed, which backends run here and why the others do not; the report of a GPU."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

from truemask._explain import duration
from truemask._plan import plan
from truemask.backends import costs
from truemask.backends.native_library import isa, missing
from truemask.cli.console import make_console, plain
from truemask.cli.gpu_report import CHECKS, LENGTH, SECONDS, gpu_facts, report
from truemask.cli.machine import facts
from truemask.masks.text import parse

EXAMPLE, TOKENS = "causal & window(256)", 4096


def doctor(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Check the backends on the CUDA device, in at most two minutes.")
    ] = False,
) -> None:
    """Say what is installed, which backends run here, and what keeps the others; a report to paste into an issue."""
    console = make_console()
    kernel = f"compiled for {isa()}" if not missing() else f"none: {missing()}"
    _pairs(console, [*facts(torch.get_num_threads()), ("native kernel", kernel), ("costs", costs.source())])
    if not gpu:
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            _backends(console, device)
        return
    if not torch.cuda.is_available():
        _no_gpu(console)
        raise typer.Exit(1)
    _pairs(console, gpu_facts())
    plain(console, "")
    good = True
    for line in report(torch.device("cuda"), CHECKS, LENGTH, SECONDS):
        plain(console, line.text)
        good &= line.good
    if not good:
        raise typer.Exit(1)


def _pairs(console: Console, pairs: list[tuple[str, str]]) -> None:
    for name, value in pairs:
        plain(console, f"{name:<16}{value}")


def _backends(console: Console, device: str) -> None:
    """Of every backend whether it runs an example, forward and in training."""
    for grad in (False, True):
        made = plan(parse(EXAMPLE), TOKENS, device=device, grad=grad)
        direction = "forward and backward" if grad else "forward"
        plain(console, f"\n{EXAMPLE}, {TOKENS:,} tokens, float32 on {device}, {direction}")
        for name, reasons in made.objections.items():
            chosen = ", and is chosen" if name == made.backend else ""
            says = (
                f"cannot: {'; '.join(reasons)}" if reasons else f"can, predicted {duration(made.costs[name])}{chosen}"
            )
            plain(console, f"  {name:<14}{says}")


def _no_gpu(console: Console) -> None:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    plain(console, f"\nno GPU: torch sees no CUDA device (this torch is built {built}), so nothing was checked.")
    plain(console, f"With one, in at most two minutes, against the reference in float64 at {LENGTH:,} tokens:")
    for check in CHECKS:
        plain(console, f"  {check}")
