"""`tm.use` on x-transformers models: without a mask they compute what they did, with one what the dense mask gives."""

from __future__ import annotations

import copy
import io
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.equality import assert_same, assert_tokens_equal_up_to_tie
from tests.support.huggingface_models import asks_beyond_the_window
from truemask.attention.attend import attend
from truemask.errors import MaskError
from truemask.interop.use import use
from truemask.interop.x_transformers import attention as x_attention
from truemask.masks.compose.boolean import everything
from truemask.masks.compose.per_axis import per_head
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, local, window
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.patterns import dilated
from truemask.masks.leaves.per_token import keys, prefix
from truemask.masks.leaves.predicate import predicate

X: Any = pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `peers` has it)")

HEADS, SIZE, WORDS, LENGTH = 4, 8, 29, 13


def stack(kind: str = "Decoder", depth: int = 2, **options: Any) -> Any:
    return getattr(X, kind)(dim=HEADS * SIZE, depth=depth, heads=HEADS, attn_dim_head=SIZE, **options)


def model(kind: str = "Decoder", wrap: dict[str, Any] | None = None, depth: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    made = X.TransformerWrapper(
        num_tokens=WORDS, max_seq_len=64, attn_layers=stack(kind, depth, **options), **(wrap or {})
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # what begins at 0 or 1 would hide mistakes
            if parameter.ndim == 1 or "sink" in name or "mem" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.eval()


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(1, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(net: Any, *args: Any, **named: Any) -> tuple[Tensor, list[Tensor]]:
    """The output of a model, and the gradients of its parameters."""
    net.zero_grad()
    out = net(*args, **named)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out * weights).sum().backward()
    return out.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]


def same(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> None:
    """Outputs, and gradients at the size of the largest: those of a key's bias are sums that cancel."""
    assert_same(ours[0], theirs[0])
    largest = max((float(plain.abs().max()) for plain in theirs[1]), default=0.0)
    for mine, plain in zip(ours[1], theirs[1], strict=True):
        assert_same(mine, plain, scale=largest)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Mask]:
    """The masks that `attend` is called with."""
    seen: list[Mask] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **named: Any) -> Tensor:
        seen.append(mask)
        return attend(q, k, v, mask, **named)

    monkeypatch.setattr(x_attention, "attend", counted)
    return seen


# -- without a mask ----------------------------------------------------------------------------------------------------

