"""The backend that defines correctness: it honours everything, and is chosen by name or when nobody else can."""

from __future__ import annotations

from truemask.backends.base import Inputs, Job, Lowered, Result
from truemask.backends.costs import REFERENCE, seconds
from truemask.backends.eager import eager_attention


class Reference:
    """Plain torch in chunks of rows, bounded memory, every derivative; see `eager`."""

    name = "reference"
    last_resort = True

    def objections(self, job: Job) -> list[str]:
        return []

    def cost(self, job: Job) -> float:
        return seconds(REFERENCE, job.request, job.request.cells)

    def way(self, job: Job) -> str:
        return "plain torch, in chunks of rows"

    def lower(self, job: Job) -> Lowered:
        return Lowered()

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        request = job.request
        found = eager_attention(
            inputs, job.mask, want_weights=request.return_weights, recompute=request.grad and not request.transform
        )
        return found._replace(lse=found.lse if request.return_lse else None)
