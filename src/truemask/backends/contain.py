"""Torch's CPU flash kernel held to laws 5 and 6: zeros for dead rows, and no NaN across a masked cell; and with sinks.

The kernel multiplies masked cells by zero, so a NaN, an infinity or an overflow behind the mask shows up as something
that is not finite in its results. One sum over them notices (lse is part of it: some of the kernel's fast
exponentials turn NaN into a number, its lse stays NaN); then the call is computed again by `eager`, where masked
cells add nothing. A sum that overflows by itself is a false alarm: slower, never wrong.

A sink takes its share of a row after the fact: out' = out * sigmoid(lse - sink), lse' = log(exp(lse) + exp(sink)).
The kernel's backward, given out' and lse', computes the gradients of just that, without another rounding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from truemask.backends.base import Inputs
from truemask.backends.eager import beside_sink, eager_attention
from truemask.errors import PlanError
from truemask.masks.biases import Bias
from truemask.masks.core import Mask

FORWARD = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
HALVES = (torch.bfloat16, torch.float16)


class Flash(NamedTuple):
    """One call of the kernel, without q, k, v and sinks."""

    scale: float
    causal: bool
    additive: Tensor | None  # 0 or a bias where allowed, -inf elsewhere; each axis whole or 1
    dead: Tensor | None  # bool [b, h, q] (1 where it does not vary): rows that see nothing; None if there are none
    mask: Mask  # the same once more, for `eager`
    bias: Tensor | Bias | None


class Forward(NamedTuple):
    """Results of a forward, and what its backward starts from."""

    out: Tensor  # b hq q d
    lse: Tensor  # b hq q, over keys only, -inf for dead rows
    merged: Tensor  # the same with the sink, and the kernel's own finite value for dead rows
    contained: bool  # made by `eager`


def flash_attention(
    call: Flash, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, grad: bool
) -> tuple[Tensor, Tensor]:
    """`out [b, hq, q, d]` and `lse [b, hq, q]`; q, k and v of one head size. Differentiable once if `grad`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if grad:
        return FlashFunction.apply(call, q, k, v, sinks)  # pyright: ignore[reportReturnType]
    found = _forward(call, q, k, v, sinks)
    return found.out, found.lse


class FlashFunction(Function):
    """The kernel with a backward that is contained too, and second derivatives refused by name."""

    @staticmethod
    def forward(ctx: Any, call: Flash, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        found = _forward(call, q, k, v, sinks)
        ctx.call, ctx.contained = call, found.contained
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, found.out, found.lse, found.merged)
        return found.out, found.lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dout, dlse = grads
        if dout is None and dlse is None:
            return None, None, None, None, None
        saved = Saved(*ctx.saved_tensors)
        dout = torch.zeros_like(saved.out) if dout is None else dout
        if not torch.is_grad_enabled():
            return None, *_gradients(ctx.call, ctx.contained, saved, dout, dlse)
        with torch.no_grad():  # the caller asked for a graph of the gradients
            found = _gradients(ctx.call, ctx.contained, saved, dout, dlse)
        links = [x for x in (*saved[:4], dout, dlse) if x is not None]
        return None, *_OnlyOnce.apply(len(links), *links, *found)  # pyright: ignore[reportGeneralTypeIssues]


class Saved(NamedTuple):
    """What a backward starts from."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    out: Tensor
    lse: Tensor
    merged: Tensor


class _OnlyOnce(Function):
    """Gradients that may be used but not differentiated."""

    @staticmethod
    def forward(ctx: Any, links: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in tensors[links:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        raise PlanError(
            "the backend 'sdpa' has no second derivative (torch's kernel lacks it): "
            'call attend(..., backend="reference"), whose derivatives of every order exist'
        )


# -- forward -----------------------------------------------------------------------------------------------------------


def _forward(call: Flash, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Forward:
    """The kernel's results with the sinks' share taken, or those of `eager` if they are not finite."""
    if q.numel() == 0 or k.numel() == 0:  # the kernel divides by such sizes
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=_wide(q.dtype))
        return Forward(torch.zeros_like(q), lse, lse, False)
    out, own = FORWARD(q, k, v, 0.0, call.causal, attn_mask=call.additive, scale=call.scale)
    if not _finite(out, own):
        found = eager_attention(Inputs(q, k, v, call.scale, bias=call.bias, sink_logits=sinks), call.mask)
        assert found.lse is not None
        return Forward(found.out, found.lse, found.lse, True)
    lse = own if call.dead is None else own.masked_fill(call.dead, -torch.inf)
    if sinks is None:
        return Forward(out, lse, own, False)
    sink = sinks.to(own.dtype)[:, None]
    out = (out * beside_sink(lse, sink)[..., None]).to(out.dtype)
    return Forward(out, lse, torch.logaddexp(own, sink), False)


# -- backward ----------------------------------------------------------------------------------------------------------


def _gradients(
    call: Flash, contained: bool, saved: Saved, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of q, k, v and the sinks, by the kernel if its results are finite."""
    grads = None if contained else _backward(call, saved, dout, dlse)
    return _contained_backward(call, saved, dout, dlse) if grads is None else grads