ON_BACKENDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flash": {"attn_flash": True},
    "encoder": {"kind": "Encoder"},
    "encoder flash": {"kind": "Encoder", "attn_flash": True},
    "alibi": {"alibi_pos_bias": True},
    "alibi flash": {"alibi_pos_bias": True, "attn_flash": True},
    "alibi of some heads": {"alibi_pos_bias": True, "alibi_num_heads": 2, "attn_kv_heads": 2},
    "rotary": {"rotary_pos_emb": True, "attn_flash": True},
    "xpos": {"rotary_pos_emb": True, "rotary_xpos": True},
    "polar": {"polar_pos_emb": True},
    "t5": {"rel_pos_bias": True},
    "t5 encoder": {"kind": "Encoder", "rel_pos_bias": True},
    "dynamic": {"dynamic_pos_bias": True},
    "grouped": {"attn_kv_heads": 2},
    "grouped flash": {"attn_kv_heads": 2, "attn_flash": True},
    "one key head": {"attn_one_kv_head": True},
    "grouped sinks and bias": {"attn_kv_heads": 2, "attn_head_learned_sink": True, "rel_pos_bias": True},
    "qk norm": {"attn_qk_norm": True},
    "qk norm dim scale": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True, "attn_flash": True},
    "qk rmsnorm": {"attn_qk_rmsnorm": True},
    "value rmsnorm": {"attn_value_rmsnorm": True},
    "softclamp": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 0.5},
    "memory keys": {"attn_num_mem_kv": 3},
    "memory keys flash": {"attn_num_mem_kv": 3, "attn_flash": True},
    "memory keys norm window": {"attn_num_mem_kv": 3, "attn_qk_norm": True, "attn_max_attend_past": 3},
    "window": {"attn_max_attend_past": 4},
    "window flash": {"attn_max_attend_past": 4, "attn_flash": True},
    "window encoder": {"kind": "Encoder", "attn_max_attend_past": 4},
    "window by layer": {"attn_max_attend_past": (2, 6)},
    "zero key": {"attn_add_zero_kv": True},
    "zero key flash": {"attn_add_zero_kv": True, "attn_flash": True, "alibi_pos_bias": True},
    "sink": {"attn_head_learned_sink": True},
    "sink and zero key": {"attn_head_learned_sink": True, "attn_add_zero_kv": True},
    "l2": {"attn_l2_distance": True},
    "l2 flash": {"attn_l2_distance": True, "attn_flash": True},
    "gates": {"attn_gate_values": True, "attn_gate_value_heads": True, "attn_head_scale": True, "attn_on_attn": True},
    "value size": {"attn_value_dim_head": 5},
    "latent": {"attn_use_latent_q": True, "attn_dim_latent_q": 12, "attn_use_latent_kv": True, "attn_dim_latent_kv": 8},
    "laser": {"attn_laser": True},
    "value residual": {"add_value_residual": True, "learned_value_residual_mix": True},
    "forgetting": {"attn_data_dependent_alibi": True},
    "relative projection": {"attn_use_rel_proj_pos_bias": True},
    "post norm": {"pre_norm": False},
    "sandwich": {"sandwich_norm": True, "use_rmsnorm": True},
    "macaron": {"macaron": True, "use_scalenorm": True},
    "hyper connections": {"num_residual_streams": 2},
    "hyper connections apart": {"num_residual_streams": 2, "qkv_receive_diff_residuals": True},
    "layers integrated": {"integrate_layers": True},
    "shifted tokens": {"shift_tokens": 1},
    "tied layers": {"weight_tie_layers": True},
    "gated residual": {"gate_residual": True},
    "belief": {"attn_orthog_projected_values": True},
    "memory tokens": {"wrap": {"num_memory_tokens": 3}},
    "memory tokens encoder": {"kind": "Encoder", "wrap": {"num_memory_tokens": 3}},
    "memory tokens between": {"wrap": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 4}},
    "class token": {"kind": "Encoder", "wrap": {"use_cls_token": True}},
    "attention pool": {"kind": "Encoder", "wrap": {"attn_pool": True}},
    "prefix decoder": {"kind": "PrefixDecoder"},
}
OWN_PATH: dict[str, dict[str, Any]] = {
    "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "scaled talking heads": {"attn_pre_scale_post_talking_heads": True},
    "top k": {"attn_sparse_topk": 3, "attn_max_attend_past": 5},
    "hard": {"attn_hard": True},
    "sigmoid": {"attn_sigmoid": True, "attn_num_mem_kv": 2},
    "custom": {"attn_custom_attn_fn": lambda scores: scores.relu().square()},
    "cog": {"attn_cog_signed": True},
    "selective": {"attn_selective": True},
    "cope": {"attn_use_cope": True},
    "softclamp and bias": {"attn_softclamp_logits": True, "alibi_pos_bias": True},
    "l2 and sink": {"attn_l2_distance": True, "attn_add_zero_kv": True},
}
SOME_OWN: dict[str, dict[str, Any]] = {
    "residual": {"residual_attn": True},
    "residual encoder": {"kind": "Encoder", "residual_attn": True},
}


