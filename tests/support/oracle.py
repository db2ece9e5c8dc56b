"""Attention as its definition reads, in fp64 and row by row: what every backend is compared with.

A row looks at the keys that it may see and at no others, so what is masked cannot leak here by construction, and the
gradients are those that autograd derives from that. Slow and small on purpose; it shares no code with the library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Three = tuple[Tensor, Tensor, Tensor]


def three(tensors: Iterable[Tensor]) -> Three:
    """q, k and v, for calls that take them apart."""
    q, k, v = tensors
    return q, k, v


class Answer(NamedTuple):
    """out `[b, h, q, dv]`, lse `[b, h, q]` and weights `[b, h, q, k]`, in fp64."""

    out: Tensor
    lse: Tensor
    weights: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    kept: Tensor | None = None,
    dropout: float = 0.0,
) -> Answer:
    """The attention of `attend`'s docstring; `allowed`, `bias` and `kept` broadcast to `[b, h, q, k]`."""
    (b, hq, nq, d), nk, shared = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    cells = (b, hq, nq, nk)
    allowed = allowed.expand(cells)
    q, k, v = q.double(), k.double(), v.double()
    outs, lses, weights = [], [], []
    for i in range(b * hq * nq):
        sample, head, row = i // (hq * nq), i // nq % hq, i % nq
        seen = allowed[sample, head, row].nonzero()[:, 0]
        s = (k[sample, head // shared, seen] * q[sample, head, row]).sum(-1)
        s = s * (1 / math.sqrt(d) if scale is None else scale)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if bias is not None:
            s = s + bias.double().expand(cells)[sample, head, row, seen]
        p, lse = softmax(s, None if sink_logits is None else sink_logits.double()[head])
        if kept is not None:
            p = p * kept.expand(cells)[sample, head, row, seen] / (1 - dropout)
        outs.append((p[:, None] * v[sample, head // shared, seen]).sum(0))
        lses.append(lse)
        weights.append(torch.zeros(nk, dtype=torch.float64).index_put((seen,), p))
    stacked = (torch.stack(x) if x else torch.zeros(0) for x in (outs, lses, weights))
    shapes = ((b, hq, nq, v.shape[-1]), (b, hq, nq), cells)
    return Answer(*(x.double().reshape(shape) for x, shape in zip(stacked, shapes, strict=True)))


def softmax(s: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of one row's visible scores; zeros and -inf if there are none or all are -inf."""
    if len(s) == 0 or bool((s == -torch.inf).all()):
        return s * 0 if len(s) == 0 else torch.zeros_like(s), torch.tensor(-torch.inf, dtype=torch.float64)
    logits = s if sink is None else torch.cat([s, sink[None]])
    return torch.softmax(logits, 0)[: len(s)], torch.logsumexp(s, 0)
