"""Attention: projections, heads, positions, and one call of `attend`.

Shapes: b batch, n rows of this call, j keys (cached ones included), d model features, h heads, g key heads, e features
of a head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truemask.attention.attend import results
from truemask.attention.call import AttendArgs
from truemask.biases import alibi
from truemask.masks.core.mask import Mask
from truemask.nn.config import LayersConfig
from truemask.nn.norms import HeadRMSNorm
from truemask.nn.positions import Rotation, rotate


class LayerCache(Protocol):
    """The keys and values of one layer. Attention appends; whoever owns the cache advances it."""

    @property
    def length(self) -> int:
        """How many keys are stored already, not counting what this call appends."""
        ...

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (b, g, n, e) behind the old ones and return all of them (b, g, j, e)."""
        ...


class Attention(nn.Module):
    """(b, n, d) -> (b, n, d): every row reads the rows that the mask lets it see.

    The mask speaks of the rows of `x` and of all keys; a row that sees nothing gets zeros. No projection has a bias.
    Query heads share key heads in blocks, as in LLaMA: with 6 query and 2 key heads, heads 0 to 2 share the first.
    """

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        attn, dim, heads, kv_heads = config.attn, config.dim, config.heads, config.kv_heads
        self.heads = heads
        self.kv_heads = kv_heads
        self.scale = attn.scale
        self.qk_norm = attn.qk_norm
        self.dropout = attn.dropout
        self.flash = attn.flash
        self.bias = alibi(heads) if config.alibi_pos_bias else None  # no buffer: halves would round the slopes
        self.to_q = nn.Linear(dim, heads * attn.dim_head, bias=False)
        self.to_k = nn.Linear(dim, kv_heads * attn.dim_head, bias=False)
        self.to_v = nn.Linear(dim, kv_heads * attn.dim_head, bias=False)
        self.to_out = nn.Linear(heads * attn.dim_head, dim, bias=False)
        self.q_norm = HeadRMSNorm(heads, attn.dim_head) if attn.qk_rmsnorm else nn.Identity()
        self.k_norm = HeadRMSNorm(kv_heads, attn.dim_head) if attn.qk_rmsnorm else nn.Identity()
        self.num_mem_kv = attn.num_mem_kv
        if attn.num_mem_kv:
            self.mem_k = nn.Parameter(torch.randn(kv_heads, attn.num_mem_kv, attn.dim_head))
            self.mem_v = nn.Parameter(torch.randn(kv_heads, attn.num_mem_kv, attn.dim_head))

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # b h n e
        k = self.to_k(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # b g n e
        v = self.to_v(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # b g n e
        if self.qk_norm:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the norms give fp32
        if self.num_mem_kv and (cache is None or cache.length == 0):
            k, v = self._with_memories(k, v)  # b g m+n e: they come first and have no position
        if cache is not None:
            k, v = cache.append(k, v)  # b g j e
        drop = self.dropout if self.training else 0.0
        plain = "reference" if drop else "sdpa"  # sdpa cannot drop the same cells
        args = AttendArgs(bias=self.bias, scale=self.scale, dropout=drop, preferred=None if self.flash else plain)
        out = results(q, k, v, mask, args).out  # b h n e
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _with_memories(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mem_k = F.normalize(self.mem_k, dim=-1) if self.qk_norm else self.mem_k
        mem_k, mem_v = (m.to(k.dtype).expand(k.shape[0], -1, -1, -1) for m in (mem_k, self.mem_v))
        return torch.cat((mem_k, k), dim=2), torch.cat((mem_v, v), dim=2)