@pytest.mark.parametrize("name", [*ON_BACKENDS, *OWN_PATH, *SOME_OWN])
def test_without_a_mask_the_model_computes_what_it_did(name: str, calls: list[Mask]) -> None:
    net = model(**{**ON_BACKENDS, **OWN_PATH, **SOME_OWN}[name])
    plain = run(net, tokens())
    with use(net):
        same(run(net, tokens()), plain)
    assert bool(calls) == (name not in OWN_PATH)
    again = run(net, tokens())
    assert torch.equal(again[0], plain[0])


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
@pytest.mark.parametrize("memory", [0, 2])
def test_padding_and_attn_mask_of_the_caller_stay(kind: str, flash: bool, memory: int, calls: list[Mask]) -> None:
    net = model(kind, attn_flash=flash, attn_num_mem_kv=memory)
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])
    plain = run(net, tokens(), mask=real)
    with use(net):
        same(run(net, tokens(), mask=real), plain)
    if not memory:  # x-transformers refuses both together
        allowed = torch.rand(HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5
        allowed |= torch.eye(LENGTH, dtype=torch.bool)
        for given in (allowed[0], allowed, allowed[None]):
            plain = run(net, tokens(), attn_mask=given, mask=real)
            with use(net):
                same(run(net, tokens(), attn_mask=given, mask=real), plain)
    assert calls


@asks_beyond_the_window
def test_what_the_model_claims_is_said_in_words(calls: list[Mask]) -> None:
    net = model(attn_max_attend_past=4)
    with use(net, prefix(2)):
        net(tokens())
    assert calls == [window(5) & prefix(2)] * 2
    calls.clear()
    net = model("Encoder", attn_num_mem_kv=2, attn_max_attend_past=4)
    with use(net):
        net(tokens())
    assert calls[0] == (window(5) | ~causal).prepended(k=2)


@pytest.mark.parametrize("flash", [False, True])
def test_a_call_may_ask_for_another_causality(flash: bool) -> None:
    net = stack(attn_flash=flash).eval()
    x = torch.randn(2, LENGTH, HEADS * SIZE)
    plain = run(net, x, causal=False)
    with use(net):
        same(run(net, x, causal=False), plain)


# -- under a mask ------------------------------------------------------------------------------------------------------

MASKS = {
    "window": window(4),
    "sinks": window(3) | (prefix(2) & causal),
    "dilated": dilated(2) & causal,
    "heads": per_head([causal, window(2), window(5), dilated(3) & causal]),
    "function": predicate(lambda b, h, q, k: (k <= q) & ((q - k) % 3 != 1)),
}


def cells(mask: Mask, n: int = LENGTH) -> Tensor:
    """The mask as x-transformers takes it: `[h or 1, n, n]`."""
    return mask.to_dense(n, heads=HEADS)[0]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_flash": True},
        {"attn_kv_heads": 2},
        {"attn_one_kv_head": True, "alibi_pos_bias": True},
        {"kind": "Encoder", "rotary_pos_emb": True},
        {"attn_max_attend_past": 6, "attn_head_learned_sink": True},
        {"attn_softclamp_logits": True},
        {"attn_post_talking_heads": True},
        {"attn_sparse_topk": 2},
        {"attn_sigmoid": True},
        {"attn_selective": True},
        {"attn_use_cope": True},
        {"attn_cog_signed": True},
        {"residual_attn": True},
        {"attn_softclamp_logits": True, "rel_pos_bias": True},
    ],
    ids=str,
)
@asks_beyond_the_window
def test_a_mask_gives_what_the_dense_mask_gives(options: dict[str, Any], mask: Mask) -> None:
    net = model(**options)
    expected = run(net, tokens(), attn_mask=cells(mask).expand(HEADS, -1, -1))
    with use(net, mask):
        same(run(net, tokens(), attn_mask=None), expected)


def test_a_mask_over_custom_weights_is_dense_there() -> None:
    """Hidden scores are the lowest number, which a function that is no softmax may turn to anything."""
    net = model(attn_custom_attn_fn=lambda scores: scores.clamp(min=-1e4).exp())
    expected = net(tokens(), attn_mask=cells(window(4)))
    with use(net, window(4)):
        assert_same(net(tokens()), expected)


def test_padding_and_a_mask_are_both_kept() -> None:
    net = model("Encoder")
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])
    expected = run(net, tokens(), mask=real, attn_mask=cells(local(2)))
    with use(net, local(2)):
        ours = run(net, tokens(), mask=real)
    same((ours[0][real], ours[1]), (expected[0][real], expected[1]))


def test_replace_lets_the_mask_alone_decide() -> None:
    net, free = model(attn_max_attend_past=3), model("Encoder")
    free.load_state_dict(net.state_dict())
    expected = run(free, tokens(), attn_mask=cells(local(3)))
    with use(net, local(3), replace=True):
        same(run(net, tokens(), mask=torch.ones(2, LENGTH, dtype=torch.bool)), expected)


def test_rows_that_see_nothing_are_zeros_and_do_not_leak() -> None:
    """x-transformers returns an average of the future there."""
    past = predicate(lambda b, h, q, k: k < q)
    settings: list[dict[str, Any]] = [{}, {"attn_flash": True}, {"attn_post_talking_heads": True}]
    for options in settings:
        core = next(m for m in model(**options).modules() if type(m).__name__ == "Attention")
        x = torch.randn(1, LENGTH, HEADS * SIZE, requires_grad=True)
        with use(core, past):
            out = core(x)
            assert torch.equal(out[0, 0], torch.zeros(HEADS * SIZE))
            (gradient,) = torch.autograd.grad(out[0, :5].sum(), x)
        assert not gradient[0, 5:].any()
        assert gradient[0, :4].any()


