"""Which constants hold in this process, and where they come from, in words.

What torch does depends on the processor, what the native kernel does on the instruction set that is in use. Tables of
both ship (`shipped`), and `truemask bench --calibrate` measures this machine and stores what it finds
(`calibration_file`): a kernel that was told to use another instruction set than the measured one is priced by that
one's shipped rates. Nothing is ever timed inside a run. The shipped ones rank backends, and say roughly how long.

`TRUEMASK_COSTS=avx2` (`avx512`, `amx`) takes one machine's tables by name, with its threads, whatever this one is:
plans are then the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch

from truemask.backends.base import Request
from truemask.backends.costs.calibration_file import (
    AGAIN,
    VARIABLE,
    Entry,
    Machine,
    complain,
    processor,
    read_entries,
    this_machine,
)
from truemask.backends.costs.rates import NativeRates, Rates, SdpaRates, StripRates
from truemask.backends.costs.shipped import NATIVE, TORCH, VENDORS, NativeCosts, vendor_of
from truemask.backends.isa import ISAS, in_use, wanted

R = TypeVar("R", bound=Rates)
BACKENDS = ("sdpa", "block_sparse", "reference", "native")


@dataclass(frozen=True)
class Table:
    """The constants of every backend that has some, under its name."""

    sdpa: SdpaRates
    block_sparse: StripRates
    reference: Rates
    native: NativeRates
    fixed: bool = False  # it was named: plans do not depend on the threads that torch uses here
    unmeasured: str = ""  # the instruction set in use, if native's rates are those of another one or another vendor

    def threads(self, rates: Rates) -> float:
        """The threads that work is shared among."""
        return rates.threads if self.fixed else torch.get_num_threads()


_entries: list[Entry] | None = None  # of the file, once it has been read
_tables: dict[tuple[Machine, str], tuple[Table, str]] = {}  # what was made of them, by machine and instruction set
_natives: dict[tuple[Machine, str], NativeRates] = {}  # by machine of no threads and instruction set
_assumed: Table | None = None


def table() -> Table:
    """The constants that hold now: those measured on this machine, or shipped ones."""
    return _assumed or _in_force()[0]


def source() -> str:
    """Where the constants come from, in words."""
    return _in_force()[1]


def native_of_any_threads() -> NativeRates:
    """The native kernel's constants by which what does not depend on threads is decided."""
    if _assumed:
        return _assumed.native
    key = this_machine()._replace(threads=0), isa_in_use()
    if key not in _natives:
        entries = [entry for entry in _stored_entries() if entry.machine._replace(threads=0) == key[0]]
        _natives[key] = shipped()[0].native
        with suppress(ValueError):
            _natives[key] = table_of(entries[0].costs).native if entries else _natives[key]
    return _natives[key]


@contextmanager
def assumed(costs: Table) -> Iterator[None]:
    """Ask what backends would cost if these were the constants."""
    global _assumed
    before, _assumed = _assumed, costs
    try:
        yield
    finally:
        _assumed = before


def forget() -> None:
    """Read the file again when somebody next asks."""
    global _entries
    _entries = None
    _tables.clear()
    _natives.clear()


def _in_force() -> tuple[Table, str]:
    machine, isa = this_machine(), isa_in_use()
    if (machine, isa) not in _tables:
        _tables[machine, isa] = _chosen(_stored_entries(), machine)
    return _tables[machine, isa]


def _stored_entries() -> list[Entry]:
    global _entries
    if _entries is None:
        _entries = read_entries()
    return _entries


def _chosen(entries: list[Entry], machine: Machine) -> tuple[Table, str]:
    """The table made of this machine's entry. Other threads are no mistake; a file only of other machines is one."""
    for entry in entries:
        if entry.machine == machine:
            try:
                return calibrated(entry)
            except ValueError as error:
                complain(f"are wrong ({error})")
                return shipped(", because the measured ones are wrong")
    threads = [entry.machine.threads for entry in entries if entry.machine._replace(threads=machine.threads) == machine]
    if threads:
        return shipped(f" (measured were {threads[0]} threads, these are {machine.threads})")
    if entries:
        complain(f"are of another machine ({entries[-1].machine}; this is {machine})")
    return shipped()


# -- measured here -----------------------------------------------------------------------------------------------------


