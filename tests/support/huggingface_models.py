"""Tiny transformers models with random weights, and the ways in which a batch can come."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be looked for anywhere else

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 61}
GROUPED = SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
TOKENS, WINDOW = 23, 5

asks_beyond_the_window = pytest.mark.filterwarnings("ignore:.* keys that the model's own rule")
"""The model's own window hides some of what the masks of such a test ask for, which `use` says."""
KINDS = ["sliding_attention", "full_attention"]


def config_of(name: str) -> tuple[str, str, dict[str, Any]]:
    """Class of the model, class of its config, arguments."""
    two = {"num_hidden_layers": 2, "layer_types": KINDS, "sliding_window": WINDOW, "head_dim": 8}
    four = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61}
    t5 = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    bart: dict[str, Any] = {"vocab_size": 61, "d_model": 32, "max_position_embeddings": 64}
    bart |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in bart_sizes().items()}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    chunked: dict[str, Any] = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 6}
    chunked |= {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]}
    both_ways = {"num_hidden_layers": 2, "local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0}
    return {
        "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
        "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": WINDOW}),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | two | {"attn_logit_softcapping": 2.0}),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | two),
        "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", GROUPED | chunked | {"attn_temperature_tuning": False}),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", four),
        "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GROUPED | two | experts),
        "bert": ("BertModel", "BertConfig", SMALL | {"num_hidden_layers": 2, "max_position_embeddings": 64}),
        "modernbert": ("ModernBertModel", "ModernBertConfig", SMALL | both_ways | {"max_position_embeddings": 64}),
        "t5": ("T5ForConditionalGeneration", "T5Config", t5 | {"decoder_start_token_id": 0}),
        "bart": ("BartForConditionalGeneration", "BartConfig", bart),
        "vit": ("ViTModel", "ViTConfig", SMALL | {"num_hidden_layers": 2, "image_size": 12, "patch_size": 4}),
    }[name]


def bart_sizes() -> dict[str, int]:
    """The sizes that both sides of BART have."""
    return {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def model_of(name: str, attention: str = "eager", seed: int = 0) -> Any:
    """A model in evaluation mode whose weights are far from zero, the same for the same seed."""
    import transformers

    model_class, config_class, arguments = config_of(name)
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**arguments, attn_implementation=attention)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, None, 1
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 or path.endswith("sinks"):
                parameter.normal_(std=0.3)
            elif parameter.isnan().any() or not parameter.any():
                parameter.normal_(std=0.5)
    return model


def tokens(samples: int = 2, length: int = TOKENS, seed: int = 1) -> Tensor:
    """Random tokens other than the padding's 0."""
    return torch.randint(1, 61, (samples, length), generator=torch.Generator().manual_seed(seed))


# -- the ways in which a batch comes: each gives the logits of the rows that are real tokens ---------------------------


def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def left_padded(model: Any, ids: Tensor) -> Tensor:
    real = torch.ones_like(ids)
    real[0, :7] = 0
    return model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits[real == 1]


def right_padded(model: Any, ids: Tensor) -> Tensor:
    real = torch.ones_like(ids)
    real[1, -4:] = 0
    return model(ids, attention_mask=real).logits[real == 1]


def packed(model: Any, ids: Tensor) -> Tensor:
    rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ([11, 12], [3, 17, 3])]
    return model(ids, position_ids=torch.stack(rows), use_cache=False).logits


def step_by_step(model: Any, ids: Tensor) -> Tensor:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    return in_chunks(model, ids, cache, [9, *[1] * 14])


def chunked_prefill(model: Any, ids: Tensor) -> Tensor:
    from transformers import DynamicCache

    return in_chunks(model, ids, DynamicCache(config=model.config), [4, 11, 8])


def static_cache(model: Any, ids: Tensor) -> Tensor:
    from transformers import StaticCache

    return in_chunks(model, ids, StaticCache(config=model.config, max_cache_len=32), [9, 4, *[1] * 10])


def in_chunks(model: Any, ids: Tensor, cache: Any, sizes: list[int]) -> Tensor:
    """One forward for each chunk of a left-padded batch, all with one cache."""
    real = torch.ones_like(ids)
    real[0, :3] = 0
    logits, start = [], 0
    for size in sizes:
        stop = start + size
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        keywords = {"attention_mask": real[:, :stop], "position_ids": positions, "past_key_values": cache}
        logits.append(model(ids[:, start:stop], **keywords, use_cache=True).logits)
        start = stop
    return torch.cat(logits, 1)[real == 1]


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    way.__name__: way for way in (plain, left_padded, right_padded, packed, step_by_step, chunked_prefill, static_cache)
}


def other_of(name: str) -> Any:
    """A model whose layers are not all attention, or whose attention says more than its mask."""
    import transformers

    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 4}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    few = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    index = {"index_n_heads": 2, "index_head_dim": 16}
    sparse: dict[str, Any] = {"layer_types": ["full_attention", "minimax_m3_sparse"], "rotary_dim": 4, "head_dim": 8}
    sparse |= {"num_local_experts": 4, "dense_intermediate_size": 32, "mlp_layer_types": ["dense", "dense"]}
    class_name, arguments = {
        "jamba": ("Jamba", mamba | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
        "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
        "recurrent_gemma": ("RecurrentGemma", {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
        "falcon_h1": ("FalconH1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}),
        "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 16}),
        "deepseek_v32": ("DeepseekV32", latent | few | index | {"index_topk": 4, "first_k_dense_replace": 2}),
        "minimax_m3": ("MiniMaxM3VL", sparse | index | {"index_block_size": 4, "index_topk_blocks": 2}),
    }[name]
    config_class = getattr(transformers, f"{class_name}{'Text' * (name == 'minimax_m3')}Config")
    torch.manual_seed(0)
    sizes = GROUPED | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = getattr(transformers, f"{class_name}ForCausalLM")(config_class(**(sizes | arguments))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model