def test_what_is_hidden_cannot_leak_by_nan() -> None:
    core = next(m for m in model().modules() if type(m).__name__ == "Attention")
    x = torch.randn(1, LENGTH, HEADS * SIZE)
    bad = x.clone()
    bad[0, 2] = float("nan")
    with use(core, window(3)):
        assert torch.equal(core(bad)[0, 5:], core(x)[0, 5:])


def test_layers_are_chosen_by_index() -> None:
    net = model(depth=3)
    blocks = [m for m in net.modules() if type(m).__name__ == "Attention"]
    with use(net, window(2), layers=[0, 2]):
        assert all("forward" in vars(block) for block in blocks)
        chosen = net(tokens())
    with use(net, layers={0: window(2), 2: window(2)}):
        assert torch.equal(net(tokens()), chosen)
    assert not torch.equal(net(tokens()), chosen)
    with use(net, window(2), layers={1: causal}):
        assert torch.equal(net(tokens()), chosen)


# -- registers and memory ----------------------------------------------------------------------------------------------


def behind(mask: Mask, front: int, n: int = LENGTH) -> Tensor:
    """`mask` behind `front` registers that see one another and are seen by all."""
    full = torch.zeros(front + n, front + n, dtype=torch.bool)
    full[:, :front] = True
    full[front:, front:] = mask.to_dense(n)[0, 0]
    return full


@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
@pytest.mark.parametrize(
    "wrap", [{"num_memory_tokens": 3}, {"use_cls_token": True, "num_cls_tokens": 2}, {"num_memory_tokens": 1}], ids=str
)
def test_registers_are_seen_by_all_and_not_counted(kind: str, wrap: dict[str, Any]) -> None:
    net = model(kind, wrap)
    front = wrap.get("num_memory_tokens", 0) + wrap.get("num_cls_tokens", 0)
    mask = window(4) | (prefix(1) & causal)
    expected = run(net, tokens(), attn_mask=behind(mask, front))
    with use(net, mask):
        same(run(net, tokens()), expected)


def test_prepended_embeddings_are_not_counted() -> None:
    net = model()
    image = torch.randn(2, 5, HEADS * SIZE)
    mask = window(4) | (prefix(1) & causal)
    expected = run(net, tokens(), prepend_embeds=image, attn_mask=behind(mask, 5))
    with use(net, mask):
        same(run(net, tokens(), prepend_embeds=image), expected)
        alone = run(net, tokens())
    same(alone, run(net, tokens(), attn_mask=cells(mask)))


def test_memory_keys_are_seen_by_all() -> None:
    net = model(attn_num_mem_kv=3, attn_flash=True)
    allowed = torch.cat((torch.ones(LENGTH, 3, dtype=torch.bool), window(4).to_dense(LENGTH)[0, 0]), -1)
    expected = run(net, tokens(), attn_mask=allowed)
    with use(net, window(4)):
        same(run(net, tokens()), expected)


def test_additional_keys_are_seen_by_all() -> None:
    net = stack(depth=1).eval()
    x, more = torch.randn(2, LENGTH, HEADS * SIZE), torch.randn(2, 2, HEADS, 4, SIZE)
    allowed = torch.cat((torch.ones(LENGTH, 4, dtype=torch.bool), window(3).to_dense(LENGTH)[0, 0]), -1)
    expected = net(x, self_attn_additional_kv=[tuple(more)], attn_mask=allowed)
    with use(net, window(3)):
        assert_same(net(x, self_attn_additional_kv=[tuple(more)]), expected)


def test_recurrence_memory_is_earlier_keys() -> None:
    """Two segments, the first remembered, under a window: as one sequence whose first half is not recomputed."""
    net = model(wrap={"max_mem_len": 32, "use_abs_pos_emb": False}, depth=1, rotary_pos_emb=True)
    whole = tokens(length=12)
    for mask in (everything, window(4), window(3) | (prefix(2) & causal)):
        with use(net, mask):
            once = net(whole)
            _, mems = net(whole[:, :7], return_mems=True)
            again = net(whole[:, 7:], mems=mems)
        assert_same(again, once[:, 7:])


# -- generation --------------------------------------------------------------------------------------------------------


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


