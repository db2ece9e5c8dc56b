"""Caches of models whose layers have masks of their own: each layer keeps what its own lets it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

import truemask as tm
from tests.support.chunks import read
from tests.support.equality import assert_same
from tests.support.nn_models import FEATURES, HEADS, decoder, ids, wrapped
from tests.support.strategies import Drawn, Reach, expressions
from truemask.generation import kv_cache
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.generation.kv_cache import KVCache
from truemask.masks.core.mask import Mask
from truemask.nn.wrappers import TransformerWrapper

N = 31
LAYERS = ("window(3) | prefix(1)", "blocks(7)")
MASKS: list[Mask] = [
    tm.causal,
    tm.causal & tm.window(11),
    tm.causal.packed([7, 11, 13]),
    tm.causal.padded([0, 6, 9]),
    tm.per_sample([tm.window(2), tm.causal & tm.blocks(5), tm.causal & tm.prefix(2)]),
]


@pytest.fixture(autouse=True, scope="module")
def little_room() -> Any:
    """Small memories, so that few tokens move keys often."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kv_cache, "LEAST_ROOM", 2)
        yield


def layered(feature: str = "rotary", layers: tuple[str, ...] = LAYERS) -> TransformerWrapper:
    options, wrapper = FEATURES[feature]
    return wrapped(decoder(**options, layer_masks=layers), **wrapper)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("feature", ["absolute", "rotary", "registers", "memories"])
def test_logits_are_those_of_all_keys(feature: str, mask: Mask) -> None:
    net, tokens = layered(feature), ids(3, N)
    whole = net(tokens, mask)
    assert_same(read(net, KVCache(net, batch=3, tokens=N), tokens, 4, mask=mask), whole)
    for size in (1, 2, 3, 7, 12, N):
        assert_same(read(net, KVCache(net, batch=3, tokens=N, mask=mask), tokens, size), whole)


def test_each_layer_has_its_own_size() -> None:
    net, tokens = layered(), ids(1, N)
    cache = KVCache(net, batch=1, tokens=N, mask="causal")
    assert (cache.capacities, cache.capacity) == ((4, 7), 7)
    assert [cache.layer(i).room for i in (0, 1)] == [8, 14]
    alone = [KVCache(layered(layers=(text,) * 2), batch=1, tokens=N, mask=tm.causal).bytes for text in LAYERS]
    assert cache.bytes == sum(alone) // 2
    read(net, cache, tokens, 1)
    kept = [cache.positions_of(i).tolist() for i in (0, 1)]
    assert kept[0][0] == 0
    assert kept[1][0] >= 14
    assert cache.positions.tolist() == sorted({*kept[0], *kept[1]})
    assert f"{len(kept[0])} kept in 1 layer, capacity 4; {len(kept[1])} kept in 1 layer, capacity 7, " in repr(cache)


@pytest.mark.parametrize("mask", [None, tm.causal, tm.causal & tm.window(5)], ids=str)
@pytest.mark.parametrize("feature", ["rotary", "registers", "memories"])
def test_the_cost_is_known_before(feature: str, mask: Mask | None) -> None:
    net = layered(feature)
    cost, cache = KVCache.cost(net, batch=3, tokens=N, mask=mask), KVCache(net, batch=3, tokens=N, mask=mask)
    assert (cost.capacities, cost.bytes) == (cache.capacities, cache.bytes)
    assert cost.full_bytes == KVCache(net, batch=3, tokens=N).bytes
    assert str(KVCache.cost(layered(), batch=1, tokens=N, mask="causal")).startswith("4 keys in 1 layer, 7 in 1; ")
    with pytest.raises(tm.MaskError, match="lets queries see later keys"):
        KVCache.cost(net, batch=3, tokens=N, mask="causal | prefix(9)")


def test_layers_that_see_alike_share_what_they_keep() -> None:
    net = layered(layers=("window(3)", "window(3)"))
    cache = KVCache(net, batch=1, tokens=N, mask="causal")
    read(net, cache, ids(1, N), 1)
    assert "kept in 2 layers, capacity 3, " in repr(cache)
    assert cache.positions_of(0).equal(cache.positions_of(1))


