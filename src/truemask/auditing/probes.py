"""What each output really depends on: by gradients and by changing one position at a time.

A difference that was seen is a proof: that output depends on that position. That nothing was seen, by these seeds,
is evidence only. Differences count above the noise floor, which two equal calls show (and the rounding of sums whose
shapes follow the values, as in mixtures of experts); gradients count where they are not exactly 0, since a hidden key
has weight 0. NaN equals NaN, and a NaN gradient says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from truemask.auditing.distances import Distances
from truemask.auditing.subject import SEED, AuditedModel, line_of

PROPORTION = 0.1  # how far three times a gradient may be from the gradient of three times the sum
MAX_POISONED_POSITIONS = 3  # positions in which NaN and huge numbers are planted
ProgressCallback = Callable[[str, int, int], None]


@dataclass
class Dependencies:
    """What was seen to matter, and where anybody looked.

    Attributes:
        by_gradient, by_change, by_larger: bool `[b, n, n]`, output q (rows) depends on input k (columns); the last is
            asked by larger changes, where one change alone says nothing.
        size: float64 `[b, n, n]`, the largest difference that a change made.
        rows, columns: outputs asked for gradients, and inputs that were changed.
        blind_rows: bool `[b, n]`, outputs whose gradients were NaN.
        neighbours: (sample changed, sample that noticed, the largest difference).
        no_gradient: why there are none; empty if there are.
    """

    by_gradient: Tensor
    by_change: Tensor
    size: Tensor
    rows: list[int]
    columns: list[int]
    blind_rows: Tensor
    neighbours: dict[tuple[int, int], float] = field(default_factory=dict)
    no_gradient: str = ""

    def __post_init__(self) -> None:
        self.by_larger = torch.zeros_like(self.by_change)

    @property
    def visible(self) -> Tensor:
        """What was seen in any way, bool `[b, n, n]`."""
        return self.by_gradient | self.by_change | self.by_larger

    @property
    def looked(self) -> Tensor:
        """Where not seeing anything says something, bool `[b, n, n]`: asked for gradients, or changed."""
        b, n, _ = self.by_change.shape
        looked = torch.zeros(b, n, n, dtype=torch.bool)
        looked[:, :, self.columns] = True
        if not self.no_gradient:
            looked[:, self.rows] |= ~self.blind_rows[:, self.rows, None]
        return looked


def look(
    subject: AuditedModel, distances: Distances, *, seeds: int, positions: int, progress: ProgressCallback
) -> Dependencies:
    """Probe a call: neighbours first, since samples that see each other must be changed one at a time."""
    b, n = subject.batch, subject.length
    places = probed_positions(n, positions)
    dependencies = Dependencies(
        by_gradient=torch.zeros(b, n, n, dtype=torch.bool),
        by_change=torch.zeros(b, n, n, dtype=torch.bool),
        size=torch.zeros(b, n, n, dtype=torch.float64),
        rows=places,
        columns=places,
        blind_rows=torch.zeros(b, n, dtype=torch.bool),
    )
    look_at_neighbours(subject, distances, dependencies, seeds)
    groups = [[s] for s in range(b)] if dependencies.neighbours else [list(range(b))]
    look_by_changes(subject, distances, dependencies, groups, seeds, progress)
    look_by_gradients(subject, dependencies, groups, seeds, progress)
    return dependencies


def probed_positions(n: int, most: int) -> list[int]:
    """Positions to probe: all, or the first, the last, and others drawn at random.

    >>> probed_positions(5, 8), len(probed_positions(1000, 10)), probed_positions(1000, 10)[-1]
    ([0, 1, 2, 3, 4], 10, 999)
    """
    if n <= most:
        return list(range(n))
    sample = torch.randperm(n - 2, generator=torch.Generator().manual_seed(SEED))[: max(0, most - 2)] + 1
    return sorted({0, n - 1, *sample.tolist()})


def look_at_neighbours(subject: AuditedModel, distances: Distances, dependencies: Dependencies, seeds: int) -> None:
    """Replace a whole sample and see whether the others notice."""
    if subject.batch == 1:
        return
    for seed in range(seeds):
        for s in range(subject.batch):
            places = torch.zeros(subject.batch, subject.length, dtype=torch.bool)
            places[s] = True
            with torch.no_grad():
                distance = distances.moved(subject.outputs(subject.other_inputs(places, _generator(seed))))
            for t, largest in enumerate(distance.amax(dim=1).tolist()):
                if t != s and largest > distances.floor:
                    dependencies.neighbours[s, t] = max(largest, dependencies.neighbours.get((s, t), 0.0))
    try:
        _look_across_samples(subject, dependencies, seeds)
    except Exception as error:  # as in look_by_gradients, which says so
        dependencies.no_gradient = line_of(error)


def look_by_changes(
    subject: AuditedModel,
    distances: Distances,
    dependencies: Dependencies,
    groups: list[list[int]],
    seeds: int,
    progress: ProgressCallback,
) -> None:
    """Replace one position at a time, in all samples of a group at once, and see which outputs change."""
    turns = [(seed, group, k) for seed in range(seeds) for group in groups for k in dependencies.columns]
    for count, (seed, group, k) in enumerate(turns):
        places = torch.zeros(subject.batch, subject.length, dtype=torch.bool)
        places[group, k] = True
        with torch.no_grad():
            outputs = subject.outputs(subject.other_inputs(places, _generator(seed * subject.length + k)))
        distance = distances.moved(outputs)[group]
        dependencies.by_change[group, :, k] |= distance > distances.floor
        dependencies.size[group, :, k] = torch.maximum(dependencies.size[group, :, k], distance)
        progress("changing positions", count + 1, len(turns))


def _look_across_samples(subject: AuditedModel, dependencies: Dependencies, seeds: int) -> None:
    """Ask all outputs of one sample for their gradient at the others; it counts where it grows in proportion."""
    if subject.features is None:
        return
    for seed in range(seeds):
        features = _moved(subject.features, seed).requires_grad_()
        with torch.enable_grad():
            outputs = subject.outputs_of_features(features)
            for t in range(subject.batch):
                dependent = _proportional(outputs, features, [t], slice(None), _generator(seed * subject.batch + t))
                for s in dependent.any(dim=1).nonzero().flatten().tolist():
                    if s != t:
                        dependencies.neighbours.setdefault((s, t), 0.0)


def confirm(subject: AuditedModel, dependencies: Dependencies, hidden: Tensor) -> None:
    """Ask again where a gradient alone says that something hidden matters: `hidden` is bool `[b, n, n]`.

    Rounding makes tiny gradients too (a convolution by FFT, say). What is real grows in proportion to the sum that is
    asked; what rounding made does not.
    """
    doubtful = dependencies.by_gradient & ~dependencies.by_change & hidden
    if subject.features is None or not bool(doubtful.any()):
        return
    features = subject.features.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = subject.outputs_of_features(features)
        for b, q in doubtful.any(dim=-1).nonzero().tolist():
            real = _proportional(outputs, features, [b], q, _generator(q))[b]
            dependencies.by_gradient[b, q] &= ~doubtful[b, q] | real


def _proportional(
    outputs: Tensor, features: Tensor, group: list[int], q: int | slice, generator: torch.Generator
) -> Tensor:
    """Where the gradient of a random sum is not 0 and three times as large for three times the sum, bool `[b, n]`."""
    state = generator.get_state()
    once = _gradient(outputs, features, group, q, generator)
    thrice = _gradient(outputs, features, group, q, generator.set_state(state), times=3.0)
    once, thrice = once.double().nan_to_num(nan=0.0), thrice.double().nan_to_num(nan=0.0)
    return ((thrice - 3 * once).norm(dim=-1) <= PROPORTION * (3 * once).norm(dim=-1)) & (once != 0).any(dim=-1)


def look_by_gradients(
    subject: AuditedModel, dependencies: Dependencies, groups: list[list[int]], seeds: int, progress: ProgressCallback
) -> None:
    """Ask each output, as a random sum of its features, for its gradient at every input vector.

    The first seed asks at the batch itself, the others close to it, where other units may be awake.
    """
    if subject.features is None:
        dependencies.no_gradient = "no module was found that turns the ids into vectors"
        return
    turns = [(group, q) for group in groups for q in dependencies.rows]
    try:
        for seed in range(seeds):
            features = _moved(subject.features, seed).requires_grad_()
            with torch.enable_grad():
                outputs = subject.outputs_of_features(features)
                for count, (group, q) in enumerate(turns):
                    gradient = _gradient(outputs, features, group, q, _generator(seed * subject.length + q))
                    dependencies.blind_rows[group, q] |= gradient.isnan().flatten(1).any(dim=1)[group]
                    dependencies.by_gradient[group, q] |= (gradient.nan_to_num(nan=0.0) != 0).any(dim=-1)[group]
                    progress("following gradients", seed * len(turns) + count + 1, seeds * len(turns))
    except Exception as error:  # autograd, or a backward of the model's own, cannot go through it
        dependencies.no_gradient = line_of(error)


def _moved(features: Tensor, seed: int) -> Tensor:
    """A copy of the features; for seeds after the first, moved a tenth of their size."""
    if seed == 0:
        return features.detach().clone()
    size = 0.1 * features.detach().double().std(correction=0).nan_to_num()
    noise = torch.randn(features.shape, generator=_generator(seed), dtype=torch.float64)
    return (features.detach().double().cpu() + size.cpu() * noise).to(features)


def _gradient(
    outputs: Tensor,
    features: Tensor,
    group: list[int],
    q: int | slice,
    generator: torch.Generator,
    *,
    times: float = 1.0,
) -> Tensor:
    weights = times * torch.randn(outputs.shape[-1], generator=generator).to(outputs)
    total = (outputs[group, q].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * weights).sum()
    (gradient,) = torch.autograd.grad(total, features, retain_graph=True)
    return gradient.cpu()


def look_with_poison(subject: AuditedModel, distances: Distances, hidden: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Plant NaN and huge numbers where some output must not see them: what, where, and who noticed, bool `[b, n]`.

    `hidden`: bool `[b, n, n]`, what must not matter. Only differences that are not numbers count here.
    """
    if subject.features is None:
        return
    columns = hidden.any(dim=1).any(dim=0).nonzero().flatten().tolist()
    huge = torch.finfo(subject.features.dtype).max
    for k in columns[-1:] + columns[: MAX_POISONED_POSITIONS - 1 if len(columns) > 1 else 0]:
        for what, value in (("NaN", torch.nan), (f"{huge:.2g}", huge)):
            features = subject.features.detach().clone()
            features[:, k] = value
            with torch.no_grad():
                distance = distances.moved(subject.outputs_of_features(features))
            yield what, k, distance.isinf() & hidden[:, :, k]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + seed)
