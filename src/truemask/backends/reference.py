"""The backend that defines correctness: it honours everything, and is chosen by name or when nobody else can."""

from __future__ import annotations

from truemask.backends.base import Inputs, Job, Lowered, Result
from truemask.backends.costs.model import seconds, table
from truemask.backends.shared.eager import eager_attention

LARGEST_DENSE = 1 << 26  # bytes of a mask that is worth keeping


class Reference:
    """Plain torch in chunks of rows, bounded memory, every derivative; see `eager`."""

    name = "reference"
    last_resort = True

    def objections(self, job: Job) -> list[str]:
        return []

    def cost(self, job: Job) -> float:
        return seconds(table().reference, job.request, job.request.cells)

    def way(self, job: Job) -> str:
        return "plain torch, in chunks of rows"

    def lower(self, job: Job) -> Lowered:
        """The dense mask, a byte a cell, if it is small: the layers of a model then evaluate it once."""
        r, mask = job.request, job.mask
        if job.mask_batch * job.mask_heads * r.q_len * r.kv_len > LARGEST_DENSE:
            return Lowered()
        if job.small is not None:
            dense = job.small.to(r.device)
        else:
            dense = mask.to_dense(r.q_len, r.kv_len, batch=r.batch, heads=r.heads, device=r.device)
        return Lowered(dense, dense.nbytes)

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        request = job.request
        found = eager_attention(
            inputs,
            job.mask,
            dense=lowered.data,
            want_weights=request.return_weights,
            recompute=request.grad and not request.transform,
        )
        return found._replace(lse=found.lse if request.return_lse else None)
