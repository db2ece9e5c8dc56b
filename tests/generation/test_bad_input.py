"""What cannot be done is said before the first token, and changes nothing: models, caches and random numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.chunks import read
from tests.support.equality import assert_same
from tests.support.nn_models import TOKENS, featured, ids
from truemask.generation import kv_cache
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.generation.kept_tokens import KeptTokens
from truemask.generation.kv_cache import KVCache
from truemask.generation.layer_kv import LayerKV
from truemask.masks.core.mask import Mask

N = 31
REMEMBERED = {"_placed"}  # the mask of the last call at the same places: follows from the rest
SIZED = tm.causal & (tm.window(4) | tm.prefix(2))
METHODS: dict[str, Callable[..., object]] = {
    "generate": AutoregressiveWrapper.generate,
    "stream": AutoregressiveWrapper.stream,  # before the first `next`
    "beam_search": AutoregressiveWrapper.beam_search,
}


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small memories, so that small models forget."""
    monkeypatch.setattr(kv_cache, "LEAST_ROOM", 2)


# -- before the first token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "got an empty list"),
        ([[3, 1], []], {}, r"at least one token each; got"),
        (torch.empty(0, dtype=torch.int64), {}, "to begin from nothing pass a start token"),
        (torch.empty(2, 0, dtype=torch.int64), {}, "to begin from nothing pass a start token"),
        ([3, 1], {"mask": tm.keys([True] * 5)}, "data for 5 .*, but was asked about 6"),  # the last is not read
        ([3, 1], {"mask": tm.causal.padded([1, 0])}, "data for 2 samples, but was asked about 1"),
        ([3, 1], {"mask": tm.per_head([tm.causal] * 3)}, "3 heads"),
        ([3, 1], {"mask": "windw(3)"}, "windw"),
        ([3, 1], {"mask": tm.prefix(5), "causal": False}, "lets earlier tokens read new ones.*cache_kv=False"),
        ([3, 1], {"eos_token": TOKENS}, f"{TOKENS}"),
        ([3, 1], {"eos_token": [2, -1]}, "-1"),
        ([3, 1], {"cache": None}, "no keyword|unexpected keyword"),
        ([3, TOKENS], {}, f"token {TOKENS} is outside the vocabulary"),
        ([[3], [-1]], {}, "token -1 is outside the vocabulary"),
    ],
    ids=str,
)
def test_nothing_is_computed(
    method: str, prompts: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = featured("absolute").train()
    monkeypatch.setattr(net.attn_layers, "forward", lambda *_, **__: pytest.fail("the model was run"))
    monkeypatch.setattr(LayerKV, "append", lambda *_: pytest.fail("keys were kept"))
    drawn = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError), match=message):
        METHODS[method](AutoregressiveWrapper(net), prompts, 5, **options)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(part.training for part in net.modules())


# -- a call with a cache -----------------------------------------------------------------------------------------------


def _state(value: object) -> object:
    """All that an object holds, tensors by their numbers and their place in memory."""
    if isinstance(value, Tensor):
        return value.data_ptr(), tuple(value.shape), value.nan_to_num(7.5).tolist()
    if isinstance(value, (list, tuple)):
        return [_state(item) for item in value]
    if isinstance(value, (KVCache, KeptTokens, LayerKV)):
        return {name: _state(item) for name, item in vars(value).items() if name not in REMEMBERED}
    return value


@pytest.mark.parametrize("mask", [None, SIZED], ids=str)
@pytest.mark.parametrize("past", [0, 3, 20])
@pytest.mark.parametrize(
    ("new", "options", "message"),
    [
        (ids(2, 1), {}, "3 samples.* the call brings 1 tokens of 2 samples"),
        (ids(3, N + 1), {}, f"holds {N} tokens of 3 samples, .* the call brings {N + 1} tokens"),
        (ids(3, 1), {"mask": tm.keys([True] * 0)}, "keys|the call is under"),
        (ids(3, 1), {"mask": tm.causal.padded([1, 0])}, "holds data for 2 samples"),
        (ids(3, 1), {"mask": tm.per_head([tm.window(2)] * 2)}, "2 heads|the call is under"),
        (ids(3, 1), {"mask": "windw(3)"}, "windw"),
        (ids(3, 1), {"pos": torch.arange(5)}, "expected the positions of this call's tokens"),
        (ids(3, 1), {"pos": torch.zeros(1)}, "positions are whole numbers"),
        (ids(3, 1), {"masks": None}, "no keyword 'masks'"),
        (ids(3), {}, r"For one sequence pass ids\[None\]"),
        (ids(3, 1) + TOKENS, {}, "outside the vocabulary"),
    ],
    ids=str,
)
def test_a_refused_call_leaves_the_cache_as_it_was(
    new: Tensor, options: dict[str, Any], message: str, past: int, mask: Mask | None
) -> None:
    net, tokens = featured("rotary"), ids(3, N)
    cache = KVCache(net, batch=3, tokens=N, mask=mask)
    read(net, cache, tokens[:, :past], 4)
    before = _state(cache)
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
        net(new, cache=cache, **options)
    assert _state(cache) == before
    cache.advance()
    assert_same(read(net, cache, tokens[:, past:], 3), net(tokens, mask=mask)[:, past:])


@pytest.mark.parametrize("past", [0, 20])
@pytest.mark.parametrize("options", [{"mask": tm.window(5)}, {"mask": tm.prefix(3), "causal": False}], ids=str)
def test_another_mask_is_refused_by_a_cache_that_forgets(options: dict[str, Any], past: int) -> None:
    net, tokens = featured("absolute"), ids(3, N)
    cache = KVCache(net, batch=3, tokens=N, mask=SIZED)
    read(net, cache, tokens[:, :past], 4)
    before = _state(cache)
    with torch.no_grad(), pytest.raises(tm.MaskError, match="the cache keeps what queries see under"):
        net(tokens[:, past : past + 2], cache=cache, **options)
    assert _state(cache) == before


@pytest.mark.parametrize("mask", [None, SIZED], ids=str)
def test_another_model_and_gradients_are_refused(mask: Mask | None) -> None:
    net, tokens = featured("rotary"), ids(3, N)
    cache = KVCache(net, batch=3, tokens=N, mask=mask)
    read(net, cache, tokens[:, :20], 4)
    before = _state(cache)
    with torch.no_grad(), pytest.raises(ValueError, match="made for another model"):
        featured("rotary")(tokens[:, 20:], cache=cache)
    with pytest.raises(ValueError, match="a cache is for inference"):
        net(tokens[:, 20:], cache=cache)
    assert _state(cache) == before


@pytest.mark.parametrize("feature", ["absolute", "registers, absolute"])
def test_positions_that_nobody_learned_are_refused(feature: str) -> None:
    net, tokens = featured(feature), ids(1, 50)
    cache = KVCache(net, batch=1, tokens=50)
    read(net, cache, tokens[:, :46], 46)
    before = _state(cache)
    with torch.no_grad(), pytest.raises(ValueError, match="position 47 has no embedding"):
        net(tokens[:, 46:48], cache=cache)
    assert _state(cache) == before
