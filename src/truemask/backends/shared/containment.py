"""A fast kernel held to laws 5 and 6: zeros for dead rows, and no NaN across a masked cell; and with sinks.

One sum over the kernel's results notices what came through the mask (lse is part of it: some of the kernel's fast
exponentials turn NaN into a number, its lse stays NaN). Then the rows concerned are computed by `eager`, where masked
cells add nothing, and the kernel runs again for the others without what troubled it. A sum that overflows by itself is
a false alarm: slower, never wrong.

A sink takes its share of a row after the fact: out' = out * sigmoid(lse - sink), lse' = log(exp(lse) + exp(sink)).
The kernel's backward, given out' and lse', computes the gradients of just that, without another rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from truemask.backends.base import Inputs, Result, wide
from truemask.backends.shared.autograd import attention, tensors_of
from truemask.backends.shared.cpu_flash import Kernel, fitted, hostile, run_backward, run_forward, split
from truemask.backends.shared.eager import beside_sink, eager_attention

HALVES = (torch.bfloat16, torch.float16)
Grads = tuple[Tensor, Tensor, Tensor, Tensor | None]  # of q, k, v and the sinks


class Forward(NamedTuple):
    """Results of a forward, and what its backward starts from."""

    out: Tensor  # b hq q d
    lse: Tensor  # b hq q, over keys only, -inf for dead rows
    merged: Tensor  # the same with the sink, and the kernel's own finite value for dead rows
    alarmed: bool = False


class Saved(NamedTuple):
    """What a backward starts from."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    out: Tensor
    lse: Tensor
    merged: Tensor


def flash_attention(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, grad: bool
) -> tuple[Tensor, Tensor]:
    """`out [b, hq, q, d]` and `lse [b, hq, q]`, differentiable once if `grad`.

    q, k and v are `fitted`; without gradients k and v need not be, if the kernel fits what it takes of them.
    """
    if not grad:
        return _forward(kernel, q, k, v, sinks)[:2]
    return attention(_Contained(kernel), (q, k, v, sinks), tensors_of(kernel.bias), grad=True)


class _Contained:
    """The kernel as an `AttentionImpl` whose backward is contained too."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name = kernel, kernel.name
        self.alarmed = False

    def results(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, ...]:
        forward = _forward(self.kernel, q, k, v, sinks)
        self.alarmed = forward.alarmed
        return forward.out, forward.lse, forward.merged

    def gradients(self, tensors: Any, results: Any, output_grads: Any, needed: Any) -> Grads:
        saved, (dout, dlse) = Saved(*tensors, *results), output_grads
        dout = torch.zeros_like(saved.out) if dout is None else dout
        grads = None if self.alarmed else _backward(self.kernel, saved, dout, dlse)
        return _contained_backward(self.kernel, saved, dout, dlse) if grads is None else grads


# -- forward -----------------------------------------------------------------------------------------------------------


def _forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Forward:
    """The kernel's results with the sinks' share taken, contained if they are not finite."""
    if q.numel() == 0 or k.numel() == 0:  # the kernel divides by such sizes
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))
        return Forward(torch.zeros_like(q), lse, lse)
    results = run_forward(kernel, q, k, v)
    return _contained(kernel, q, k, v, sinks) if results is None else _finished(kernel, *results, sinks)


def _finished(kernel: Kernel, out: Tensor, kernel_lse: Tensor, sinks: Tensor | None) -> Forward:
    """The kernel's results as callers know them: lse -inf for dead rows, out beside the sinks."""
    lse = kernel_lse if kernel.dead is None else kernel_lse.masked_fill(kernel.dead, -torch.inf)
    if sinks is None:
        return Forward(out, lse, kernel_lse)
    sink = sinks.to(kernel_lse.dtype)[:, None]
    out = (out * beside_sink(lse, sink)[..., None]).to(out.dtype)
    return Forward(out, lse, torch.logaddexp(kernel_lse, sink))


