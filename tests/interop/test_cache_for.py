"""`cache_for` at its door, and a call at the cache's: what is refused, before the first token, with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.huggingface_models import asks_beyond_the_window, model_of, other_of, tokens
from truemask.errors import MaskError

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

pytestmark = asks_beyond_the_window
MASK = tm.causal & (tm.window(4) | tm.prefix(2))


def call(model: Any, cache: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens(1, 9) if ids is None else ids, past_key_values=cache).logits


@pytest.fixture
def model() -> Any:
    return model_of("llama")


# -- at the door of `cache_for` ----------------------------------------------------------------------------------------


def refused(match: str, *given: Any, **named: Any) -> None:
    with pytest.raises(MaskError, match=match):
        tm.cache_for(*given, **named)


def test_what_is_no_model_is_refused() -> None:
    refused("takes a model of transformers, got Linear", torch.nn.Linear(2, 2), MASK)
    refused("takes a model of transformers, got int 3", 3)


def test_a_mask_is_needed_and_the_masks_in_use_are_one(model: Any) -> None:
    refused("no mask is given, and the LlamaForCausalLM is not in use here: .*make it inside the block", model)
    with tm.use(model, MASK):
        inside = tm.cache_for(model)
        outside = tm.cache_for(model, str(MASK))
        assert torch.equal(call(model, inside), call(model, outside))
    refused("not in use here", model)
    refused("replace=True says that a mask takes the place", model, replace=True)


def test_a_mask_that_looks_ahead_is_refused_where_it_takes_the_models_place(model: Any) -> None:
    ahead = tm.window(4) | tm.prefix(2)
    refused("lets queries see later keys", model, ahead, replace=True, tokens=20)
    refused("may let queries see later keys", model, ahead, replace=True)
    with tm.use(model, ahead):
        assert call(model, tm.cache_for(model)).shape == (1, 9, 61)  # the model is causal itself


def test_a_mask_whose_data_end_before_the_tokens_is_refused(model: Any) -> None:
    short = tm.causal & tm.keys(torch.ones(12, dtype=torch.bool))
    refused(r"tokens=13 under mask=.*Pass a mask that answers for all tokens", model, short, tokens=13)
    with tm.use(model, short):
        cache = tm.cache_for(model)
        call(model, cache)
        before = cache.positions()
        with pytest.raises(MaskError, match="12"):
            call(model, cache, tokens(1, 4))
        assert torch.equal(cache.positions(), before)
        call(model, cache, tokens(1, 3))
    assert cache.get_seq_length() == 12


def test_memory_of_a_fixed_size_needs_a_number_of_tokens(model: Any) -> None:
    refused("static=True sets memory aside, whose size follows from tokens=", model, MASK, static=True)


@pytest.mark.parametrize("name", ["jamba", "lfm2", "falcon_h1"])
def test_layers_that_keep_something_else_are_refused_by_name(name: str) -> None:
    refused("keep something else than keys of their own|nobody can tell it which keys", other_of(name), MASK)


def test_layers_and_names_are_those_of_use() -> None:
    model = model_of("gemma3")
    refused("no layer of Gemma3ForCausalLM answers to that", model, MASK, "chunked")
    refused("attends in several places", model_of("t5"), MASK)
    cache = tm.cache_for(model, MASK, layers="full_attention")
    with tm.use(model, MASK, layers="full_attention"):
        assert call(model, cache).shape == (1, 9, 61)


# -- at the door of a call ---------------------------------------------------------------------------------------------


def rejected(model: Any, cache: Any, match: str, ids: Tensor | None = None) -> None:
    """A call is refused, and the cache is as it was."""
    before = [(cache.positions(layer), cache.get_seq_length(layer)) for layer in range(2)]
    with pytest.raises(MaskError, match=match):
        call(model, cache, ids)
    for layer, (places, length) in enumerate(before):
        assert torch.equal(cache.positions(layer), places)
        assert cache.get_seq_length(layer) == length


def test_another_model_another_mask_and_no_use_are_refused(model: Any) -> None:
    other = model_of("llama", seed=1)
    with tm.use(model, MASK), tm.use(other, MASK):
        cache = tm.cache_for(model)
        call(model, cache)
        expected = call(model, tm.cache_for(model), torch.cat((tokens(1, 9), tokens(1, 3)), 1))[:, 9:]
        rejected(other, cache, r"made for another model \(LlamaForCausalLM\), whose keys mean nothing")
    with tm.use(model, tm.window(4)):
        rejected(model, cache, r"may not see under `causal & .*`, and in use is `window\(4\)`: make the cache with")
    with tm.use(model):
        rejected(model, cache, "in use is `the model alone`")
    with tm.use(model, MASK, replace=True):
        rejected(model, cache, "in use is `.*, replace=True`")
    rejected(model, cache, r"run the model inside `with tm.use\(model, mask\):`")
    with tm.use(model, MASK):
        torch.testing.assert_close(call(model, cache, tokens(1, 3)), expected)


def test_another_batch_more_tokens_and_gradients_are_refused(model: Any) -> None:
    for static in (False, True):
        with tm.use(model, MASK):
            cache = tm.cache_for(model, tokens=12, static=static)
            rejected(model, cache, r"is for tokens=12, pads included, 0 of them", tokens(1, 13))
            call(model, cache)
            rejected(model, cache, "the cache holds 1 sample, and the call brings 2", tokens(2, 1))
            rejected(model, cache, r"tokens=12, pads included, 9 of them are read, and the call brings 4", tokens(1, 4))
            with pytest.raises(MaskError, match="keeps no gradients"):
                model(tokens(1, 1), past_key_values=cache)
            call(model, cache, tokens(1, 3))
        assert cache.get_seq_length() == 12


def test_generate_is_refused_before_its_first_token(model: Any) -> None:
    with tm.use(model, MASK):
        cache = tm.cache_for(model, tokens=8)
        with pytest.raises(MaskError, match="is for tokens=8"):
            model.generate(tokens(1, 9), max_new_tokens=4, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_model_inside_wrappers_is_found(model: Any) -> None:
    wrapped = torch.nn.DataParallel(model)
    with tm.use(wrapped, MASK):
        assert call(model, tm.cache_for(wrapped)).shape == (1, 9, 61)


def test_a_tensor_mask_is_refused_by_name(model: Any) -> None:
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with tm.use(model, MASK):
        cache = tm.cache_for(model)
        with torch.no_grad(), pytest.raises(MaskError, match="4-D attention_mask does not say what later queries see"):
            model(tokens(1, 9), attention_mask=seen, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_is_broken_off_leaves_no_trace(model: Any, kind: type[BaseException]) -> None:
    ids, last = tokens(1, 12), model.model.layers[-1]
    with tm.use(model, MASK):
        whole, cache = call(model, tm.cache_for(model), ids), tm.cache_for(model)
        call(model, cache, ids[:, :9])
        handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(kind))
        with pytest.raises(kind):
            call(model, cache, ids[:, 9:])
        handle.remove()
        assert kind is KeyboardInterrupt or {cache.get_seq_length(layer) for layer in range(2)} == {9}
        torch.testing.assert_close(call(model, cache, ids[:, 9:]), whole[:, 9:])


def test_it_says_what_it_costs(model: Any) -> None:
    with tm.use(model, MASK):
        cache = tm.cache_for(model)
        assert (cache.bytes, cache.full_bytes) == (0, 0)
        call(model, cache, tokens(2, 500))
    each = 2 * 2 * 2 * 2 * 8 * 4  # keys and values, layers, samples, heads, features, bytes
    assert cache.full_bytes == 500 * each
    assert cache.bytes == (37 + 32) * each
    assert repr(cache).startswith("KeptCache(LlamaForCausalLM): 500 tokens read, 37 kept in 2 layers, ")
