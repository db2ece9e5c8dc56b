"""The parts against their formulas, and what must survive copying, pickling and another dtype."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.equality import assert_same
from tests.support.nn_models import FEATURES, TOKENS, block_of, decoder, encoder, featured, features, ids, wrapped
from truemask.masks.compose.boolean import everything
from truemask.masks.leaves.bands import causal, window
from truemask.nn.config import FeedForwardConfig
from truemask.nn.feedforward import FeedForward
from truemask.nn.layers import Decoder
from truemask.nn.norms import HeadRMSNorm, LayerNorm, RMSNorm

X = features(2, 5)


# -- norms and feedforward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_offset", [True, False])
def test_norms_are_their_formulas(unit_offset: bool) -> None:
    dim = X.shape[-1]
    rms, layer = (kind(dim, unit_offset=unit_offset).double() for kind in (RMSNorm, LayerNorm))
    assert_same(rms(X), X / (X.square().mean(-1, keepdim=True) + rms.eps).sqrt())
    centred = X - X.mean(-1, keepdim=True)
    assert_same(layer(X), centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt())
    assert torch.equal(rms.gain, torch.zeros_like(rms.gain) if unit_offset else torch.ones_like(rms.gain))
    assert rms(torch.zeros_like(X)).abs().max() == 0


def test_head_norms_have_a_gain_for_each_head() -> None:
    norm, q = HeadRMSNorm(2, 7).double(), features(3, 2, 5)[..., :7]
    nn.init.normal_(norm.gain)
    plain = q / (q.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert_same(norm(q)[:, 1], plain[:, 1] * (norm.gain[1] + 1))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FeedForwardConfig(), lambda x, ff: F.gelu(ff.proj_in(x))),
        (FeedForwardConfig(swish=True), lambda x, ff: F.silu(ff.proj_in(x))),
        (FeedForwardConfig(relu_squared=True), lambda x, ff: ff.proj_in(x).clamp(min=0) ** 2),
        (FeedForwardConfig(glu=True), lambda x, ff: ff.proj_in(x)[..., :92] * F.gelu(ff.proj_in(x)[..., 92:])),
        (
            FeedForwardConfig(glu=True, swish=True),
            lambda x, ff: ff.proj_in(x)[..., :92] * F.silu(ff.proj_in(x)[..., 92:]),
        ),
    ],
    ids=["gelu", "swish", "relu squared", "glu", "swiglu"],
)
def test_feedforwards_are_their_formulas(config: FeedForwardConfig, expected: object) -> None:
    ff = FeedForward(X.shape[-1], config).double().eval()
    assert_same(ff(X), ff.proj_out(expected(X, ff)))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("glu", [True, False])
def test_no_bias_leaves_none(glu: bool) -> None:
    """x-transformers keeps the bias of the gated projection."""
    layers = decoder(ff_no_bias=True, ff_glu=glu)
    assert not [name for name, _ in layers.named_parameters() if "bias" in name]


# -- attention ---------------------------------------------------------------------------------------------------------


def test_key_heads_are_shared_in_blocks() -> None:
    """LLaMA's layout: the model with shared key heads is the full model with each repeated in place."""
    shared, full = decoder(attn_kv_heads=2), decoder()
    state = shared.state_dict()
    for name, tensor in state.items():
        if name.endswith(("to_k.weight", "to_v.weight")):
            state[name] = tensor.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    assert_same(shared(X), full(X))


def test_one_key_head_is_kv_heads_1() -> None:
    assert_same(decoder(attn_one_kv_head=True)(X), decoder(attn_kv_heads=1)(X))


def test_cosine_scores_ignore_the_length_of_queries() -> None:
    layers = decoder(attn_qk_norm=True)
    before = layers(X)
    with torch.no_grad():
        block_of(layers).attn.to_q.weight *= 5.0
    assert_same(layers(X), before)


def test_dropout_only_in_training() -> None:
    layers = decoder(attn_dropout=0.5, ff_dropout=0.5)
    assert_same(layers(X), layers(X))
    layers.train()
    torch.manual_seed(3)
    first = layers(X)
    assert not torch.equal(first, layers(X))
    torch.manual_seed(3)
    assert_same(layers(X), first)


def test_dense_and_any_backend_agree_also_with_dropout() -> None:
    results = []
    for flash in (True, False):
        torch.manual_seed(3)
        results.append(decoder(attn_dropout=0.5, attn_flash=flash).train()(X, mask=window(3)))
    assert_same(results[0], results[1])
    assert_same(decoder(attn_flash=False)(X, mask=window(3)), decoder()(X, mask=window(3)))


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_copies_are_the_same_and_independent(feature: str) -> None:
    """In x-transformers a deep copy of a tied model reads the original's embedding, and pickling one fails."""
    net, tokens = featured(feature), ids(2, 7)
    expected = net(tokens)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same(again(tokens), expected)
        with torch.no_grad():
            again.token_emb.weight += 1.0
        assert not torch.equal(again(tokens), expected)
        assert_same(net(tokens), expected)


def test_a_tied_model_has_one_matrix() -> None:
    net = wrapped(tie_embedding=True)
    assert [name for name, t in net.named_parameters() if t.shape[0] == TOKENS] == ["token_emb.weight"]
    copied = copy.deepcopy(net).train()
    copied(ids(1, 5)).sum().backward()
    assert net.token_emb.weight.grad is None
    assert_same(
        net(ids(1, 5)), net(ids(1, 5), return_embeddings=True) @ net.token_emb.weight.T * net.tie_embedding_scale
    )


@pytest.mark.parametrize("feature", FEATURES)
def test_weights_move_to_another_model(feature: str) -> None:
    net, other = featured(feature), featured(feature)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(net.state_dict())
    assert_same(other(ids(2, 7)), net(ids(2, 7)))


@pytest.mark.parametrize("feature", FEATURES)
def test_half_precision_stays_near(feature: str) -> None:
    net, tokens = featured(feature), ids(2, 13)
    expected = net(tokens, mask=causal & window(5))
    half = net.bfloat16()(tokens, mask=causal & window(5))
    assert half.dtype == torch.bfloat16
    assert (half.double() - expected).abs().mean() < 0.05 * expected.abs().mean() + 0.02


@pytest.mark.parametrize("feature", ["rotary", "cosine", "qk rmsnorm", "memories"])
def test_autocast_runs_forward_and_backward(feature: str) -> None:
    net = featured(feature).float().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(ids(2, 7)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_every_parameter_learns() -> None:
    for feature in FEATURES:
        net = featured(feature).train()
        net(ids(2, 7)).square().mean().backward()
        still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert still == [], feature


def test_empty_inputs() -> None:
    assert encoder()(features(0, 5)).shape == (0, 5, 23)
    assert decoder()(features(2, 0)).shape == (2, 0, 23)
    assert wrapped(num_memory_tokens=3)(ids(2, 0)).shape == (2, 0, TOKENS)


def test_a_decoder_takes_its_sizes_in_order() -> None:
    layers = Decoder(12, 3, 2, attn_dim_head=6)
    assert (layers.dim, layers.depth, layers.config.heads) == (12, 3, 2)
    assert layers(torch.randn(1, 5, 12), mask=everything).shape == (1, 5, 12)
