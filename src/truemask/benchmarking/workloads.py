"""What is raced: five masks at a length, and the calls that compute attention under them, as functions to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from truemask.attention.attend import attend
from truemask.benchmarking.timing import Run
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, window
from truemask.masks.leaves.patterns import random
from truemask.masks.leaves.per_token import global_tokens, prefix

BLOCK = 64  # BigBird's: 3 blocks around each, 2 that are global, 3 at random
DOCUMENT = 700  # tokens, about
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def race_masks(n: int) -> dict[str, Mask]:
    """Five masks by name, for n tokens."""
    return {
        "causal": causal,
        "causal, window 512": causal & window(512),
        "4 sinks and window 256": causal & (window(256) | prefix(4)),
        f"BigBird, blocks of {BLOCK}": big_bird(n),
        f"packed documents of about {DOCUMENT}": causal.packed(document_lengths(n)),
    }


def big_bird(n: int) -> Mask:
    """BigBird: neighbouring blocks, global blocks, random blocks."""
    tokens = list(range(min(2 * BLOCK, n)))
    return blocks(BLOCK, back=1, ahead=1) | global_tokens(tokens) | random(min(1.0, 3 * BLOCK / n), block=BLOCK, seed=1)


def document_lengths(n: int, about: int = DOCUMENT, seed: int = 0) -> list[int]:
    """Lengths between half and one and a half times `about` that make n tokens in all."""
    draw, lengths = Random(seed), []
    while (rest := n - sum(lengths)) > 0:
        lengths.append(min(rest, draw.randint(about // 2, about * 3 // 2)))
    return lengths


@dataclass(frozen=True)
class Workload:
    """Tensors `[b, h, n, d]` for one size of attention, and a gradient that arrives at the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    arriving: Tensor

    @classmethod
    def of(cls, n: int, heads: int = 8, d: int = 64, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Workload:
        """Random tensors, the same in every process."""
        generator = torch.Generator().manual_seed(0)
        q, k, v, arriving = (torch.randn(batch, heads, n, d, generator=generator).to(dtype) for _ in range(4))
        return cls(q, k, v, arriving)

    def shortened(self, n: int = 512) -> Workload:
        """The first n tokens."""
        return Workload(*(x[:, :, :n].contiguous() for x in (self.q, self.k, self.v, self.arriving)))

    def forward(self, attention: Attention) -> Run:
        """The call without gradients."""
        attention = torch.no_grad()(attention)
        return lambda: attention(self.q, self.k, self.v)

    def train(self, attention: Attention) -> Run:
        """The call and the gradients of q, k and v."""
        return lambda: self.result(attention)

    def run(self, attention: Attention, grad: bool) -> Run:
        """Either of the two."""
        return self.train(attention) if grad else self.forward(attention)

    def result(self, attention: Attention) -> tuple[Tensor, ...]:
        """The output and the three gradients."""
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        out = attention(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, self.arriving))


def masked_sdpa(mask: Mask, workload: Workload) -> Attention:
    """SDPA with the mask as the kernel wants it, dense and additive, made beforehand."""
    batch, heads, n, _ = workload.q.shape
    dense = mask.to_dense(n, n, batch=batch, heads=heads)
    additive = torch.zeros(dense.shape, dtype=workload.q.dtype).masked_fill_(~dense, -torch.inf)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=additive)


def by_truemask(mask: Mask, backend: str | None = None) -> Attention:
    """`attend` under the mask, as planned or by one backend."""
    return lambda q, k, v: attend(q, k, v, mask, backend=backend)
