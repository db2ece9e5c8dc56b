"""A step by the native kernel gives what the model gives: options, numbers, masks, batches; and when it steps aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truemask as tm
from truemask.backends.context import attention_backend
from truemask.backends.native.library import missing
from truemask.generation.decoding import Reader
from truemask.generation.kv_cache import KVCache
from truemask.generation.native_step import NativeStep, objection
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"the move is whoever builds the kernel: {missing()}")

TOKENS, PROMPT, WORDS = 150, 70, 97
SMALL = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16}
SINKS = tm.window(30) | tm.prefix(4)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learned positions": ({}, {}),
    "rotary, gated, rms": (
        {"rotary_pos_emb": True, "ff_glu": True, "ff_swish": True, "use_rmsnorm": True, "ff_no_bias": True},
        {},
    ),
    "registers, cosine, shared keys": (
        {"rotary_pos_emb": True, "ff_relu_squared": True, "attn_qk_norm": True, "attn_kv_heads": 2},
        {"num_memory_tokens": 3},
    ),
    "memories, normed heads, tied": (
        {"rotary_pos_emb": True, "attn_qk_rmsnorm": True, "attn_kv_heads": 1, "attn_num_mem_kv": 2},
        {"tie_embedding": True},
    ),
    "plain gains, few turned": ({"norm_add_unit_offset": False, "rotary_pos_emb": True, "rotary_emb_dim": 4}, {}),
    "alibi": ({"alibi_pos_bias": True, "attn_kv_heads": 2}, {"use_abs_pos_emb": False}),
    "alibi, odd heads": ({"alibi_pos_bias": True, "dim": 80, "heads": 5, "attn_dim_head": 16}, {}),
    "masks of layers": (
        {"rotary_pos_emb": True, "layer_masks": ["window(9) | prefix(3)", "blocks(40)"]},
        {"num_memory_tokens": 2},
    ),
    "masks of layers, alibi": (
        {"alibi_pos_bias": True, "layer_masks": ["causal", "window(20)"]},
        {"use_abs_pos_emb": False},
    ),
    "no positions": ({}, {"use_abs_pos_emb": False}),
    "odd heads": ({"dim": 80, "attn_dim_head": 12, "rotary_pos_emb": True}, {}),
    "gated by squares": ({"ff_glu": True, "ff_relu_squared": True, "ff_mult": 2.5}, {}),
}
MASKS: dict[str, Mask | None] = {
    "causal": None,
    "sinks": SINKS,
    "blocks": tm.blocks(32),
    "documents": tm.documents([50, 40, 60]),
    "packed": SINKS.packed([50, 40, 60]),
    "random": tm.dilated(3) | tm.random(0.1, seed=3),
    "heads": tm.causal & tm.per_head([tm.window(9), tm.window(40), tm.blocks(16), tm.everything]),
    "samples": tm.per_sample([tm.window(9), tm.window(70)]),
    "padded": SINKS.padded([0, 13]),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def made(dtype: torch.dtype = torch.float32, wrapper: dict[str, Any] | None = None, **keywords: Any) -> Any:
    torch.manual_seed(0)
    layers = tm.Decoder(**{**SMALL, **keywords})
    net = tm.TransformerWrapper(num_tokens=WORDS, max_seq_len=TOKENS, attn_layers=layers, **(wrapper or {}))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net.eval().to(dtype)


def cache_of(net: Any, ids: Tensor, mask: Mask | None) -> KVCache:
    """After the prompt; as small as the mask allows."""
    cache = KVCache(net, batch=len(ids), tokens=TOKENS, mask=None if mask is None else tm.causal & mask)
    net(ids[:, :PROMPT], cache=cache)
    cache.advance()
    return cache


@torch.no_grad()
def agree(net: Any, mask: Mask | None = None, *, batch: int = 2, new: int = 1) -> None:
    """Every step is one of the kernel, and near the model's own logits for all tokens at once."""
    ids = torch.randint(WORDS, (batch, TOKENS), generator=torch.Generator().manual_seed(1))
    expected = net(ids, mask=mask).float()
    cache = cache_of(net, ids, mask)
    step = NativeStep(net, cache, everything if cache.mask is None else cache.mask, None)
    for chunk, wanted in zip(ids[:, PROMPT:].split(new, 1), expected[:, PROMPT:].split(new, 1), strict=True):
        logits = step(chunk)
        if logits is None:  # there was no room behind the kept keys: the model moves them
            layers = map(cache.layer, range(net.attn_layers.depth))
            assert any(layer.length + chunk.shape[1] > layer.room for layer in layers)
            logits = net(chunk, cache=cache)
        cache.advance()
        size = max(1.0, float(expected.abs().max()))
        assert float((logits - wanted).abs().max()) <= TOLERANCE[net.token_emb.weight.dtype] * size


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_option(name: str, dtype: torch.dtype) -> None:
    keywords, wrapper = MODELS[name]
    net = made(dtype, wrapper, **keywords)
    assert objection(net) == ""
    agree(net)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("new", [1, 3])
