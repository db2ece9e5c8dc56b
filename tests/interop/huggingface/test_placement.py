"""Where tokens stand: what a forward says of it in several ways is compared, and models count from where they do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import asks_beyond_the_window, model_of, tokens
from truemask.errors import ConventionWarning, MaskError
from truemask.interop.positions import first_position
from truemask.interop.use import use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def after_padding(name: str, pad: int = 1) -> Any:
    """A model whose positions begin after its padding's."""
    extra = {"Esm": {"position_embedding_type": "absolute", "token_dropout": False, "mask_token_id": 3}}.get(name, {})
    config = getattr(transformers, f"{name}Config")(**SMALL, **extra, pad_token_id=pad, initializer_range=0.3)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config).eval()


# -- models that count from somewhere else -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Camembert", "Esm", "MPNet", "Longformer", "Data2VecText"])
def test_the_first_position_of_models_that_keep_one_for_padding(name: str) -> None:
    model = after_padding(name)
    assert first_position(model) == 2
    ids = torch.tensor([[8, 9, 10, 11]])
    given = {"position_ids": torch.arange(2, 6)[None]}
    assert_same(model(ids, **given).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "bart", "t5", "modernbert"])
def test_the_first_position_of_others_is_zero(name: str) -> None:
    assert first_position(model_of(name)) == 0


def test_positions_before_the_first_are_told_once() -> None:
    model = after_padding("XLMRoberta")
    batch = tm.PackCollator(7, mask=tm.everything)([{"input_ids": [8, 9, 10, 11]}, {"input_ids": [5, 6, 7]}])
    ids, places = batch["input_ids"], batch["position_ids"]
    with torch.no_grad():
        alone = [model(torch.tensor([each])).last_hidden_state[0] for each in ([8, 9, 10, 11], [5, 6, 7])]
        with use(model, batch["mask"]):
            with pytest.warns(ConventionWarning, match=r"from 2 .* first_position=2") as told:
                model(ids, position_ids=places)
            assert told[0].filename == __file__
            model(ids, position_ids=places)
        with use(model, batch["mask"]):
            assert_same(model(ids, position_ids=places + 2).last_hidden_state[0], torch.cat(alone))


def test_positions_of_padding_are_no_tokens() -> None:
    """RoBERTa itself gives its padding the position before the first; `pad` is 0 or 1."""
    for pad in (0, 1):
        model = after_padding("Roberta", pad)
        ids, real = torch.tensor([[8, 9, 10, pad, pad]]), torch.tensor([[1, 1, 1, 0, 0]])
        places = torch.tensor([[1, 2, 3, 0, 0]]) + pad
        with use(model, tm.local(1)):
            found = model(ids, attention_mask=real, position_ids=places).last_hidden_state[0, :3]
            assert_same(found, model(ids[:, :3]).last_hidden_state[0])


# -- the same padding, told in several ways ----------------------------------------------------------------------------

MASK = tm.causal & (tm.window(4) | tm.prefix(1))
PADS = [4, 0]


