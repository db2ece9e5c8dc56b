"""A cache that its mask sizes: what all keys would give, from as few as later queries see."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import truemask as tm
from tests.support.cases import CASES, Case
from tests.support.chunks import read
from tests.support.equality import assert_same
from tests.support.nn_models import HEADS, decoder, featured, ids, wrapped
from tests.support.strategies import Drawn, Reach, expressions
from truemask.generation import decoding, kv_cache
from truemask.generation.kv_cache import KVCache
from truemask.masks.core.mask import Mask
from truemask.nn.layers import Decoder
from truemask.nn.wrappers import TransformerWrapper

N = 31
WINDOW = 4
MASKS: list[Mask] = [
    tm.causal & (tm.window(WINDOW) | tm.prefix(2)),
    tm.window(WINDOW),
    tm.causal & tm.blocks(WINDOW),
    tm.causal & tm.blocks(3, back=1),
    tm.causal & (tm.window(2) | tm.strided(5)),
    tm.causal.packed([7, 11, 13]),
    tm.per_head([tm.window(2), tm.causal & tm.dilated(3), tm.window(5), tm.causal & tm.prefix(1)]),
    tm.per_sample([tm.window(3), tm.causal & tm.blocks(5), tm.causal & tm.prefix(2)]),
    (tm.causal & (tm.window(WINDOW) | tm.prefix(1))).padded([0, 6, 9]),
]
FEATURED = ["absolute", "rotary", "registers", "registers, absolute", "grouped", "memories", "dense"]


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small memories, so that small models forget."""
    monkeypatch.setattr(kv_cache, "LEAST_ROOM", 2)


def sized(net: TransformerWrapper, mask: Mask, batch: int = 3, tokens: int = N) -> KVCache:
    return KVCache(net, batch=batch, tokens=tokens, mask=mask)


# -- the same logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("feature", FEATURED)
def test_logits_are_those_of_all_keys(feature: str, mask: Mask) -> None:
    net, tokens = featured(feature), ids(3, N)
    whole = net(tokens, mask=mask)
    for size in (1, 7, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, N):
        assert_same(read(net, sized(net, mask), tokens, size), whole)


def _is_square(case: Case) -> bool:
    return case.q_len == case.kv_len and case.heads in (1, 2, 3)


@pytest.mark.parametrize("case", list(filter(_is_square, CASES)), ids=repr)
def test_every_mask_of_the_catalogue(case: Case) -> None:
    layers = Decoder(24, 2, case.heads, attn_dim_head=6, rotary_pos_emb=True, rotary_emb_dim=4)
    net = wrapped(layers)
    mask, tokens = tm.causal & case.make(), ids(case.batch, case.q_len)
    whole = net(tokens, mask=mask, pos=torch.arange(case.q_len))
    for sizes in (1, 3, case.q_len):
        cache, parts, start = sized(net, mask, case.batch, case.q_len), [], 0
        with torch.no_grad():
            for chunk in tokens.split(sizes, dim=1):
                parts.append(net(chunk, cache=cache, pos=torch.arange(start, start + chunk.shape[1])))
                cache.advance()
                start += chunk.shape[1]
        assert_same(torch.cat(parts, dim=1), whole)


@st.composite
def chunked(draw: Any) -> tuple[Drawn, list[int]]:
    n = draw(st.integers(4, 14))
    drawn = draw(expressions(depth=3, reach=Reach(n, n, draw(st.integers(1, 3)), HEADS)))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1))))
    return drawn, [stop - start for start, stop in itertools.pairwise([0, *cuts, n])]


@given(chunked(), st.sampled_from(["absolute", "rotary", "memories"]))
@settings(max_examples=60)
def test_random_masks_and_chunks(pair: tuple[Drawn, list[int]], feature: str) -> None:
    drawn, sizes = pair
    net, mask, r = featured(feature), tm.causal & drawn.mask, drawn.reach
    tokens, pos = ids(r.batch, r.q), torch.arange(r.q)
    with torch.no_grad():
        whole, cache, start = net(tokens, mask=mask, pos=pos), sized(net, mask, r.batch, r.q), 0
        for size in sizes:
            stop = start + size
            assert_same(net(tokens[:, start:stop], pos=pos[start:stop], cache=cache), whole[:, start:stop], scale=10.0)
            cache.advance()
            start = stop


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_is_kept_is_what_live_keys_says(mask: Mask) -> None:
    net, tokens = featured("rotary"), ids(3, N)
    cache, most = sized(net, mask), 0
    for past in range(N):
        live = mask.live_keys(past, q_stop=N, batch=3, heads=HEADS).any(dim=0).any(dim=0).nonzero()[:, 0]
        assert set(live.tolist()) <= set(cache.positions.tolist())
        most = max(most, len(live) + 1)
        read(net, cache, tokens[:, past : past + 1], 1)
    assert cache.capacity == most
    assert len(cache.positions) <= most + max(most, 2)


