"""The backend that defines correctness: it honours everything, and is chosen by name or when nobody else can."""

from __future__ import annotations

from typing import ClassVar

import torch

from truemask.backends.backend import ANY_DEVICE, OPTIONS, Backend, Capabilities, Proposal
from truemask.backends.base import Inputs, Job, Lowered, Result
from truemask.backends.costs.model import table
from truemask.backends.costs.prediction import seconds
from truemask.backends.shared.eager import eager_attention

MAX_KEPT_BYTES = 1 << 26  # bytes of a mask that is worth keeping


class ReferenceProposal(Proposal):
    """Chunks of rows, under the dense mask if it is small."""

    @property
    def cost(self) -> float:
        return seconds(table().reference, self.job.request, self.job.request.cells)

    @property
    def description(self) -> str:
        return "plain torch, in chunks of rows"

    def lower(self) -> Lowered:
        """The dense mask, a byte a cell, if it is small: the layers of a model then evaluate it once."""
        job, r, mask = self.job, self.job.request, self.job.mask
        if job.mask_batch * job.mask_heads * r.q_len * r.kv_len > MAX_KEPT_BYTES:
            return Lowered()
        if job.small is not None:
            dense = job.small.to(r.device)
        else:
            dense = mask.to_dense(r.q_len, r.kv_len, batch=r.batch, heads=r.heads, device=r.device)
        return Lowered(dense, dense.nbytes)


class Reference(Backend):
    """Plain torch in chunks of rows, bounded memory, every derivative; see `eager`."""

    name = "reference"
    devices: ClassVar = {ANY_DEVICE: Capabilities(frozenset(OPTIONS))}
    tolerance: ClassVar = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

    @property
    def last_resort(self) -> bool:
        return True

    def propose(self, job: Job) -> Proposal | list[str]:
        return self.lacking(job.request) or ReferenceProposal(job)

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        request = job.request
        result = eager_attention(
            inputs,
            job.mask,
            dense=lowered.data,
            want_weights=request.return_weights,
            recompute=request.grad and not request.transform,
        )
        return result._replace(lse=result.lse if request.return_lse else None)
