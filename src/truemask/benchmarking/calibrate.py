"""Measures the constants of `truemask.backends.costs.rates` on this machine: all backends in turns, in under a minute.

Each backend runs a small job and a large one. The constants say which part of either is calls and which is arithmetic;
so the two measurements give two factors, one for a backend's `call...` constants and one for its rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from typing import NamedTuple

import torch

from truemask.attention.attend import attend
from truemask.backends.backend import Backend, Proposal
from truemask.backends.base import Job, Request
from truemask.backends.costs.model import assumed
from truemask.backends.costs.rates import BACKENDS as NAMES
from truemask.backends.costs.rates import SHIPPED, Rates
from truemask.backends.registry import BACKENDS
from truemask.benchmarking.timing import race
from truemask.benchmarking.workloads import Workload, by_truemask
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import window
from truemask.masks.leaves.per_token import prefix

SECONDS = 0.8  # for each backend and job
# Of a shipped constant, and that many times as much at most (1 / 0.05): beyond that a measurement is not believed.
MIN_SHARE = 0.05
FITTING_STEPS, NUDGE = 6, 1e-4
Announce = Callable[[str], object]


class Probe(NamedTuple):
    """A job to be measured."""

    mask: Mask
    n: int
    heads: int
    d: int
    dtype: torch.dtype = torch.float32

    def job(self, grad: bool) -> Job:
        """What backends are asked about."""
        sizes = (1, self.heads, self.heads, self.n, self.n, self.d, self.d)
        return Job(self.mask, Request(*sizes, self.dtype, torch.device("cpu"), grad))

    def __str__(self) -> str:
        return f"{self.n} tokens, {self.heads} heads of {self.d}, {str(self.dtype).removeprefix('torch.')}"


class Measured(NamedTuple):
    """A job, in one of the two directions, and the seconds that it took."""

    probe: Probe
    grad: bool
    seconds: float


SMALL_PROBE = Probe(window(5) | prefix(1), 16, 4, 32)
LARGE_PROBE = Probe(window(256) | prefix(4), 2048, 8, 64)


def measured_costs(
    say: Announce, small: Probe = SMALL_PROBE, large: Probe = LARGE_PROBE, seconds: float = SECONDS
) -> dict[str, dict[str, float]]:
    """The constants of every backend, in the form in which they are stored; `say` hears what is being measured."""
    backends = [b for b in BACKENDS if b.name in NAMES and b.can_run(large.job(False))]
    times = partial(_times, say, backends, seconds)
    forward, train = ([(probe, times(probe, grad)) for probe in (small, large)] for grad in (False, True))
    others = {
        "doubles": times(large._replace(dtype=torch.float64), False),
        "halves": times(large._replace(dtype=torch.bfloat16), False),
    }
    costs = {}
    for backend in backends:
        name, rates = backend.name, getattr(SHIPPED, backend.name)
        for grad, runs in ((False, forward), (True, train)):
            small_job, large_job = (Measured(probe, grad, took[name]) for probe, took in runs)
            rates = fitted(backend, rates, small_job, large_job)
        single = Measured(large, False, forward[1][1][name])
        work = max(_cost_split(backend, rates, single).work, MIN_SHARE * single.seconds)
        of_dtypes = {key: times[name] for key, times in others.items() if name in times}
        factors = {key: max(MIN_SHARE, 1 + (took - single.seconds) / work) for key, took in of_dtypes.items()}
        costs[name] = asdict(replace(rates, **factors))
    say("a bias that meets a mask")
    faster = join_rate(seconds) / SHIPPED.sdpa.join
    for name in costs:
        if "join" in costs[name]:
            costs[name]["join"] = faster * getattr(SHIPPED, name).join
    return costs


def _times(say: Announce, backends: list[Backend], seconds: float, probe: Probe, grad: bool) -> dict[str, float]:
    """The least seconds of each backend that can run the job."""
    say(f"{'forward and backward' if grad else 'forward'}, {probe}")
    workload = Workload.of(probe.n, probe.heads, probe.d, dtype=probe.dtype)
    names = [backend.name for backend in backends if backend.can_run(probe.job(grad))]
    runs = {name: workload.run(by_truemask(probe.mask, name), grad) for name in names}
    return {name: timing.least for name, timing in race(runs, seconds).items()}


def fitted(backend: Backend, rates: Rates, small: Measured, large: Measured) -> Rates:
    """The constants of one direction scaled, so that what is predicted of the two jobs is what was measured.

    In steps, because a backend that chooses among ways may choose another one under other constants.
    """
    calls = work = 1.0
    for _ in range(FITTING_STEPS):
        scaled = _scaled(rates, small.grad, calls, work)
        of_calls, of_work = _factors(*(_cost_split(backend, scaled, measured) for measured in (small, large)))
        calls, work = (min(max(MIN_SHARE, factor), 1 / MIN_SHARE) for factor in (calls * of_calls, work * of_work))
    return _scaled(rates, small.grad, calls, work)


class CostSplit(NamedTuple):
    """Seconds of a job that calls and arithmetic should take together, and what is predicted of either."""

    seconds: float
    calls: float
    work: float


def _cost_split(backend: Backend, rates: Rates, measured: Measured) -> CostSplit:
    """What one direction should take, and takes by these constants: how the prediction answers to a small change."""
    before = predicted(backend, rates, measured)
    calls = (predicted(backend, _scaled(rates, measured.grad, calls=1 + NUDGE), measured) - before) / NUDGE
    work = (predicted(backend, _scaled(rates, measured.grad, work=1 + NUDGE), measured) - before) / NUDGE
    return CostSplit(measured.seconds - (before - calls - work), calls, work)


def _factors(small: CostSplit, large: CostSplit) -> tuple[float, float]:
    """By what to multiply calls and arithmetic."""
    of_calls = (small.seconds * large.work - large.seconds * small.work) / (
        small.calls * large.work - large.calls * small.work
    )
    return of_calls, (large.seconds - max(MIN_SHARE, of_calls) * large.calls) / large.work


def _scaled(rates: Rates, backward: bool, calls: float = 1, work: float = 1) -> Rates:
    """Constants of one direction that make calls and arithmetic so many times longer."""
    changed = {}
    for field in fields(rates):
        value, call = getattr(rates, field.name), field.name.startswith("call")
        if ("backward" in field.name) == backward and field.name not in ("doubles", "halves"):
            changed[field.name] = value * calls if call else value / work
    return replace(rates, **changed)


def predicted(backend: Backend, rates: Rates, measured: Measured) -> float:
    """What the backend would cost if these were its constants; of a new job, because a job remembers choices."""
    with assumed(replace(SHIPPED, **{backend.name: rates})):
        proposal = backend.propose(measured.probe.job(measured.grad))
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
