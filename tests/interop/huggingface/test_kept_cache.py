"""A cache that forgets what its masks let it forget: the same logits and the same text from fewer keys."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import truemask as tm
from tests.support.cases import CASES, Case
from tests.support.equality import assert_same
from tests.support.huggingface_models import WINDOW, asks_beyond_the_window, model_of, tokens
from tests.support.kept_caches import MASK, MODELS, encodes, full, read, side
from tests.support.strategies import Drawn, Reach, expressions
from truemask.errors import MaskError

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

from truemask.interop.huggingface import kept_layer  # noqa: E402  (it needs transformers)

pytestmark = asks_beyond_the_window
N = 29
OTHERS = ["gemma2", "llama4", "gpt_oss", "qwen3", "bart"]
MASKS: list[tm.Mask | None] = [
    MASK,
    tm.causal & tm.blocks(5),
    tm.per_sample([tm.window(3), tm.causal & tm.blocks(5)]),
    tm.causal.packed([7, 11, 11]),
    None,
]
SIZES = (1, 7, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, N)  # MASK's window is one less than the models'


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small memories, so that small models forget."""
    monkeypatch.setattr(kept_layer, "LEAST_ROOM", 2)
    monkeypatch.setattr(kept_layer, "SLACK", 2)


# -- the same logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_all_keys(name: str, mask: tm.Mask | None) -> None:
    model, ids = model_of(name), tokens(2, N)
    with tm.use(model, mask, **side(model, mask)):
        whole = read(model, ids, full(model), N)
        for size, static in zip(SIZES, itertools.cycle((False, True))):
            cache = tm.cache_for(model, tokens=N, static=static)
            assert_same(read(model, ids, cache, size), whole)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_logits_from_memory_of_a_fixed_size(mask: tm.Mask | None) -> None:
    model, ids = model_of("gemma3"), tokens(2, N)
    with tm.use(model, mask):
        whole = read(model, ids, full(model), N)
        for size in SIZES:
            assert_same(read(model, ids, tm.cache_for(model, tokens=N, static=True), size), whole)


@pytest.mark.parametrize("name", OTHERS)
def test_logits_of_other_architectures(name: str) -> None:
    model, ids = model_of(name), tokens(2, N)
    with tm.use(model, MASK, **side(model, MASK)):
        whole = read(model, ids, full(model), N)
        for size in (1, 6, N):
            assert_same(read(model, ids, tm.cache_for(model), size), whole)


def _fits(case: Case) -> bool:
    return case.q_len == case.kv_len and case.heads in (1, 4)


@pytest.mark.parametrize("case", list(filter(_fits, CASES)), ids=repr)
def test_every_mask_of_the_catalogue(case: Case) -> None:
    model, n, mask = model_of("llama"), case.q_len, tm.causal & case.make()
    ids = tokens(case.batch, n)
    with tm.use(model, mask):
        whole = read(model, ids, full(model), n)
        for size, known in ((1, n), (3, n), (1, None)):
            assert_same(read(model, ids, tm.cache_for(model, tokens=known), size), whole)


@pytest.mark.parametrize("mask", [MASK, MASKS[2], tm.causal & tm.blocks(5), None], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "llama4"])
def test_left_padding_moves_what_is_kept(name: str, mask: tm.Mask | None) -> None:
    model, ids = model_of(name), tokens(2, N)
    real = torch.ones_like(ids)
    real[0, :9] = 0
    with tm.use(model, mask):
        whole = read(model, ids, full(model), N, real)[real == 1]
        for size, static in ((1, False), (7, True), (N, False)):
            cache = tm.cache_for(model, tokens=N, static=static)
            assert_same(read(model, ids, cache, size, real)[real == 1], whole)
    assert mask is None or len(cache.positions()) < N


def with_pads(ids: Tensor, start: int) -> Tensor:
    """Flags of real tokens, of which three are missing from `start` on in the first sample."""
    real = torch.ones_like(ids)
    real[0, start : start + 3] = 0
    return real


def test_pads_elsewhere_keep_every_key() -> None:
    model, ids = model_of("llama"), tokens(2, N)
    early, late = with_pads(ids, 4), with_pads(ids, 21)
    with tm.use(model, MASK):
        whole, cache = read(model, ids, full(model), N, early)[early == 1], tm.cache_for(model)
        assert_same(read(model, ids, cache, 7, early)[early == 1], whole)
        assert len(cache.positions()) == N
        with pytest.raises(MaskError, match=r"`model.layers.0.self_attn` may need key \d+ now, .* forgotten under"):
            read(model, ids, tm.cache_for(model), 1, late)


def test_a_mask_in_the_place_of_the_models_window_keeps_what_it_sees() -> None:
    model, ids = model_of("mistral"), tokens(2, N)
    with tm.use(model, MASK, replace=True):
        whole = read(model, ids, full(model), N)
        cache = tm.cache_for(model, MASK, replace=True)
        assert_same(read(model, ids, cache, 1), whole)
    assert cache.positions()[:2].tolist() == [0, 1]


def test_weights_are_those_of_all_keys() -> None:
    model, ids = model_of("llama"), tokens(1, N)
    with tm.use(model, MASK), torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
        cache = tm.cache_for(model)
        model(ids[:, :-1], past_key_values=cache)
        found = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs[:, :, -1:])