def batch_of(starts: list[int], length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens behind left pads, flags and positions."""
    real = (torch.arange(length) >= torch.tensor(starts)[:, None]).long()
    return tokens(len(starts), length), real, (real.cumsum(1) - 1).clamp(min=0)


def alone(model: Any, ids: Tensor, starts: list[int]) -> Tensor:
    """The logits of real tokens, each sample without its pads."""
    return torch.cat([model(own[None, start:]).logits[0] for own, start in zip(ids, starts, strict=True)])


def four_axes(real: Tensor, *, rows: slice = slice(None), additive: bool = False) -> Tensor:
    """Causality and padding as a tensor `[b, 1, q, k]`."""
    mask = (tm.causal.to_dense(real.shape[1]) & real.bool()[:, None, None])[:, :, rows]
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("starts", [[4], PADS])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])  # GPT-2's attention is not given position_ids
def test_padding_may_be_told_by_a_tensor_and_positions(name: str, starts: list[int], additive: bool) -> None:
    model, (ids, real, places) = model_of(name), batch_of(starts)
    with torch.no_grad(), use(model, MASK):
        expected = alone(model, ids, starts)
        for mask in (real, four_axes(real, additive=additive)):
            found = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[real == 1]
            assert_same(found, expected)


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_a_tensor_and_positions_tell_padding_in_cached_steps_too(kind: str) -> None:
    model, (ids, real, places) = model_of("llama"), batch_of(PADS)
    room = {"max_cache_len": 16} if kind == "StaticCache" else {}
    with torch.no_grad(), use(model, MASK):
        expected, cache, found = alone(model, ids, PADS), getattr(transformers, kind)(config=model.config, **room), []
        for start, stop in ((0, 7), (7, 8), (8, 12)):
            mask = four_axes(real[:, :stop], rows=slice(start, stop))
            mask = torch.nn.functional.pad(mask, (0, 16 - stop)) if room else mask
            given = {"attention_mask": mask, "position_ids": places[:, start:stop], "past_key_values": cache}
            found.append(model(ids[:, start:stop], **given).logits)
    assert_same(torch.cat(found, 1)[real == 1], expected)


def test_documents_of_a_tensor_count_where_positions_restart() -> None:
    model, ids = model_of("llama"), tokens(1, 12)
    given = {"position_ids": torch.tensor([[*range(5), *range(7)]])}
    apart = (tm.causal & tm.documents([5, 7])).to_dense(12)
    with torch.no_grad(), use(model, MASK):
        expected = torch.cat([model(ids[:, :5]).logits[0], model(ids[:, 5:]).logits[0]])
        assert_same(model(ids, attention_mask=apart, **given).logits[0], expected)
        with pytest.warns(ConventionWarning, match="the documents see each other"):
            model(ids, attention_mask=tm.causal.to_dense(12), **given)


def test_a_tree_told_by_a_tensor_counts_depth() -> None:
    """Two completions of a prompt: the mask counts positions on each path."""
    model, ids = model_of("llama"), tokens(1, 9)
    first, second = [*range(4), 4, 5], [*range(4), 6, 7, 8]
    given = {"position_ids": torch.tensor([[*range(6), 4, 5, 6]]), "use_cache": False}
    with torch.no_grad(), use(model, MASK), warnings.catch_warnings():
        expected = torch.cat([model(ids[:, first]).logits[0], model(ids[:, second]).logits[0, 4:]])
        assert_same(
            model(ids, attention_mask=tm.tree([-1, 0, 0], lengths=[4, 2, 3]).to_dense(9), **given).logits[0], expected
        )


# -- what contradicts itself -------------------------------------------------------------------------------------------


def evicted(model: Any, ids: Tensor, kept: int) -> Any:
    """A cache of which the middle was thrown away: its first key and the last ones are left."""
    cache = model(ids, use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = (
            torch.cat([x[:, :, :1], x[:, :, 1 - kept :]], 2) for x in (layer.keys, layer.values)
        )
    return cache


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_keys_that_a_cache_has_evicted_are_not_placed_by_guessing(name: str, flags: bool) -> None:
    model, ids = model_of(name), tokens(1, 61)
    given: dict[str, Any] = {"attention_mask": torch.ones(1, 61).long()} if flags else {}
    own = torch.tensor([[0, *range(50, 61)]])
    with torch.no_grad(), use(model, MASK):
        expected = model(ids).logits[0, -1:]
        for told in ({}, {"position_ids": torch.tensor([[60]])})[not flags :]:
            with pytest.raises(MaskError, match=r"60.* 12 keys|61 flags.* 12 keys|12 keys.* 61 flags"):
                model(ids[:, -1:], past_key_values=evicted(model, ids[:, :-1], 11), **given, **told)
    with torch.no_grad(), use(model, MASK.take(q=own[0, -1:], k=own[0])):  # the way out
        given["position_ids"] = torch.tensor([[60]])
        found = model(ids[:, -1:], past_key_values=evicted_under(model, ids, MASK), **given).logits[0]
    assert_same(found, expected)


def evicted_under(model: Any, ids: Tensor, mask: tm.Mask) -> Any:
    with use(model, mask):
        return evicted(model, ids[:, :-1], 11)


def test_documents_may_be_told_by_the_mask_where_a_cache_goes_on() -> None:
    model, ids = model_of("llama"), tokens(1, 9)
    places = torch.tensor([[*range(4), *range(5)]])
    with torch.no_grad(), use(model, MASK):
        alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
    with torch.no_grad(), use(model, MASK.packed([4, 5])):
        cache = model(ids[:, :6], position_ids=places[:, :6], use_cache=True).past_key_values
        rest = [
            model(ids[:, place : place + 1], position_ids=places[:, place : place + 1], past_key_values=cache).logits
            for place in range(6, 9)
        ]
    assert_same(torch.cat(rest, 1), alone[:, 6:])


def test_a_cache_that_evicts_runs_as_always_without_a_mask_of_positions() -> None:
    model, ids = model_of("llama"), tokens(1, 61)
    given = {"attention_mask": torch.ones(1, 61).long(), "position_ids": torch.tensor([[60]])}
    with torch.no_grad():
        expected = model(ids[:, -1:], past_key_values=evicted(model, ids[:, :-1], 11), **given).logits
        for mask in (None, tm.causal, tm.everything):
            with use(model, mask):
                assert_same(
                    model(ids[:, -1:], past_key_values=evicted(model, ids[:, :-1], 11), **given).logits, expected
                )


@asks_beyond_the_window
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_a_sliding_cache_says_where_its_keys_stand(cache: str) -> None:
    model, ids = model_of("mistral"), tokens(1, 23)
    room = {"max_cache_len": 32} if cache == "StaticCache" else {}
    mask = tm.window(3) | tm.dilated(2)
    with torch.no_grad(), use(model, mask):
        expected, held, found = model(ids).logits, getattr(transformers, cache)(config=model.config, **room), []
        for place, size in ((0, 9), (9, 1), (10, 4), *[(n, 1) for n in range(14, 23)]):
            rows = slice(place, place + size)
            given = {"attention_mask": torch.ones(1, place + size).long(), "position_ids": torch.arange(23)[None, rows]}
            found.append(model(ids[:, rows], past_key_values=held, **given).logits)
    assert_same(torch.cat(found, 1), expected)


def test_positions_that_all_begin_later_leave_masks_of_distances_alone() -> None:
    model, ids = model_of("llama"), tokens(1, 12)
    later = torch.arange(100, 112)[None]
    with torch.no_grad(), use(model, tm.window(4)):
        assert_same(model(ids, position_ids=later).logits, model(ids).logits)
    with use(model, MASK), pytest.raises(MaskError, match=r"last row at 111, and its 12 keys at 11.*could"):
        model(ids, position_ids=later)
    with torch.no_grad(), use(model, MASK.at(q_start=100, k_start=100)):  # says which
        assert_same(model(ids, position_ids=later).logits, model_under(model, tm.window(4), ids))


def model_under(model: Any, mask: tm.Mask, ids: Tensor) -> Tensor:
    with use(model, mask):
        return model(ids).logits


def test_positions_with_gaps_are_refused_beside_flags() -> None:
    """Without flags transformers takes a gap for the beginning of a document."""
    model, ids = model_of("llama"), tokens(1, 6)
    given = {"attention_mask": torch.ones(1, 6).long(), "position_ids": torch.tensor([[0, 1, 4, 5, 8, 11]])}
    with use(model, MASK), pytest.raises(MaskError, match=r"last row at 11, and its 6 keys \(6 flags\) at 5"):
        model(ids, **given)
    with use(model):
        model(ids, **given)


def test_a_model_that_counts_from_one_is_not_contradicted() -> None:
    assert first_position(paligemma()) == 1


def paligemma() -> Any:
    """A PaliGemma without weights to speak of."""
    text = {"model_type": "gemma", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 12, "patch_size": 4, "projection_dim": 32}
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32)
    return transformers.PaliGemmaForConditionalGeneration(config).eval()