def test_every_mask(name: str, new: int) -> None:
    agree(made(rotary_pos_emb=True, attn_kv_heads=2 if name != "heads" else 4), MASKS[name], new=new)


@pytest.mark.parametrize("positions", ["rotary_pos_emb", "alibi_pos_bias"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_with_those_of_layers(name: str, positions: str) -> None:
    """Layers whose memories have different sizes, and move at different steps."""
    layers: dict[str, Any] = {"layer_masks": ["window(9) | prefix(3)", "blocks(40)"], positions: True}
    mask = MASKS[name]
    agree(made(**layers, wrapper={"use_abs_pos_emb": False}), tm.causal if mask is None else mask)


@pytest.mark.parametrize("name", ["sinks", "packed", "heads", "samples", "padded"])
@pytest.mark.parametrize("new", [1, 3])
def test_alibi_counts_the_masks_positions(name: str, new: int) -> None:
    agree(made(alibi_pos_bias=True, wrapper={"use_abs_pos_emb": False}), MASKS[name], new=new)


@pytest.mark.parametrize("batch", [1, 3, 8, 16])
def test_batches(batch: int) -> None:
    agree(made(), SINKS, batch=batch)


def test_weights_are_those_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed in place, or replaced: a step follows."""
    net, ids = made(), torch.randint(WORDS, (1, TOKENS))
    with torch.no_grad():
        cache = cache_of(net, ids, None)
        step = NativeStep(net, cache, everything, None)
        first = step(ids[:, :1])
        net.project_out.weight.mul_(2)
        assert torch.allclose(step(ids[:, :1]), 2 * first, atol=1e-5)
        net.project_out.weight.data = net.project_out.weight / 2
        assert torch.allclose(step(ids[:, :1]), first, atol=1e-5)


def test_threads_change_nothing() -> None:
    net, ids = made(dim=512, attn_dim_head=64, heads=8), torch.randint(WORDS, (2, TOKENS))
    before, found = torch.get_num_threads(), []
    with torch.no_grad():
        cache = cache_of(net, ids, None)  # once: torch's own products may differ by the number of threads
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(NativeStep(net, cache, everything, None)(ids[:, PROMPT : PROMPT + 1]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_samples_and_ends_may_change() -> None:
    """After `select`, `reorder` and `truncate` steps go on from what the cache holds."""
    net = made(rotary_pos_emb=True)
    ids = torch.randint(WORDS, (3, TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = cache_of(net, ids, SINKS)
        step = NativeStep(net, cache, tm.causal & SINKS, None)
        for place in range(PROMPT, PROMPT + 9):
            assert step(ids[:, place : place + 1]) is not None
            cache.advance()
        cache.truncate(PROMPT + 4)
        cache.select([2, 0])
        read = ids[[2, 0]]
        logits = step(read[:, PROMPT + 4 : PROMPT + 5])
        expected = net(read[:, : PROMPT + 5], mask=SINKS)[:, -1]
    assert logits is not None
    assert torch.allclose(logits[:, 0], expected, atol=1e-4)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _with_another_linear(net: Any) -> None:
    net.attn_layers.layers[0].attn.to_q = Doubled(64, 64, bias=False)


CHANGES: dict[str, Any] = {
    "another linear": _with_another_linear,
    "a hook": lambda net: net.attn_layers.layers[1].ff.register_forward_hook(lambda *_: None),
    "doubles": lambda net: net.double(),
    "mixed numbers": lambda net: net.attn_layers.layers[0].ff.bfloat16(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_kernel_does_not_know_goes_through_the_model(name: str) -> None:
    net = made()
    CHANGES[name](net)
    assert objection(net)
    assert not objection(made())


@pytest.mark.parametrize("keywords", [{"dim": 60}, {"ff_mult": 0.3}, {"attn_flash": False}])
def test_sizes_and_ways_that_are_not_for_it(keywords: dict[str, Any]) -> None:
    assert objection(made(**keywords))


@torch.no_grad()
def test_it_steps_aside() -> None:
    """Before the prompt, for too many rows, under another backend, with gradients, autocast or foreign tokens."""
    net, ids = made(), torch.randint(WORDS, (2, TOKENS))
    empty = NativeStep(net, KVCache(net, batch=2, tokens=TOKENS), everything, None)
    assert empty(ids[:, :1]) is None
    cache = cache_of(net, ids, None)
    step, one = NativeStep(net, cache, everything, None), ids[:, :1]
    assert step(ids[:, :20]) is None
    assert step(one + WORDS) is None
    assert step(one.int()) is None
    with attention_backend("reference"):
        assert step(one) is None
    with torch.enable_grad():
        assert step(one) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert step(one) is None
    assert cache.past == PROMPT
    assert step(one) is not None


def test_positions_that_were_not_learned_are_an_error() -> None:
    torch.manual_seed(0)
    net = tm.TransformerWrapper(num_tokens=WORDS, max_seq_len=80, attn_layers=tm.Decoder(**SMALL)).eval()
    ids = torch.randint(WORDS, (1, 90))
    with torch.no_grad():
        cache = KVCache(net, batch=1, tokens=90)
        read = Reader(net, everything, cache=cache)
        read(ids[:, :70])
        for place in range(70, 80):
            read(ids[:, place : place + 1])
        with pytest.raises(ValueError, match="position 80 has no embedding"):
            read(ids[:, 80:81])
    assert cache.past == 80


def test_generating_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the text that recomputing everything gives."""
    taken: list[bool] = []
    original = NativeStep.__call__

    def counted(self: NativeStep, tokens: Tensor) -> Tensor | None:
        found = original(self, tokens)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(NativeStep, "__call__", counted)
    model = tm.AutoregressiveWrapper(made(rotary_pos_emb=True))
    prompts = [torch.randint(WORDS, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 12)]
    found = model.generate(prompts, 40, temperature=0.0, mask=SINKS)
    assert taken == [False] + [True] * 39
    assert torch.equal(found, model.generate(prompts, 40, temperature=0.0, mask=SINKS, cache_kv=False))


def test_drafts_with_masks_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(rotary_pos_emb=True, layer_masks=["window(9) | prefix(3)", "blocks(40)"])
    model, calls = tm.AutoregressiveWrapper(net), []
    whole = NativeStep.__call__
    monkeypatch.setattr(NativeStep, "__call__", lambda self, tokens: calls.append(whole(self, tokens)) or calls[-1])
    prompts = [torch.arange(n) % 7 for n in (20, 13)]
    plain = model.generate(prompts, 60, mask=SINKS, temperature=0.0, cache_kv=False)
    for draft in (None, "ngram"):
        calls.clear()
        assert torch.equal(model.generate(prompts, 60, mask=SINKS, temperature=0.0, draft=draft), plain)
        assert sum(logits is not None for logits in calls) > 10
