"""Leaks below the rounding of sums, without a gradient: hidden inputs are changed more, again and again.

One difference of a few eps says nothing, since sums in another order differ by as much. But what an input does to an
output, it does again when everything else is moved a little, and more so when it is changed more; what rounding does
points elsewhere each time. So differences count that grow in proportion to the change, and small ones that point the
same way every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from truemask.auditing.distances import Distances
from truemask.auditing.probes import Dependencies, ProgressCallback
from truemask.auditing.subject import SEED, AuditedModel

REPETITIONS = 8  # that a change is repeated, with everything else moved a little
NEARBY_SHARE = 0.01  # how much
DIRECTION_SEEDS = (1, 2)  # directions that must all say so
MAX_COLUMNS = 16  # that are asked again


class Amplification(NamedTuple):
    """How a hidden input is asked.

    Attributes:
        scales: of an ordinary change, the smallest and the largest.
        scatter: how far differences may be from their mean, each divided by its scale, in parts of that mean.
        least: the mean for a change of ordinary size, in units of eps of a typical output.
    """

    scales: tuple[float, float]
    scatter: float
    least: float


# rounding in a convolution by FFT was seen to scatter by 0.1 and more
GROWING = Amplification((64.0, 256.0), 0.05, 0.1)
BOUNDED = Amplification((1.0, 1.0), 0.5, 3.0)  # behind a norm a larger change does no more


def look_by_larger_changes(
    subject: AuditedModel, distances: Distances, dependencies: Dependencies, hidden: Tensor, progress: ProgressCallback
) -> None:
    """Note in `dependencies` which inputs matter to outputs from which they are `hidden`, bool `[b, n, n]`.

    It is asked only where nothing was seen to leak so far.
    """
    if subject.features is None or dependencies.neighbours or bool((dependencies.visible & hidden).any()):
        return
    columns = [k for k in dependencies.columns if bool(hidden[:, :, k].any())]
    movement = torch.zeros_like(dependencies.size)
    for turn, k in enumerate(columns):
        change = _direction(subject, k, 0) * GROWING.scales[0]
        difference = _difference(subject, distances, subject.features, k, change).abs().amax(dim=-1)
        movement[:, :, k] = torch.where(hidden[:, :, k], difference, 0.0)
        progress("larger changes", turn + 1, len(columns))
    by_column = movement.amax(dim=(0, 1))
    for k in by_column.argsort(descending=True)[:MAX_COLUMNS].tolist():
        if float(by_column[k]) > 0:
            _ask_again(subject, distances, dependencies, movement[:, :, k] > 0, k)


def _ask_again(subject: AuditedModel, distances: Distances, dependencies: Dependencies, cells: Tensor, k: int) -> None:
    """Whether input `k` matters to some of the outputs `cells`, bool `[b, n]`."""
    for amplification in (GROWING, BOUNDED):
        candidates, size = cells, torch.zeros_like(cells, dtype=torch.float64)
        for seed in DIRECTION_SEEDS:
            if bool(candidates.any()):
                scatter, size = _repeated_differences(subject, distances, k, seed, amplification)
                least = max(amplification.least * distances.unit, 8 * distances.noise)
                candidates = candidates & (scatter <= amplification.scatter) & (size > least)
        if bool(candidates.any()):
            dependencies.by_larger[:, :, k] = candidates
            dependencies.size[:, :, k] = torch.where(candidates, size, dependencies.size[:, :, k])
            return


def _repeated_differences(
    subject: AuditedModel, distances: Distances, k: int, seed: int, amplification: Amplification
) -> tuple[Tensor, Tensor]:
    """How far the differences scatter, and how large their mean is: both float64 `[b, n]`."""
    assert subject.features is not None
    change, differences = _direction(subject, k, seed), []
    least, most = amplification.scales
    for turn in range(REPETITIONS):
        scale = least * (most / least) ** (turn / (REPETITIONS - 1))
        noise = torch.randn(subject.features.shape, generator=_generator(k, seed, turn + 1), dtype=torch.float64)
        nearby = (subject.features.detach().double().cpu() * (1 + NEARBY_SHARE * noise)).to(subject.features)
        differences.append(_difference(subject, distances, nearby, k, change * scale) / scale)
    repetitions = torch.stack(differences)  # times b n e
    mean = repetitions.mean(dim=0)
    deviation = (repetitions - mean).norm(dim=-1).square().mean(dim=0).sqrt()
    return deviation / mean.norm(dim=-1).clamp(min=1e-300), mean.abs().amax(dim=-1)


def _difference(subject: AuditedModel, distances: Distances, features: Tensor, k: int, change: Tensor) -> Tensor:
    """What outputs differ by when input `k` is changed, float64 `[b, n, e]`; 0 where they are no numbers."""
    changed = features.detach().clone()
    changed[:, k] += change.to(changed)
    with torch.no_grad():
        before, after = subject.outputs_of_features(features.detach()), subject.outputs_of_features(changed)
    return distances.weighed(after - before).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _direction(subject: AuditedModel, k: int, seed: int) -> Tensor:
    """A change as large as the input vectors, float64 `[b, d]`."""
    assert subject.features is not None
    size = subject.features.detach().double().std(correction=0).nan_to_num().clamp(min=1e-3).cpu()
    shape = subject.features[:, k].shape
    return size * torch.randn(shape, generator=_generator(k, seed, 0), dtype=torch.float64)


def _generator(k: int, seed: int, turn: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + (k * (len(DIRECTION_SEEDS) + 1) + seed) * (REPETITIONS + 1) + turn)
