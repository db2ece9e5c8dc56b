"""transformers models under `use`: they compute what they did, and take any mask, whatever way a batch comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truemask as tm
from tests.support.equality import assert_same, assert_tokens_equal_up_to_tie
from tests.support.huggingface_models import (
    KINDS,
    TOKENS,
    WAYS,
    WINDOW,
    asks_beyond_the_window,
    in_chunks,
    left_padded,
    model_of,
    packed,
    tokens,
)
from truemask.errors import ConventionWarning, MaskError
from truemask.interop.use import use

pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

DECODERS = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "llama4", "gpt2", "gpt_oss"]
ONLY_EAGER = {"gemma2", "gpt_oss"}  # soft caps and sinks: transformers' sdpa refuses or ignores them
MASK = tm.causal & (tm.window(6) | tm.prefix(2))
OWN_RULE = {"mistral": tm.window(WINDOW)}


# -- what the model computes stays the same ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), [(n, w) for n in DECODERS for w in WAYS if (n, w) != ("gpt_oss", "packed")])
def test_a_decoder_computes_what_it_computes_alone(name: str, way: str) -> None:
    model, ids = model_of(name), tokens()
    with torch.no_grad():
        expected = WAYS[way](model, ids)
        with use(model):
            found = WAYS[way](model, ids)
    assert_same(found, expected)
    if name not in ONLY_EAGER:
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            assert_same(found, WAYS[way](model, ids))


@pytest.mark.parametrize("way", ["left_padded", "packed"])
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gpt_oss"])
def test_the_gradients_of_a_decoder_are_its_own(name: str, way: str) -> None:
    model, ids = model_of(name), tokens()
    expected = gradients(model, WAYS[way](model, ids))
    with use(model):
        found = gradients(model, WAYS[way](model, ids))
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5", "bart", "vit"])
def test_encoders_and_encoder_decoders_compute_what_they_compute_alone(name: str) -> None:
    model = model_of(name)
    expected = other_outputs(name, model)
    with use(model):
        found = other_outputs(name, model)
    assert_same(found, expected)
    assert_same(gradients(model, found), gradients(model, expected))


def other_outputs(name: str, model: Any) -> Tensor:
    """What comes out of a model that is no decoder, at real tokens, right and left padded."""
    if name == "vit":
        return model(torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))).last_hidden_state
    real = torch.ones(2, TOKENS, dtype=torch.int64)
    real[0, -5:], real[1, :4] = 0, 0
    if "bert" in name:
        return model(tokens(), attention_mask=real).last_hidden_state[real == 1]
    return model(tokens(), attention_mask=real, decoder_input_ids=tokens(2, 7, seed=5)).logits


def gradients(model: nn.Module, outputs: Tensor) -> Tensor:
    """Of every parameter that takes part, for a fixed sum of the outputs, in one row."""
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((outputs * weights).sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in found if grad is not None])


# -- a mask of one's own -----------------------------------------------------------------------------------------------


@asks_beyond_the_window
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2"])
def test_a_mask_is_anded_with_the_models_own(name: str) -> None:
    model, ids = model_of(name), tokens()
    dense = (MASK & OWN_RULE.get(name, tm.everything)).to_dense(TOKENS)
    expected = model(ids, attention_mask=additive(dense)).logits
    with use(model, MASK):
        found = model(ids).logits
    assert_same(found, expected)
    assert_same(gradients(model, found), gradients(model, expected))


@asks_beyond_the_window
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_layers_of_different_kinds_take_different_masks(name: str) -> None:
    model, ids = model_of(name), tokens()
    masks = {KINDS[0]: tm.window(3) | tm.prefix(1), KINDS[1]: tm.dilated(2)}
    rules = {KINDS[0]: tm.window(WINDOW) & masks[KINDS[0]], KINDS[1]: tm.causal & masks[KINDS[1]]}
    dense = {kind: additive(rule.to_dense(TOKENS)) for kind, rule in rules.items()}
    expected = model(ids, attention_mask=dense).logits
    with use(model, layers=masks):
        assert_same(model(ids).logits, expected)
    with use(model, masks[KINDS[0]], layers=[0]), use(model, masks[KINDS[1]], layers={0: masks[KINDS[0]]}):
        assert_same(model(ids).logits, expected)


def test_a_mask_can_take_the_place_of_the_models_own() -> None:
    model, ids = model_of("mistral"), tokens()
    both_ways = tm.local(4)
    expected = model(ids, attention_mask=additive(both_ways.to_dense(TOKENS))).logits
    with use(model, both_ways, replace=True):
        assert_same(model(ids).logits, expected)


def test_a_replaced_rule_leaves_padding_and_documents_alone() -> None:
    model, ids = model_of("llama"), tokens()
    with use(model, tm.everything, replace=True):
        alone = model(ids[:1, 7:]).logits[0]
        assert_same(left_padded(model, ids)[: TOKENS - 7], alone)
        assert_same(packed(model, ids)[0, :11], model(ids[:1, :11]).logits[0])


@asks_beyond_the_window
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_sample_means_the_same_under_a_mask_however_it_comes(name: str, way: str) -> None:
    """Law 2: the mask counts a sample's own positions, whatever stands before it and whatever is cached."""
    model, ids = model_of(name), tokens()
    starts = {"left_padded": 7, "step_by_step": 3, "chunked_prefill": 3, "static_cache": 3}.get(way, 0)
    mask = tm.blocks(4) | tm.prefix(2)
    with torch.no_grad(), use(model, mask):
        found = WAYS[way](model, ids)
        if way == "packed":
            assert_same(found[1, 3:20], model(ids[1:, 3:20]).logits[0])
            assert_same(found[0, 11:], model(ids[:1, 11:]).logits[0])
        else:
            assert_same(found.reshape(-1, 61)[: TOKENS - starts], model(ids[:1, starts:]).logits[0])


