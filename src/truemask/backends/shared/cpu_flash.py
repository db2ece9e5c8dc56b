"""Torch's CPU flash kernel as it is, and what must be kept from such kernels so that their results stay finite.

A kernel multiplies masked cells by zero, so it may not be shown a NaN, an infinity or a number whose products
overflow behind the mask. `split` names the rows that meet such a thing legitimately and zeroes it in q, k and v: the
kernel's results for all other rows are then exactly theirs, because what was zeroed is masked for them.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from truemask.backends.base import wide
from truemask.biases import Bias
from truemask.common.torch_internals import cpu_flash, cpu_flash_backward
from truemask.masks.core.mask import Mask

Grads = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """One call of a fast kernel, without q, k, v and sinks: what `containment` holds to laws 5 and 6."""

    @property
    def name(self) -> str:
        """The backend it runs for."""
        ...

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        ...

    @property
    def mask(self) -> Mask:
        """The mask, for `eager`."""
        ...

    @property
    def bias(self) -> Tensor | Bias | None:
        """The bias, for `eager`; it has no gradient."""
        ...

    @property
    def dead(self) -> Tensor | None:
        """Rows that see nothing, bool `[b, h, q]` (1 where it does not vary), known after `forward`; None: no row."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out `[b, h, q, d]` and lse `[b, h, q]`, which is finite for dead rows."""
        ...

    def backward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Grads:
        """dq, dk and dv."""
        ...

    def sees(self, keys: Tensor, rows: int) -> Tensor:
        """Which of the rows may attend to any of these keys (bool `[b, h, k]`): `[b, h, q]`, or 1 where all do."""
        ...


class Flash(NamedTuple):
    """One call of torch's kernel under a dense mask, its flag, or nothing."""

    scale: float
    causal: bool
    additive: Tensor | None  # 0 or a bias where allowed, -inf elsewhere; each axis whole or 1
    dead: Tensor | None
    mask: Mask
    bias: Tensor | Bias | None
    name: str = "sdpa"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cpu_flash(q, k, v, 0.0, self.causal, attn_mask=self.additive, scale=self.scale)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Grads:
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        return cpu_flash_backward(dout, q, k, v, out, lse, 0.0, self.causal, attn_mask=self.additive, scale=self.scale)

    def sees(self, keys: Tensor, rows: int) -> Tensor:
        if self.additive is not None:
            allowed = (self.additive != -torch.inf).float()
            return (allowed.expand(*allowed.shape[:3], keys.shape[-1]) @ keys.float()[..., None]).squeeze(-1) > 0
        if self.causal:
            last = torch.arange(rows, device=keys.device).clamp(max=keys.shape[-1] - 1)
            return (keys.cumsum(-1) > 0)[..., last]
        return keys.any(-1, keepdim=True)


def run_forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """out and the kernel's own lse, or None if they are not finite."""
    out, lse = kernel.forward(q, k, v)
    return (out, lse) if finite(out, lse) else None


def run_backward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> Grads | None:
    """dq, dk and dv, or None if they are not finite."""
    grads = kernel.backward(q, k, v, out, lse, dout)
    return grads if finite(*grads) else None


def all_fitted(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype and head size: zeros behind the narrower ones change nothing."""
    width = max(q.shape[-1], v.shape[-1])
    return fitted(q, width, dtype), fitted(k, width, dtype), fitted(v, width, dtype)


def fitted(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """A tensor as kernels take it: of this dtype, zeros up to this width, and no gaps in its last axis."""
    x = x if x.dtype == dtype else x.to(dtype)
    x = x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def finite(*tensors: Tensor) -> bool:
    """Whether the sum of everything is finite."""
    total = 0.0
    for x in tensors:
        total += (x.sum() if x.dtype.itemsize >= 4 else x.sum(dtype=torch.float32)).item()
    return math.isfinite(total)


class Split(NamedTuple):
    """q, k and v with zeros for what is hostile, and the rows (bool `[q]`) that meet it in some sample and head."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor


def split(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Split:
    """Take what is hostile out of q, k and v, and say which rows it concerns."""
    bad_q, bad_k = hostile(q), hostile(k) | hostile(v)
    concerned = bad_q | kernel.sees(bad_k.repeat_interleave(q.shape[1] // k.shape[1], 1), q.shape[2])
    q, k, v = (x.masked_fill(bad[..., None], 0) for x, bad in ((q, bad_q), (k, bad_k), (v, bad_k)))
    return Split(q, k, v, concerned.any(1).any(0))


def hostile(x: Tensor) -> Tensor:
    """Which vectors of `[b, h, n, d]` are not finite, or so large that a product with another one might not be."""
    return ~(x.abs().amax(-1) <= math.sqrt(torch.finfo(wide(x.dtype)).max) / x.shape[-1])
