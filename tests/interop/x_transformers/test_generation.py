"""x-transformers' generation under a mask: what all tokens give at once, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.equality import assert_same, assert_tokens_equal_up_to_tie
from tests.support.huggingface_models import asks_beyond_the_window
from tests.support.x_transformers_models import HEADS, MASKS, SIZE, X, behind, cells, model, tokens
from truemask.errors import MaskError
from truemask.interop.use import use
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.per_token import keys, prefix


def greedy(prompt: Tensor, new: int, next_logits: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The best token of all tokens so far, again and again: the new ones, and the logits `[b, new, v]` they are of."""
    out, logits = prompt, []
    for _ in range(new):
        logits.append(next_logits(out))
        out = torch.cat((out, logits[-1].argmax(-1, keepdim=True)), 1)
    return out[:, prompt.shape[1] :], torch.stack(logits, 1)


GENERATED: dict[str, dict[str, Any]] = {
    "plain": {},
    "flash rotary": {"attn_flash": True, "rotary_pos_emb": True},
    "alibi grouped": {"alibi_pos_bias": True, "attn_kv_heads": 2},
    "window": {"attn_max_attend_past": 5},
    "talking heads": {"attn_pre_talking_heads": True},
    "residual": {"residual_attn": True},
}


@asks_beyond_the_window
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("options", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("mask", [window(3) | (prefix(2) & causal), MASKS["heads"]], ids=["sinks", "heads"])
def test_generation_under_a_mask(mask: Mask, options: dict[str, Any], cache: bool) -> None:
    net = model(**options)
    if options.get("residual_attn") and cache:
        options = {}  # x-transformers adds scores of another length there
        net = model()
    expected, logits = greedy(
        tokens(length=6), 9, lambda x: net(x, attn_mask=cells(mask, x.shape[1]).expand(HEADS, -1, -1))[:, -1]
    )
    wrapper = X.AutoregressiveWrapper(net)
    with use(wrapper, mask):
        out = wrapper.generate(tokens(length=6), 9, temperature=0.0, cache_kv=cache)
    assert_tokens_equal_up_to_tie(out, expected, logits)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("flash", [True, False])
def test_prompts_of_different_lengths_generate_what_each_does_alone(cache: bool, registers: int, flash: bool) -> None:
    net = model(wrap={"num_memory_tokens": registers}, attn_flash=flash)
    wrapper = X.AutoregressiveWrapper(net)
    prompts = [tokens(1, n, seed=n)[0] for n in (3, 8, 5)]
    mask = window(4) | (prefix(2) & causal)
    with use(wrapper, mask):
        together = wrapper.generate(prompts, 7, temperature=0.0, cache_kv=cache)
        alone = [wrapper.generate(prompt[None], 7, temperature=0.0, cache_kv=cache)[0] for prompt in prompts]

        def chosen_from(row: int, step: int) -> Tensor:
            return net(torch.cat((prompts[row], alone[row][:step]))[None])[0, -1]

        assert_tokens_equal_up_to_tie(together, torch.stack(alone), chosen_from)


@pytest.mark.parametrize("memory", [0, 2])
def test_generation_behind_an_image(memory: int) -> None:
    net = model(attn_num_mem_kv=memory)
    wrapper = X.AutoregressiveWrapper(net)
    image = torch.randn(2, 4, HEADS * SIZE)
    mask = window(3) | (prefix(1) & causal)
    prompt = tokens(length=5)
    with use(wrapper, mask):
        cached, plain = (
            wrapper.generate(prompt, 6, temperature=0.0, cache_kv=cache, prepend_embeds=image)
            for cache in (True, False)
        )

    def next_logits(text: Tensor) -> Tensor:
        allowed = behind(mask, 4, text.shape[1])
        allowed = torch.cat((torch.ones(len(allowed), memory, dtype=torch.bool), allowed), -1)
        return net(text, prepend_embeds=image, attn_mask=allowed)[:, -1]

    expected, logits = greedy(prompt, 6, next_logits)
    assert_tokens_equal_up_to_tie(cached, expected, logits)
    assert_tokens_equal_up_to_tie(plain, expected, logits)


def test_a_cache_remembers_its_registers() -> None:
    """The image is given with the prompt only, and the tokens after it one by one."""
    net = model()
    image, text = torch.randn(2, 4, HEADS * SIZE), tokens(length=8)
    mask = window(3) | (prefix(1) & causal)
    with use(net, mask):
        whole = net(text, prepend_embeds=image)[:, 4:]
        _, cache = net(text[:, :5], prepend_embeds=image, return_intermediates=True)
        x = net.token_emb(text) + net.pos_emb(text)
        last, _ = net.attn_layers(torch.cat((image, x[:, :6]), 1), cache=cache, return_hiddens=True)
    assert_same(net.to_logits(last)[:, -1], whole[:, 5])


@pytest.mark.parametrize("cache", [True, False])
def test_generation_beyond_the_longest_sequence(cache: bool) -> None:
    """The model forgets the oldest tokens then, and the mask counts from the oldest that it still sees."""
    net = model(wrap={"use_abs_pos_emb": False}, depth=1, rotary_pos_emb=True)
    net.max_seq_len, mask, prompt = 8, window(3) | (prefix(2) & causal), tokens(length=5)
    wrapper = X.AutoregressiveWrapper(net)
    expected, logits = greedy(prompt, 9, lambda x: net(x[:, -8:], attn_mask=cells(mask, min(x.shape[1], 8)))[:, -1])
    with use(wrapper, mask):
        out = wrapper.generate(prompt, 9, temperature=0.0, cache_kv=cache)
    assert_tokens_equal_up_to_tie(out, expected, logits)


def test_a_cache_that_takes_back_its_last_key_keeps_its_registers() -> None:
    """As x-transformers' `Recirculation` does: it runs the last token again, in the place of what was cached of it."""
    net, image, text = model(), torch.randn(2, 4, HEADS * SIZE), tokens(length=6)
    mask = window(3) | (prefix(1) & causal)
    with use(net, mask):
        whole = net(text, prepend_embeds=image)
        _, cache = net(text, prepend_embeds=image, return_intermediates=True)
        for layer in cache.attn_intermediates:
            layer.cached_kv = tuple(x[..., :-1, :] for x in layer.cached_kv)
        cache.cache_length -= 1
        again = net(text, prepend_embeds=image, cache=cache)
    assert_same(again[:, -1], whole[:, -1])


def test_beams_agree_with_and_without_the_cache() -> None:
    wrapper = X.AutoregressiveWrapper(model(rotary_pos_emb=True))
    with use(wrapper, window(3)):
        cached = wrapper.beam_search(tokens(length=5), 5, beams=3, cache_kv=True)
        plain = wrapper.beam_search(tokens(length=5), 5, beams=3, cache_kv=False)
    assert torch.equal(cached, plain)


def test_a_mask_that_holds_data_says_where_it_ends() -> None:
    wrapper = X.AutoregressiveWrapper(model())
    with use(wrapper, causal & keys([True] * 8)):
        wrapper.generate(tokens(length=5), 4, temperature=0.0)
        with pytest.raises(MaskError, match="8"):
            wrapper.generate(tokens(length=5), 5, temperature=0.0)
