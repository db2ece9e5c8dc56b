"""Cached equals uncached, whatever the model has and however the tokens arrive (law 7)."""

from __future__ import annotations

import pytest
import torch

from tests.support.chunks import read
from tests.support.equality import assert_same
from tests.support.nn_models import FEATURES, TOKENS, encoder, featured, ids, wrapped
from truemask.attention.planning.cache import CACHE
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.generation.kv_cache import KVCache
from truemask.masks.compose.boolean import everything
from truemask.masks.compose.per_axis import per_head
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, window
from truemask.masks.leaves.documents import documents
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.patterns import dilated, random
from truemask.masks.leaves.per_token import prefix
from truemask.nn.wrappers import TransformerWrapper

N = 17
MASKS: list[Mask] = [
    everything,
    window(4),
    causal & (window(3) | prefix(2)),
    random(0.4, seed=3) | blocks(5),
    per_head([window(2), dilated(3), everything, prefix(1)]),
    documents([5, 12]),
    causal.packed([5, 12]),
    window(6).padded([0, 4, 7]),
    dense(torch.rand(N, N, generator=torch.Generator().manual_seed(2)) < 0.5),
]


def cached(net: TransformerWrapper, tokens: torch.Tensor, sizes: list[int], **options: object) -> torch.Tensor:
    """The logits of tokens that arrive in chunks."""
    return read(net, KVCache(net, batch=len(tokens), tokens=tokens.shape[1]), tokens, sizes, **options)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_cached_equals_uncached(feature: str, mask: Mask) -> None:
    """A chunk to begin with, single tokens, a chunk in the middle."""
    net, tokens = featured(feature), ids(3, N)
    assert_same(cached(net, tokens, [7, 1, 1, 3, 5], mask=mask), net(tokens, mask=mask))


@pytest.mark.parametrize("feature", FEATURES)
def test_flags_and_matrices_speak_of_the_cached_positions_too(feature: str) -> None:
    net, tokens = featured(feature), ids(3, N)
    flags = torch.rand(3, N, generator=torch.Generator().manual_seed(5)) < 0.7
    matrix = torch.rand(N, N, generator=torch.Generator().manual_seed(6)) < 0.7
    whole = net(tokens, mask=flags, attn_mask=matrix)
    cache = KVCache(net, batch=3, tokens=N)
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 5), (5, N)):
            part = net(tokens[:, start:stop], flags[:, :stop], matrix[:stop, :stop], cache=cache)
            cache.advance()
            assert_same(part, whole[:, start:stop])


def test_a_prefix_may_look_ahead_if_it_arrives_whole() -> None:
    net, tokens, mask = featured("rotary"), ids(2, N), causal | prefix(6)
    whole = net(tokens, mask=mask, causal=False)
    assert_same(cached(net, tokens, [6, 1, 10], mask=mask, causal=False), whole)


def test_the_callers_positions_are_those_of_the_new_tokens() -> None:
    net, tokens = featured("rotary"), ids(2, N)
    assert_same(cached(net, tokens, [N], pos=torch.arange(N) * 2), net(tokens, pos=torch.arange(N) * 2))


def test_single_precision_agrees_relatively() -> None:
    net, tokens = featured("grouped").float(), ids(3, N)
    whole = net(tokens, mask=window(4))
    assert_same(cached(net, tokens, [7] + [1] * 10, mask=window(4)), whole)


def test_the_past_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from truemask.nn import attention

    rows: list[tuple[int, int]] = []
    real = attention.results
    monkeypatch.setattr(
        attention, "results", lambda q, k, *rest, **kw: rows.append((q.shape[2], k.shape[2])) or real(q, k, *rest, **kw)
    )
    cached(featured("registers"), ids(1, 9), [6, 1, 2])
    assert rows[::2] == [(9, 9), (1, 10), (2, 12)]  # three registers, then the tokens alone


def test_a_cache_is_set_aside_once_and_says_when_it_is_full() -> None:
    net = featured("memories")
    cache = KVCache(net, batch=2, tokens=5)
    memory = cache.layer(0).memory
    with torch.no_grad():
        net(ids(2, 3), cache=cache)
        assert cache.length == 0  # the owner advances
        cache.advance()
        assert cache.length == 3 + 3 + 2
        net(ids(2, 2), cache=cache)
        cache.advance()
        assert cache.layer(0).memory is memory
        with pytest.raises(ValueError, match="holds 5 tokens of 2 samples, 5 of them taken; the call brings 1 tokens"):
            net(ids(2, 1), cache=cache)


def test_a_call_that_is_not_kept_leaves_no_trace() -> None:
    net, tokens = featured("rotary"), ids(2, 9)
    cache = KVCache(net, batch=2, tokens=9)
    with torch.no_grad():
        net(tokens[:, :5], cache=cache)
        cache.advance()
        net(ids(2, 3, seed=9), cache=cache)  # a draft that was refused
        assert_same(net(tokens[:, 5:], cache=cache), net(tokens)[:, 5:])


def test_a_cache_is_for_inference() -> None:
    net = wrapped()
    with pytest.raises(ValueError, match="a cache is for inference"):
        net(ids(1, 3), cache=KVCache(net, batch=1, tokens=3))


def test_another_batch_is_refused() -> None:
    net = wrapped()
    with torch.no_grad(), pytest.raises(ValueError, match="2 samples, 0 of them taken; the call brings 5 tokens of 3"):
        net(ids(3, 5), cache=KVCache(net, batch=2, tokens=9))


def test_a_cache_runs_under_autocast() -> None:
    net, tokens = featured("qk rmsnorm").float(), ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = cached(net, tokens, [4, 5])
        assert KVCache(net, batch=1, tokens=1).layer(0).memory.dtype == torch.bfloat16
    assert out.shape == (2, 9, TOKENS)
    assert (out.double() - net(tokens).double()).abs().mean() < 0.05 * out.double().abs().mean() + 0.02


def test_an_encoder_told_to_be_causal_can_be_cached() -> None:
    net, tokens = wrapped(encoder()), ids(2, 9)
    assert_same(cached(net, tokens, [4, 5], mask=causal), net(tokens, mask=causal))


@pytest.mark.parametrize("mask", [None, window(13)], ids=str)
def test_an_answer_of_two_hundred_tokens_makes_two_plans(mask: Mask | None) -> None:
    """One for the prompts and one for all that follows, in every layer."""
    model = AutoregressiveWrapper(featured("rotary"))
    CACHE.clear()
    model.generate([ids(1, 5)[0], ids(1, 9)[0]], 200, temperature=0.0, mask=mask)
    assert CACHE.info().misses == 2
