"""Tokens that arrive at a cache in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truemask.generation.kv_cache import KVCache
from truemask.nn.wrappers import TransformerWrapper


def read(net: TransformerWrapper, cache: KVCache, tokens: Tensor, sizes: int | list[int], **options: Any) -> Tensor:
    """The logits of tokens that arrive in chunks."""
    parts = []
    with torch.no_grad():
        for chunk in tokens.split(sizes, dim=1):
            parts.append(net(chunk, cache=cache, **options))
            cache.advance()
    return torch.cat(parts, dim=1)
