"""Small models of text as people have them: folders of Hugging Face with a tokenizer, made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer() -> Any:
    """A byte-level one of 256 signs and a few merges, without a token before the text."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "t"), ("Ġ", "the")]
    vocabulary = {sign: i for i, sign in enumerate([*signs, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def llama_folder(path: Path) -> Path:
    """Rotary positions, which do not end."""
    torch.manual_seed(7)
    words = tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(words), intermediate_size=40, eos_token_id=None, bos_token_id=None, **sizes)
    return _saved(LlamaForCausalLM(config), words, path)


def gpt2_folder(path: Path, positions: int = 64) -> Path:
    """Learned positions, which end."""
    torch.manual_seed(8)
    words = tokenizer()
    sizes: dict[str, Any] = {"n_embd": 24, "n_head": 3, "n_layer": 2, "eos_token_id": None, "bos_token_id": None}
    return _saved(GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=positions, **sizes)), words, path)


def _saved(model: Any, words: Any, path: Path) -> Path:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(16)  # far from uniform, so that masks show
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path