# -- wrappers ----------------------------------------------------------------------------------------------------------


def test_training_through_the_autoregressive_wrapper(calls: list[Mask]) -> None:
    """Steps of an optimiser under a mask, against the dense mask."""

    def losses(net: nn.Module, **named: Any) -> list[float]:
        wrapper = X.AutoregressiveWrapper(net).train()
        optimizer = torch.optim.SGD(wrapper.parameters(), 0.1)
        found = []
        for step in range(4):
            loss = wrapper(tokens(seed=step), **named)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses(model(), attn_mask=cells(window(3)))
    net = model()
    with use(net, window(3)):
        assert losses(net) == pytest.approx(expected, abs=1e-5)
    assert calls


def test_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    options = {"num_tokens": WORDS, "depth": 2, "heads": HEADS, "max_seq_len": 32, "attn_dim_head": SIZE}
    both = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in options.items()}
    net = X.XTransformer(dim=HEADS * SIZE, **both).eval()
    source, target = tokens(length=11), tokens(length=7, seed=4)
    real = torch.arange(11) < torch.tensor([[11], [6]])

    def step(**named: Any) -> tuple[Tensor, list[Tensor]]:
        net.zero_grad()
        loss = net(source, target, mask=real, **named)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    plain = step()
    with use(net):
        same(step(), plain)
    masked = step(attn_mask=local(2).to_dense(11)[0, 0])
    with use(net.encoder, local(2)):
        same(step(), masked)
    over = predicate(lambda b, h, q, k: k % 7 >= q % 3)
    with use(net, over, layers="cross_attention"):
        out = net.generate(source, target[:, :1], 5, mask=real, temperature=0.0)
        again = net.generate(source, target[:, :1], 5, mask=real, temperature=0.0, cache_kv=False)
        encoded = net.encoder(source, mask=real, return_embeddings=True)

        def chosen_from(row: int, step: int) -> Tensor:
            text = torch.cat((target[:, :1], again[:, :step]), 1)
            return net.decoder.net(text, context=encoded, context_mask=real)[row, -1]

        assert_tokens_equal_up_to_tie(out, again, chosen_from)
        logits = net.decoder.net(target, context=encoded, context_mask=real)
        _, hidden = net.decoder.net(target, context=encoded, context_mask=real, return_intermediates=True)
    maps = [x.post_softmax_attn for x in hidden.attn_intermediates if x.layer_type == "c"]
    allowed = over.to_dense(7, 11)[0, 0] & real[:, None, None]
    assert all(torch.equal(weights > 0, allowed.expand_as(weights)) for weights in maps)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("registers", [0, 2])
def test_images_in_patches(registers: int) -> None:
    torch.manual_seed(0)
    net = X.ViTransformerWrapper(
        image_size=12, patch_size=3, num_classes=5, attn_layers=stack("Encoder"), num_register_tokens=registers
    ).eval()
    picture = torch.randn(2, 3, 12, 12)
    plain = run(net, picture)
    with use(net):
        same(run(net, picture), plain)
    n = 16
    allowed = torch.ones(n + registers, n + registers, dtype=torch.bool)
    allowed[:n, :n] = local(2).to_dense(n)[0, 0]
    allowed[n:, :n] = False
    core = net.attn_layers.forward
    net.attn_layers.forward = lambda x: core(x, attn_mask=allowed)
    expected = run(net, picture)
    del net.attn_layers.forward
    with use(net, local(2)):
        same(run(net, picture), expected)


def test_vectors_in_and_out() -> None:
    torch.manual_seed(0)
    net = X.ContinuousTransformerWrapper(
        dim_in=6, dim_out=6, max_seq_len=32, attn_layers=stack(), num_memory_tokens=2
    ).eval()
    x = torch.randn(2, LENGTH, 6)
    expected = run(net, x, attn_mask=behind(window(3), 2))
    with use(net, window(3)):
        same(run(net, x), expected)
    lens = torch.tensor([LENGTH, 7])
    plain = net(x, lens=lens)
    with use(net):
        assert_same(net(x, lens=lens), plain)


