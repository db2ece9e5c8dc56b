"""Generation with a cache that forgets what its mask lets it forget: the text of a cache that keeps all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.equality import assert_tokens_equal_up_to_tie
from tests.support.huggingface_models import asks_beyond_the_window, model_of, tokens
from tests.support.kept_caches import MASK, MODELS, encodes, full, side

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

from truemask.interop.huggingface import kept_layer  # noqa: E402  (it needs transformers)

pytestmark = asks_beyond_the_window


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small memories, so that small models forget."""
    monkeypatch.setattr(kept_layer, "LEAST_ROOM", 2)
    monkeypatch.setattr(kept_layer, "SLACK", 2)


def given_to(model: Any, **options: Any) -> dict[str, Any]:
    """A batch, left-padded where the model is a decoder, and how to go on."""
    ids = tokens(2, 11)
    real = torch.ones_like(ids)
    real[0, :4] = 0
    named = {"attention_mask": real} if not encodes(model) else {}
    return {"input_ids": ids, "max_new_tokens": 24, "do_sample": False, **named, **options}


def choices(model: Any, row: Tensor) -> Tensor:
    """The logits `[v]` from which the token behind a row is chosen."""
    with torch.no_grad():
        return model(row[None]).logits[0, -1]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "chunks": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams and sequences": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", MODELS)
def test_generation_is_that_of_all_keys(name: str, way: str, static: bool) -> None:
    model = model_of(name)
    named = given_to(model, **WAYS[way])
    if encodes(model):
        named.pop("prefill_chunk_size", None)
    with tm.use(model, MASK, **side(model, MASK)):
        torch.manual_seed(0)
        expected = model.generate(**named, past_key_values=full(model))
        torch.manual_seed(0)
        cache = tm.cache_for(model, tokens=40, static=static)
        found = model.generate(**named, past_key_values=cache)
    assert torch.equal(found, expected)
    assert cache.bytes < cache.full_bytes


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_rejected_drafts_are_taken_back(name: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_layer, "SLACK" if static else "DRAFTS", 20)  # as many as an assistant drafts
    model, assistant = model_of(name), model_of(name, seed=3)
    named: dict[str, Any] = {"input_ids": tokens(1, 9), "max_new_tokens": 50, "do_sample": False}
    with tm.use(model, MASK, **side(model, MASK)):
        expected = model.generate(**named, past_key_values=full(model))
        for drafts in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
            cache = tm.cache_for(model, tokens=80, static=static)
            found = model.generate(**named, **drafts, past_key_values=cache)
            if encodes(model):
                assert torch.equal(found, expected)
            else:
                assert_tokens_equal_up_to_tie(found, expected, lambda row, step: choices(model, expected[row, :step]))
            assert len(cache.positions()) < cache.get_seq_length()


def test_a_chat_goes_on_with_its_cache() -> None:
    model = model_of("mistral")
    caches = [full(model), None]
    texts = []
    with tm.use(model, MASK):
        caches[1] = tm.cache_for(model)
        for cache in caches:
            text = tokens(1, 9)
            for turn in range(4):
                text = model.generate(input_ids=text, max_new_tokens=7, do_sample=False, past_key_values=cache)
                text = torch.cat((text, tokens(1, 5, seed=turn)), 1)
            texts.append(text)
    assert torch.equal(*texts)


def test_a_quantised_cache_of_transformers_runs_in_use() -> None:
    model, named = model_of("llama"), {"input_ids": tokens(1, 9), "max_new_tokens": 9, "do_sample": False}
    named |= {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    expected = model.generate(**named)
    with tm.use(model):
        assert torch.equal(model.generate(**named), expected)
        with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
            model.generate(**named, past_key_values=tm.cache_for(model))
