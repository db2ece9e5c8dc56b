"""`speculate`: the text of `generate` in Hugging Face models, whoever guesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.chance import assert_drawn_from
from tests.support.huggingface_models import asks_beyond_the_window, model_of, tokens
from truemask.errors import MaskError
from truemask.generation.speculation.trees import Draft, side_by_side
from truemask.interop.huggingface.configs import account_of
from truemask.interop.huggingface.draft_reader import HuggingFaceReader
from truemask.interop.speculate import speculate

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

SINKS = tm.causal & (tm.window(4) | tm.prefix(2))
MODELS = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "llama4", "gpt2", "gpt_oss"]
NEW = 16


def model(name: str, noise: float = 0.0) -> Any:
    """In fp64, so that no two logits tie; products of experts know no fp64."""
    net = model_of(name)
    net = net if name == "gpt_oss" else net.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return net


def batch() -> dict[str, Tensor]:
    ids = tokens(3, 12)
    ids[1, 6:] = ids[1, :6]  # something to look up
    real = torch.ones_like(ids)
    real[0, :5], real[2, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": real}


def generated(net: Any, given: dict[str, Tensor], mask: tm.Mask | None = None, **use: Any) -> Tensor:
    with tm.use(net, mask, **use):  # a cache of its own choice would forget what a wider mask sees
        return net.generate(**given, max_new_tokens=NEW, do_sample=False, past_key_values=transformers.DynamicCache())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mask", [None, SINKS], ids=str)
@asks_beyond_the_window
def test_greedy_text_is_that_of_generate(name: str, mask: tm.Mask | None) -> None:
    net, other, given = model(name), model(name, 0.02), batch()
    plain = generated(net, given, mask)
    for draft in ("ngram", other):
        found = speculate(net, **given, mask=mask, draft=draft, max_new_tokens=NEW, draft_tokens=5)
        assert torch.equal(found.tokens, plain)
        assert bool(((found.accepted + 1).sum(1) == NEW - 1).all())
        assert found.logprobs.shape == (3, NEW)
        if draft is other:
            assert found.per_forward > 1.3


@pytest.mark.parametrize("name", ["llama", "mistral", "llama4", "gpt2"])
@asks_beyond_the_window
@torch.no_grad()
def test_nodes_of_a_draft_are_read_as_their_paths(name: str) -> None:
    net, given = model(name), batch()
    near = 1e-5 if name == "llama4" else 1e-9  # its angles are fp32
    drafts = [Draft([7]), Draft([8]), Draft([9])]
    for paths in ([1, 2, 3], [1, 4, 5], [6]):
        drafts[0].add_path(paths)
        drafts[1].add_path(paths[::-1])
    texts = [row[real == 1].tolist() for row, real in zip(given["input_ids"], given["attention_mask"], strict=True)]
    with tm.use(net, SINKS):
        read = HuggingFaceReader("model", net, given["attention_mask"].bool(), 40)
        read.begin(given["input_ids"])
        for accepted in ([[0, 1, 4, 5], [0, 7], [0]], [[0, 6], [], [0]], [[0], [0], [0]]):
            logits = read(side_by_side(drafts))
            for sample, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
                for node in range(len(draft.tokens)):
                    path, at = [], node
                    while at >= 0:
                        path, at = [draft.tokens[at], *path], draft.parents[at]
                    expected = net(torch.tensor([[*text, *path]]), use_cache=False).logits[0, -1]
                    torch.testing.assert_close(logits[sample, node], expected, rtol=0, atol=near)
            read.accept(accepted)
            for text, draft, path in zip(texts, drafts, accepted, strict=True):
                text += [draft.tokens[node] for node in path]


def test_inside_a_use_its_mask_holds_and_outside_nothing_stays() -> None:
    net, given = model("mistral"), batch()
    wide = tm.causal & tm.window(9)
    plain = generated(net, given, wide, replace=True)
    with tm.use(net, wide, replace=True):
        assert torch.equal(speculate(net, **given, max_new_tokens=NEW).tokens, plain)
    own = speculate(net, **given, max_new_tokens=NEW)
    assert account_of(net.config) is None
    assert torch.equal(own.tokens, generated(net, given))
    assert not torch.equal(own.tokens, plain)


def test_ends_are_the_models_own_or_those_that_are_asked_for() -> None:
    net, given = model("llama"), batch()
    first = generated(net, given)[:, 12 + 5]
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = first.tolist(), 3
    plain = generated(net, given)
    found = speculate(net, **given, max_new_tokens=NEW)
    assert torch.equal(found.tokens, plain)
    assert found.tokens.shape[1] < 12 + NEW
    assert speculate(net, **given, max_new_tokens=NEW, eos_token=[]).tokens.shape[1] == 12 + NEW


def test_seeds_draw_the_same_text_whoever_guesses() -> None:
    net, given = model("llama"), batch()
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": [4, 5, 6]}
    one, other = (
        speculate(net, **given, draft=draft, max_new_tokens=NEW, **options) for draft in ("ngram", model("llama", 0.02))
    )
    assert torch.equal(one.tokens, other.tokens)
    alone = speculate(net, given["input_ids"][1:2], max_new_tokens=NEW, **(options | {"seed": 5}))
    assert torch.equal(alone.tokens[0], one.tokens[1])


@pytest.mark.parametrize("kind", ["ngram", "another"])
def test_texts_are_drawn_as_the_model_draws_them(kind: str) -> None:
    net, drawn, kept = model("llama"), 1500, 3
    text = torch.tensor([[5, 6, 7, 5, 6]])
    found = speculate(
        net,
        text.repeat(drawn, 1),
        max_new_tokens=3,
        draft="ngram" if kind == "ngram" else model("llama", 0.1),
        mask=SINKS,
        temperature=4.0,
        top_k=kept,
        generator=torch.Generator().manual_seed(2),
    )
    texts, shares = text, torch.ones(1, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad(), tm.use(net, SINKS):
            best = net(texts).logits[:, -1].topk(kept)
        shares = (shares[:, None] * (best.values / 4.0).softmax(-1)).flatten()
        texts = torch.cat((texts.repeat_interleave(kept, 0), best.indices.flatten()[:, None]), 1)
    counts = (found.tokens[:, None] == texts).all(-1).sum(0).double()
    assert counts.sum() == drawn
    assert_drawn_from(counts, shares)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"draft": "n-gram"}, "draft is 'n-gram'"),
    "no model": ({"draft": 3}, "draft is int 3"),
    "an option of generate": ({"samples_per_prompt": 2}, "no keyword 'samples_per_prompt': repeat the rows"),
    "a misspelt one": ({"temprature": 1.0}, "temprature"),
    "no number": ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    "words": ({"input_ids": torch.tensor([[70]])}, "token 70 is outside the vocabulary"),
    "no tokens": ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "input_ids are"),
    "pads behind": ({"attention_mask": torch.tensor([[1] * 11 + [0]] * 3)}, "has a 0 behind a 1"),
    "flags of others": ({"attention_mask": torch.ones(1, 12)}, "attention_mask is"),
    "an end": ({"eos_token": 99}, "eos_token is 99"),
    "a short mask": ({"mask": tm.causal & tm.keys([True] * 14)}, "holds data for 14 keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said_by_name(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=words):
        speculate(model("llama"), **{**batch(), "max_new_tokens": NEW, **options})


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_models_that_cannot_take_guesses_back(name: str) -> None:
    with pytest.raises(MaskError, match=r"model is a .*speculate takes decoders"):
        speculate(model_of(name), tokens(1, 5), max_new_tokens=3)


def test_drafts_of_other_models() -> None:
    net = model("llama")
    with pytest.raises(ValueError, match="draft is the model itself"):
        speculate(net, tokens(1, 5), max_new_tokens=3, draft=net)
    config = transformers.LlamaConfig(**{**net.config.to_dict(), "vocab_size": 50})
    with pytest.raises(ValueError, match="draft has a vocabulary of 50, and the model of 61"):
        speculate(net, tokens(1, 5), max_new_tokens=3, draft=transformers.LlamaForCausalLM(config))
    with pytest.raises(ValueError, match="draft learned positions 0 to 63"):
        speculate(net, tokens(1, 60), max_new_tokens=9, draft=model("gpt2"))
