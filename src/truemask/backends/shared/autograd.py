"""Attention with a backward of its own, which is differentiated once: the frame that the fast ways share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from truemask.backends.base import batched_refusal
from truemask.biases import Bias
from truemask.common.torch_internals import is_batched
from truemask.errors import PlanError

Gradients = tuple[Tensor | None, ...]


class AttentionImpl(Protocol):
    """One call without its tensors, so that a graph keeps those by torch's own means only."""

    @property
    def name(self) -> str:
        """The backend that it runs for."""
        ...

    @property
    def results(self) -> Callable[..., tuple[Tensor, ...]]:
        """Called with the tensors: out `[b, h, q, dv]`, lse `[b, h, q]`, and what else the backward starts from."""
        ...

    def gradients(
        self,
        tensors: Sequence[Any],
        results: Sequence[Tensor],
        output_grads: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> Gradients:
        """Of every tensor; `output_grads` are those of out and lse, one of which may be None."""
        ...


def attention(
    impl: AttentionImpl, tensors: Sequence[Tensor | None], guarded: Sequence[Tensor] = (), *, grad: bool
) -> tuple[Tensor, Tensor]:
    """out and lse, differentiable once if `grad`.

    What is `guarded` has no gradient here; it is saved so that torch notices a change of it before the backward.
    """
    if grad:
        return _Attention.apply(impl, len(tensors), *tensors, *guarded)  # pyright: ignore[reportReturnType]
    out, lse = impl.results(*tensors)[:2]
    return out, lse


def tensors_of(bias: Tensor | Bias | None) -> tuple[Tensor, ...]:
    """What is guarded of a bias."""
    return () if bias is None else (bias,) if isinstance(bias, Tensor) else bias.parameters


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, impl: AttentionImpl, count: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        results = impl.results(*tensors[:count])
        ctx.impl, ctx.count, ctx.saved_count = impl, count, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *results)
        return results[0], results[1]

    @staticmethod
    def backward(ctx: Any, *output_grads: Any) -> Gradients:
        impl, count, saved_count = ctx.impl, ctx.count, ctx.saved_count
        if any(x is not None and is_batched(x) for x in output_grads):
            raise batched_refusal(impl.name)
        if all(x is None for x in output_grads):
            return (None,) * (2 + saved_count)
        saved = ctx.saved_tensors
        tensors, results, needed = saved[:count], saved[saved_count:], ctx.needs_input_grad[2 : 2 + count]
        gradients = partial(impl.gradients, tensors, results, output_grads, needed)
        who, guarded = f"the backend {impl.name!r}", (None,) * (saved_count - count)
        return None, None, *differentiable_once(who, [*tensors, *output_grads], gradients), *guarded


def differentiable_once(
    who: str, links: Sequence[Tensor | None], gradients: Callable[[], Gradients], first: str = ""
) -> Gradients:
    """What `gradients` works out; to differentiate them by what they are made of, `links`, is refused.

    `first`: what to do before the way out that all have, naming `reference`.
    """
    if not torch.is_grad_enabled():
        return gradients()
    with torch.no_grad():  # the caller asked for a graph of the gradients
        grads = gradients()
    tensors = [x for x in links if x is not None]
    return _OnlyOnce.apply(who, first, len(tensors), *tensors, *grads)  # pyright: ignore[reportReturnType]


class _OnlyOnce(Function):
    """Gradients that may be used but not differentiated."""

    @staticmethod
    def forward(ctx: Any, who: str, first: str, links: int, *tensors: Tensor | None) -> Gradients:
        ctx.who, ctx.first = who, first
        return tuple(None if x is None else x.view_as(x) for x in tensors[links:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        raise PlanError(
            f"{ctx.who} has no second derivative: {ctx.first}"
            'call attend(..., backend="reference"), whose derivatives of every order exist, or run what calls it under '
            '`with tm.attention_backend("reference"):`'
        )
