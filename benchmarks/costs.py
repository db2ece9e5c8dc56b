"""The constants by which plans predict seconds, measured here, beside those that ship; stores nothing.

    python benchmarks/costs.py [--quick] [--json FILE] [--as-table NAME] [--backends NAME ...]

`truemask bench --calibrate` measures the same and keeps it for this machine. Who changes a backend's speed runs this on
a quiet machine with `--as-table "AMD EPYC (Zen 4)"`: it prints the machine's entries of `backends/costs/shipped.py`, of
torch's operators and of the native kernel with the instruction set in use. `TRUEMASK_ISA` names another; `--backends
native` spares what does not depend on it.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
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
        rates = (f"        {written(getattr(measured, backend), 8)},\n" for backend in TORCHS)
        native = f'("{isa}", "{vendor}")'
        yield f'    "{torch_kind()}": TorchCosts("{name}", "{vendor}", {native}, (\n{"".join(rates)}    )),'
    if isa and "native" in given.backends:
        yield f'    NativeCosts("{isa}", "{name}", "{vendor}", {written(measured.native, 4)}),'


def written(rates: Rates, indent: int) -> str:
    """Constants as Python, with three digits, each dtype by itself."""
    numbers, space = rates.numbers(), " " * indent
    paces = numbers.pop("paces").items()
    lines = [
        f'{space}    "{dtype}": {_both(_pace(both["forward"]), _pace(both["backward"]), indent)},\n'
        for dtype, both in paces
    ]
    others = textwrap.fill(
        ", ".join(f"{name}={_digits(number)}" for name, number in numbers.items()) + ",",
        width=120,
        initial_indent=f"{space}    ",
        subsequent_indent=f"{space}    ",
    )
    return f"{type(rates).__name__}(\n{others}\n{space}    paces={{\n{''.join(lines)}{space}}})"


def _both(forward: str, backward: str, indent: int) -> str:
    """Of both directions, in one line if there is room."""
    between = ", " if len(forward + backward) < 80 else f",\n{' ' * (indent + 17)}"
    return f"Both({forward}{between}{backward})"


def _pace(numbers: dict[str, float]) -> str:
    """Numbers at the end that are those of any pace are left out."""
    names, usual = list(numbers), Pace(1, 1)
    while numbers[names[-1]] == getattr(usual, names[-1]):
        names.pop()
    return f"Pace({', '.join(_digits(numbers[name]) for name in names)})"


def _digits(number: float) -> str:
    """Three of them, and no more signs than they need."""
    return re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", f"{number:.3g}")


if __name__ == "__main__":
    main()
