"""What the backends cost: constants that were measured, and the seconds that follow from them.

The constants of two machines ship, `TABLES`. `truemask bench --calibrate` measures this one and stores what it finds
(see `calibration_file`); `table()` is what holds in this process, and `source()` says where it comes from. Nothing is
ever timed inside a run.

The shipped ones rank backends, and say roughly how long. `TRUEMASK_COSTS=avx2` or `=amx` takes one of them by name,
whatever the processor: plans are then the same everywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from truemask.backends.base import Request
from truemask.backends.costs.calibration_file import (
    AGAIN,
    VARIABLE,
    Entry,
    Machine,
    complain,
    read_entries,
    this_machine,
)
from truemask.backends.costs.rates import BACKENDS, MEASURED_WITH, SHIPPED, TABLES, Rates, Table
from truemask.backends.isa import in_use, wanted

BACKWARD_PRODUCTS = 2.5  # five products of the forward's size in the backward, against two


# Rows of queries, and the speed of torch's kernel with so many, forward and backward: it takes 32 of them at a time, 64
# of 192 and more, 256 of 768 and more.
SPEED_AT = (1, 16, 32, 64, 96, 128, 191, 192, 256, 768)
SPEED = (0.1, 0.5, 0.62, 0.7, 0.71, 0.73, 0.74, 0.92, 0.93, 1.0)
SPEED_BACKWARD = (0.1, 0.25, 0.42, 0.77, 0.82, 0.85, 0.87, 0.93, 0.95, 1.0)


def rows_at_once(rows: int) -> int:
    """How many rows of queries torch's kernel takes at a time."""
    return 32 if rows < 192 else 64 if rows < 768 else 256


def slowed(cells: ArrayLike, rows: ArrayLike, speed: tuple[float, ...] = SPEED) -> float:
    """As many cells as torch's kernel would do at full speed in the time that it takes for these, of so many rows."""
    return float((np.asarray(cells) / np.interp(np.asarray(rows, float), SPEED_AT, speed)).sum())


def seconds(rates: Rates, request: Request, cells: float) -> float:
    """Predicted seconds for so many scores: two products of the head sizes, and in training five more."""
    work = 2 * cells * (request.head_dim + request.value_dim) * dtype_factor(rates, request.dtype)
    forward = rates.call + work / rates.forward
    backward = rates.call_backward + BACKWARD_PRODUCTS * work / rates.backward
    return forward + backward if request.grad else forward


def dtype_factor(rates: Rates, dtype: torch.dtype) -> float:
    """How many times longer than in fp32 the arithmetic takes."""
    return {8: rates.doubles, 4: 1.0}.get(dtype.itemsize, rates.halves)


# -- which constants hold ----------------------------------------------------------------------------------------------

_entries: list[Entry] | None = None  # of the file, once it has been read
_tables: dict[Machine, tuple[Table, str]] = {}  # what was made of them
_assumed: Table | None = None


def table() -> Table:
    """The constants that hold now: those measured on this machine, or the shipped ones."""
    return _assumed or _in_force()[0]


@contextmanager
def assumed(costs: Table) -> Iterator[None]:
    """Ask what backends would cost if these were the constants."""
    global _assumed
    before, _assumed = _assumed, costs
    try:
        yield
    finally:
        _assumed = before


def shipped() -> tuple[Table, str]:
    """The shipped constants nearest to this processor, and what is to be said of them."""
    named = os.environ.get(VARIABLE, "")
    if named in TABLES:
        return TABLES[named], f"the shipped costs; {AGAIN}"
    name = "amx" if has_amx() else "avx2"
    runs = in_use(torch.backends.cpu.get_cpu_capability(), wanted()) or MEASURED_WITH[name]
    fits = "" if runs == MEASURED_WITH[name] else f", none of which was measured with {runs}"
    return TABLES[name], f"the shipped costs{fits}; {AGAIN}"


def has_amx() -> bool:
    """Whether torch multiplies bf16 with AMX here: several times faster than anything without it."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def source() -> str:
    """Where the constants come from, in words."""
    return _in_force()[1]


def forget() -> None:
    """Read the file again when somebody next asks."""
    global _entries
    _entries = None
    _tables.clear()


def _in_force() -> tuple[Table, str]:
    global _entries
    machine = this_machine()
    if machine not in _tables:
        if _entries is None:
            _entries = read_entries()
        _tables[machine] = _chosen(_entries, machine)
    return _tables[machine]


def _chosen(entries: list[Entry], machine: Machine) -> tuple[Table, str]:
    """The table made of this machine's entry. Other threads are no mistake; a file only of other machines is one."""
    for entry in entries:
        if entry.machine == machine:
            try:
                return table_of(entry.costs), f"costs measured on this machine on {entry.measured}"
            except ValueError as error:
                complain(f"are wrong ({error})")
                return shipped()[0], f"the shipped costs, because the measured ones are wrong; {AGAIN}"
    threads = [entry.machine.threads for entry in entries if entry.machine._replace(threads=machine.threads) == machine]
    if threads:
        return shipped()[0], f"the shipped costs (measured were {threads[0]} threads, these are {machine.threads})"
    if entries:
        complain(f"are of another machine ({entries[-1].machine}; this is {machine})")
    return shipped()


def table_of(costs: dict[str, Any]) -> Table:
    """The table of stored constants; `ValueError` names the one that cannot be, or the backend that is missing."""
    rates: dict[str, Rates] = {}
    for name in BACKENDS:
        shipped = getattr(SHIPPED, name)
        numbers = costs.get(name, {} if name == "native" else None)  # which may have been missing
        if not isinstance(numbers, dict):
            raise ValueError(f"nothing is said of the backend {name!r}")
        names = {field.name for field in fields(shipped)}
        for key, number in numbers.items():
            if key not in names or type(number) not in (int, float) or not 0 < number < math.inf:
                raise ValueError(f"{name}: {key} = {number!r} is no constant above 0")
        rates[name] = replace(shipped, **numbers)
    return Table(**rates)  # pyright: ignore[reportArgumentType]