def _contained(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Forward:
    """Rows that something hostile reaches by `eager`, the others by the kernel; or else all by `eager`."""
    k, v = (fitted(x, q.shape[-1], q.dtype) for x in (k, v))
    parts = split(kernel, q, k, v)
    results = None if parts.rows.all() else run_forward(kernel, parts.q, parts.k, parts.v)
    if results is None:
        eager = _eager(kernel, q, k, v, sinks, None)
        assert eager.lse is not None
        return Forward(eager.out, eager.lse, eager.lse, True)
    out, lse, merged, _ = _finished(kernel, *results, sinks)
    rows = parts.rows.nonzero()[:, 0]
    if len(rows):
        eager = _eager(kernel, q[:, :, rows], k, v, sinks, rows)
        assert eager.lse is not None
        lse = lse.index_copy(2, rows, eager.lse)
        out = out.index_copy(2, rows, eager.out)
    return Forward(out, lse, merged, True)


def _eager(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, rows: Tensor | None) -> Result:
    """The same attention by `eager`; with `rows`, q holds those rows only."""
    bias, mask = kernel.bias, kernel.mask
    if isinstance(bias, Tensor):
        bias = bias.detach() if rows is None or bias.shape[2] == 1 else bias.detach()[:, :, rows]
    if rows is not None:
        mask = mask.take(q=rows)
    return eager_attention(Inputs(q, k, v, kernel.scale, bias=bias, sink_logits=sinks), mask)


# -- backward ----------------------------------------------------------------------------------------------------------


def _backward(kernel: Kernel, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Grads | None:
    """The kernel's gradients, or None if they are not finite."""
    q, k, v, sinks, out, _, merged = saved
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), _zeros(sinks)
    dsinks = None if sinks is None else _sink_gradient(kernel, sinks, dout, out, merged)
    if dsinks is not None and not torch.isfinite(dsinks).all():
        return None
    if dlse is not None:
        q, k, v, dout, out = _with_lse_gradient(kernel, saved, dout, dlse)
    grads = run_backward(kernel, q, k, v, out, merged, dout)
    if grads is None or dlse is None:
        return None if grads is None else (*grads, dsinks)
    dq, dk, dv = (grad[..., : saved.q.shape[-1]] for grad in grads)
    return dq, dk, dv, dsinks


def _zeros(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else torch.zeros_like(sinks)


def _sink_gradient(kernel: Kernel, sinks: Tensor, dout: Tensor, out: Tensor, merged: Tensor) -> Tensor:
    """`-exp(sink - lse') * (dout . out')` over samples and rows: what a softmax gives a column without a value."""
    share = torch.exp(sinks.to(merged.dtype)[:, None] - merged)
    reached = -share * (dout.to(merged.dtype) * out.to(merged.dtype)).sum(-1)
    if kernel.dead is not None:
        reached = reached.masked_fill(kernel.dead, 0)
    return reached.sum((0, 2)).to(sinks.dtype)


def _with_lse_gradient(kernel: Kernel, saved: Saved, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, dout and out with a few more columns, through which the kernel's backward adds the gradient of lse.

    The gradient of a score is p * (dout . v - dout . out + dlse). A column that is 0 in q, k and v, 1 in dout and
    -dlse in out leaves all but that untouched, exactly. Half-precision dtypes get dlse in three parts, which lose
    nothing. With a sink, p is but its share of the softmax that lse is about, so dlse is divided by that share.
    """
    q, k, v, sinks, out, lse, merged = saved
    rest = dlse if sinks is None else dlse / torch.exp(lse - merged)
    rest = rest if kernel.dead is None else rest.masked_fill(kernel.dead, 0)
    parts: list[Tensor] = []
    for _ in range(3 if out.dtype in HALVES else 1):
        parts.append(rest.to(out.dtype))
        rest = rest - parts[-1].to(rest.dtype)
    wider = 8  # whole vectors, and room for the parts
    column = torch.stack(parts, -1)
    dout = torch.cat([dout, pad(torch.ones_like(column), (0, wider - len(parts)))], -1)
    out = torch.cat([out, pad(-column, (0, wider - len(parts)))], -1)
    return pad(q, (0, wider)), pad(k, (0, wider)), pad(v, (0, wider)), dout, out


def _contained_backward(kernel: Kernel, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of and through the rows that something hostile reaches by `eager`, of the others by the kernel."""
    parts = split(kernel, saved.q, saved.k, saved.v)
    bad = parts.rows | hostile(dout).any(1).any(0)
    if dlse is not None:
        bad = bad | hostile(dlse[..., None]).any(1).any(0)
    column = bad[:, None]
    clean = Saved(
        parts.q.masked_fill(column, 0),
        parts.k,
        parts.v,
        saved.sinks,
        saved.out.masked_fill(column, 0),
        saved.lse.masked_fill(bad, 0),
        saved.merged.masked_fill(bad, 0),
    )
    others = None if dlse is None else dlse.masked_fill(bad, 0)
    grads = None if bad.all() else _backward(kernel, clean, dout.masked_fill(column, 0), others)
    if grads is None:
        return _eager_backward(kernel, saved, dout, dlse, None)
    rows = bad.nonzero()[:, 0]
    if not len(rows):
        return grads
    more = _eager_backward(kernel, saved, dout, dlse, rows)
    dq = grads[0].index_copy(2, rows, more[0])
    dsinks = None if grads[3] is None or more[3] is None else grads[3] + more[3]
    return dq, grads[1] + more[1], grads[2] + more[2], dsinks


def _eager_backward(kernel: Kernel, saved: Saved, dout: Tensor, dlse: Tensor | None, rows: Tensor | None) -> Grads:
    """The gradients through some rows, or all, by way of `eager`; that of q for those rows alone."""
    if rows is not None:
        saved = saved._replace(q=saved.q[:, :, rows])
        dout, dlse = dout[:, :, rows], None if dlse is None else dlse[:, :, rows]
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in saved[:3])
        sinks = None if saved.sinks is None else saved.sinks.detach().requires_grad_()
        eager = _eager(kernel, q, k, v, sinks, rows)
        assert eager.lse is not None
        results, output_grads = [eager.out], [dout]
        if dlse is not None:
            results, output_grads = [eager.out, eager.lse], [dout, dlse]
        grads = torch.autograd.grad(results, [x for x in (q, k, v, sinks) if x is not None], output_grads)
    return grads[0], grads[1], grads[2], None if sinks is None else grads[3]