@pytest.mark.parametrize(
    ("mask", "capacity"),
    [
        (tm.causal & (tm.window(256) | tm.prefix(4)), 260),
        (tm.causal & tm.blocks(512), 512),
        (tm.causal, 5000),
        (tm.causal & tm.predicate(lambda b, h, q, k: q >= k), 5000),
        (tm.window(9).packed([2000, 3000]), 9),
    ],
    ids=str,
)
def test_the_capacity_is_the_masks(mask: Mask, capacity: int) -> None:
    assert sized(featured("rotary"), mask, 1, 5000).capacity == capacity


def test_memory_is_set_aside_once_and_stays_small() -> None:
    net, tokens = featured("registers"), ids(2, 200)
    cache = sized(net, MASKS[0], 2, 200)
    places, size = [layer.memory.data_ptr() for layer in cache._layers], cache.bytes
    read(net, cache, tokens, 1)
    assert [layer.memory.data_ptr() for layer in cache._layers] == places
    assert cache.bytes == size < KVCache(net, batch=2, tokens=200).bytes / 10
    assert repr(cache).startswith(
        "KVCache(batch=2, tokens=200, mask=causal & (window(4) | prefix(2))): 200 tokens read, "
    )
    assert repr(cache).endswith("kept in 2 layers, capacity 6, 22 KiB")


def test_steps_between_two_moves_share_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    real = Mask.take
    monkeypatch.setattr(Mask, "take", lambda self, **sides: made.append(sides) or real(self, **sides))
    net, mask = featured("rotary"), tm.causal & (tm.window(10) | tm.prefix(2))
    read(net, sized(net, mask, 1, 140), ids(1, 140), 1)
    assert len(made) <= 11  # twelve keys are kept and twelve follow before they move


@pytest.mark.parametrize(
    ("mask", "capacity"),
    [(MASKS[0], 10), (tm.blocks(5) | tm.dilated(3), 48), (tm.everything, 50)],  # 10: the sinks of three, and a window
    ids=str,
)
def test_generating_keeps_what_the_mask_lets_it(mask: Mask, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[KVCache] = []
    monkeypatch.setattr(decoding, "KVCache", lambda *a, **k: made.append(KVCache(*a, **k)) or made[-1])
    model = tm.AutoregressiveWrapper(featured("rotary"))
    prompts = [ids(5, seed=1), ids(3, seed=2), ids(11, seed=3)]
    answer = model.generate(prompts, 40, temperature=0.0, mask=mask)
    assert torch.equal(answer, model.generate(prompts, 40, temperature=0.0, mask=mask, cache_kv=False))
    assert len(made) == 1
    assert (made[0].tokens, made[0].past, made[0].capacity) == (50, 50, capacity)


def test_a_prefix_that_looks_ahead_keeps_all() -> None:
    model, mask = tm.AutoregressiveWrapper(featured("rotary")), tm.causal | tm.prefix(6)
    options: dict[str, Any] = {"temperature": 0.0, "mask": mask, "causal": False}
    prompt = ids(6)
    assert torch.equal(model.generate(prompt, 9, **options), model.generate(prompt, 9, cache_kv=False, **options))


# -- other samples, other ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("first", [3, 20])  # before anything was forgotten, and after
def test_samples_change_places(mask: Mask, first: int) -> None:
    net, tokens = featured("memories"), ids(3, N)
    rows = torch.tensor([2, 2, 0])
    whole = net(tokens[rows], mask=mask.select(samples=rows))
    for change in (KVCache.reorder, KVCache.select):
        cache = sized(net, mask)
        read(net, cache, tokens[:, :first], 4)
        change(cache, rows)
        assert_same(read(net, cache, tokens[rows, first:], 3), whole[:, first:])


def test_samples_leave_and_are_shared() -> None:
    net, mask, tokens = featured("rotary"), MASKS[-1], ids(3, N)
    cache = sized(net, mask)
    read(net, cache, tokens[:, :20], 4)
    for rows, base in (([2], [2]), ([0, 0, 0, 0], [2, 2, 2, 2])):
        cache.select(rows)
        whole = net(tokens[base], mask=mask.select(samples=base))
        assert cache.batch == len(rows)
        stop = cache.past + 3
        assert_same(read(net, cache, tokens[base, stop - 3 : stop], 1), whole[:, stop - 3 : stop])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_rejected_drafts(mask: Mask) -> None:
    """Drafts of two tokens of which one is right, all along."""
    net, tokens = featured("registers"), ids(3, N)
    whole, cache = net(tokens, mask=mask), sized(net, mask)
    for past in range(N - 1):
        draft = torch.cat((tokens[:, past : past + 1], ids(3, 1, seed=past)), dim=1)
        assert_same(read(net, cache, draft, 2)[:, 0], whole[:, past])
        cache.truncate(past + 1)
    assert cache.past == N - 1


def test_what_was_overwritten_cannot_be_gone_back_to() -> None:
    net, mask, tokens = featured("rotary"), MASKS[0], ids(3, N)
    cache = sized(net, mask)
    read(net, cache, tokens[:, :20], 1)
    before = cache.positions.tolist()
    with pytest.raises(
        ValueError, match=r"the first 9 tokens cannot be gone on from: key 8, .* up to 11 .*least the"
    ) as e:
        cache.truncate(9)
    least = int(str(e.value).partition("the first")[2].partition("at least the first ")[2].split()[0])
    assert cache.positions.tolist() == before
    whole = net(tokens, mask=mask)
    cache.truncate(least)
    assert_same(read(net, cache, tokens[:, least:], 2), whole[:, least:])
    with pytest.raises(ValueError, match="31 tokens were read, so there are no first 32"):
        cache.truncate(32)
    cache.truncate(0)
    assert_same(read(net, cache, tokens, 5), whole)


def test_a_cache_that_keeps_all_can_do_the_same() -> None:
    net, tokens = featured("registers"), ids(3, N)
    cache, rows = KVCache(net, batch=3, tokens=N), torch.tensor([1, 0, 1])
    read(net, cache, tokens[:, :9], 9)
    cache.truncate(5)
    cache.reorder(rows)
    assert_same(read(net, cache, tokens[rows, 5:], 2), net(tokens[rows])[:, 5:])
    assert cache.capacity == N
    assert cache.positions.tolist() == list(range(N))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (tm.causal | tm.prefix(3), r"mask=`causal \| prefix\(3\)`: it lets queries see later keys.*Pass `tm.causal & "),
        (tm.local(2), "lets queries see later keys"),
        (tm.everything, "lets queries see later keys"),
        (tm.causal & tm.keys([True] * 7), r"tokens=31 under mask=`causal & keys.*7.*31.*or fewer tokens="),
        (tm.causal.padded([1, 2]), "holds data for 2 samples, but was asked about 3"),
        (torch.ones(N, N).bool(), "mask= of a cache must be a mask expression or its text"),
        ("causal & windw(3)", "windw"),
    ],
    ids=str,
)
def test_masks_that_size_no_cache(mask: Any, message: str) -> None:
    with pytest.raises(tm.MaskError, match=message):
        sized(featured("rotary"), mask)