def test_segments_with_recurrence() -> None:
    net = model(wrap={"max_mem_len": 8, "use_abs_pos_emb": False}, rotary_pos_emb=True)
    net.max_seq_len = 6
    wrapper = X.XLAutoregressiveWrapper(net)
    plain = wrapper(tokens(length=19))
    with use(wrapper):
        assert_same(wrapper(tokens(length=19)), plain)
        under_use = wrapper.generate(tokens(length=4), 4, temperature=0.0)
    logits: list[Tensor] = []
    with net.register_forward_hook(lambda _, inputs, out: logits.append(out[0][:, -1])):
        alone = wrapper.generate(tokens(length=4), 4, temperature=0.0)
    assert_tokens_equal_up_to_tie(under_use, alone, torch.stack(logits, 1))
    with use(wrapper, window(3)):
        narrow = wrapper(tokens(length=19))
    assert abs(narrow - plain) > 1e-4


def test_masked_language_models_and_preferences() -> None:
    net = model("Encoder")
    net.max_seq_len = LENGTH
    wrapper = X.NonAutoregressiveWrapper(net, mask_id=0)

    def loss(**named: Any) -> Tensor:
        random.seed(1)
        torch.manual_seed(1)
        return wrapper(tokens(), **named).loss

    for mask in (everything, window(3)):
        expected = loss(attn_mask=cells(mask))
        with use(wrapper, mask):
            assert_same(loss(), expected)
    preference = X.DPO(model())
    preferred, other, prompt = tokens(seed=2), tokens(seed=3), torch.arange(LENGTH).expand(2, -1) < 4
    plain = preference(preferred, other, prompt_mask=prompt)
    with use(preference):
        assert_same(preference(preferred, other, prompt_mask=prompt), plain)


def test_belief_states_and_several_inputs() -> None:
    torch.manual_seed(0)
    belief = X.BeliefStateWrapper(model(rotary_pos_emb=True), model(rotary_pos_emb=True)).eval()
    plain = belief(tokens())
    with use(belief):
        assert_same(belief(tokens()), plain)
    several = X.MultiInputTransformerWrapper(
        num_tokens={"note": WORDS, "pitch": 7}, max_seq_len=32, attn_layers=stack(), num_memory_tokens=2
    ).eval()
    given = {"note": tokens(), "pitch": tokens() % 7}
    expected = several(given, attn_mask=behind(window(3), 2))
    with use(several, window(3)):
        ours = several(given)
    assert ours.keys() == expected.keys()
    for name in ours:
        assert_same(ours[name], expected[name])


# -- the use itself ----------------------------------------------------------------------------------------------------


def test_attention_maps_are_there_when_asked_for() -> None:
    net = model()
    expected, maps = net(tokens(), return_attn=True, attn_mask=cells(window(3)))
    with use(net, window(3)):
        out, ours = net(tokens(), return_attn=True)
        assert_same(out, expected)
        for mine, theirs in zip(ours, maps, strict=True):
            assert_same(mine, theirs)
    loss = net(tokens(), return_attn_z_loss=True)[1].attn_z_loss
    with use(net):
        ours = net(tokens(), return_attn_z_loss=True)[1].attn_z_loss
        torch.testing.assert_close(ours, loss)
        ours.backward()
    assert next(m for m in net.modules() if type(m).__name__ == "Attention").to_q.weight.grad.any()


def test_of_nested_uses_the_inner_one_counts_alone() -> None:
    net = model()
    plain, narrow, sparse = (
        net(tokens()),
        net(tokens(), attn_mask=cells(window(4))),
        net(tokens(), attn_mask=cells(MASKS["dilated"])),
    )
    with use(net, window(4)):
        with use(net, dilated(2)):
            assert_same(net(tokens()), sparse)
        assert_same(net(tokens()), narrow)
    assert torch.equal(net(tokens()), plain)
    first, second = use(net, window(4)), use(net, dilated(2))
    first.__enter__(), second.__enter__()
    first.undo()
    assert_same(net(tokens()), sparse)
    second.undo()
    second.undo()
    assert torch.equal(net(tokens()), plain)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    net = model(attn_max_attend_past=5)
    plain, before = net(tokens()), [dict(vars(m)) for m in net.modules()]
    with pytest.raises(IndexError), use(net, window(2)):
        net(tokens() + WORDS)
    with pytest.raises(MaskError), use(net, keys([True] * 3)):
        net(tokens())
    assert [set(vars(m)) for m in net.modules()] == [set(names) for names in before]
    assert torch.equal(net(tokens()), plain)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in net.modules())