@st.composite
def chunked(draw: Any) -> tuple[Drawn, list[int]]:
    n = draw(st.integers(4, 14))
    drawn = draw(expressions(depth=3, reach=Reach(n, n, draw(st.integers(1, 3)), 4)))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1))))
    return drawn, [stop - start for start, stop in itertools.pairwise([0, *cuts, n])]


@given(chunked(), st.sampled_from(["llama", "gemma3", "gpt2", "t5"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_random_masks_and_chunks(pair: tuple[Drawn, list[int]], name: str, static: bool) -> None:
    (drawn, sizes), model = pair, model_of(name).double()
    mask, ids = tm.causal & drawn.mask, tokens(drawn.reach.batch, drawn.reach.q)
    with tm.use(model, mask, **side(model, mask)):
        whole, cache = (
            read(model, ids, full(model), ids.shape[1]),
            tm.cache_for(model, tokens=ids.shape[1], static=static),
        )
        parts = [read(model, part, cache, part.shape[1]) for part in ids.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [MASK, tm.causal & tm.blocks(5)], ids=str)
def test_what_is_kept_is_what_live_keys_says_and_little_more(mask: tm.Mask) -> None:
    model, ids = model_of("llama"), tokens(1, 60)
    with tm.use(model, mask):
        cache = tm.cache_for(model)
        for past in range(1, 61):
            read(model, ids[:, past - 1 : past], cache, 1)
            live = set(mask.live_keys(past)[0, 0].nonzero()[:, 0].tolist())
            assert live <= set(cache.positions().tolist())
            assert cache.get_seq_length() == past
            assert len(cache.positions()) <= 2 * (6 + 2 + 2)
    assert cache.bytes < cache.full_bytes / 2


def test_each_kind_of_layer_keeps_its_own() -> None:
    model, ids = model_of("gemma3"), tokens(1, 60)
    masks = {"full_attention": tm.causal & (tm.window(9) | tm.prefix(1))}
    with tm.use(model, layers=masks):
        cache = tm.cache_for(model, layers=masks)
        read(model, ids, cache, 5)
    sliding, attending = (cache.positions(layer).tolist() for layer in (0, 1))
    assert sliding[0] > 1
    assert attending[0] == 0
    assert attending[1] > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_static_cache_stays_where_it_is(name: str) -> None:
    model, ids = model_of(name), tokens(2, 60)
    with tm.use(model, MASK, **side(model, MASK)):
        cache = tm.cache_for(model, static=True, tokens=60)
        layers = (cache.self_attention_cache if encodes(model) else cache).layers
        read(model, ids[:, :9], cache, 9)
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers]
        size = cache.bytes
        for step in range(9, 60):
            read(model, ids[:, step : step + 1], cache, 1)
            assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers] == places
    assert cache.bytes == size < cache.full_bytes


def test_a_long_text_keeps_constant_memory() -> None:
    model, ids, most = model_of("llama"), tokens(1, 64), 0
    with tm.use(model, MASK):
        cache = tm.cache_for(model)
        for _ in range(30):
            read(model, ids, cache, 16)
            most = max(most, cache.bytes)
    assert cache.get_seq_length() == 30 * 64
    assert most * 20 < cache.full_bytes


# -- other samples, other ends -----------------------------------------------------------------------------------------


def test_a_copy_goes_on_by_itself() -> None:
    model, ids = model_of("llama"), tokens(1, N)
    with tm.use(model, MASK):
        whole, cache = read(model, ids, full(model), N), tm.cache_for(model)
        read(model, ids[:, :20], cache, 7)
        copied = copy.deepcopy(cache)
        read(model, tokens(1, 9, seed=4), cache, 1)
        assert_same(read(model, ids[:, 20:], copied, 1), whole[:, 20:])


def test_samples_change_places_and_numbers() -> None:
    model, ids = model_of("llama"), tokens(3, N)
    chosen = torch.tensor([2, 0, 2])
    with tm.use(model, MASK):
        cache = tm.cache_for(model)
        read(model, ids[:, :20], cache, 3)
        cache.reorder_cache(chosen)
        assert_same(read(model, ids[chosen][:, 20:24], cache, 1), read(model, ids[chosen], full(model), N)[:, 20:24])
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        rows = ids[[0, 0]]
        assert_same(read(model, rows[:, 24:], cache, 1), read(model, rows, full(model), N)[:, 24:])
    assert cache.batch_size == 2


def test_tokens_are_taken_back_as_far_as_nothing_is_missing() -> None:
    model, ids = model_of("llama"), tokens(1, N)
    with tm.use(model, MASK):
        whole, cache = read(model, ids, full(model), N), tm.cache_for(model)
        read(model, ids[:, :25], cache, 1)
        before = cache.positions()
        with pytest.raises(MaskError, match=r"crop: the first 5 tokens cannot be gone on from: .*activate_past"):
            cache.crop(-20)
        with pytest.raises(ValueError, match="minus the number of tokens to remove"):
            cache.crop(3)
        assert torch.equal(cache.positions(), before)
        cache.crop(-2)
        assert cache.get_seq_length() == 23
        assert_same(read(model, ids[:, 23:], cache, 2), whole[:, 23:])
        cache.activate_past_recording()
        read(model, tokens(1, 12, seed=5), cache, 12)
        cache.crop(-12)
        assert cache.get_seq_length() == N
        cache.reset()
        assert_same(read(model, ids, cache, 4), whole)
