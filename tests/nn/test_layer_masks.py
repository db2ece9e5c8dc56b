"""A mask for each layer: the same as calls of single layers under it, at the positions of the call's mask."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import truemask as tm
from tests.support.equality import assert_same
from tests.support.nn_models import DEPTH, DIM, HEADS, block_of, decoder, encoder, features, ids, wrapped
from truemask.masks.core.mask import Mask
from truemask.nn.config import LayersConfig
from truemask.nn.layers import AttentionLayers
from truemask.nn.wrappers import TransformerWrapper

N = 13
LAYERS = ["window(3) | prefix(1)", "blocks(5)"]


def by_hand(layers: AttentionLayers, x: torch.Tensor, masks: list[Mask]) -> torch.Tensor:
    for index, mask in enumerate(masks):
        x = block_of(layers, index)(x, mask, None, None)
    return layers.final_norm(x)


@pytest.mark.parametrize("make", [decoder, encoder])
def test_each_layer_runs_its_own(make: Any) -> None:
    layers, x = make(layer_masks=LAYERS), features(2, N)
    own = [tm.window(3) | tm.prefix(1), tm.blocks(5)]
    outer = tm.causal if layers.causal else tm.everything
    assert_same(layers(x), by_hand(layers, x, [outer & mask for mask in own]))
    assert_same(layers(x, tm.window(7)), by_hand(layers, x, [outer & tm.window(7) & mask for mask in own]))


def test_each_distinct_mask_is_combined_once() -> None:
    layers = decoder(layer_masks=["window(3)"] * DEPTH)
    assert (layers.masks.terms, layers.masks.which) == ([tm.window(3)], [0] * DEPTH)
    assert_same(layers(features(2, N)), decoder()(features(2, N), tm.window(3)))


def test_positions_of_layers_restart_with_the_calls() -> None:
    net = wrapped(decoder(rotary_pos_emb=True, rotary_emb_dim=4, layer_masks=LAYERS))
    long, short = ids(1, 9), ids(1, 6, seed=1)
    packed = net(torch.cat((long, short), dim=1), tm.causal.packed([9, 6]))
    assert_same(packed[:, :9], net(long))
    assert_same(packed[:, 9:], net(short))
    padded = net(torch.cat((torch.zeros(1, 3).long(), short), dim=1), tm.everything.padded([3]))
    assert_same(padded[:, 3:], net(short))
    mixed = tm.per_sample([tm.window(4).padded([3, 3]), tm.causal.padded([3, 3]) | tm.nothing.padded([3, 3])])
    both = net(torch.cat((torch.zeros(2, 3).long(), short.expand(2, -1)), dim=1), mixed)
    assert_same(both[:1, 3:], net(short, tm.window(4)))
    assert_same(both[1:, 3:], net(short))


def test_a_pattern_names_masks_again_and_again() -> None:
    config = LayersConfig.from_keywords(
        dim=8, depth=6, layer_masks={"L": tm.window(8), "G": "causal"}, layer_pattern="LLG"
    )
    assert config.layer_masks == ("window(8)", "window(8)", "causal") * 2
    assert LayersConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_model_comes_back_with_its_masks() -> None:
    net = wrapped(decoder(layer_masks=LAYERS))
    twin = TransformerWrapper.from_dict(json.loads(json.dumps(net.to_dict()))).double().eval()
    twin.load_state_dict(net.state_dict())
    assert_same(twin(ids(2, N)), net(ids(2, N)))


@pytest.mark.parametrize(
    ("given", "pattern", "error", "message"),
    [
        (["causal"], None, ValueError, "layer_masks= has 1 masks for 2 layers"),
        ("causal", None, TypeError, "it takes a list of 2 masks.*mask= of the call"),
        (["causal", 3], None, tm.MaskError, r"layer_masks\[1\] must be a mask expression or its text"),
        (["causal", "windw(3)"], None, tm.MaskError, "windw"),
        (["causal", tm.causal.padded([1, 2])], None, tm.MaskError, "differs from sample to sample"),
        (["causal", tm.keys(torch.arange(900) % 7 < 3)], None, tm.MaskError, "holds data that no text can say"),
        (["causal", "causal"], "LG", ValueError, "layer_pattern='LG' names the masks.*pass a dict"),
        (None, "LG", ValueError, "layer_pattern='LG' names the masks"),
        ({"L": "causal"}, None, ValueError, "dict of 'L', and layer_pattern= is None"),
        ({"L": "causal"}, "LG", ValueError, "no mask is named 'G'"),
    ],
    ids=str,
)
def test_what_says_nothing_of_the_layers(given: Any, pattern: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tm.Decoder(DIM, DEPTH, HEADS, layer_masks=given, layer_pattern=pattern)


def test_positions_that_nobody_says_are_refused() -> None:
    with pytest.raises(tm.MaskError, match="does not say from where: negate within"):
        decoder(layer_masks=LAYERS)(features(1, N), ~tm.window(3).packed([6, 7]))


def test_a_compiled_model_runs_each_layers_mask() -> None:
    net, tokens = wrapped(decoder(rotary_pos_emb=True, rotary_emb_dim=4, layer_masks=LAYERS)), ids(2, N)
    fn = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        for mask in (None, tm.causal.packed([6, 7])):
            assert_same(fn(tokens, mask), net(tokens, mask))
