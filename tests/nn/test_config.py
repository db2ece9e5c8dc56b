"""Keywords: routed by prefix, refused by name, and kept in checkpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from truemask.nn.config import AttentionConfig, FeedForwardConfig, LayersConfig
from truemask.nn.layers import Decoder, Encoder
from truemask.nn.wrappers import TransformerWrapper

ROTARY: dict[str, Any] = {"rotary_pos_emb": True, "rotary_emb_dim": 4}
SMALL: dict[str, Any] = {"dim": 12, "depth": 1, "heads": 2, "attn_dim_head": 6}


def test_prefixes_reach_their_part() -> None:
    config = LayersConfig.from_keywords(dim=12, depth=3, heads=6, attn_kv_heads=2, ff_mult=2, use_rmsnorm=True)
    assert config.attn == AttentionConfig(kv_heads=2)
    assert config.ff == FeedForwardConfig(mult=2)
    assert (config.kv_heads, config.use_rmsnorm, config.depth) == (2, True, 3)


def test_flash_is_the_default() -> None:
    assert AttentionConfig().flash is True


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"atn_kv_heads": 2}, "did you mean 'attn_kv_heads'?"),
        ({"attn_kv_head": 2}, "did you mean 'attn_kv_heads'?"),
        ({"ff_gelu": True}, "did you mean 'ff_glu'?"),
        ({"rotary": True}, "no keyword 'rotary', did you mean 'rotary_"),
        ({"xyzzy": 1}, r"Decoder\(\) has no keyword 'xyzzy'$"),
        ({"rel_pos_bias": True}, "x-transformers has it and this library does not have it yet"),
        ({"attn_talking_heads": True}, "has no keyword 'attn_talking_heads'"),
        ({"attn_max_attend_past": 3}, r"yet; pass the mask `window\(size\)` in the call"),
        ({"cross_attn_dropout": 0.1}, "does not have it yet"),
        ({"causal": False}, "a Decoder is causal .* pass causal= in the call"),
        ({"attn_causal": False}, "has no keyword 'attn_causal'"),
    ],
)
def test_an_unknown_keyword_names_what_was_meant(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
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
    ("keywords", "message"),
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
        ({"alibi_pos_bias": True, "attn_num_mem_kv": 2}, "counts distances, and the 2 keys of attn_num_mem_kv stand"),
        ({**ROTARY, "rotary_interpolation_factor": 0.5}, "rotary_interpolation_factor is 0.5"),
        ({**ROTARY, "rotary_base_rescale_factor": 0.0}, "rotary_base_rescale_factor is 0.0"),
    ],
)
def test_contradictions_and_impossible_sizes_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(**SMALL, **keywords)


@pytest.mark.parametrize(
    ("keywords", "owner"),
    [
        ({"rotary_emb_dim": 4}, "rotary_pos_emb"),
        ({"rotary_interpolation_factor": 2.0}, "rotary_pos_emb"),
        ({"rotary_base_rescale_factor": 1.0}, "rotary_pos_emb"),
        ({"attn_qk_norm_scale": 10.0}, "attn_qk_norm"),
    ],
)
def test_a_keyword_that_would_change_nothing_is_refused(keywords: dict[str, Any], owner: str) -> None:
    (name,) = keywords
    with pytest.raises(ValueError, match=f"{name}=.* says something about {owner}, which is off.*pass {owner}=True"):
        Decoder(**SMALL, **keywords)


def test_a_scale_of_logits_needs_tied_ones() -> None:
    with pytest.raises(ValueError, match=r"tie_embedding_scale=0.5 says something about tie_embedding"):
        TransformerWrapper(num_tokens=7, max_seq_len=5, attn_layers=Decoder(**SMALL), tie_embedding_scale=0.5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attn_flash": "no"}, "attn_flash is str 'no'; expected True or False"),
        ({"use_rmsnorm": "no"}, "use_rmsnorm is str 'no'; expected True or False"),
        ({"ff_glu": 1}, "ff_glu is int 1; expected True or False"),
        ({"rotary_pos_emb": None}, "rotary_pos_emb is NoneType None"),
        ({"attn_num_mem_kv": 1.5}, "attn_num_mem_kv is float 1.5; expected a whole number"),
        ({"attn_num_mem_kv": True}, "attn_num_mem_kv is bool True; expected a whole number"),
        ({"attn_kv_heads": 2.0}, "attn_kv_heads is float 2.0; expected a whole number or None"),
        ({"ff_mult": "4"}, "ff_mult is str '4'; expected a number"),
        ({"ff_dropout": None}, "ff_dropout is NoneType None; expected a number"),
        ({"attn_qk_norm": True, "attn_qk_norm_scale": "7"}, "attn_qk_norm_scale is str '7'; expected a number or None"),
        ({**ROTARY, "rotary_interpolation_factor": "2"}, "rotary_interpolation_factor is str '2'"),
    ],
)
def test_a_value_of_another_type_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Decoder(**SMALL, **keywords)


def test_sizes_and_numbers_are_checked_too() -> None:
    with pytest.raises(TypeError, match=r"depth is float 1.0; expected a whole number"):
        Decoder(**{**SMALL, "depth": 1.0})
    with pytest.raises(ValueError, match="ff_mult is inf; expected a finite number"):
        Decoder(**SMALL, ff_mult=float("inf"))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_tokens": 5.5}, "num_tokens is float 5.5; expected a whole number"),
        ({"max_seq_len": "5"}, "max_seq_len is str '5'"),
        ({"num_memory_tokens": True}, "num_memory_tokens is bool True; expected a whole number or None"),
        ({"tie_embedding": "no"}, "tie_embedding is str 'no'; expected True or False"),
        ({"use_abs_pos_emb": 0}, "use_abs_pos_emb is int 0"),
        ({"tie_embedding": True, "tie_embedding_scale": "1"}, "tie_embedding_scale is str '1'"),
        ({"emb_dropout": None}, "emb_dropout is NoneType None"),
    ],
)
def test_the_wrapper_checks_types_too(keywords: dict[str, Any], message: str) -> None:
    options = {"num_tokens": 7, "max_seq_len": 5, "attn_layers": Decoder(**SMALL), **keywords}
    with pytest.raises(TypeError, match=message):
        TransformerWrapper(**options)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"context": None}, "Decoder.forward.. has no keyword 'context': x-transformers has it"),
        ({"mems": []}, "'mems': x-transformers has it .*; keep a KVCache and pass it as cache="),
        ({"attn_msk": None}, "Decoder.forward.. has no keyword 'attn_msk', did you mean 'attn_mask'"),
        ({"unknow": 1}, "Decoder.forward.. has no keyword 'unknow'$"),
    ],
)
def test_a_call_of_the_layers_names_what_was_meant(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Decoder(**SMALL)(torch.zeros(1, 3, 12), **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"return_mems": True}, r"TransformerWrapper.forward\(\) has no keyword 'return_mems': x-transformers has it"),
        ({"seq_start_pos": None}, r"pass the mask `everything.padded\(starts\)`"),
        ({"return_embedding": True}, "did you mean 'return_embeddings'"),
    ],
)
def test_a_call_of_the_wrapper_names_what_was_meant(keywords: dict[str, Any], message: str) -> None:
    net = TransformerWrapper(num_tokens=7, max_seq_len=5, attn_layers=Decoder(**SMALL))
    with pytest.raises(TypeError, match=message):
        net(torch.zeros(1, 3, dtype=torch.long), **keywords)


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
