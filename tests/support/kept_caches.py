"""Models of transformers that read a text with one cache: what their logits are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import truemask as tm

MASK = tm.causal & (tm.window(4) | tm.prefix(2))
MODELS = ["llama", "mistral", "gemma3", "gpt2", "t5"]


def side(model: Any, mask: tm.Mask | None) -> dict[str, Any]:
    """Where the mask applies: in the decoder, if there is an encoder too."""
    return {"layers": "decoder"} if model.config.is_encoder_decoder and mask is not None else {}


def read(model: Any, ids: Tensor, cache: Any, size: int, real: Tensor | None = None) -> Tensor:
    """The logits of all tokens, read in chunks with one cache."""
    parts: list[Tensor] = []
    for start in range(0, ids.shape[1], size):
        named: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        chunk, stop = ids[:, start : start + size], min(start + size, ids.shape[1])
        if real is not None:
            positions = (real.cumsum(1) - 1).clamp(min=0)[:, start:stop]
            named |= {"attention_mask": real[:, :stop], "position_ids": positions}
        if model.config.is_encoder_decoder:
            context = torch.randn(len(ids), 5, 32, generator=torch.Generator().manual_seed(1))
            named |= {"decoder_input_ids": chunk, "encoder_outputs": (context.to(model.dtype),)}
        else:
            named["input_ids"] = chunk
        with torch.no_grad():
            parts.append(model(**named).logits)
    return torch.cat(parts, 1)


def full(model: Any) -> Any:
    """A cache that keeps every key."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache()
    return EncoderDecoderCache(cache, DynamicCache()) if encodes(model) else cache


def encodes(model: Any) -> bool:
    return model.config.is_encoder_decoder
