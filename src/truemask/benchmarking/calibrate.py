"""Measures the constants of `truemask.backends.costs.rates` on this machine: backends in turns, in about a minute.

Each probe is held against what is predicted of it, and the constants that it shows are multiplied until the two agree;
again for all of them, because what one shows leans on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from truemask.attention.attend import attend
from truemask.attention.planning.cache import CACHE
from truemask.backends.backend import Backend, Proposal
from truemask.backends.block_sparse.gather_scatter import gathered
from truemask.backends.costs.model import BACKENDS as NAMES
from truemask.backends.costs.model import Table, assumed, isa_in_use, shipped
from truemask.backends.costs.rates import PARTS, Both, NativeRates, Rates, SdpaRates
from truemask.backends.native.library import missing, peak
from truemask.backends.native.parts import forced
from truemask.backends.registry import BACKENDS
from truemask.benchmarking.probes import Measure, Probe, Sizes, measures
from truemask.benchmarking.timing import race
from truemask.masks.leaves.bands import window

SECONDS = 0.1  # for each backend and probe, in each of so many turns: a noisy minute does not hit all of them
TURNS, RUNS = 2, 4
MOST = 30.0  # times a constant, or a part of it, is multiplied at most: beyond that a measurement is not believed
STEPS = 1e-7, 1e-3  # seconds: less does not show, whatever the shipped constant is
ROUNDS, NUDGE = 6, 1e-3
Announce = Callable[[str], object]


class Measured(NamedTuple):
    """A probe of one backend, the constants that it shows, and the seconds that it took."""

    backend: Backend
    probe: Probe
    shows: tuple[str, ...]
    seconds: float


def measured_costs(
    say: Announce, sizes: Sizes | None = None, seconds: float = SECONDS, names: Collection[str] = NAMES
) -> dict[str, Any]:
    """The constants of the backends, in the form in which they are stored; `say` hears what is being measured."""
    backends = {b.name: b for b in BACKENDS if b.name in names and not b.unavailable()}
    todo = [one for one in measures(sizes or Sizes()) if backends.keys() & one.shows.keys()] * TURNS
    found: dict[tuple[str, Probe], Measured] = {}
    for i, one in enumerate(todo):
        say(f"{i + 1} of {len(todo)}: {one.probe}")
        for new in timed(one, backends, seconds):
            key = new.backend.name, new.probe
            found[key] = min(found.get(key, new), new, key=lambda measured: measured.seconds)
    start = _start(join_rate(seconds), copy_rate(seconds))
    CACHE.clear()  # of what was lowered for probes
    table = fitted(list(found.values()), start)
    costs = {name: getattr(table, name).numbers() for name in backends}
    return costs | ({"native": {isa_in_use(): costs["native"]}} if "native" in costs else {})


def timed(one: Measure, backends: Mapping[str, Backend], seconds: float) -> list[Measured]:
    """The least seconds of each backend that can run the probe: other programs only ever add to them."""
    job = one.probe.job()
    able = [name for name in one.shows if name in backends and backends[name].can_run(job)]
    times = race({name: one.probe.run(name) for name in able}, seconds, least=RUNS)
    return [Measured(backends[name], one.probe, one.shows[name], times[name].least) for name in able]


def _start(join: float, copy: float) -> Table:
    """The shipped constants as of this many threads, with what is measured by itself."""
    table, threads = shipped()[0], torch.get_num_threads()
    rates = {name: getattr(table, name).with_threads(threads) for name in NAMES}
    joins = join * table.block_sparse.join / table.sdpa.join
    rates["block_sparse"] = replace(rates["block_sparse"], join=joins, copy=copy)
    read = SdpaRates.read * threads / table.sdpa.threads  # what ships may say that nobody waits
    rates["sdpa"] = replace(rates["sdpa"], join=join, read=read)
    if not missing():
        native = replace(rates["native"], peak=max(peak(0.02, False) for _ in range(5)) / threads)
        rates["native"] = replace(native, paces=native.paces | _paces_in_parts(native))
    return replace(table, **rates, fixed=False)


def _paces_in_parts(native: NativeRates) -> dict[str, Both]:
    """Something to start from, where there are tiles."""
    names = native.dtypes_in_parts if isa_in_use().startswith("amx") else ()
    return {name: native.paces.get(name, native.paces[name.removesuffix(PARTS)]) for name in names}


def fitted(found: Sequence[Measured], table: Table) -> Table:
    """The constants by which what is predicted of the probes is what was measured."""
    start = {name: getattr(table, name) for name in NAMES}
    for _ in range(ROUNDS):
        for one in found:
            name = one.backend.name
            rates: Rates = getattr(table, name)
            factor = agreeing(one, table)
            bound, now = start[name].flat(), rates.flat()
            factors = {path: _bounded(path, factor * now[path], bound[path]) / now[path] for path in one.shows}
            table = replace(table, **{name: rates.scaled(factors)})
    return table


def agreeing(one: Measured, table: Table) -> float:
    """By what the constants that a probe shows are to be multiplied, so that it is predicted as it was measured.

    Times are sums of parts that a constant multiplies or divides; so a small change of it tells its part.
    """
    takes_time = one.shows[0].startswith("call") or one.shows[0].endswith(("step", "mixed"))
    before = predicted(one, table, 1.0)
    nudged = predicted(one, table, 1 + NUDGE if takes_time else 1 / (1 + NUDGE))
    part = (nudged - before) / NUDGE
    if part <= 0:
        return 1.0
    times = _within((one.seconds - before + part) / part)
    return times if takes_time else 1 / times


def _bounded(path: str, found: float, start: float) -> float:
    """A constant within what is believed of it."""
    return min(max(STEPS[0], found), STEPS[1]) if path.endswith("step") else _within(found / start) * start


def _within(factor: float) -> float:
    return min(max(1 / MOST, factor), MOST)


def predicted(one: Measured, table: Table, factor: float = 1.0) -> float:
    """What the probe would cost if these were the constants; of a new job, because a job remembers choices."""
    name = one.backend.name
    rates: Rates = getattr(table, name)
    with assumed(replace(table, **{name: rates.scaled(dict.fromkeys(one.shows, factor))})), forced(one.probe.in_parts):
        proposal = one.backend.propose(one.probe.job())
        assert isinstance(proposal, Proposal)
        return float(proposal.cost)


def join_rate(seconds: float, n: int = 1024) -> float:
    """Bytes a second at which a bias and a mask become one dense tensor, all copies counted."""
    q, bias, mask = torch.randn(1, 4, n, 8), torch.randn(4, n, n), window(64)
    with_bias = {
        name: lambda added=added: attend(q, q, q, mask, bias=added, backend="sdpa")
        for name, added in (("plain", None), ("biased", bias))
    }
    times = race(with_bias, seconds)
    return (n * n + bias.numel()) * 4 / max(times["biased"].least - times["plain"].least, 1e-9)


def copy_rate(seconds: float, n: int = 1024, width: int = 320) -> float:
    """Bytes a second of rows that `block_sparse` gathers: overlapping strips of keys."""
    x = torch.randn(8, n, 64)
    places = (torch.arange(0, n, 64)[:, None] + torch.arange(width)).clamp(max=n - 1)
    took = race({"gathered": lambda: gathered(x, places)}, seconds)["gathered"].least
    return places.numel() * x.shape[0] * x.shape[2] * x.itemsize / took
