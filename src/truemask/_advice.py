"""What `plan.explain()` says: why this backend, what keeps the others, and what would make the call faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from truemask._explain import duration, sizes_text, tiles_text
from truemask.backends.base import Job
from truemask.backends.costs import source
from truemask.backends.registry import BACKENDS
from truemask.diagnosis.recognise import recognise
from truemask.masks.core import Mask

WORTH = 0.8  # share of the time below which a change is worth a line
NAMED = ("dense", "predicate")  # masks that may be an expression in disguise


class Change(NamedTuple):
    """Another way to ask for nearly the same, and the job that it makes."""

    text: str
    job: Job


def advice(job: Job, chosen: str, objections: dict[str, list[str]], costs: dict[str, float]) -> str:
    """The explanation as plain text."""
    lines = [f"`{job.mask}`", sizes_text(job.request), tiles_text(job), ""]
    lines += [_why(chosen, costs), *_others(chosen, costs), *_refusals(objections), ""]
    faster = list(_faster(job, costs.get(chosen)))
    lines += ["what would make it faster:", *faster] if faster else ["nothing that is known here would make it faster"]
    return "\n".join(lines)


def _why(chosen: str, costs: dict[str, float]) -> str:
    if chosen not in costs:
        return f"{chosen} runs it: it was chosen for calls of this kind, and kept"
    time = duration(costs[chosen])
    if len(costs) == 1:
        return f"{chosen} runs it in a predicted {time}: nobody else can ({source()})"
    cheapest = costs[chosen] <= min(costs.values())
    why = f"the cheapest of the {len(costs)} that can" if cheapest else "it was named, or chosen for calls of this kind"
    return f"{chosen} runs it in a predicted {time}: {why} ({source()})"


def _others(chosen: str, costs: dict[str, float]) -> Iterator[str]:
    for name, cost in sorted(costs.items(), key=lambda pair: pair[1]):
        if name != chosen:
            times = f", {cost / costs[chosen]:.1f} times that" if chosen in costs else ""
            yield f"  {name} would take {duration(cost)}{times}"


def _refusals(objections: dict[str, list[str]]) -> Iterator[str]:
    for name, reasons in objections.items():
        yield from (f"  {name} cannot: {reason}" for reason in reasons)


def _faster(job: Job, cost: float | None) -> Iterator[str]:
    """Changes with which somebody would be faster, the best first."""
    found: list[tuple[float, str]] = []
    for text, other in _changes(job):
        able = {backend.name: backend.cost(other) for backend in BACKENDS if not backend.objections(other)}
        name = min(able, key=lambda name: able[name], default="")
        if name and (cost is None or able[name] < WORTH * cost):
            times = f", {cost / able[name]:.1f} times faster" if cost else ""
            found.append((able[name], f"  {text}: {name} in {duration(able[name])}{times}"))
    yield from (line for _, line in sorted(found))


def _changes(job: Job) -> Iterator[Change]:
    r = job.request
    asked = [
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
    yield from (Change(text, Job(job.mask, r._replace(**values))) for holds, text, values in asked if holds)
    named = _by_name(job)
    if named is not None:
        yield Change(f"the mask written as `{named}`", Job(named, r))


def _by_name(job: Job) -> Mask | None:
    r = job.request
    if job.mask.kind not in NAMED:
        return None
    return recognise(job.mask, r.q_len, r.kv_len, batch=r.batch, heads=r.heads)