def test_what_any_layer_has_lost_cannot_be_gone_back_to() -> None:
    net, tokens = layered(), ids(1, N)
    cache, whole = KVCache(net, batch=1, tokens=N, mask="causal"), net(tokens)
    read(net, cache, tokens[:, :20], 1)
    before = pickle.dumps(cache)
    with pytest.raises(ValueError, match=r"the first 8 tokens cannot.*at least the first (\d+) stay") as error:
        cache.truncate(8)
    assert pickle.dumps(cache) == before
    least = int(str(error.value).partition("at least the first ")[2].split()[0])
    cache.truncate(least)
    assert_same(read(net, cache, tokens[:, least:], 2), whole[:, least:])


def test_a_copy_and_a_pickle_go_on() -> None:
    net, tokens = layered("registers"), ids(3, N)
    cache, whole = KVCache(net, batch=3, tokens=N, mask="causal"), net(tokens)
    read(net, cache, tokens[:, :20], 4)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert_same(read(net, twin, tokens[:, 20:], 3), whole[:, 20:])


@pytest.mark.parametrize("layers", [("window(3) | prefix(1)", "causal"), ("causal", "prefix(3).packed([3, 4])")])
def test_layers_are_asked_about_all_tokens_at_the_door(layers: tuple[str, ...]) -> None:
    net = layered(layers=layers)
    if "packed" in layers[1]:
        with pytest.raises(tm.MaskError, match=r"tokens=31 under mask=`causal & prefix.3..packed.*31"):
            KVCache(net, batch=1, tokens=N, mask=tm.causal)
    else:
        assert KVCache(net, batch=1, tokens=N, mask=tm.causal).capacities == (4, N)


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, tm.window(6) | tm.prefix(2)], ids=str)
@pytest.mark.parametrize("feature", ["absolute", "rotary", "registers"])
def test_generation_is_that_of_all_keys(feature: str, mask: Mask | None) -> None:
    model = AutoregressiveWrapper(layered(feature))
    prompts = [ids(n, seed=n) for n in (3, 9, 1)]
    ways: list[dict[str, Any]] = [{"temperature": 0.0}, {"seed": 3, "samples_per_prompt": 2}]
    for options in ways:
        plain = answer(model, prompts, mask=mask, cache_kv=False, **options)
        assert torch.equal(answer(model, prompts, mask=mask, **options), plain)
        assert torch.equal(torch.stack(list(model.stream(prompts, 20, mask=mask, **options)), dim=1), plain)
        if feature != "absolute":
            assert torch.equal(answer(model, prompts, mask=mask, draft="ngram", **options), plain)
    together = answer(model, prompts, mask=mask, temperature=0.0)
    for i, prompt in enumerate(prompts):
        assert torch.equal(answer(model, prompt, mask=mask, temperature=0.0), together[i])
    found = model.beam_search(prompts, 12, beams=3, return_n=2, mask=mask)
    again = model.beam_search(prompts, 12, beams=3, return_n=2, mask=mask, cache_kv=False)
    assert torch.equal(found.tokens, again.tokens)


def answer(model: AutoregressiveWrapper, prompts: Any, **options: Any) -> Tensor:
    found = model.generate(prompts, 20, **options)
    assert isinstance(found, Tensor)
    return found


# -- whatever happens --------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40)
def test_whatever_happens_to_a_cache(data: st.DataObject) -> None:
    n, batch = data.draw(st.integers(4, 14)), data.draw(st.integers(1, 3))
    drawn: Drawn = data.draw(expressions(depth=2, reach=Reach(n, n, batch, HEADS)))
    net, mask, tokens = layered("registers"), tm.causal & drawn.mask, ids(batch, n)
    pos = torch.arange(n)
    with torch.no_grad():
        try:
            net.attn_layers.masks.each(mask)
        except tm.MaskError:
            reject()
        cache = KVCache(net, batch=batch, tokens=n, mask=mask)
        while cache.past < n:
            rows = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=4))
            cache.select(rows)
            tokens, mask = tokens[rows], mask.select(samples=rows)
            new = slice(cache.past, cache.past + data.draw(st.integers(1, 5)))
            found = net(tokens[:, new], pos=pos[new], cache=cache)
            cache.advance()
            assert_same(found, net(tokens, mask, pos=pos)[:, new])
