"""A call that was read, run: its plan, the plan's warning, what was lowered for it, the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.attention.call import Call
from truemask.attention.planning.cache import CACHE
from truemask.backends.base import Request, Result
from truemask.backends.context import CHOSEN
from truemask.common.real_tensors import is_diverted
from truemask.common.torch_internals import transform
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


class Ready:
    """A call without gradients that was read and planned: for tensors of the same make it need not be again.

    So the layers of a model, which ask the same of other tensors, read a call once in every step of decoding.
    `run(q, k, v)` is out `[b, h, q, dv]`.
    """

    def __init__(self, call: Call) -> None:
        entry = CACHE.entry(call.mask, call.request, call.backend)
        self.run = entry.backend.repeated(CACHE.lowered(entry), call.inputs, entry.plan.job)
        self.warning, self._named = entry.plan.warning, CHOSEN.get()
        self._makes = [_make_of(x) for x in call.inputs[:3]]
        self._threads = torch.get_num_threads()

    @classmethod
    def of(cls, call: Call) -> Ready | None:
        """None of a call that is not the same each time: with gradients, dropout, a bias, in a transform, a warning."""
        r = call.request
        changes = r.grad or r.dropout or r.bias or r.sinks or r.transform or call.mask.functions
        ready = None if changes or call.inputs.q.is_meta or is_diverted() else cls(call)
        return None if ready is None or ready.warning else ready

    def takes(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether a call of these tensors, in these surroundings, would be the same but for their numbers."""
        return (
            [_make_of(x) for x in (q, k, v)] == self._makes
            and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
            and torch.get_num_threads() == self._threads
            and CHOSEN.get() == self._named
            and not torch.is_autocast_enabled(q.device.type)
            and not is_diverted()
            and not transform()
        )


def _make_of(x: Tensor) -> tuple[object, ...]:
    return type(x), x.shape, x.dtype, x.device


def new_seed() -> Tensor:
    """Drawn from torch's generator, so that `torch.manual_seed` repeats it."""
    return torch.randint(1 << 32, ())


def result_like(q: Tensor, r: Request) -> Result:
    """Results of the right shapes and dtypes beside q, without numbers: on the meta device, or while tracing."""
    rows = (r.batch, r.heads, r.q_len)
    lse = q.new_empty(rows, dtype=r.compute_dtype) if r.return_lse else None
    return Result(q.new_empty((*rows, r.value_dim)), lse, q.new_empty((*rows, r.kv_len)) if r.return_weights else None)
