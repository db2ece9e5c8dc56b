"""The backend that every torch has: `scaled_dot_product_attention`'s kernels with no mask, a flag, or a dense mask.

| the mask, at these sizes      | how it runs                                    |
|-------------------------------|------------------------------------------------|
| lets everything through       | no mask                                        |
| is `causal`                   | the kernel's own flag, which skips half        |
| is anything else              | dense, of size 1 where it does not vary        |

On the CPU the kernel is called directly, because it gives the log-sum-exp too (for `return_lse` and sinks) and because
`containment` must see its results. On other devices the call is `F.scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from truemask.backends.backend import ANY_DEVICE, Backend, Capabilities, Proposal
from truemask.backends.base import Inputs, Job, Lowered, Request, Result
from truemask.backends.costs.model import table
from truemask.backends.costs.prediction import (
    BACKWARD_PRODUCTS,
    KEYS_AT_ONCE,
    Blocks,
    blocks_of,
    flash_seconds,
    paces,
    rows_at_once,
    spread,
    waiting,
)
from truemask.backends.shared.containment import flash_attention
from truemask.backends.shared.cpu_flash import Flash, all_fitted
from truemask.backends.shared.eager import bias_values
from truemask.biases import Bias
from truemask.common.formatting import memory
from truemask.masks.compose.boolean import everything

MAX_DENSE_BYTES = 4 << 30  # bytes of a dense mask or bias that are too many


class AdditiveMask(NamedTuple):
    """A mask as numbers: 0 where allowed and -inf elsewhere, and the rows that see nothing (None: there are none)."""

    additive: Tensor
    dead: Tensor | None


class KernelMask(NamedTuple):
    """What the kernel is told of the mask, and the dtype that it computes in."""

    dtype: torch.dtype
    causal: bool = False
    dense: AdditiveMask | None = None


class SdpaProposal(Proposal):
    """Torch's kernel with no mask, its causal flag, or a dense mask."""

    @property
    def cost(self) -> float:
        job, r, rates = self.job, self.job.request, table().sdpa
        forward, backward = paces(rates, r)
        planes = r.batch * r.heads
        cells, count = kernel_work(r, causal=_flag(job))
        blocks = Blocks(r.q_len, planes * cells, planes * count, planes * math.ceil(r.q_len / rows_at_once(r.q_len)))
        cost = rates.call + flash_seconds(rates, forward, r, blocks)
        cost += waiting(rates, r, kernel_dtype(r).itemsize, blocks.tasks)
        if kernel_dtype(r) != r.dtype:  # the calls that make fp32 of q, k and v, and what comes back of it
            cost += rates.call * (0.5 + r.grad)
        if r.bias:  # joined in every call; a mask alone is lowered once
            cost += _dense_bytes(job) / rates.join
        if not _flag(job) and (r.bias or job.pattern != "everything"):
            cost += (1 + r.grad) * spread(rates) * r.cells / rates.masked
        if r.grad:  # whose tasks are heads
            blocks = blocks._replace(tasks=planes)
            cost += rates.call_backward + flash_seconds(rates, backward, r, blocks, BACKWARD_PRODUCTS)
        return cost

    @property
    def description(self) -> str:
        job = self.job
        if _flag(job):
            return "the causal flag"
        if job.pattern == "everything" and not job.request.bias:
            return "no mask"
        cells, itemsize = _dense_cells(job), _mask_dtype(job.request).itemsize
        what = "bias" if job.pattern == "everything" else "mask and bias" if job.request.bias else "mask"
        return f"dense {what}, {memory(cells * itemsize)}"

    def lower(self) -> Lowered:
        kernel = KernelMask(kernel_dtype(self.job.request), causal=_flag(self.job))
        if kernel.causal or self.job.pattern == "everything":
            return Lowered(kernel)
        dense = lower_dense(self.job)
        return Lowered(kernel._replace(dense=dense), sum(x.nbytes for x in dense if x is not None))