def test_copies_and_state_dicts() -> None:
    net = model(wrap={"num_memory_tokens": 2})
    names = list(net.state_dict())
    plain = net(tokens())
    with use(net, window(3)):
        masked = net(tokens())
        twin = copy.deepcopy(net)
        assert list(net.state_dict()) == names
        net.load_state_dict(twin.state_dict())
        assert torch.equal(twin(tokens()), masked)
        with torch.no_grad():
            twin.attn_layers.layers[0][1].to_v.weight.zero_()
        assert torch.equal(net(tokens()), masked)
        assert not torch.equal(twin(tokens()), masked)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(tokens()), plain)
    with use(twin, window(3)):
        assert torch.equal(twin(tokens()), masked)
    assert torch.equal(net(tokens()), plain)


def test_a_pickled_model_in_use_stays_in_use() -> None:
    net = stack().eval()
    x = torch.randn(1, LENGTH, HEADS * SIZE)
    with use(net, window(3)):
        masked, file = net(x), io.BytesIO()
        torch.save(net, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(loaded(x), masked)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where dynamo looks at what is no leaf
def test_compiled_models() -> None:
    net = model(depth=1)
    compiled: Any = torch.compile(net, backend="eager")
    plain = net(tokens())
    assert_same(compiled(tokens()), plain)
    for mask in (window(3), dilated(2)):
        expected = net(tokens(), attn_mask=cells(mask & causal))
        with use(compiled, mask):
            assert_same(compiled(tokens()), expected)
    assert_same(compiled(tokens()), plain)


def test_dropout_in_training() -> None:
    net = model(attn_dropout=0.5).train()
    with use(net, window(3)):
        torch.manual_seed(0)
        first, second = net(tokens()), net(tokens())
        torch.manual_seed(0)
        assert torch.equal(net(tokens()), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = model(attn_flash=True).to(dtype)
    expected = net(tokens(), attn_mask=cells(window(4)))
    exact = model(attn_flash=True).double()(tokens(), attn_mask=cells(window(4)))
    with use(net, window(4)):
        ours = net(tokens())
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 1.5 * (expected - exact).abs().max() + 1e-12


def test_what_cannot_be_is_refused_in_words() -> None:
    net = model()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"layers": [2], "mask": causal}, "0 to 1"),
        ({"layers": "modle", "mask": causal}, "did you mean 'model'"),
        ({"layers": [0]}, "there is no mask"),
        ({"layers": {0: None}}, "got NoneType"),
        ({"mask": torch.ones(3, 3).bool()}, r"is `dense\(tensor\)`"),
        ({"mask": "causl"}, "did you mean .causal."),
        ({"layers": "cross_attention", "mask": causal}, "no layer"),
        ({"replace": True}, "there is no"),
    ]
    for wrong, words in refused:
        with pytest.raises(MaskError, match=words), use(net, **wrong):
            pytest.fail("not refused")
    with pytest.raises(MaskError, match="no attention of x-transformers"), use(X.FeedForward(8)):
        pytest.fail("not refused")
    with pytest.raises(MaskError, match="several places"), use(X.DPO(model()), causal):
        pytest.fail("not refused")
    with pytest.raises(MaskError, match="PrefixDecoder"), use(model("PrefixDecoder"), causal, replace=True):
        pytest.fail("not refused")
    between = model(wrap={"num_memory_tokens": 2, "memory_tokens_interspersed_every": 4})
    with pytest.raises(MaskError, match="memory_tokens_interspersed_every"), use(between, window(2)):
        between(tokens())
    recurrent = model(wrap={"num_memory_tokens": 2, "max_mem_len": 8})
    _, mems = recurrent(tokens(), return_mems=True)
    with pytest.raises(MaskError, match="recurrence memory"), use(recurrent, window(2)):
        recurrent(tokens(), mems=mems)


