"""What `plan.explain()` says: why this backend, what keeps the others, and what would make the call faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from truemask.attention.planning.proposals import Proposals
from truemask.attention.planning.table import sizes_text, tiles_text
from truemask.backends.base import Job
from truemask.backends.costs.model import source
from truemask.common.formatting import duration
from truemask.diagnosis.recognise import recognise
from truemask.masks.core.mask import Mask
from truemask.masks.structure.data import is_opaque

WORTHWHILE_SHARE = 0.8  # share of the time below which a change is worth a line
NEVER = float("inf")  # seconds


class Change(NamedTuple):
    """Another way to ask for nearly the same, and the job that it makes."""

    text: str
    job: Job


def advice(job: Job, backend: str, proposals: Proposals) -> str:
    """The explanation as plain text."""
    costs = proposals.costs
    lines = [f"`{job.mask}`", sizes_text(job.request), tiles_text(job), ""]
    lines += [_why(backend, costs), *_others(backend, costs), *_refusals(proposals.objections), ""]
    faster = list(_faster(job, proposals, costs.get(backend, NEVER)))
    lines += ["what would make it faster:", *faster] if faster else ["nothing that is known here would make it faster"]
    return "\n".join(lines)


def _why(backend: str, costs: dict[str, float]) -> str:
    if backend not in costs:
        return f"{backend} runs it: it was chosen for calls of this kind, and kept"
    time = duration(costs[backend])
    if len(costs) == 1:
        return f"{backend} runs it in a predicted {time}: nobody else can ({source()})"
    cheapest = costs[backend] <= min(costs.values())
    why = f"the cheapest of the {len(costs)} that can" if cheapest else "it was named, or chosen for calls of this kind"
    return f"{backend} runs it in a predicted {time}: {why} ({source()})"


def _others(backend: str, costs: dict[str, float]) -> Iterator[str]:
    for name, cost in sorted(costs.items(), key=lambda pair: pair[1]):
        if name != backend:
            yield f"  {name} would take {duration(cost)}{_times(cost, costs[backend]) if backend in costs else ''}"


def _times(cost: float, that: float) -> str:
    """How many times slower or faster something is than what was named before."""
    return f", {that / cost:.1f} times faster" if cost < that else f", {cost / that:.1f} times that"


def _refusals(objections: dict[str, list[str]]) -> Iterator[str]:
    for name, reasons in objections.items():
        yield from (f"  {name} cannot: {reason}" for reason in reasons)


def _faster(job: Job, proposals: Proposals, now: float) -> Iterator[str]:
    """Changes after which the fastest backend takes less than the fastest of now, the best first."""
    cost, name = _fastest(proposals)
    named = cost < WORTHWHILE_SHARE * now < NEVER
    if named:
        yield f"  without `backend=`, if it was given: {name} in {duration(cost)}{_times(cost, now)}"
    lines: list[tuple[float, str]] = []
    for text, other in _changes(job):
        less, name = _fastest(Proposals.of(other))
        if less < WORTHWHILE_SHARE * cost:
            times = _times(less, cost) + " than that" * named if cost < NEVER else ""
            lines.append((less, f"  {text}: {name} in {duration(less)}{times}"))
    yield from (line for _, line in sorted(lines))


def _fastest(proposals: Proposals) -> tuple[float, str]:
    """The least predicted seconds and who needs them; `NEVER` if nobody can run it."""
    best = proposals.best()
    return (NEVER, "") if best is None else (proposals.costs[best.name], best.name)


def _changes(job: Job) -> Iterator[Change]:
    r = job.request
    changes = [
        (r.dtype == torch.float64, "float32 instead of float64", {"dtype": torch.float32}),
        (r.dtype == torch.float32, "bfloat16 instead of float32", {"dtype": torch.bfloat16}),
        (r.return_weights, "without return_weights", {"return_weights": False}),
        (r.bias_grad, "a bias without a gradient (`bias.detach()`)", {"bias_grad": False}),
        (
            r.bias in ("tensor", "object"),
            "the bias as `alibi(...)` or `relative(...)`, if it is one",
            {"bias": "alibi"},
        ),
        (bool(r.transform), f"outside of {r.transform}", {"transform": ""}),
    ]
    yield from (Change(text, Job(job.mask, r._replace(**values))) for holds, text, values in changes if holds)
    named = _by_name(job)
    if named is not None:
        yield Change(f"the mask written as `{named}`", Job(named, r))


def _by_name(job: Job) -> Mask | None:
    r = job.request
    if not is_opaque(job.mask):
        return None
    return recognise(job.mask, r.q_len, r.kv_len, batch=r.batch, heads=r.heads)