MIXED = tm.causal & (tm.window(2) | tm.prefix(1))
LAYOUTS = {
    "inside the documents": MIXED,
    "packed": MIXED.packed([7, 16]),
    "packed, and said twice": MIXED.packed([7, 16]) & tm.documents([7, 16]),
}


@asks_beyond_the_window
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_mask_that_says_how_rows_are_packed_is_about_rows(name: str, layout: str, replace: bool) -> None:
    """It is not packed once more where transformers tells documents by their positions; the later one is longer."""
    model, ids = model_of(name), tokens(1)
    given = {"position_ids": torch.tensor([[*range(7), *range(16)]]), "use_cache": False}
    with use(model, MIXED, replace=replace):
        alone = torch.cat([model(ids[:, :7]).logits[0], model(ids[:, 7:]).logits[0]])
    with use(model, LAYOUTS[layout], replace=replace):
        assert_same(model(ids, **given).logits[0], alone)


@pytest.mark.parametrize("detected", [True, False])
def test_chunks_are_counted_inside_documents(detected: bool) -> None:
    model, ids = model_of("llama4"), tokens(1)
    given = {"position_ids": torch.tensor([[*range(7), *range(16)]]), "use_cache": not detected}
    with use(model):
        alone = torch.cat([model(ids[:, :7]).logits[0], model(ids[:, 7:]).logits[0]])
    with use(model, tm.causal.packed([7, 16])):
        assert_same(model(ids, **given).logits[0], alone)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_tree_is_not_cut_where_its_positions_restart(name: str) -> None:
    model, ids = model_of(name), tokens(1)[:, :9]
    first, second = [*range(4), 4, 5], [*range(4), 6, 7, 8]  # a prompt of four tokens, and two completions
    with use(model):
        alone = torch.cat([model(ids[:, first]).logits[0], model(ids[:, second]).logits[0, 4:]])
    given = {"position_ids": torch.tensor([[*range(6), 4, 5, 6]]), "use_cache": False}
    with use(model, tm.tree([-1, 0, 0], lengths=[4, 2, 3])):
        assert_same(model(ids, **given).logits[0], alone)


def test_a_batch_that_carries_its_mask_is_honoured() -> None:
    model, ids = model_of("llama"), tokens(1)
    batch = tm.PackCollator(TOKENS, mask=MIXED)([ids[0, :7].tolist(), ids[0, 7:].tolist()])
    mask = tm.causal.packed(batch["lengths"]) & batch["mask"]
    with use(model, mask):
        expected = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    with use(model):
        assert_same(model(**batch).logits, expected)


