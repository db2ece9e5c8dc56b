"""The constants by which plans predict seconds, measured here, beside those that ship; stores nothing.

    python benchmarks/costs.py [--quick] [--json FILE] [--as-table NAME] [--backends NAME ...]

`truemask bench --calibrate` measures the same and keeps it for this machine. Who changes a backend's speed runs this on
a quiet machine with `--as-table "AMD EPYC (Zen 4)"`: it prints the machine's entries of `backends/costs/shipped.py`, of
torch's operators and of the native kernel with the instruction set in use. `TRUEMASK_ISA` names another; `--backends
native` spares what does not depend on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from harness import Table, finish, options

from truemask.backends.costs.calibration_file import processor
from truemask.backends.costs.model import BACKENDS, isa_in_use, shipped, table_of, torch_kind
from truemask.backends.costs.model import Table as Costs
from truemask.backends.costs.rates import Pace, Rates
from truemask.backends.costs.shipped import vendor_of
from truemask.benchmarking.calibrate import SECONDS, measured_costs
from truemask.benchmarking.probes import Sizes
from truemask.cli.commands.bench import beside

TORCHS = BACKENDS[:3]
QUICK = Sizes(7, (40, 200), 66, 97, 130, 2)


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure and show."""
    given = options(
        __doc__,
        arguments,
        as_table={"metavar": "NAME", "help": "print Python, with this name of the machine"},
        backends={"nargs": "+", "choices": BACKENDS, "default": BACKENDS, "help": "measure only these"},
    )
    sizes, seconds = (QUICK, 0.0) if given.quick else (Sizes(), SECONDS)
    found = measured_costs(lambda text: print(f"  {text}", file=sys.stderr), sizes, seconds, given.backends)
    measured = table_of({name: getattr(shipped()[0], name).numbers() for name in TORCHS} | found)
    if given.as_table:
        text = "\n".join(entries(given, measured))
        print(text)
        return text
    table = Table("Costs", ("backend", "constant", "shipped", "measured"))
    for row in beside(shipped()[0], measured):
        if row[0] in given.backends:
            table.add(*row)
    table.numbers = [found]
    return finish([table], given)


def entries(given: argparse.Namespace, measured: Costs) -> Iterator[str]:
    """The entries as `shipped.py` holds them."""
    vendor, isa = vendor_of(processor()), isa_in_use()
    name = f"{given.as_table}, torch {torch.__version__.split('+')[0]}"
    if set(given.backends) >= set(TORCHS):
        rates = ", ".join(written(getattr(measured, backend)) for backend in TORCHS)
        yield f"    {torch_kind()!r}: TorchCosts({name!r}, {vendor!r}, ({isa!r}, {vendor!r}), ({rates})),"
    if isa and "native" in given.backends:
        yield f"    NativeCosts({isa!r}, {name!r}, {vendor!r}, {written(measured.native)}),"


def written(rates: Rates) -> str:
    """Constants as Python, with three digits."""
    numbers = rates.numbers()
    paces = [
        f'"{dtype}": Both({_pace(both["forward"])}, {_pace(both["backward"])})'
        for dtype, both in numbers.pop("paces").items()
    ]
    others = ", ".join(f"{name}={number:.3g}" for name, number in numbers.items())
    return f"{type(rates).__name__}({others}, paces={{{', '.join(paces)}}})"


def _pace(numbers: dict[str, float]) -> str:
    """Numbers at the end that are those of any pace are left out."""
    usual = Pace(1, 1)
    names = list(numbers)
    while names and numbers[names[-1]] == getattr(usual, names[-1]):
        names.pop()
    return f"Pace({', '.join(f'{numbers[name]:.3g}' for name in names)})"


if __name__ == "__main__":
    main()
