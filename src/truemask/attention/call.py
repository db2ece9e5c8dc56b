"""One call of `attend`, read once: checked arguments, the mask as an expression, the request that finds its plan."""

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
from truemask.biases import Alibi, Bias, Relative
from truemask.common.torch_internals import transform
from truemask.masks.core.mask import Mask


class Call(NamedTuple):
    """What `attend` was given, in the form that plans and backends speak."""

    mask: Mask
    request: Request
    inputs: Inputs


def read_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: object = None,
    *,
    bias: object = None,
    scale: object = None,
    softcap: object = None,
    sink_logits: object = None,
    dropout: object = 0.0,
    return_lse: bool = False,
    return_weights: bool = False,
    device: torch.device | None = None,
) -> Call:
    """Check everything but the mask's own data (that is done once for each plan) and say what is asked.

    `device` is what meta tensors stand for (default: the CPU); biases and sinks beside them may be anywhere.
    """
    q, k, v = cast(q, k, v, device)
    check_qkv(q, k, v)
    real = None if q.is_meta else q.device
    device = real or device or torch.device("cpu")
    (b, hq, nq, d), (_, hk, nk, dv) = q.shape, v.shape
    sizes = (b, hq, nq, nk)
    mask = as_mask(mask, *sizes)
    given_scale = 1 / math.sqrt(d) if scale is None else check_number("scale", scale)
    cap = None if softcap is None else check_number("softcap", softcap, positive=True)
    rate = check_dropout(dropout)
    added = check_bias(bias, sizes, real) if bias is not None else None
    sinks = check_sinks(sink_logits, hq, real) if sink_logits is not None else None
    return_lse, return_weights = check_flag("return_lse", return_lse), check_flag("return_weights", return_weights)
    if return_weights:
        check_weights(sizes, q.dtype)
    tracked = torch.is_grad_enabled()
    bias_grad = tracked and added is not None and added.requires_grad
    grad = tracked and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or bias_grad
        or (sinks is not None and sinks.requires_grad)
    )
    request = Request(
        b,
        hq,
        hk,
        nq,
        nk,
        d,
        dv,
        q.dtype,
        device,
        grad,
        _bias_kind(added),
        _bias_shape(added, sizes),
        bias_grad,
        cap is not None,
        sinks is not None,
        rate > 0,
        return_lse,
        return_weights,
        transform(),
    )
    return Call(mask, request, Inputs(q, k, v, given_scale, cap, added, sinks, rate))


def _bias_kind(bias: Tensor | Bias | None) -> str:
    """`Request.bias`."""
    if bias is None or isinstance(bias, Tensor):
        return "" if bias is None else "tensor"
    return {Alibi: "alibi", Relative: "relative"}.get(type(bias), "object")


def _bias_shape(bias: Tensor | Bias | None, sizes: tuple[int, int, int, int]) -> tuple[int, ...]:
    """What a bias would be as a tensor; a bias object may tell samples apart only through the mask's positions."""
    if bias is None:
        return ()
    return tuple(bias.shape) if isinstance(bias, Tensor) else (1, bias.head_count, *sizes[2:])


def cast(q: Tensor, k: Tensor, v: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, q, k and v in its dtype, as `F.scaled_dot_product_attention` takes them; doubles stay.

    What is no tensor, or not of floats, is left for the door to refuse.
    """
    given = (q, k, v)
    if not isinstance(q, Tensor):
        return given
    kind = (device or torch.device("cpu")).type if q.is_meta else q.device.type
    if not torch.is_autocast_enabled(kind) or not all(isinstance(x, Tensor) and x.is_floating_point() for x in given):
        return given
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in given)
    return q, k, v
