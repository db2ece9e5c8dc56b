"""Torch's CPU flash kernel as it is, and what must be kept from it so that its results stay finite.

The kernel multiplies masked cells by zero, so it may not be shown a NaN, an infinity or a number whose products
overflow behind the mask. `split` names the rows that meet such a thing legitimately and zeroes it in q, k and v: the
kernel's results for all other rows are then exactly theirs, because what was zeroed is masked for them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.masks.biases import Bias
from truemask.masks.core import Mask

KERNEL = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Flash(NamedTuple):
    """One call of the kernel, without q, k, v and sinks."""

    scale: float
    causal: bool
    additive: Tensor | None  # 0 or a bias where allowed, -inf elsewhere; each axis whole or 1
    dead: Tensor | None  # bool [b, h, q] (1 where it does not vary): rows that see nothing; None if there are none
    mask: Mask  # the same once more, for `eager`
    bias: Tensor | Bias | None


def kernel(call: Flash, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """out and the kernel's own lse (0 for rows that it knows to be dead), or None if they are not finite."""
    out, own = KERNEL(q, k, v, 0.0, call.causal, attn_mask=call.additive, scale=call.scale)
    return (out, own) if finite(out, own) else None


def kernel_backward(
    call: Flash, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """dq, dk and dv, or None if they are not finite."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    grads = KERNEL_BACKWARD(dout, q, k, v, out, lse, 0.0, call.causal, attn_mask=call.additive, scale=call.scale)
    return grads if finite(*grads) else None


def finite(*tensors: Tensor) -> bool:
    """Whether the sum of everything is finite."""
    return math.isfinite(sum(x.sum(dtype=wide(x.dtype)).item() for x in tensors))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of lse: fp64 for doubles, fp32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Split(NamedTuple):
    """q, k and v with zeros for what is hostile, and the rows (bool `[q]`) that meet it in some sample and head."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor


def split(call: Flash, q: Tensor, k: Tensor, v: Tensor) -> Split:
    """Take what is hostile out of q, k and v, and say which rows it concerns."""
    bad_q, bad_k = hostile(q), hostile(k) | hostile(v)
    concerned = bad_q | _sees(call, bad_k.repeat_interleave(q.shape[1] // k.shape[1], 1), q.shape[2])
    q, k, v = (x.masked_fill(bad[..., None], 0) for x, bad in ((q, bad_q), (k, bad_k), (v, bad_k)))
    return Split(q, k, v, concerned.any(1).any(0))


def hostile(x: Tensor) -> Tensor:
    """Which vectors of `[b, h, n, d]` are not finite, or so large that a product with another one might not be."""
    return ~(x.abs().amax(-1) <= math.sqrt(torch.finfo(wide(x.dtype)).max) / x.shape[-1])


def _sees(call: Flash, keys: Tensor, rows: int) -> Tensor:
    """Which of the rows may attend to any of these keys (bool `[b, h, k]`): `[b, h, q]`, or 1 where it cannot vary."""
    if call.additive is not None:
        allowed = (call.additive != -torch.inf).float()
        return (allowed.expand(*allowed.shape[:3], keys.shape[-1]) @ keys.float()[..., None]).squeeze(-1) > 0
    if call.causal:
        last = torch.arange(rows, device=keys.device).clamp(max=keys.shape[-1] - 1)
        return (keys.cumsum(-1) > 0)[..., last]
    return keys.any(-1, keepdim=True)
