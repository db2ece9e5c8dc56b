"""One call of `attend`, read once: its options, checked arguments, the mask, the request that finds its plan.

`AttendArgs` is where an option of `attend` is written down. The operator of `torch.compile`, `plan` and the plain
operations of `torch.export` take their lists of options from it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.attention.validation import (
    as_mask,
    check_bias,
    check_dropout,
    check_flag,
    check_number,
    check_qkv,
    check_sinks,
    check_weights,
)
from truemask.backends.base import Inputs, Request
from truemask.backends.context import named_here
from truemask.biases import Alibi, Bias, Relative
from truemask.common.torch_internals import transform
from truemask.masks.core.mask import Mask


class AttendArgs(NamedTuple):
    """The options of one call of `attend`, as the caller gave them: not checked yet."""

    bias: Tensor | Bias | None = None
    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    dropout: float = 0.0
    backend: str | None = None
    return_lse: bool = False
    return_weights: bool = False
    preferred: str | None = None  # by a module: the backend, unless the call or a block around it names another


NO_OPTIONS = AttendArgs()


class Call(NamedTuple):
    """What `attend` was given, in the form that plans and backends speak."""

    mask: Mask
    request: Request
    inputs: Inputs
    backend: str | None  # that was named by the call or around it, or that a module prefers


def read_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: object = None,
    args: AttendArgs = NO_OPTIONS,
    *,
    device: torch.device | None = None,
) -> Call:
    """Check everything but the mask's own data (that is done once for each plan) and say what is asked.

    `device` is what meta tensors stand for (default: the CPU); biases and sinks beside them may be anywhere.
    """
    q, k, v = cast(q, k, v, device)
    check_qkv(q, k, v)
    real = None if q.is_meta else q.device
    (b, hq, nq, d), (_, hk, nk, dv) = q.shape, v.shape
    sizes = (b, hq, nq, nk)
    mask = as_mask(mask, *sizes)
    scale = 1 / math.sqrt(d) if args.scale is None else check_number("scale", args.scale)
    softcap = None if args.softcap is None else check_number("softcap", args.softcap, positive=True)
    dropout = check_dropout(args.dropout)
    bias = None if args.bias is None else check_bias(args.bias, sizes, real)
    sinks = None if args.sink_logits is None else check_sinks(args.sink_logits, hq, real)
    check_flag("return_lse", args.return_lse)
    if check_flag("return_weights", args.return_weights):
        check_weights(sizes, q.dtype)
    kind, shape = ("", ()) if bias is None else _kind_and_shape(bias, sizes)
    tracked = torch.is_grad_enabled()
    request = Request(
        batch=b,
        heads=hq,
        kv_heads=hk,
        q_len=nq,
        kv_len=nk,
        head_dim=d,
        value_dim=dv,
        dtype=q.dtype,
        device=real or device or torch.device("cpu"),
        grad=tracked and (q.requires_grad or k.requires_grad or v.requires_grad or _want_gradients(bias, sinks)),
        bias=kind,
        bias_shape=shape,
        bias_grad=tracked and bias is not None and bias.requires_grad,
        softcap=softcap is not None,
        sinks=sinks is not None,
        dropout=dropout > 0,
        return_lse=args.return_lse,
        return_weights=args.return_weights,
        transform=transform(),
    )
    inputs = Inputs(q, k, v, scale, softcap, bias, sinks, dropout)
    return Call(mask, request, inputs, named_here(args.backend, args.preferred))


def _want_gradients(bias: Tensor | Bias | None, sinks: Tensor | None) -> bool:
    return (bias is not None and bias.requires_grad) or (sinks is not None and sinks.requires_grad)


def _kind_and_shape(bias: Tensor | Bias, sizes: tuple[int, int, int, int]) -> tuple[str, tuple[int, ...]]:
    """`Request.bias`, and what it would be as a tensor; an object tells samples apart only by the mask's positions."""
    if isinstance(bias, Tensor):
        return "tensor", tuple(bias.shape)
    kind = {Alibi: "alibi", Relative: "relative"}.get(type(bias), "object")
    return kind, (1, bias.head_count, *sizes[2:])


def cast(q: Tensor, k: Tensor, v: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, q, k and v in its dtype, as `F.scaled_dot_product_attention` takes them; doubles stay.

    What is no tensor, or not of floats, is left for the validation to refuse.
    """
    tensors = (q, k, v)
    if not isinstance(q, Tensor):
        return tensors
    kind = (device or torch.device("cpu")).type if q.is_meta else q.device.type
    if not torch.is_autocast_enabled(kind) or not all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return q, k, v
