"""Caches of transformers models that masks size: what they give is what a cache that keeps every key gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import QuantizedLayer

import truemask as tm
from tests.support.huggingface_models import asks_beyond_the_window, model_of, tokens
from truemask.interop.huggingface import kept_keys
from truemask.interop.huggingface.kept_keys import move

TOKENS = 60
MASKS = ["causal", "window(5) | prefix(2)", "blocks(8)", "dilated(3) & window(9)", None]
CHUNKS = [[TOKENS], [1] * TOKENS, [7] * 8 + [4], [10, *[1] * 50], [25, 1, 1, 1, 20, *[1] * 12]]
PADS = torch.ones(2, TOKENS, dtype=torch.long)
PADS[0, :7] = PADS[1, :2] = 0


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys move every few steps, as they do in long texts."""
    monkeypatch.setattr(kept_keys, "LEAST_ROOM", 2)
    monkeypatch.setattr(kept_keys, "TAKEN_BACK", 3)
    yield


def read(model: Any, cache: Any, ids: Tensor, chunks: list[int], pads: Tensor | None) -> Tensor:
    """Logits `[b, n, v]` of a text that comes in pieces."""
    found, at = [], 0
    with torch.no_grad():
        for chunk in chunks:
            flags = None if pads is None else pads[:, : at + chunk]
            found.append(model(ids[:, at : at + chunk], past_key_values=cache, attention_mask=flags).logits)
            at += chunk
    return torch.cat(found, 1)


def assert_same(found: Tensor, expected: Tensor, pads: Tensor | None = None) -> None:
    real = slice(None) if pads is None else pads.bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=2e-5)


# -- logits ------------------------------------------------------------------------------------------------------------


@asks_beyond_the_window
@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "gpt_oss"])
def test_logits_are_those_of_all_keys(name: str, text: str | None) -> None:
    model, ids = model_of(name), tokens(2, TOKENS)
    with tm.use(model, text):
        for pads in (None, PADS):
            expected = read(model, DynamicCache(), ids, [20, 20, 20], pads)
            for chunks in CHUNKS[:2] if pads is None else CHUNKS[2:]:
                for static in (False, True):
                    cache = tm.cache_for(model, text, tokens=TOKENS, static=static)
                    assert_same(read(model, cache, ids, chunks, pads), expected, pads)
                    assert cache.get_seq_length() == TOKENS


@pytest.mark.parametrize(
    ("text", "most"), [("window(5) | prefix(2)", 7 + 3), ("blocks(8)", 8 + 3), ("window(1)", 1 + 3), ("causal", TOKENS)]
)
def test_as_many_keys_as_the_mask_needs_and_some_to_go_back(text: str, most: int) -> None:
    model, ids = model_of("llama"), tokens(1, TOKENS)
    cache = tm.cache_for(model, text, tokens=TOKENS)
    with tm.use(model, text):
        read(model, cache, ids, [50], None)
    assert all(len(kept.positions) <= most for kept in cache.kept)
    for kept in cache.kept:
        assert kept.bytes == kept.room * 2 * 2 * 8 * 4  # keys and values, heads, features, bytes
        assert kept.full_bytes == 50 * 2 * 2 * 8 * 4
    assert cache.bytes == sum(kept.bytes for kept in cache.kept)


def test_layers_keep_what_their_own_masks_need() -> None:
    model, ids = model_of("llama"), tokens(1, TOKENS)
    layers = {0: "window(4)", 1: "causal"}
    cache = tm.cache_for(model, layers=layers, tokens=TOKENS)
    with tm.use(model, layers=layers):
        expected = read(model, DynamicCache(), ids, [TOKENS], None)
        assert_same(read(model, cache, ids, [30, *[1] * 30], None), expected)
    few, all_of_them = (kept.count for kept in cache.kept)
    assert few < 20
    assert all_of_them == TOKENS


def test_the_models_own_rule_counts_too() -> None:
    model = model_of("mistral")
    cache = tm.cache_for(model, tokens=TOKENS)
    with tm.use(model):
        read(model, cache, tokens(1, TOKENS), [TOKENS - 1], None)
    assert cache.kept[0].positions.tolist() == list(range(TOKENS - 1 - 3 - 4, TOKENS - 1))  # window 5, 3 to go back


@pytest.mark.parametrize(
    "mask",
    [
        tm.per_sample([tm.causal & tm.window(3), tm.causal & tm.blocks(9)]),
        tm.causal.packed([20, 25, 15]),
        tm.per_head([tm.causal & tm.window(3), tm.causal, tm.causal & tm.window(6), tm.causal & tm.prefix(2)]),
        tm.causal & tm.strided(7),
    ],
    ids=["per sample", "packed", "per head", "strided"],
)
def test_masks_of_samples_documents_and_heads(mask: tm.Mask) -> None:
    model, ids = model_of("llama"), tokens(2, TOKENS)
    with tm.use(model, mask):
        expected = read(model, DynamicCache(), ids, [TOKENS], None)
        for static in (False, True):
            cache = tm.cache_for(model, mask, tokens=TOKENS, static=static)
            assert_same(read(model, cache, ids, [11, *[1] * 49], None), expected)


