"""`attend` in plain torch operations, for graphs that run elsewhere: `torch.export`, `torch.jit.trace`, ONNX.

Such a graph is written down once and runs without this library, perhaps without Python. So it holds no operator of
ours and no plan: the mask is its own `truth`, index arithmetic on the sizes of each call, and attention is torch's. All
cells are computed. Lengths, and data that comes in with the call (`keys(flags)`), are those of each call, and
gradients are torch's.

Shapes: b samples, h query heads = y key heads x g, q rows, k keys, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from truemask.attention.call import AttendArgs, Call, cast, read_call
from truemask.attention.run import new_seed
from truemask.attention.validation import checked_length
from truemask.backends.base import Inputs, Result
from truemask.backends.context import check_backend
from truemask.backends.shared.dropout import kept
from truemask.backends.shared.eager import bias_values, mixed_by, scores_of, weights_of
from truemask.biases import Bias
from truemask.common.real_tensors import beside_real, trusted
from truemask.masks.compose.boolean import everything
from truemask.masks.core.queries import indices

FUSED_OPTIONS = {"grad", "transform"}  # the options that torch's own attention has


def attend_plain(q: Tensor, k: Tensor, v: Tensor, mask: Any, args: AttendArgs, seed: Tensor | None = None) -> Result:
    """The call, in operations that any tracer can write down; a backend's kernel is none of them, whoever is named."""
    check_backend(args.backend)
    with trusted(), beside_real():
        return _attended(read_call(*cast(q, k, v), mask, args), seed)


def _attended(call: Call, seed: Tensor | None) -> Result:
    r, q, mask = call.request, call.inputs.q, call.mask
    (b, h, n), m = q.shape[:3], call.inputs.k.shape[2]  # of the call for which the graph runs
    inputs = call.inputs._replace(k=_for_each_head(call.inputs.k, r.heads), v=_for_each_head(call.inputs.v, r.heads))
    checked_length(mask, r.batch, r.heads, r.q_len, r.kv_len)
    allowed = None
    if mask != everything:
        cells = indices(1 if mask.batch_size == 1 else b, 1 if mask.head_count == 1 else h, n, m, q.device)
        allowed = mask.bound(q.device)._truth(*cells)
    if r.options <= FUSED_OPTIONS:
        return Result(_fused(inputs, allowed))
    return _spelled_out(call, inputs, allowed, seed)


def _for_each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values `[b, y, k, d]` as `[b, h, k, d]`."""
    shared = heads // x.shape[1]
    return x if shared == 1 else x.unsqueeze(2).expand(-1, -1, shared, -1, -1).flatten(1, 2)


def _fused(inputs: Inputs, allowed: Tensor | None) -> Tensor:
    """Torch's own attention; rows that see nothing are opened before it and zeros after (law 5)."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if allowed is None:
        return scaled_dot_product_attention(q, k, v, scale=inputs.scale)
    alive = allowed.any(-1, keepdim=True)
    out = scaled_dot_product_attention(q, k, v, attn_mask=allowed | ~alive, scale=inputs.scale)
    return torch.where(alive, out, 0.0)


def _spelled_out(call: Call, inputs: Inputs, allowed: Tensor | None, seed: Tensor | None) -> Result:
    """Scores, softmax and mixture as three steps, in fp32 or better."""
    r, dtype, wide = call.request, inputs.q.dtype, call.request.compute_dtype
    bias = None if inputs.bias is None else _bias(call).to(wide)
    s = scores_of(inputs.q.to(wide) @ inputs.k.to(wide).transpose(2, 3), inputs, bias)  # b h q k
    p, lse = weights_of(s if allowed is None else torch.where(allowed, s, -torch.inf))
    keep = None
    if r.dropout:
        drawn = (new_seed() if seed is None else seed).to(s.device)
        keep = kept(drawn, inputs.dropout, *indices(*s.shape, s.device))  # pyright: ignore
    p = mixed_by(p, lse, inputs, None if inputs.sink_logits is None else inputs.sink_logits[:, None], keep)
    out = (p @ inputs.v.to(wide)).to(dtype)
    return Result(out, lse if r.return_lse else None, p.to(dtype) if r.return_weights else None)


def _bias(call: Call) -> Tensor:
    """The bias, as floats that broadcast to the scores."""
    bias, (b, h, n) = call.inputs.bias, call.inputs.q.shape[:3]
    if isinstance(bias, Bias):
        positions = call.mask.positions(n, call.inputs.k.shape[2])
        return bias_values(bias, positions, slice(None), (b, h), call.inputs.q.device)
    assert bias is not None
    return bias
