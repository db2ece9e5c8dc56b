"""Small models whose every size is a different prime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from truemask.nn.layers import AttentionLayers, Block, Decoder, Encoder
from truemask.nn.wrappers import TransformerWrapper

TOKENS, DIM, HEADS, DIM_HEAD, DEPTH = 31, 23, 4, 6, 2  # heads are even, so that key heads can be fewer

FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "absolute": ({}, {}),
    "rotary": ({"rotary_pos_emb": True, "rotary_emb_dim": 4}, {}),
    "alibi": ({"alibi_pos_bias": True}, {"max_seq_len": 0}),
    "no positions": ({}, {"use_abs_pos_emb": False}),
    "registers": ({"rotary_pos_emb": True, "rotary_emb_dim": 2}, {"num_memory_tokens": 3}),
    "registers, absolute": ({}, {"num_memory_tokens": 2}),
    "grouped": ({"attn_kv_heads": 2, "rotary_pos_emb": True, "rotary_emb_dim": 6}, {"tie_embedding": True}),
    "one key head": ({"attn_one_kv_head": True, "use_rmsnorm": True}, {}),
    "cosine": ({"attn_qk_norm": True, "rotary_pos_emb": True, "rotary_emb_dim": 4}, {}),
    "qk rmsnorm": ({"attn_qk_rmsnorm": True, "attn_kv_heads": 2, "ff_glu": True, "ff_swish": True}, {}),
    "memories": ({"attn_num_mem_kv": 3, "attn_qk_norm": True}, {"num_memory_tokens": 2}),
    "dense": ({"attn_flash": False, "ff_relu_squared": True, "ff_no_bias": True}, {}),
}


def decoder(**keywords: Any) -> Decoder:
    """A small causal stack in fp64, always the same weights."""
    return _random_weights(Decoder(DIM, DEPTH, HEADS, attn_dim_head=DIM_HEAD, **keywords))


def encoder(**keywords: Any) -> Encoder:
    """A small stack in fp64 whose rows read everything."""
    return _random_weights(Encoder(DIM, DEPTH, HEADS, attn_dim_head=DIM_HEAD, **keywords))


def wrapped(layers: AttentionLayers | None = None, **keywords: Any) -> TransformerWrapper:
    """A small model of tokens in fp64; `max_seq_len` is 47."""
    options = {"num_tokens": TOKENS, "max_seq_len": 47, **keywords}
    return _random_weights(TransformerWrapper(attn_layers=decoder() if layers is None else layers, **options))


def block_of(layers: AttentionLayers, index: int = 0) -> Block:
    """One layer of a stack."""
    block = layers.layers[index]
    assert isinstance(block, Block)
    return block


def featured(name: str) -> TransformerWrapper:
    """The model with one of FEATURES."""
    layers, wrapper = FEATURES[name]
    return wrapped(decoder(**layers), **wrapper)


def _random_weights(module: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for part in module.parameters():
        nn.init.normal_(part, std=0.4, generator=generator)
    return module.double().eval()


def features(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers [*shape, DIM] in fp64."""
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens."""
    return torch.randint(TOKENS, shape, generator=torch.Generator().manual_seed(seed))
