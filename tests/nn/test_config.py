"""Keywords: routed by prefix, refused by name, and kept in checkpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from truemask.nn.config import AttentionConfig, FeedForwardConfig, LayersConfig
from truemask.nn.layers import Decoder, Encoder
from truemask.nn.wrappers import TransformerWrapper

SMALL: dict[str, Any] = {"dim": 12, "depth": 1, "heads": 2, "attn_dim_head": 6}


def test_prefixes_reach_their_part() -> None:
    config = LayersConfig.from_keywords(dim=12, depth=3, heads=6, attn_kv_heads=2, ff_mult=2, use_rmsnorm=True)
    assert config.attn == AttentionConfig(kv_heads=2)
    assert config.ff == FeedForwardConfig(mult=2)
    assert (config.kv_heads, config.use_rmsnorm, config.depth) == (2, True, 3)


def test_flash_is_the_default() -> None:
    assert AttentionConfig().flash is True


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"atn_kv_heads": 2}, "did you mean 'attn_kv_heads'?"),
        ({"attn_kv_head": 2}, "did you mean 'attn_kv_heads'?"),
        ({"ff_gelu": True}, "did you mean 'ff_glu'?"),
        ({"rotary": True}, "no keyword 'rotary', did you mean 'rotary_"),
        ({"xyzzy": 1}, r"Decoder\(\) has no keyword 'xyzzy'$"),
        ({"alibi_pos_bias": True}, "x-transformers has it and this library does not have it yet"),
        ({"attn_talking_heads": True}, "has no keyword 'attn_talking_heads'"),
        ({"attn_max_attend_past": 3}, r"yet; pass the mask `window\(size\)` in the call"),
        ({"cross_attn_dropout": 0.1}, "does not have it yet"),
        ({"causal": False}, "a Decoder is causal .* pass causal= in the call"),
        ({"attn_causal": False}, "has no keyword 'attn_causal'"),
    ],
)
def test_an_unknown_keyword_names_what_was_meant(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Decoder(**SMALL, **keywords)


def test_the_wrapper_refuses_unknown_keywords_too() -> None:
    with pytest.raises(
        TypeError, match=r"TransformerWrapper\(\) has no keyword 'num_token', did you mean 'num_tokens'"
    ):
        TransformerWrapper(num_tokens=3, max_seq_len=5, attn_layers=Decoder(**SMALL), num_token=3)
    with pytest.raises(TypeError, match="'emb_dim': x-transformers has it"):
        TransformerWrapper(num_tokens=3, max_seq_len=5, attn_layers=Decoder(**SMALL), emb_dim=3)
    with pytest.raises(TypeError, match="expected a Decoder or an Encoder"):
        TransformerWrapper(num_tokens=3, max_seq_len=5, attn_layers=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"attn_one_kv_head": True, "attn_kv_heads": 2}, "attn_one_kv_head says one key head and attn_kv_heads says 2"),
        ({"ff_swish": True, "ff_relu_squared": True}, "each name the activation"),
        ({"attn_qk_norm": True, "attn_qk_rmsnorm": True}, "pass one of them"),
        ({"attn_kv_heads": 3}, "heads=2 is not a multiple of the 3 key heads"),
        ({"rotary_pos_emb": True, "rotary_emb_dim": 5}, "must be even and from 2 to 6"),
        ({"rotary_pos_emb": True}, "rotary_emb_dim is 3"),
        ({"attn_dropout": 1.0}, r"attn_dropout is 1.0; it is the share that is dropped, in \[0, 1\)"),
        ({"ff_dropout": -0.1}, "ff_dropout is -0.1"),
        ({"attn_kv_heads": 0}, "attn_kv_heads is 0; it must be a whole number above 0"),
        ({"ff_mult": 0}, "ff_mult is 0"),
        ({"attn_num_mem_kv": -1}, "attn_num_mem_kv is -1"),
        ({"rotary_interpolation_factor": 0.5}, "rotary_interpolation_factor is 0.5"),
    ],
)
def test_contradictions_and_impossible_sizes_are_refused(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Decoder(**SMALL, **keywords)


def test_half_of_a_head_rotates_unless_said_otherwise() -> None:
    """x-transformers' default."""
    assert LayersConfig.from_keywords(dim=12, depth=1, attn_dim_head=28).rotary_dim == 14


def test_a_config_survives_json() -> None:
    config = LayersConfig.from_keywords(dim=12, depth=3, heads=6, causal=True, attn_kv_heads=2, ff_glu=True)
    assert LayersConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_a_model_is_rebuilt_from_its_dict(kind: type[Decoder] | type[Encoder]) -> None:
    layers = kind(**SMALL, rotary_pos_emb=True, rotary_emb_dim=4, attn_qk_rmsnorm=True)
    net = TransformerWrapper(num_tokens=7, max_seq_len=5, attn_layers=layers, num_memory_tokens=3, tie_embedding=True)
    again = TransformerWrapper.from_dict(json.loads(json.dumps(net.to_dict())))
    assert type(again.attn_layers) is kind
    assert again.to_dict() == net.to_dict()
    again.load_state_dict(net.state_dict())