def calibrated(entry: Entry) -> tuple[Table, str]:
    """The table of stored constants, and what is to be said of it."""
    isa, table, said = isa_in_use(), believed(entry.costs), f"costs measured on this machine on {entry.measured}"
    if not isa or isa in entry.costs.get("native", {}):
        return table, said
    return table, f"{said}; native with {isa} was not, and goes by the shipped ones"


def believed(costs: dict[str, Any]) -> Table:
    """The table of measured constants; `ValueError` names one that no machine has."""
    table = table_of(costs)
    for name in BACKENDS:
        if wrong := getattr(table, name).absurd():
            raise ValueError(f"{name}: {wrong}")
    return table


def table_of(costs: dict[str, Any]) -> Table:
    """The table of constants as they are stored; `ValueError` names the one that cannot be, or the backend missing."""
    table, isa, native = shipped()[0], isa_in_use(), costs.get("native", {})
    if not isinstance(native, dict):
        raise ValueError(f"native: {native!r} names no instruction set")
    table = replace(
        table,
        sdpa=rates_of(SdpaRates, costs, "sdpa"),
        block_sparse=rates_of(StripRates, costs, "block_sparse"),
        reference=rates_of(Rates, costs, "reference"),
        fixed=False,
    )
    if isa not in native:
        return table
    return replace(table, native=rates_of(NativeRates, native, isa), unmeasured="")


def rates_of(kind: type[R], costs: dict[str, Any], name: str) -> R:
    """A backend's stored constants."""
    if not isinstance(costs.get(name), dict):
        raise ValueError(f"nothing is said of the backend {name!r}")
    try:
        return kind.of(costs[name])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from None


# -- shipped -----------------------------------------------------------------------------------------------------------


def shipped(why: str = "") -> tuple[Table, str]:
    """The shipped constants nearest to this processor, and what is to be said of them, with `why` it is those."""
    named = os.environ.get(VARIABLE, "")
    if named in TORCH:
        costs = TORCH[named]
        return Table(*costs.rates, NATIVE[costs.native].rates, fixed=True), f"the shipped costs; {AGAIN}"
    vendor, isa = vendor_of(processor()), isa_in_use()
    costs, notes = TORCH[torch_kind()], []
    if vendor != costs.vendor:
        notes.append(f"those of torch are an {costs.machine}'s")
    native = nearest_native(isa, vendor)
    unmeasured = isa if isa and (native.isa, native.vendor) != (isa, vendor) else ""
    if unmeasured:
        beside_amx = ", and in bf16 not held against sdpa" if has_amx() else ""
        notes.append(
            f"native with {isa} was not measured: it is priced as with {native.isa} on an {native.machine}{beside_amx}"
        )
    said = f" ({'; '.join(notes)})" if notes else ""
    return Table(*costs.rates, native.rates, unmeasured=unmeasured), f"the shipped costs{why}{said}; {AGAIN}"


def torch_kind() -> str:
    """By which of the shipped tables torch's own operators are priced here."""
    capability = torch.backends.cpu.get_cpu_capability()
    return "amx" if has_amx() else "avx512" if capability.startswith("AVX512") else "avx2"


def has_amx() -> bool:
    """Whether torch multiplies bf16 with AMX here: several times faster than anything without it."""
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    able = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    return able and wide and (held in ("", "DEFAULT") or "AMX" in held)


_in_use = cache(in_use)  # it looks for files, and a plan asks fifteen times


def isa_in_use() -> str:
    """The native kernel's instruction set; empty if there is no kernel."""
    return _in_use(torch.backends.cpu.get_cpu_capability(), wanted())


def nearest_native(isa: str, vendor: str) -> NativeCosts:
    """The rates that were measured with it on such a processor, on another, or with the next best set."""
    names = (*(ISAS[ISAS.index(isa) :] if isa in ISAS else ()), *ISAS[::-1])
    return next(
        NATIVE[pair] for name in names for pair in [(name, vendor), *((name, of) for of in VENDORS)] if pair in NATIVE
    )


def is_doubtful(request: Request) -> bool:
    """Whether native's price must not be held against that of an SDPA that has AMX, because nobody measured it."""
    return bool(table().unmeasured) and request.dtype == torch.bfloat16 and has_amx()
