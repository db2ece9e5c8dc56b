"""`truemask doctor`: what is installed, which backends run here and why the others do not; the report of a GPU."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from truemask.attention.planning.plan import plan
from truemask.backends.costs import model as costs
from truemask.backends.costs.calibration_file import AGAIN
from truemask.backends.native.library import isa, missing, passed_over, peak
from truemask.cli.console import make_console, plain
from truemask.cli.doctor.backend_check import self_test
from truemask.cli.doctor.gpu_report import CHECKS, LENGTH, SECONDS, gpu_facts, report
from truemask.cli.machine import facts
from truemask.common.formatting import duration
from truemask.masks.formats.parse import parse

EXAMPLE, TOKENS = "causal & window(256)", 4096
PEAK_SECONDS, FITTING_RATIO = 0.02, 1.5


def doctor(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Check the backends on the CUDA device, in at most two minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what is installed, which backends run here and what keeps the others; test them in a few seconds.

    A report to paste into an issue. Exit code 1 if a backend that runs here computes something wrong.
    """
    console = make_console()
    answers = findings()
    if as_json:
        plain(console, json.dumps(answers, indent=2))
    else:
        _show(console, answers, backends=not gpu)
    good = all(outcome["good"] for outcome in answers["self_test"])
    if gpu:
        good &= _gpu(console)
    if not good:
        raise typer.Exit(1)


def findings() -> dict[str, Any]:
    """Versions, machine, backends and the self-test, as plain values."""
    kernel = "; not for ".join([f"compiled for {isa()}", *passed_over()]) if not missing() else f"none: {missing()}"
    names_and_values = [*facts(torch.get_num_threads()), ("native kernel", kernel), ("costs", costs.source()), *fit()]
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {
        "facts": dict(names_and_values),
        "backends": [_backends(device, grad) for device in devices for grad in (False, True)],
        "self_test": [outcome._asdict() for outcome in self_test()],
    }


def fit() -> list[tuple[str, str]]:
    """Whether the kernel's arithmetic is as fast as on the machine that the costs were measured on."""
    table = costs.table()
    if missing() or table.fixed:
        return []
    here, there = max(peak(PEAK_SECONDS, False) for _ in range(5)) / torch.get_num_threads(), table.native.peak
    said = f"{here / 1e9:.0f} GF/s in fp32 for each thread, {there / 1e9:.0f} where the costs were measured"
    fits = 1 / FITTING_RATIO < here / there < FITTING_RATIO
    return [("peak", said if fits else f"{said}: if nothing else runs here, they do not fit; {AGAIN}")]


def _backends(device: str, grad: bool) -> dict[str, Any]:
    """Of every backend whether it runs an example."""
    example_plan = plan(parse(EXAMPLE), TOKENS, device=device, grad=grad)
    return {
        "device": device,
        "direction": "forward and backward" if grad else "forward",
        "chosen": example_plan.backend,
        "seconds": example_plan.costs,
        "objections": {name: reasons for name, reasons in example_plan.objections.items() if reasons},
    }


def _show(console: Console, answers: dict[str, Any], backends: bool) -> None:
    _pairs(console, list(answers["facts"].items()))
    for example in answers["backends"] if backends else []:
        plain(console, f"\n{EXAMPLE}, {TOKENS:,} tokens, float32 on {example['device']}, {example['direction']}")
        for name in (*example["seconds"], *example["objections"]):
            plain(console, f"  {name:<14}{_says(name, example)}")
    plain(console, "\nself-test: forward and backward against the reference, with dead rows and a hidden NaN")
    for outcome in answers["self_test"]:
        plain(console, f"  {outcome['backend']:<14}{outcome['text']}")


def _says(name: str, example: dict[str, Any]) -> str:
    reasons = example["objections"].get(name)
    if reasons:
        return f"cannot: {'; '.join(reasons)}"
    return (
        f"can, predicted {duration(example['seconds'][name])}{', and is chosen' if name == example['chosen'] else ''}"
    )


def _pairs(console: Console, pairs: list[tuple[str, str]]) -> None:
    for name, value in pairs:
        plain(console, f"{name:<16}{value}")


def _gpu(console: Console) -> bool:
    """The report of the CUDA device; whether it is there and every line is as it should be."""
    if not torch.cuda.is_available():
        _no_gpu(console)
        return False
    _pairs(console, gpu_facts())
    plain(console, "")
    good = True
    for line in report(torch.device("cuda"), CHECKS, LENGTH, SECONDS):
        plain(console, line.text)
        good &= line.good
    return good


def _no_gpu(console: Console) -> None:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    plain(console, f"\nno GPU: torch sees no CUDA device (this torch is built {built}), so nothing was checked.")
    plain(console, f"With one, in at most two minutes, against the reference in float64 at {LENGTH:,} tokens:")
    for check in CHECKS:
        plain(console, f"  {check}")