def test_pads_in_the_middle_move_positions() -> None:
    """As in a second turn of a chat whose samples are padded on the left."""
    model, ids, text = model_of("llama"), tokens(2, TOKENS), "window(5) | prefix(2)"
    pads = PADS.clone()
    pads[0, 30:33] = 0
    with tm.use(model, text):
        expected = read(model, DynamicCache(), ids, [28, 32], pads)
        cache = tm.cache_for(model, text, tokens=TOKENS)
        assert_same(read(model, cache, ids, [28, 12, *[1] * 20], pads), expected, pads)


# -- generate ----------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True},
    "prompt in pieces": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("way", WAYS)
def test_generate_writes_the_same(way: str, static: bool) -> None:
    text, options = "window(5) | prefix(2)", dict(WAYS[way])
    model, ids = model_of("llama"), tokens(2, 12)
    ids[0, :3] = 0
    if way in ("prompt look-up", "assistant"):
        ids = ids[1:]  # transformers takes one sample
    if "assistant_model" in options:
        options["assistant_model"] = model_of("llama", seed=3)

    def text_of(cache: Any) -> Tensor:
        torch.manual_seed(0)
        with tm.use(model, text):
            flags = (ids != 0).long()
            return model.generate(ids, attention_mask=flags, past_key_values=cache, max_new_tokens=45, **options)

    cache = tm.cache_for(model, text, tokens=64, static=static)
    assert text_of(cache).tolist() == text_of(DynamicCache()).tolist()
    assert cache.kept[0].places.since > 0, "keys were left behind"


def test_a_chat_goes_on() -> None:
    model, text = model_of("llama"), "window(5) | prefix(2)"
    cache, all_keys = tm.cache_for(model, text, tokens=64), DynamicCache()
    with tm.use(model, text):
        ids = other = tokens(1, 10)
        for turn in range(3):
            more = tokens(1, 6, seed=turn)
            ids = model.generate(torch.cat((ids, more), 1), past_key_values=cache, max_new_tokens=8)
            other = model.generate(torch.cat((other, more), 1), past_key_values=all_keys, max_new_tokens=8)
    assert ids.tolist() == other.tolist()
    assert cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoders_keep_little_of_their_own_tokens(beams: int) -> None:
    model, text, source = model_of("t5"), "window(4) | prefix(1)", tokens(2, 9)
    with tm.use(model, text, layers="decoder"):
        expected = model.generate(source, max_new_tokens=45, num_beams=beams)
        cache = tm.cache_for(model, text, layers="decoder", tokens=60)
        found = model.generate(source, max_new_tokens=45, num_beams=beams, past_key_values=cache)
    assert isinstance(cache, EncoderDecoderCache)
    assert found.tolist() == expected.tolist()
    assert cache.self_attention_cache.kept[0].places.since > 0


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_static_cache_stays_where_it_is() -> None:
    """Once the prompt is read; and the keys that attention reads lie in it."""
    model, text = model_of("llama"), "window(5) | prefix(2)"
    cache = tm.cache_for(model, text, tokens=TOKENS, static=True)
    ids, places, rooms = tokens(2, TOKENS), [], []

    def look(_: Any, __: Any, out: Any) -> None:
        del out
        rooms.append([kept.room for kept in cache.kept])
        places.append([part.data_ptr() for kept in cache.kept for part in kept.memory])

    with tm.use(model, text), torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        handle = model.register_forward_hook(look)
        append, inside = kept_keys.KeptKeys.append, []

        def watched(kept: Any, k: Tensor, v: Tensor) -> Any:
            keys, values = append(kept, k, v)
            storage = kept.memory[0].untyped_storage().data_ptr()
            inside.append(keys.untyped_storage().data_ptr() == storage)
            return keys, values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kept_keys.KeptKeys, "append", watched)
            for at in range(10, TOKENS):
                model(ids[:, at : at + 1], past_key_values=cache)
        handle.remove()
    assert len(places) == TOKENS - 10
    assert all(place == places[0] for place in places)
    assert all(room == rooms[0] for room in rooms)
    assert all(inside)


