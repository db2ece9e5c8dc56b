"""How far outputs are apart, in one number for each position, and which distances count.

A feature that is much larger than most (a banned logit of -1e9, the lowest number of a dtype) is measured in its own
size: else the rounding of that one feature would hide what happens to all the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.auditing.subject import AuditedModel

ROUNDING_EPS = 64  # the noise floor in units of the dtype's eps, of a typical output; less in half precision


class Distances:
    """Distances from the outputs of a call, the baseline `[b, n, e]`.

    Attributes:
        noise: how far equal calls are apart.
        floor: the distance above which a change counts.
        tolerance: the distance up to which results of other shapes may differ: the square root of eps.
        rounding: distances up to which nobody wonders: sums in another order.
        unit: eps of a typical output.
    """

    def __init__(self, baseline: Tensor) -> None:
        self.baseline = baseline.detach()
        sizes = _sizes(self.baseline)  # e
        typical = float(sizes[sizes > 0].median()) if bool((sizes > 0).any()) else 0.0
        weights = typical / sizes.clamp(min=typical) if typical else torch.ones_like(sizes)
        self._weights = weights.to(baseline.device)
        self._plain = bool((self._weights > 0.5).all())
        eps = torch.finfo(baseline.dtype).eps
        self.unit = eps * typical
        self.rounding = min(ROUNDING_EPS * eps, eps**0.5 / 8) * typical
        self.tolerance = eps**0.5 * max(typical, 1e-30)
        self.noise, self.floor = 0.0, self.rounding

    def listen(self, subject: AuditedModel, times: int = 2) -> None:
        """Repeat the call, and count nothing that is as small as what comes of it."""
        with torch.no_grad():
            noise = max(float(self.moved(subject.outputs()).max()) for _ in range(times))
        self.noise = max(self.noise, noise)
        self.floor = max(8 * self.noise, self.rounding)

    def moved(self, outputs: Tensor) -> Tensor:
        """How far outputs are from the baseline at each position, float64 `[b, n]`."""
        return self.between(self.baseline, outputs)

    def weighed(self, difference: Tensor) -> Tensor:
        """A difference of outputs `[b, n, e]` in units of a typical feature, float64."""
        wide = _wide(difference.detach())
        return (wide if self._plain else wide * self._weights.to(wide)).double().cpu()

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """The largest difference at each position, float64 `[b, n]`; infinite where only one of them is a number."""
        left, right = (_wide(x.detach()) for x in (first, second))
        distance = (left - right).abs()
        if not bool(torch.isfinite(distance.sum())):
            same = (left == right) | (left.isnan() & right.isnan())
            distance = torch.where(same, 0.0, distance).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if not self._plain:
            distance = distance * self._weights.to(distance)
        return distance.amax(dim=-1).double().cpu()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _sizes(outputs: Tensor) -> Tensor:
    """The largest finite number of each feature, float64 `[e]`."""
    return outputs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().flatten(0, 1).amax(dim=0).double().cpu()
