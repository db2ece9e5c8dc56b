"""x-transformers' models and wrappers under `tm.use`: without a mask they compute what they did."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.equality import assert_same, assert_tokens_equal_up_to_tie
from tests.support.huggingface_models import asks_beyond_the_window
from tests.support.x_transformers_models import (
    HEADS,
    LENGTH,
    SIZE,
    WORDS,
    X,
    behind,
    cells,
    model,
    run,
    same,
    stack,
    tokens,
)
from truemask.interop.use import use
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, local, window
from truemask.masks.leaves.per_token import prefix
from truemask.masks.leaves.predicate import predicate

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