@pytest.mark.parametrize("mask", [MIXED, MIXED.padded([0, 5]), MIXED & tm.padding(starts=[0, 5])])
def test_a_mask_that_says_where_samples_begin_is_about_rows(mask: tm.Mask) -> None:
    model, ids = model_of("llama"), tokens()
    real = (torch.arange(TOKENS) >= torch.tensor([[0], [5]])).long()
    given = {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    rule = mask if mask.batch_size > 1 else MIXED.padded([0, 5])
    expected = model(
        ids, attention_mask=additive((rule & tm.causal).to_dense(TOKENS)), position_ids=given["position_ids"]
    )
    with use(model, mask):
        assert_same(model(ids, **given).logits[1, 5:], expected.logits[1, 5:])


def test_a_model_that_packs_without_telling_its_mask_is_named_and_mended() -> None:
    """GPT-OSS (5.23) makes its mask without position_ids: its packed documents see each other."""
    model, ids = model_of("gpt_oss"), tokens(1)
    given = {"position_ids": torch.tensor([[*range(9), *range(14)]]), "use_cache": False}
    with use(model), pytest.warns(ConventionWarning, match="GPT-OSS among them"):
        leaking = model(ids, **given).logits[0, 9:]
    alone = model(ids[:, 9:]).logits[0]
    with use(model, tm.causal.packed([9, 14])):  # a mask that keeps them apart: nothing to warn of
        assert_same(model(ids, **given).logits[0, 9:], alone)
    assert (leaking - alone).abs().max() > 0.1


def test_tokens_between_pads_count_as_if_the_pads_were_not_there() -> None:
    model, ids = model_of("gpt2"), tokens(1)
    real = torch.ones_like(ids)
    real[:, [0, 1, 5, 6, 11]] = 0
    given = {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    with use(model, MASK):
        assert_same(model(ids, **given).logits[real == 1], model(ids[real == 1][None]).logits[0])


def test_masks_of_samples_and_of_heads() -> None:
    model, ids = model_of("gpt2"), tokens()
    mask = tm.per_head([tm.window(3), tm.window(5), tm.prefix(3), tm.everything]) & tm.prefix([3, 9]) | tm.local(0)
    expected = model(ids, attention_mask=additive((tm.causal & mask).to_dense(TOKENS))).logits
    with use(model, mask):
        assert_same(model(ids).logits, expected)
        with pytest.raises(MaskError, match="speaks of 2 samples, but the batch has 3 rows"):
            model(tokens(3))


def test_the_sides_of_a_model_take_masks_by_name() -> None:
    model, given = model_of("t5"), {"input_ids": tokens(), "decoder_input_ids": tokens(2, 7, seed=5)}
    dense = additive((tm.causal & tm.window(3)).to_dense(7))
    expected = model(**given, decoder_attention_mask=dense).logits
    with use(model, tm.window(3), layers="decoder"):
        assert_same(model(**given).logits, expected)
    with use(model, layers={"encoder": tm.local(2)}):
        found = model(**given).logits
    dense = additive(tm.local(2).to_dense(TOKENS))
    encoded = model.get_encoder()(given["input_ids"], attention_mask=dense).last_hidden_state
    assert_same(found, model(encoder_outputs=(encoded,), decoder_input_ids=given["decoder_input_ids"]).logits)


def test_cross_attention_is_reached_by_name() -> None:
    """The first nine real tokens of the source, wherever padding puts them."""
    model, ids, target = model_of("bart"), tokens(), tokens(2, 7, seed=5)
    real, first_nine = torch.ones(2, TOKENS, dtype=torch.int64), torch.zeros(2, TOKENS, dtype=torch.int64)
    real[1, :4] = 0
    first_nine[0, :9] = first_nine[1, 4:13] = 1
    with use(model, layers={"cross_attention": tm.prefix(9)}):
        found = model(ids, attention_mask=real, decoder_input_ids=target).logits
    encoded = model.get_encoder()(ids, attention_mask=real).last_hidden_state
    assert_same(found, model(encoder_outputs=(encoded,), attention_mask=first_nine, decoder_input_ids=target).logits)


def test_cross_attention_knows_the_position_of_a_cached_query() -> None:
    model, ids, target = model_of("t5"), tokens(), tokens(2, 7, seed=5)
    with torch.no_grad(), use(model, layers={"cross_attention": tm.local(2)}):
        whole = model(ids, decoder_input_ids=target).logits
        first = model(ids, decoder_input_ids=target[:, :4], use_cache=True)
        given = {"past_key_values": first.past_key_values, "encoder_outputs": (first.encoder_last_hidden_state,)}
        rest = model(decoder_input_ids=target[:, 4:], **given).logits
    assert_same(torch.cat([first.logits, rest], 1), whole)
    assert not torch.allclose(whole, model(ids, decoder_input_ids=target).logits, atol=1e-2)


def additive(dense: Tensor) -> Tensor:
    """A bool mask as eager attention takes it."""
    return torch.where(dense, 0.0, torch.finfo(torch.float32).min)


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_the_same_token_for_token(name: str, options: dict[str, Any]) -> None:
    model, given = model_of(name), generation_of(**options)
    if options.get("num_beams") and name == "gpt_oss":
        given["num_beams"] = 2
    expected = model.generate(**given)
    with use(model):
        found = model.generate(**given)
    if "num_beams" in given:
        assert torch.equal(found, expected)
        return
    pads = (given["attention_mask"] == 0).sum(1)
    assert_tokens_equal_up_to_tie(found, expected, lambda row, step: best_of(model, expected[row, pads[row] : step]))


def best_of(model: Any, row: Tensor) -> Tensor:
    """The logits `[v]` that the model chooses the next token of a row without padding from."""
    with torch.no_grad():
        return model(row[None]).logits[0, -1]


WAYS_ON = [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}]


@asks_beyond_the_window
@pytest.mark.parametrize("options", WAYS_ON, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation_under_a_mask_follows_the_uncached_forward(name: str, options: dict[str, Any]) -> None:
    model, given = model_of(name), generation_of(**options)
    alone = given["input_ids"][:1, 4:]
    with torch.no_grad(), use(model, MASK):
        found = model.generate(**given)
        for _ in range(given["max_new_tokens"]):
            alone = torch.cat([alone, model(alone).logits[:, -1:].argmax(-1)], 1)
        assert_tokens_equal_up_to_tie(found[:1, 4:], alone, lambda row, step: best_of(model, alone[row, :step]))


def test_a_rule_that_is_replaced_needs_a_cache_that_keeps_what_it_sees() -> None:
    from transformers import DynamicCache

    model, ids = model_of("mistral"), tokens(1, 9)
    given = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad(), use(model, MASK, replace=True):
        with pytest.raises(MaskError, match=r"which the sliding cache has given up: .*DynamicCache\(\)"):
            model.generate(**given)
        found = model.generate(**given, past_key_values=DynamicCache())
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert_tokens_equal_up_to_tie(found, ids, lambda row, step: best_of(model, ids[row, :step]))
    with use(model, tm.window(3), replace=True):
        assert model.generate(**given).shape == (1, 17)


def test_slots_of_a_static_cache_are_hidden_until_they_are_written() -> None:
    from transformers import DynamicCache, StaticCache

    model, ids = model_of("llama"), tokens()
    with torch.no_grad(), use(model, tm.everything, replace=True):
        expected = in_chunks(model, ids, DynamicCache(config=model.config), [9, 14])
        assert_same(in_chunks(model, ids, StaticCache(config=model.config, max_cache_len=32), [9, 14]), expected)


def test_beams_under_a_mask_of_samples_are_chosen_rows() -> None:
    model = model_of("llama")
    given = generation_of(num_beams=2)
    mask = tm.prefix([2, 5]) & tm.causal | tm.window(3)
    sides = r"for beams side by side `mask.select\(samples=\[0, 0, 1, 1\]\)`"
    with use(model, mask), pytest.raises(MaskError, match=sides):
        model.generate(**given)
    with use(model, mask.select(samples=[0, 0, 1, 1])):
        found = model.generate(**given)
    with use(model, tm.prefix(5) & tm.causal | tm.window(3)):
        alone = model.generate(**(given | {"input_ids": given["input_ids"][1:], "attention_mask": None}))
    assert torch.equal(found[1:], alone)


def test_assisted_generation() -> None:
    model, assistant = model_of("llama"), model_of("llama", seed=3)
    given = {"input_ids": tokens(1, 9), "max_new_tokens": 9, "do_sample": False}
    with use(model, MASK), use(assistant, MASK):
        found, expected = model.generate(**given, assistant_model=assistant), model.generate(**given)
        assert_tokens_equal_up_to_tie(found, expected, lambda row, step: best_of(model, expected[row, :step]))


def test_generation_with_an_encoder() -> None:
    model = model_of("t5")
    given = generation_of(max_new_tokens=8, num_beams=2)
    expected = model.generate(**given)
    with use(model):
        assert torch.equal(model.generate(**given), expected)


def generation_of(**options: Any) -> dict[str, Any]:
    """A left-padded batch and how to go on."""
    ids = tokens(2, 11)
    real = torch.ones_like(ids)
    real[0, :4] = 0
    return {"input_ids": ids, "attention_mask": real, "max_new_tokens": 12, "do_sample": False, **options}
