"""Attention in plain torch, by chunks of rows: what `reference` is, and what contains a NaN when a fast kernel cannot.

Everything between the two products is ordinary differentiable torch, and the products are those of `masked_matmul`, so
no value crosses a masked cell in any direction, and second derivatives, forward mode and `vmap` work. Scores exist for
one chunk at a time; with several chunks in training, each is computed again in the backward rather than kept.

Shapes: b samples, h query heads = y key heads x g, q rows (n of a chunk), k keys, d head size.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from truemask.backends.base import Inputs, Result, wide
from truemask.backends.shared.dropout import kept
from truemask.backends.shared.masked_matmul import gather, no_autocast, outer
from truemask.biases import Bias
from truemask.common.formatting import describe
from truemask.masks.core.mask import Mask
from truemask.masks.core.queries import indices
from truemask.masks.leaves.predicate import check_unchanged

CHUNK_BYTES = 1 << 23  # of the scores of one chunk; about eight tensors of this size live at once


class _Call(NamedTuple):
    """What every chunk of one call shares, in the dtype of the computation."""

    inputs: Inputs
    mask: Mask
    k: Tensor  # b y k d
    v: Tensor  # b y k d
    heads: tuple[int, int]  # y, g
    dense: Tensor | None  # the mask of all rows, if somebody has it already
    positions: tuple[Tensor, Tensor] | None  # of rows and keys, for a bias object
    want_weights: bool


def eager_attention(
    inputs: Inputs,
    mask: Mask,
    *,
    dense: Tensor | None = None,
    want_weights: bool = False,
    compute: torch.dtype | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    recompute: bool = True,
) -> Result:
    """The attention of `attend`'s docstring, in `compute` (default: fp64 for doubles, otherwise fp32).

    `dense` is the mask as bool `[b, h, q, k]` (1 where it does not vary) if it exists; otherwise chunks ask the mask.
    `recompute=False` keeps every chunk's scores for the backward, which forward mode and `vmap` need.
    """
    compute = compute or wide(inputs.q.dtype)
    (b, hq, rows), (y, keys) = inputs.q.shape[:3], inputs.k.shape[1:3]
    with no_autocast(inputs.q.device):
        positions = mask.positions(rows, keys) if isinstance(inputs.bias, Bias) else None
        k, v = inputs.k.to(compute).contiguous(), inputs.v.to(compute).contiguous()  # else each chunk copies them
        call = _Call(inputs, mask, k, v, (y, hq // y), dense, positions, want_weights)
        q = inputs.q.to(compute).unflatten(1, call.heads)
        step = max(1, chunk_bytes // max(1, b * hq * keys * k.element_size()))
        ways = _chunk
        if recompute and rows > step and _wants_gradients(inputs):
            ways = partial(checkpoint, _chunk, use_reentrant=False, preserve_rng_state=False)
        parts = [ways(call, q[:, :, :, first : first + step], first) for first in range(0, max(rows, 1), step)]
        return _joined(parts, inputs.q.dtype, want_weights)


def _wants_gradients(inputs: Inputs) -> bool:
    tensors = (inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sink_logits)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _joined(parts: list[tuple[Tensor, ...]], dtype: torch.dtype, want_weights: bool) -> Result:
    """The chunks one after the other, query heads on one axis again."""
    out, lse, *weights = (torch.cat(column, 3).flatten(1, 2) for column in zip(*parts, strict=True))
    return Result(out.to(dtype), lse, weights[0].to(dtype) if want_weights else None)


def _chunk(call: _Call, q: Tensor, first: int) -> tuple[Tensor, ...]:
    """Rows `first`, `first + 1`, ... `q [b, y, g, n, d]`: their out, lse and, if wanted, weights."""
    inputs, allowed = call.inputs, _allowed(call, first, q.shape[-2])
    bias = None if inputs.bias is None else _bias(call, first, q)
    keep = _kept(call, first, q) if inputs.dropout else None
    sinks = None if inputs.sink_logits is None else inputs.sink_logits.view(*call.heads, 1)
    out, lse, p = cells_attention(inputs, (q, call.k, call.v), allowed, bias, keep, sinks)
    return (out, lse, torch.where(allowed, p, 0)) if call.want_weights else (out, lse)


def cells_attention(
    numbers: Inputs,
    qkv: tuple[Tensor, Tensor, Tensor],
    allowed: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and weights (unmasked) of `q [b, y, g, n, d]`, `k` and `v [b, y, k, d]` on cells `[b, y, g, n, k]`.

    `numbers` gives scale, soft cap and rate of dropout; `keep` the cells that dropout keeps; `sinks` are `[y, g, 1]`.
    """
    q, k, v = qkv
    s = scores_of(outer(q, k, allowed), numbers, None if bias is None else torch.where(allowed, bias, 0))
    p, lse = weights_of(torch.where(allowed, s, -torch.inf))
    p = mixed_by(p, lse, numbers, sinks, keep)
    return gather(p, v, allowed), lse, p


