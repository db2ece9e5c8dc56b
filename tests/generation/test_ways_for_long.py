"""Beams and samples over long answers: after keys were forgotten, by the native step, of prompts of other lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from truemask.backends.native.library import missing
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.generation.decoding import Reader, cache_for
from truemask.generation.native_step import NativeStep
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask

WORDS, LONG = 31, 90  # more than a cache of SINKS has room for
SINKS = tm.causal & (tm.window(4) | tm.prefix(2))
MASKS: list[Mask | None] = [None, SINKS, tm.causal & tm.blocks(5)]


def model() -> AutoregressiveWrapper:
    torch.manual_seed(0)
    layers = tm.Decoder(dim=32, depth=2, heads=4, attn_dim_head=16, attn_kv_heads=2, rotary_pos_emb=True)
    net = tm.TransformerWrapper(num_tokens=WORDS, max_seq_len=0, attn_layers=layers)
    torch.nn.init.normal_(net.project_out.weight, std=0.5)
    return AutoregressiveWrapper(net.eval())


def prompts(*lengths: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(WORDS, (length,), generator=numbers) for length in lengths]


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was one for the native step."""
    calls, original = [], NativeStep.__call__

    def call(self: NativeStep, tokens: Tensor) -> Tensor | None:
        logits = original(self, tokens)
        calls.append(logits is not None)
        return logits

    monkeypatch.setattr(NativeStep, "__call__", call)
    return calls


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_long_searches_and_samples_are_those_without_a_cache(mask: Mask | None, native_calls: list[bool]) -> None:
    quick, given = model(), prompts(3, 8)
    slow = AutoregressiveWrapper(copy.deepcopy(quick.net).double())
    search: dict[str, Any] = {"beams": 3, "return_n": 3, "eos_token": 7, "mask": mask}
    found = quick.beam_search(given, LONG, **search)
    exact = slow.beam_search(given, LONG, **search, cache_kv=False)
    assert torch.equal(found.tokens, exact.tokens)
    assert torch.allclose(found.scores, exact.scores, atol=1e-5)
    draw: dict[str, Any] = {"samples_per_prompt": 3, "seed": 4, "mask": mask}
    drawn, again = quick.generate(given, LONG, **draw), slow.generate(given, LONG, **draw, cache_kv=False)
    assert isinstance(drawn, Tensor)
    assert isinstance(again, Tensor)
    assert torch.equal(drawn, again)
    if not missing():
        assert sum(native_calls) >= LONG  # all but the prompts


def test_a_search_goes_on_for_as_long_as_it_is_asked_to() -> None:
    """Masks were chosen of chosen ones, step by step, until an expression was too deep."""
    wrapper, given = model(), prompts(3, 8)
    found = wrapper.beam_search(given, 230, beams=2)
    for prompt, tokens, scores in zip(given, *found, strict=True):
        alone = wrapper.beam_search(prompt, 230, beams=2)
        assert torch.equal(alone.tokens, tokens)
        assert torch.allclose(alone.scores, scores, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("causal", [None, False])
@pytest.mark.parametrize("cached", [True, False])
def test_samples_that_change_places_take_their_masks_along(cached: bool, causal: bool | None) -> None:
    """Whether the mask is the cache's or, since it looks ahead, the reader's."""
    net, ids = model().net, torch.stack(prompts(12, 12, 12))
    mask = tm.causal & tm.per_sample([tm.window(3), tm.window(9), tm.blocks(4)])
    if causal is False:
        mask = mask | tm.prefix(4)
    read = Reader(net, mask, causal_too=causal)
    if cached:
        read = Reader(net, mask, causal_too=causal, cache=cache_for(net, mask, batch=3, tokens=12, causal_too=causal))
    read(ids[:, :8])
    held = [0, 1, 2]
    for step, rows in enumerate([[0, 1, 2], [2, 0, 1], [1, 1, 0], [2, 0]]):
        read.select(rows)
        held = [held[row] for row in rows]
        stop = 9 + step
        expected = net(ids[held, :stop], mask=mask.select(samples=held), causal=causal)[:, -1]
        assert torch.allclose(read(ids[held, stop - 1 : stop]), expected, atol=1e-4)


def test_beams_in_their_places_do_not_move() -> None:
    net = model().net
    cache = cache_for(net, everything.padded([0, 2]), batch=2, tokens=9, causal_too=None)
    read = Reader(net, everything.padded([0, 2]), cache=cache)
    with torch.no_grad():
        read(torch.stack(prompts(5, 5)))
    read.select([0, 0, 1, 1])
    moves, mask, memory = cache.moves, cache.mask, cache.layer(0).memory
    before = memory[:, :, :, :5].clone()
    read.select([1, 0, 3, 3])
    assert (cache.moves, cache.mask) == (moves, mask)
    assert cache.layer(0).memory is memory
    assert torch.equal(memory[:, :, :, :5], before[:, [1, 0, 3, 3]])