def test_another_call_is_refused_and_changes_nothing() -> None:
    net, mask, tokens = featured("registers"), MASKS[0], ids(3, N)
    cache, whole = sized(net, mask), net(tokens, mask=mask)
    read(net, cache, tokens[:, :20], 4)
    other = featured("registers")
    refused: list[tuple[TransformerWrapper, Tensor, dict[str, Any], str]] = [
        (other, tokens[:, :1], {}, "made for another model"),
        (net, tokens[:2, :1], {}, "31 tokens of 3 samples, 20 of them taken; the call brings 1 tokens of 2 samples"),
        (net, ids(3, 12), {}, "20 of them taken; the call brings 12 tokens"),
        (net, tokens[:, :1], {"mask": tm.window(5)}, r"under `causal & \(w.*and the call is under `window\(5\)`"),
        (net, tokens[:, :1], {"mask": torch.ones(3, 21).bool()}, "the call is under `everything`"),
    ]
    with torch.no_grad():
        for model, chunk, options, message in refused:
            with pytest.raises(ValueError, match=message):
                model(chunk, cache=cache, **options)
    for change, rows, message in (
        (cache.reorder, [0, 1], "2 indices for 3 samples"),
        (cache.select, [0, 3], r"samples \[0, 3\] are not of 0 to 2"),
        (cache.select, [], "no samples are chosen"),
        (cache.select, torch.ones(3).bool(), "chosen by their indices"),
    ):
        with pytest.raises(ValueError, match=message):
            change(rows)
    assert_same(read(net, cache, tokens[:, 20:], 3, mask=mask), whole[:, 20:])


@pytest.mark.parametrize("new", [1, 11])  # within the memory's room, and beyond it
def test_a_call_that_fails_or_is_not_kept_leaves_no_trace(new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, mask, tokens = featured("memories"), MASKS[0], ids(3, N)
    cache, whole = sized(net, mask), net(tokens, mask=mask)
    for layer in cache._layers:
        layer.memory.fill_(torch.nan)  # what was never written is never read
    read(net, cache, tokens[:, :20], 4)
    with torch.no_grad():
        net(ids(3, new, seed=5), cache=cache)
        with monkeypatch.context() as patched:
            patched.setattr(net.attn_layers.layers[1], "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                net(ids(3, 3, seed=6), cache=cache)
    with pytest.raises(ValueError, match="the layers appended different numbers of keys"):
        cache.advance()
    assert_same(read(net, cache, tokens[:, 20:], 3), whole[:, 20:])


def test_a_copy_and_a_pickle_go_on() -> None:
    net, mask, tokens = featured("rotary"), MASKS[0], ids(3, N)
    cache, whole = sized(net, mask), net(tokens, mask=mask)
    read(net, cache, tokens[:, :20], 4)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert_same(read(net, twin, tokens[:, 20:], 3), whole[:, 20:])
    assert cache.past == 20


def test_a_mask_may_leave_causality_to_the_model() -> None:
    net, tokens = wrapped(decoder()), ids(2, N)
    mask = tm.window(4) | tm.strided(3)
    cache = sized(net, tm.causal & mask, 2)
    assert_same(read(net, cache, tokens, 3, mask=mask), net(tokens, mask=mask))