def test_models_are_known_by_name() -> None:
    use(X.AutoregressiveWrapper(model()))
    with pytest.raises(MaskError, match="got TransformerEncoderLayer"):
        use(nn.TransformerEncoderLayer(8, 2))
    code = (
        "import sys, truemask.interop.x_transformers.switch; assert not any('x_transformers' == m for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_dense_mask_of_each_sample() -> None:
    net = model(attn_kv_heads=2)
    allowed = torch.rand(2, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    expected = run(net, tokens(), attn_mask=allowed)
    with use(net, dense(allowed)):
        same(run(net, tokens()), expected)


# -- threads -----------------------------------------------------------------------------------------------------------


def windows(net: nn.Module) -> list[int | None]:
    return [m.max_attend_past for m in net.modules() if type(m).__name__ == "Attention"]  # pyright: ignore


@pytest.mark.parametrize("mask", [None, window(3) | prefix(1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"attn_flash": True, "attn_max_attend_past": (2, 6)},
        {"attn_max_attend_past": 4, "attn_post_talking_heads": True},
        {"wrap": {"num_memory_tokens": 2}},
    ],
    ids=str,
)
@asks_beyond_the_window
def test_threads_share_a_model(options: dict[str, Any], mask: Mask | None) -> None:
    """Each gets what it gets alone, whatever the others run meanwhile: other lengths, other paddings, no use at all."""
    net = model(**options)
    given = [(tokens(length=5 + i, seed=i), torch.tensor([i % 3, 0])) for i in range(6)]

    def out(place: int) -> Tensor:
        with torch.no_grad():
            return net(given[place][0], seq_start_pos=given[place][1])

    def inside(place: int) -> Tensor:
        if place % 2:
            return out(place)
        with use(net, mask):
            return out(place)

    before, plain = windows(net), out(0)
    alone = [inside(place) for place in range(6)]
    with use(net, mask), ThreadPoolExecutor(4) as pool:
        together = list(pool.map(inside, [*range(6)] * 20))
    for place, found in enumerate(together):
        assert_same(found, alone[place % 6])
    assert windows(net) == before
    assert torch.equal(out(0), plain)


def test_a_copy_gets_its_window_back_when_the_use_ends() -> None:
    net = model(attn_max_attend_past=4)
    plain = net(tokens())
    with use(net, window(3)):
        net(tokens())
        twin = copy.deepcopy(net)
    for _ in range(2):
        assert torch.equal(twin(tokens()), plain)
        assert windows(twin) == [4, 4]
        with use(twin, window(3)):
            twin(tokens())
        assert torch.equal(net(tokens()), plain)


def test_checkpointed_layers_are_recomputed_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where autograd's own thread does it: no stack runs there that could say what the input was."""
    net = model(wrap={"num_memory_tokens": 2})
    weights = torch.randn(2, LENGTH, WORDS, generator=torch.Generator().manual_seed(5))
    with use(net, window(3)), monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        expected = run(net, tokens())
        for layer in net.attn_layers.layers:
            patch.setattr(layer[1], "forward", partial(checkpoint, layer[1].forward, use_reentrant=False))
        net.zero_grad()
        out = net(tokens())
        pool.submit((out * weights).sum().backward).result()
        same((out.detach(), [p.grad for p in net.parameters() if p.grad is not None]), expected)


# -- what a mask cannot hold, and what it says itself ------------------------------------------------------------------


class Recurrent(nn.Module):
    """A hybrid module: every position hears of those before."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(HEADS * SIZE, HEADS * SIZE, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.cells(x, hidden)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shift_tokens": 1}, "shift_tokens"),
        ({"attn_hybrid_module": Recurrent(), "attn_hybrid_fold_axial_dim": 1}, "attn_hybrid_module"),
    ],
)
def test_what_moves_beside_attention_is_named(options: dict[str, Any], name: str) -> None:
    """Under causal.packed such a model would carry one document into the next; without a mask it runs as it is."""
    net = model(**options)
    plain = net(tokens())
    with pytest.raises(MaskError, match=rf"{name}.*Build the model without {name}.*tm\.use\(model\)"):
        use(net, causal.packed([6, 7]))
    assert torch.equal(net(tokens()), plain)
    with use(net):
        assert_same(net(tokens()), plain)


@pytest.mark.parametrize("replace", [False, True])
def test_a_mask_that_says_where_samples_begin_is_not_moved_once_more(replace: bool, calls: list[Mask]) -> None:
    starts = torch.tensor([3, 0])
    own = (causal & (window(4) | prefix(1))).padded(starts.tolist())
    net = model()
    expected = net(tokens(), attn_mask=own.to_dense(LENGTH, batch=2).expand(-1, HEADS, -1, -1), seq_start_pos=starts)
    with use(net, own, replace=replace):
        found = net(tokens(), seq_start_pos=starts)
    assert all(mask in (own, causal & own) for mask in calls)
    for sample, start in enumerate(starts.tolist()):
        assert_same(found[sample, start:], expected[sample, start:])