@pytest.mark.parametrize("which", [[0, 1, 5, 6, 7], [3, 4, 5, 6], [7], [], [0, 2, 4, 6], [1, 2, 3, 4, 5, 6, 7]])
def test_keys_move_to_the_front_of_the_memory_that_they_lie_in(which: list[int]) -> None:
    memory = torch.arange(8.0).reshape(1, 1, 8, 1).clone()
    expected = memory[:, :, which].clone()
    move(memory, torch.tensor(which, dtype=torch.int64), memory)
    assert memory[:, :, : len(which)].tolist() == expected.tolist()


# -- other ends --------------------------------------------------------------------------------------------------------


def state(cache: Any) -> list[Any]:
    """All that a cache holds."""
    return [
        (kept.past, kept.count, kept.positions.tolist(), [part[:, :, : kept.count].tolist() for part in kept.memory])
        for kept in cache.kept
    ]


def test_tokens_are_taken_back_after_keys_were_left_behind() -> None:
    model, ids, text = model_of("llama"), tokens(1, TOKENS), "window(5) | prefix(2)"
    cache, all_keys = tm.cache_for(model, text, tokens=TOKENS), DynamicCache()
    with tm.use(model, text), torch.no_grad():
        for one in (cache, all_keys):
            for at in range(0, 40, 4):
                model(ids[:, at : at + 4], past_key_values=one)
                one.crop(-3)
                model(ids[:, at + 1 : at + 4], past_key_values=one)
        expected = model(ids[:, 40:50], past_key_values=all_keys).logits
        assert_same(model(ids[:, 40:50], past_key_values=cache).logits, expected)


def test_tokens_that_were_forgotten_cannot_be_gone_back_to() -> None:
    model, text = model_of("llama"), "window(5) | prefix(2)"
    cache = tm.cache_for(model, text, tokens=TOKENS)
    with tm.use(model, text):
        read(model, cache, tokens(1, TOKENS), [40], None)
    before = state(cache)
    with pytest.raises(ValueError, match=r"the first 20 of 40 tokens .* key 19, which queries up to 23 see, was over"):
        cache.crop(-20)
    with pytest.raises(ValueError, match="minus the number of tokens"):
        cache.crop(20)
    assert state(cache) == before
    cache.reset()
    assert cache.get_seq_length() == 0


# -- at the door -------------------------------------------------------------------------------------------------------


def refused(cache: Any, run: Callable[[], object], kind: type[Exception], words: str) -> None:
    """`run` raises, and the cache is as it was."""
    before = state(cache)
    with pytest.raises(kind, match=words), torch.no_grad():
        run()
    assert state(cache) == before


def test_what_a_cache_does_not_fit_is_refused_before_anything_is_read() -> None:
    model, text, ids = model_of("llama"), "window(5) | prefix(2)", tokens(2, TOKENS)
    cache = tm.cache_for(model, text, tokens=50, static=True)
    with tm.use(model, text):
        read(model, cache, ids, [10, 1], None)
        refused(cache, lambda: model(ids[:1, :1], past_key_values=cache), ValueError, "2 samples, .* brings 1")
        refused(cache, lambda: model(ids[:, :40], past_key_values=cache), ValueError, "for 50 tokens, 11 of them read")
        refused(cache, lambda: cache.batch_repeat_interleave(2), ValueError, "static cache keeps its memory")
    refused(cache, lambda: model(ids[:, :1], past_key_values=cache), tm.MaskError, "is not in use: run the")
    with tm.use(model, "window(6) | prefix(2)"):
        refused(cache, lambda: model(ids[:, :1], past_key_values=cache), tm.MaskError, "mask in use is `window.6.")
    with tm.use(model, text):
        with pytest.raises(ValueError, match="use torch.no_grad"):
            model(ids[:, :1], past_key_values=cache)
        read(model, cache, ids, [5], None)


def test_without_a_mask_the_first_use_decides() -> None:
    model, ids = model_of("llama"), tokens(1, TOKENS)
    cache = tm.cache_for(model, tokens=TOKENS)
    with tm.use(model, "window(4)"):
        read(model, cache, ids, [30], None)
    assert cache.kept[0].count < 10
    with tm.use(model, "causal"):
        refused(cache, lambda: model(ids[:, :1], past_key_values=cache), tm.MaskError, "for .* under `window.4.`")


class Rounded(QuantizedLayer):
    """A quantised cache without a library: keys and values in steps of 1/64."""

    def __init__(self) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return (tensor * 64).round()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor / 64


def test_quantised_caches_of_transformers_run_in_use() -> None:
    """They give all keys back, so masks mean what they mean."""
    model, ids = model_of("llama"), tokens(1, 20)
    chunks = [8, *[1] * 12]
    expected = read(model, Cache(layer_class_to_replicate=Rounded), ids, chunks, None)
    with tm.use(model):
        assert_same(read(model, Cache(layer_class_to_replicate=Rounded), ids, chunks, None), expected)