def _backward(call: Flash, saved: Saved, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...] | None:
    """The kernel's gradients, or None if they are not finite."""
    q, k, v, sinks, out, _, merged = saved
    if q.numel() == 0 or k.numel() == 0:
        return tuple(None if x is None else torch.zeros_like(x) for x in saved[:4])
    dsinks = None if sinks is None else _sink_gradient(call, sinks, dout, out, merged)
    if dlse is not None:
        q, k, v, dout, out = _with_lse_gradient(call, saved, dout, dlse)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    grads = BACKWARD(dout, q, k, v, out, merged, 0.0, call.causal, attn_mask=call.additive, scale=call.scale)
    if not _finite(*grads) or (dsinks is not None and not _finite(dsinks)):
        return None
    if dlse is not None:
        grads = [grad[..., : saved.q.shape[-1]] for grad in grads]
    return *grads, dsinks


def _sink_gradient(call: Flash, sinks: Tensor, dout: Tensor, out: Tensor, merged: Tensor) -> Tensor:
    """`-exp(sink - lse') * (dout . out')` over samples and rows: what a softmax gives a column without a value."""
    sink = sinks.to(merged.dtype)[:, None]
    share = torch.exp(sink - merged)
    reached = -share * (dout.to(merged.dtype) * out.to(merged.dtype)).sum(-1)
    if call.dead is not None:
        reached = reached.masked_fill(call.dead, 0)
    return reached.sum((0, 2)).to(sinks.dtype)


def _with_lse_gradient(call: Flash, saved: Saved, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, dout and out with a few more columns, through which the kernel's backward adds the gradient of lse.

    The gradient of a score is p * (dout . v - dout . out + dlse). A column that is 0 in q, k and v, 1 in dout and
    -dlse in out leaves all but that untouched, exactly. Half-precision dtypes get dlse in three parts, which lose
    nothing. With a sink, p is but its share of the softmax that lse is about, so dlse is divided by that share.
    """
    q, k, v, sinks, out, lse, merged = saved
    rest = dlse if sinks is None else dlse / torch.exp(lse - merged)
    rest = rest if call.dead is None else rest.masked_fill(call.dead, 0)
    parts: list[Tensor] = []
    for _ in range(3 if out.dtype in HALVES else 1):
        parts.append(rest.to(out.dtype))
        rest = rest - parts[-1].to(rest.dtype)
    wider = 8  # whole vectors, and room for the parts
    column = torch.stack(parts, -1)
    dout = torch.cat([dout, pad(torch.ones_like(column), (0, wider - len(parts)))], -1)
    out = torch.cat([out, pad(-column, (0, wider - len(parts)))], -1)
    return pad(q, (0, wider)), pad(k, (0, wider)), pad(v, (0, wider)), dout, out


def _contained_backward(call: Flash, saved: Saved, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients by way of `eager`."""
    with torch.enable_grad():
        q, k, v, sinks = (None if x is None else x.detach().requires_grad_() for x in saved[:4])
        assert q is not None and k is not None and v is not None  # noqa: PT018
        bias = call.bias.detach() if isinstance(call.bias, Tensor) else call.bias
        found = eager_attention(Inputs(q, k, v, call.scale, bias=bias, sink_logits=sinks), call.mask)
        assert found.lse is not None
        results, gradients = [found.out], [dout]
        if dlse is not None:
            results, gradients = [*results, found.lse], [*gradients, dlse]
        leaves = [q, k, v] if sinks is None else [q, k, v, sinks]
        grads = torch.autograd.grad(results, leaves, gradients)
    return grads if sinks is not None else (*grads, None)


def _finite(*tensors: Tensor) -> bool:
    """Whether the sum of everything is finite."""
    return math.isfinite(sum(x.sum(dtype=_wide(x.dtype)).item() for x in tensors))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of lse: fp64 for doubles, fp32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