def scores_of(products: Tensor, numbers: Inputs, bias: Tensor | None) -> Tensor:
    """Scores from the products of queries and keys: scaled, capped, with the bias added."""
    s = products * numbers.scale
    if numbers.softcap is not None:
        s = numbers.softcap * torch.tanh(s / numbers.softcap)
    return s if bias is None else s + bias


def mixed_by(p: Tensor, lse: Tensor, numbers: Inputs, sinks: Tensor | None, keep: Tensor | None) -> Tensor:
    """What values are multiplied by: the weights, less what a sink takes and dropout drops."""
    if sinks is not None:
        p = p * beside_sink(lse, sinks.to(p.dtype))[..., None]
    return p if keep is None else p * keep / (1 - numbers.dropout)


def weights_of(s: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over the last axis and their log-sum-exp; a row of -inf only has weights 0 and lse -inf (law 5)."""
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -torch.inf) + s.sum(-1)
    highest = s.detach().amax(-1, keepdim=True)
    dead = highest == -torch.inf
    e = torch.exp(s - highest.masked_fill(dead, 0))
    total = e.sum(-1, keepdim=True).masked_fill(dead, 1)
    lse = (highest + torch.log(total)).masked_fill(dead, -torch.inf)
    return e / total, lse.squeeze(-1)


def beside_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """The share of a row's softmax that its keys keep beside a sink: exp(lse) / (exp(lse) + exp(sink)); 0 if dead."""
    dead = lse == -torch.inf
    return torch.sigmoid(lse.masked_fill(dead, 0) - sink).masked_fill(dead, 0)


def _grouped(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """`[b, h, n, k]` as `[b, y, g, n, k]`, for h the number of query heads or 1."""
    return x.unsqueeze(1) if x.shape[1] == 1 else x.unflatten(1, heads)


def _allowed(call: _Call, first: int, rows: int) -> Tensor:
    """The mask of the chunk's rows, `[b, y, g, n, k]` with 1 where it does not vary."""
    if call.dense is not None:
        return _grouped(call.dense[:, :, first : first + rows], call.heads)
    mask, (samples, heads) = call.mask, call.inputs.q.shape[:2]
    b, h, q, k = indices(
        1 if mask.batch_size == 1 else samples,
        1 if mask.head_count == 1 else heads,
        rows,
        call.k.shape[2],
        call.k.device,
    )
    check_unchanged(mask)
    return _grouped(mask.truth(b, h, q + first, k), call.heads)


def _kept(call: _Call, first: int, q: Tensor) -> Tensor:
    """The cells of the chunk that dropout keeps, `[b, y, g, n, k]`."""
    inputs = call.inputs
    b, h, rows, k = indices(q.shape[0], inputs.q.shape[1], q.shape[-2], call.k.shape[2], q.device)
    return _grouped(kept(inputs.seed, inputs.dropout, b, h, rows + first, k), call.heads)


def _bias(call: _Call, first: int, q: Tensor) -> Tensor:
    """The bias of the chunk's rows, `[b, y, g, n, k]` with 1 where it does not vary."""
    bias, rows = call.inputs.bias, slice(first, first + q.shape[-2])
    if isinstance(bias, Bias):
        samples, heads = call.inputs.q.shape[:2]
        value = bias_values(bias, call.positions, rows, (samples, heads), q.device)
    else:
        assert bias is not None
        value = bias if bias.shape[2] == 1 else bias[:, :, rows]
    return _grouped(value.to(q.dtype), call.heads)


def bias_values(
    bias: Bias,
    positions: tuple[Tensor, Tensor] | None,
    rows: slice,
    sizes: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """A bias object at the positions of some rows and all keys: `[b, h, n, k]`, or 1 for an axis it does not know."""
    assert positions is not None
    q, k = (side.to(device, copy=True) for side in positions)  # a bias may write to what it is asked about
    q = q[..., rows]
    b, h, *_ = indices(sizes[0], sizes[1], 1, 1, device)
    samples = [len(side) if side.ndim == 2 else 1 for side in (q, k)]
    n, m = q.shape[-1], k.shape[-1]
    return checked_value(bias, b, h, q.reshape(samples[0], 1, n, 1), k.reshape(samples[1], 1, 1, m), (*sizes, n, m))


def checked_value(bias: Bias, b: Tensor, h: Tensor, q: Tensor, k: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """What a bias object says of index tensors that broadcast to `sizes`: four axes, 1 where it does not vary."""
    value = bias.value(b, h, q, k)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"attend: {_named(bias)} must return a float tensor, got {describe(value)}")
    shape = (1,) * (4 - value.ndim) + tuple(value.shape)
    if len(shape) > 4 or any(length not in (1, size) for length, size in zip(shape, sizes, strict=True)):
        raise ValueError(
            f"attend: {_named(bias)} must return a tensor that broadcasts to [b, h, q, k] = {list(sizes)}, "
            f"got {describe(value)}"
        )
    return value.reshape(shape)


def _named(bias: Bias) -> str:
    return f"{type(bias).__name__}.value (of the bias object)"