class Sdpa(Backend):
    """Torch's fused attention."""

    name = "sdpa"
    devices: ClassVar = {
        "cpu": Capabilities(frozenset(("grad", "bias", "sinks", "return_lse"))),
        ANY_DEVICE: Capabilities(frozenset(("grad", "bias"))),
    }
    tolerance: ClassVar = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
    words: ClassVar = {
        "softcap": "softcap: the kernel has no soft cap",
        "dropout": "dropout: the kernel cannot drop the cells that other backends drop",
        "return_weights": "return_weights: the kernel never holds the weights",
        "bias_grad": "the gradient of a bias: the kernel has none",
        "transform": "{transform}: the kernel has no rule for it",
        "return_lse": "return_lse: the kernel gives it on the CPU only",
        "sinks": "sink_logits: they need the kernel's lse, which the CPU's gives",
    }

    def propose(self, job: Job) -> Proposal | list[str]:
        return self.lacking(job.request) + _too_large(job) or SdpaProposal(job)

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        kernel: KernelMask = lowered.data
        if inputs.bias is not None:
            kernel = kernel._replace(dense=with_bias(kernel.dense, inputs, job))
        if inputs.q.device.type != "cpu":
            return Result(front_end(inputs, kernel))
        out, lse = _flash(inputs, kernel, job)
        return Result(out, lse if job.request.return_lse else None)


def _flash(inputs: Inputs, kernel: KernelMask, job: Job) -> tuple[Tensor, Tensor]:
    """The CPU kernel; it wants one head size, and columns of zeros change nothing."""
    q, k, v = inputs.q, inputs.k, inputs.v
    dtype, width = q.dtype, v.shape[-1]
    q, k, v = all_fitted(q, k, v, kernel.dtype)
    additive, dead = kernel.dense or (None, None)
    call = Flash(inputs.scale, kernel.causal, additive, dead, job.mask, inputs.bias)
    out, lse = flash_attention(call, q, k, v, inputs.sink_logits, grad=job.request.grad)
    out = out if out.shape[-1] == width else out[..., :width]
    return out if dtype == kernel.dtype else out.to(dtype), lse


def front_end(inputs: Inputs, kernel: KernelMask) -> Tensor:
    """`F.scaled_dot_product_attention`; dead rows are opened before, so that no kernel meets one, and zeroed after."""
    q, k, v = inputs.q, inputs.k, inputs.v
    additive, dead = kernel.dense or (None, None)
    if additive is not None:
        additive = additive if dead is None else additive.masked_fill(dead[..., None], 0)
        additive = additive.to(q.dtype)
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=additive, is_causal=kernel.causal, scale=inputs.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out if dead is None else out.masked_fill(dead[..., None], 0)


# -- dense masks and biases --------------------------------------------------------------------------------------------


def lower_dense(job: Job) -> AdditiveMask:
    """The mask as numbers, one row for all queries if it does not vary with them."""
    r, mask = job.request, job.mask
    rows = r.q_len if mask.varies_with_query else min(r.q_len, 1)
    if job.small is not None:
        allowed = job.small[:, :, :rows].to(r.device)
    else:
        allowed = mask.to_dense(rows, r.kv_len, batch=r.batch, heads=r.heads, device=r.device)
    alive = torch.from_numpy(allowed.numpy().any(-1)) if allowed.device.type == "cpu" else allowed.any(-1)
    return AdditiveMask(as_numbers(allowed, _mask_dtype(r)), None if bool(alive.all()) else ~alive)


