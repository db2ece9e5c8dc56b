"""A call that was read, run: its plan, the plan's warning, what was lowered for it, the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.attention.call import Call
from truemask.attention.planning.cache import CACHE
from truemask.backends.base import Request, Result
from truemask.common.warning import warn


def run(call: Call, seed: Tensor | None = None) -> Result:
    """The results of the call; `seed`, whole and below 2**32, chooses the cells that dropout drops."""
    entry = CACHE.entry(call.mask, call.request, call.backend)
    if entry.plan.warning:
        warn(entry.plan.warning)
    inputs = call.inputs
    if inputs.q.is_meta:
        return result_like(inputs.q, call.request)
    if inputs.dropout:
        inputs = inputs._replace(seed=int(new_seed() if seed is None else seed))
    return entry.backend.run(entry.lowered or CACHE.lowered(entry), inputs, entry.plan.job)


def new_seed() -> Tensor:
    """Drawn from torch's generator, so that `torch.manual_seed` repeats it."""
    return torch.randint(1 << 32, ())


def result_like(q: Tensor, r: Request) -> Result:
    """Results of the right shapes and dtypes beside q, without numbers: on the meta device, or while tracing."""
    rows = (r.batch, r.heads, r.q_len)
    lse = q.new_empty(rows, dtype=r.compute_dtype) if r.return_lse else None
    return Result(q.new_empty((*rows, r.value_dim)), lse, q.new_empty((*rows, r.kv_len)) if r.return_weights else None)
