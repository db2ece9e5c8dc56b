"""Whether equal calls of a model give equal outputs, and what it means for an audit if they do not."""

from __future__ import annotations

import torch

from truemask.auditing.distances import Distances
from truemask.auditing.subject import SEED, AuditedModel, undisturbed
from truemask.common.finding import Finding


def unsteady_calls(subject: AuditedModel, distances: Distances, train: bool) -> list[Finding]:
    """Calls that differ with other random numbers, or even with the same ones."""
    if distances.noise > distances.rounding:
        text = (
            f"two equal calls differ by {distances.noise:.2g}; even with the same random numbers they differ, and "
            "smaller differences did not count"
        )
        fix = "look for what changes from call to call, in eval mode too"
        return [Finding("nondeterministic", "warning", "everywhere", text, fix)]
    distance = _distance(subject, distances)
    if not distance:
        return []
    text = (
        f"two equal calls differ by {distance:.2g} when the random numbers differ; every call of the audit began with "
        "the same ones, so nothing else that was found comes from this"
    )
    fix = "call model.eval()" if train else "look for what draws random numbers in eval mode"
    return [Finding("nondeterministic", "note" if train else "warning", "everywhere", text, fix)]


def unsteady_in_training(subject: AuditedModel, distances: Distances) -> list[Finding]:
    """The same for a model that was given in training mode, in which it runs here."""
    with undisturbed(subject.model, train=True):
        distance = _distance(subject, distances)
    if not distance:
        return []
    text = (
        f"the model was given in training mode, where two equal calls differ by {distance:.2g} (dropout?); it was "
        "audited in eval mode"
    )
    fix = "model.eval() before it is used; train=True audits it so"
    return [Finding("nondeterministic", "note", "everywhere", text, fix)]


def _distance(subject: AuditedModel, distances: Distances) -> float:
    """How far two calls are apart that begin with other random numbers; 0 if by no more than rounding."""
    with torch.no_grad():
        first = subject.outputs()
        subject.seed = SEED + 1
        try:
            distance = float(distances.between(first, subject.outputs()).max())
        finally:
            subject.seed = SEED
    return distance if distance > distances.rounding else 0.0
