"""Torch's CPU flash kernel held to laws 5 and 6: zeros for dead rows, and no NaN across a masked cell.

The kernel multiplies masked cells by zero, so a NaN, an infinity or an overflow behind the mask shows up as something not
finite in its results. One sum over them notices (the log-sum-exp is part of the sum: some of the kernel's fast exponentials
turn NaN into a number, the log-sum-exp never does); then the call is computed again by `eager`, where masked cells contribute
nothing. A sum that overflows by itself is a false alarm: slower, never wrong.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from truemask.backends.base import Inputs
from truemask.backends.eager import eager_attention
from truemask.errors import PlanError
from truemask.masks.biases import Bias
from truemask.masks.core import Mask

FORWARD = torch._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Flash(NamedTuple):
    """One call of the kernel, without q, k and v."""

    scale: float
    causal: bool
    additive: Tensor | None  # 0 or a bias where allowed, -inf elsewhere; each axis whole or 1
    dead: Tensor | None  # bool [b, h, q] (1 where it does not vary): rows that see nothing; None if there are none
    mask: Mask  # the same once more, for `eager`
    bias: Tensor | Bias | None


def flash_attention(call: Flash, q: Tensor, k: Tensor, v: Tensor, *, grad: bool) -> tuple[Tensor, Tensor]:
    """`out [b, hq, q, d]` and `lse [b, hq, q]`; q, k and v of one head size. Differentiable once if `grad`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if grad:
        return FlashFunction.apply(call, q, k, v)  # pyright: ignore[reportReturnType]
    out, lse, _ = _forward(call, q, k, v)
    return out, _visible(call, lse)


class FlashFunction(Function):
    """The kernel with a backward that is contained too, and second derivatives refused by name."""

    @staticmethod
    def forward(ctx: Any, call: Flash, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, ctx.contained = _forward(call, q, k, v)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, _visible(call, lse)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return None, None, None, None
        saved = ctx.saved_tensors
        dout = torch.zeros_like(saved[3]) if dout is None else dout
        if not torch.is_grad_enabled():
            return None, *_gradients(ctx.call, ctx.contained, saved, dout, dlse)
        with torch.no_grad():  # the caller asked for a graph of the gradients
            grads = _gradients(ctx.call, ctx.contained, saved, dout, dlse)
        links = [x for x in (*saved[:3], dout, dlse) if x is not None]
        return None, *_OnlyOnce.apply(*grads, *links)  # pyright: ignore[reportGeneralTypeIssues]


class _OnlyOnce(Function):
    """Gradients that may be used but not differentiated."""

    @staticmethod
    def forward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, *links: Tensor) -> tuple[Tensor, ...]:
        return dq.view_as(dq), dk.view_as(dk), dv.view_as(dv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise PlanError(
            "the backend 'sdpa' has no second derivative (torch's kernel lacks it): "
            'call attend(..., backend="reference"), whose derivatives of every order exist'
        )


def _forward(call: Flash, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The kernel's out and own lse (0, not -inf, for rows that it knows to be dead), and whether `eager` made them."""
    if q.numel() == 0 or k.numel() == 0:  # the kernel divides by such sizes
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=_wide(q.dtype)), False
    out, lse = FORWARD(q, k, v, 0.0, call.causal, attn_mask=call.additive, scale=call.scale)
    if _finite(out, lse):
        return out, lse, False
    found = eager_attention(Inputs(q, k, v, call.scale, bias=call.bias), call.mask)
    assert found.lse is not None
    return found.out, found.lse, True


def _visible(call: Flash, lse: Tensor) -> Tensor:
    """The log-sum-exp as callers know it: -inf for dead rows."""
    return lse if call.dead is None else lse.masked_fill(call.dead, -torch.inf)


def _gradients(
    call: Flash, contained: bool, saved: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """Of q, k and v, by the kernel if its results are finite."""
    grads = None if contained else _backward(call, saved, dout, dlse)
    return _contained_backward(call, saved[:3], dout, dlse) if grads is None else grads


def _backward(call: Flash, saved: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, ...] | None:
    """The kernel's gradients, or None if they are not finite."""
    q, k, v, out, lse = saved
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if dlse is not None:
        dlse = dlse if call.dead is None else dlse.masked_fill(call.dead, 0)
        q, k, v, dout, out = _with_lse_gradient(q, k, v, dout, out, dlse)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    grads = BACKWARD(dout, q, k, v, out, lse, 0.0, call.causal, attn_mask=call.additive, scale=call.scale)
    if not _finite(*grads):
        return None
    return grads if dlse is None else tuple(grad[..., : saved[0].shape[-1]] for grad in grads)


def _with_lse_gradient(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    """The same call with a few more columns, through which the kernel's backward adds the gradient of lse.

    The gradient of a score is p * (dout . v - dout . out + dlse). A column that is 0 in q, k and v, 1 in dout and -dlse in
    out leaves all but that untouched, exactly. Half-precision dtypes get dlse in three parts, which lose nothing.
    """
    parts, rest = [], dlse
    for _ in range(3 if out.dtype in (torch.bfloat16, torch.float16) else 1):
        parts.append(rest.to(out.dtype))
        rest = rest - parts[-1].to(rest.dtype)
    wider = 8  # whole vectors, and room for the parts
    column = torch.stack(parts, -1)
    dout = torch.cat([dout, pad(torch.ones_like(column), (0, wider - len(parts)))], -1)
    out = torch.cat([out, pad(-column, (0, wider - len(parts)))], -1)
    return pad(q, (0, wider)), pad(k, (0, wider)), pad(v, (0, wider)), dout, out


def _contained_backward(
    call: Flash, leaves: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """The gradients by way of `eager`."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in leaves)
        found = eager_attention(Inputs(q, k, v, call.scale, bias=_detached(call.bias)), call.mask)
        assert found.lse is not None
        pairs = [(found.out, dout)] + ([] if dlse is None else [(found.lse, dlse)])
        results, gradients = zip(*pairs, strict=True)
        return torch.autograd.grad(results, (q, k, v), gradients)


def _detached(bias: Tensor | Bias | None) -> Tensor | Bias | None:
    return bias.detach() if isinstance(bias, Tensor) else bias


def _finite(*tensors: Tensor) -> bool:
    """Whether the sum of everything is finite."""
    return math.isfinite(sum(x.sum(dtype=_wide(x.dtype)).item() for x in tensors))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of lse: fp64 for doubles, fp32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