def as_numbers(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool tensor is True and -inf elsewhere, in the dtype's bits: a tenth of the time that filling takes.

    >>> as_numbers(torch.tensor([True, False]), torch.bfloat16)
    tensor([0., -inf], dtype=torch.bfloat16)
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    least = torch.tensor(-torch.inf, dtype=dtype).view(whole).item()
    return allowed.to(whole).sub_(1).bitwise_and_(least).view(dtype)  # True is 0, False has all bits set


def with_bias(dense: AdditiveMask | None, inputs: Inputs, job: Job) -> AdditiveMask:
    """Bias where the mask allows, -inf elsewhere."""
    bias = inputs.bias
    if isinstance(bias, Bias):
        r = job.request
        bias = bias_values(bias, job.positions, slice(None), (r.batch, r.heads), inputs.q.device)
    assert bias is not None
    bias = bias.detach().to(_mask_dtype(job.request))
    if dense is not None:
        bias = torch.where(dense.additive == 0, bias, -torch.inf)
    return AdditiveMask(bias, _dead(bias))


def kernel_dtype(r: Request) -> torch.dtype:
    """What the kernel computes in: q's dtype, or fp32 for half precision that is not native or meets a sink.

    A CPU without arithmetic for a half-precision dtype converts at every step, which is far slower than fp32, the
    backward above all. And rounding before and after a sink's share is taken would break law 10.
    """
    if r.device.type != "cpu" or r.dtype.itemsize >= 4:
        return r.dtype
    return r.dtype if r.dtype in native_halves() and not r.sinks else torch.float32


@cache
def native_halves() -> tuple[torch.dtype, ...]:
    """The half-precision dtypes that this CPU computes in itself."""
    return (torch.bfloat16,) if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else ()


def _mask_dtype(r: Request) -> torch.dtype:
    """That of q, which the kernel wants; fp32 where half precision would round a bias."""
    computes = kernel_dtype(r)
    return torch.float32 if r.bias and computes.itemsize < 4 else computes


def _dead(additive: Tensor) -> Tensor | None:
    dead = (additive == -torch.inf).all(-1)
    return dead if bool(dead.any()) else None


def _flag(job: Job) -> bool:
    """Whether the kernel's causal flag says all there is to say."""
    return not job.request.bias and job.pattern == "causal"


def _too_large(job: Job) -> list[str]:
    """An objection if what would be dense is larger than the limit."""
    if job.request.cells * 3 * 8 <= MAX_DENSE_BYTES:  # more than all of it in fp64
        return []
    nbytes = _dense_bytes(job)
    if nbytes <= MAX_DENSE_BYTES or (not job.request.bias and job.pattern != "other"):
        return []
    what = "a dense mask and bias" if job.request.bias else "a dense mask"
    return [f"{what} of {memory(nbytes)}: the limit is {memory(MAX_DENSE_BYTES)}"]


def _dense_bytes(job: Job) -> int:
    """The bytes that a dense mask and bias take at once: the mask, the two joined, and a bias object's own values."""
    r = job.request
    mask = 0 if r.bias and job.pattern == "everything" else math.prod(_mask_sizes(job))
    biases = bool(r.bias) + r.bias_object
    return (mask + biases * _dense_cells(job)) * _mask_dtype(r).itemsize


def _dense_cells(job: Job) -> int:
    """The numbers in the dense mask, joined with the bias."""
    sizes, bias = _mask_sizes(job), job.request.bias_shape
    if job.request.bias_object:  # positions that differ among samples make biases that do
        bias = (job.request.batch if job.mask.batch_size != 1 else 1, *bias[1:])
    return math.prod(map(max, sizes, bias or sizes))


def _mask_sizes(job: Job) -> tuple[int, int, int, int]:
    r, mask = job.request, job.mask
    rows = r.q_len if mask.varies_with_query else 1
    return (1, 1, 1, 1) if mask == everything else (job.mask_batch, job.mask_heads, rows, r.kv_len)


def kernel_work(r: Request, *, causal: bool) -> tuple[float, float]:
    """The scores that the kernel computes of a head, and in how many blocks: the causal flag spares it whole ones."""
    if not causal:
        return r.q_len * r.kv_len, float(blocks_of(r.q_len, r.kv_len))
    at_once = rows_at_once(r.q_len)
    starts = np.arange(0, r.q_len, at_once)
    seen = np.minimum(starts + at_once, r.kv_len)
    count = np.ceil(seen / KEYS_AT_ONCE)
    rows = np.minimum(at_once, r.q_len - starts)
    return float((rows * np.minimum(count * KEYS_AT_ONCE, r.kv_len)).sum()), float(count.sum())
