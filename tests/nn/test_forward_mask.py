"""What a row of a model depends on: nothing that its mask hides, in any combination; dead rows; registers; memories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.equality import assert_same
from tests.support.nn_models import HEADS, TOKENS, block_of, decoder, encoder, features, ids, wrapped
from truemask.masks.compose.boolean import everything, nothing
from truemask.masks.compose.per_axis import per_head
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, local, window
from truemask.masks.leaves.documents import documents
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.patterns import dilated, random
from truemask.masks.leaves.per_token import keys, padding, prefix, queries
from truemask.masks.structure.order import looks_back
from truemask.masks.structure.padding import seen_by_all
from truemask.nn.forward_mask import pairs_ahead
from truemask.nn.layers import AttentionLayers

N = 13
STRICTLY_BEFORE = causal - dilated(1000)  # no row sees itself, so the first sees nothing


def moved(model: torch.nn.Module, x: Tensor, place: int, **options: object) -> Tensor:
    """Which rows of the output change when row `place` of the input does, bool [b, n]."""
    other = x.clone()
    other[:, place] = other[:, place] * -0.7 + 1.0 if x.is_floating_point() else (x[:, place] + 5) % TOKENS
    return (model(x, **options) != model(other, **options)).any(dim=-1)


def reach(mask: Mask, layers: int, batch: int = 1) -> Tensor:
    """Which rows may depend on which inputs after some layers: paths through the mask, and the row itself."""
    step = mask.to_dense(N, batch=batch, heads=HEADS).any(dim=1) | torch.eye(N, dtype=torch.bool)
    paths = step
    for _ in range(layers - 1):
        paths = (paths.float() @ step.float()) > 0
    return paths


@pytest.mark.parametrize(
    "mask",
    [
        STRICTLY_BEFORE,
        window(3) - dilated(1000),
        random(0.3, seed=5),
        random(0.2, seed=1) & local(4),
        dilated(3) & ~prefix(2),
        documents([4, 2, 7]),
        keys(torch.arange(N) % 3 == 1),
        per_head([window(2), prefix(3), nothing, random(0.1)]),
        dense(torch.rand(N, N, generator=torch.Generator().manual_seed(2)) < 0.25),
    ],
    ids=str,
)
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("model", [decoder, encoder])
def test_a_row_depends_only_on_what_the_mask_lets_through(model: type, mask: Mask, flash: bool) -> None:
    """In x-transformers a decoder whose mask forbids the diagonal averages the future into early rows."""
    layers: AttentionLayers = model(attn_flash=flash)
    allowed = reach(causal & mask if layers.causal else mask, layers.depth)[0]
    x = features(1, N)
    for place in range(0, N, 3):
        assert not (moved(layers, x, place, mask=mask)[0] & ~allowed[:, place]).any()


def test_a_row_depends_on_what_the_mask_does_let_through() -> None:
    """The converse, so that the test above cannot pass by seeing nothing."""
    assert torch.equal(moved(decoder(), features(1, N), 4)[0], torch.arange(N) >= 4)
    assert torch.equal(moved(decoder(), features(1, N), 4, mask=window(2))[0], reach(window(2), 2)[0][:, 4])


# -- rows that see nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [nothing, STRICTLY_BEFORE, keys(torch.zeros(N, dtype=torch.bool))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_get_zeros_and_finite_gradients(mask: Mask, dtype: torch.dtype) -> None:
    layers = decoder().to(dtype).train()
    x = features(2, N).to(dtype).requires_grad_()
    attended = block_of(layers).attn(x, mask)
    dead = mask.dead_queries(N)[0, 0]
    assert torch.equal(attended[:, dead], torch.zeros_like(attended[:, dead]))
    layers(x, mask=mask).sum().backward()
    gradients = [x.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_padding_is_not_read_and_its_rows_get_zeros_from_attention() -> None:
    flags = torch.tensor([[True] * 9 + [False] * 4])
    x = features(1, N)
    assert not moved(encoder(), x, 11, mask=flags)[0, :9].any()
    attended = block_of(encoder()).attn(x, keys(flags) & queries(flags))
    assert torch.equal(attended[:, 9:], torch.zeros_like(attended[:, 9:]))
    assert_same(encoder()(x, mask=flags)[:, :9], encoder()(x[:, :9]))


def test_a_sample_without_real_tokens_harms_no_other() -> None:
    flags = torch.tensor([[True] * N, [False] * N])
    out = encoder()(features(2, N), mask=flags)
    assert out.isfinite().all()
    assert_same(out[:1], encoder()(features(2, N)[:1]))


# -- registers ---------------------------------------------------------------------------------------------------------


def test_registers_are_not_in_the_output_and_every_row_reads_them() -> None:
    net = wrapped(num_memory_tokens=3)
    tokens = ids(2, N)
    before = net(tokens, mask=nothing)
    assert before.shape == (2, N, TOKENS)
    with torch.no_grad():
        net.memory_tokens[1] *= -2.0
    assert (before != net(tokens, mask=nothing)).any(dim=-1).all()


def test_registers_of_a_decoder_leak_nothing() -> None:
    net = wrapped(num_memory_tokens=3)
    assert torch.equal(moved(net, ids(1, N), 5)[0], torch.arange(N) >= 5)
    packed = causal.packed([4, 9])
    assert torch.equal(moved(net, ids(1, N), 2, mask=packed)[0], (torch.arange(N) >= 2) & (torch.arange(N) < 4))


def test_registers_of_an_encoder_carry_real_tokens_to_all() -> None:
    flags = torch.tensor([[True] * 9 + [False] * 4])
    net = wrapped(encoder(), num_memory_tokens=2)
    assert moved(net, ids(1, N), 3, mask=flags)[0, :9].all()
    assert not moved(net, ids(1, N), 11, mask=flags)[0, :9].any()
    assert_same(net(ids(1, N), mask=flags)[:, :9], net(ids(1, N)[:, :9]))
    assert_same(net(ids(1, N), mask=padding(lengths=[9])), net(ids(1, N), mask=flags))


@pytest.mark.parametrize("mask", [documents([4, 9]), local(1), everything.packed([4, 9])], ids=str)
def test_registers_carry_nothing_to_rows_that_may_not_read_it(mask: Mask) -> None:
    net = wrapped(encoder(), num_memory_tokens=2)
    allowed = reach(mask, 2)[0]
    for place in (0, 5, 12):
        assert not (moved(net, ids(1, N), place, mask=mask)[0] & ~allowed[:, place]).any()


REAL = torch.arange(N) < 9


@pytest.mark.parametrize(
    "given",
    [
        {"mask": queries(REAL)},
        {"mask": queries(REAL) & keys(torch.arange(N) != 3)},
        {"mask": padding(lengths=[9])},
        {"mask": padding(lengths=[9], on="queries")},
        {"mask": padding(starts=[3]) & keys(REAL)},
        {"mask": everything.padded([3])},
        {"mask": REAL[None]},
        {"mask": REAL[None], "attn_mask": queries(torch.arange(N) > 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("memories", [0, 2])
def test_registers_carry_nothing_to_rows_that_may_read_nothing(given: dict[str, Any], memories: int) -> None:
    net = wrapped(encoder(attn_num_mem_kv=memories), num_memory_tokens=3)
    mask = keys(REAL) & queries(REAL) if isinstance(given["mask"], Tensor) else given["mask"]
    allowed = reach(mask & given.get("attn_mask", everything), 2)[0]
    for place in (0, 3, 5, 8, 11):
        assert not (moved(net, ids(1, N), place, **given)[0] & ~allowed[:, place]).any()


@pytest.mark.parametrize("mask", [queries(REAL), padding(lengths=[9]), everything.padded([3])], ids=str)
def test_where_registers_read_tokens_padding_reads_no_register(mask: Mask) -> None:
    net = wrapped(encoder(), num_memory_tokens=3)
    with torch.no_grad():
        before = net(ids(1, N), mask=mask)
        net.memory_tokens[1] *= -2.0
        changed = (before != net(ids(1, N), mask=mask)).any(dim=-1)[0]
    assert torch.equal(changed, ~mask.dead_queries(N)[0, 0])


def test_memory_keys_are_read_by_padding_too() -> None:
    net = wrapped(encoder(attn_num_mem_kv=2), num_memory_tokens=3)
    before = net(ids(1, N), mask=REAL[None])
    with torch.no_grad():
        block_of(net.attn_layers).attn.mem_v.add_(1.0)
    assert (before != net(ids(1, N), mask=REAL[None])).any(dim=-1).all()


def test_a_padded_sample_with_registers_is_what_it_is_alone() -> None:
    net = wrapped(encoder(), num_memory_tokens=3)
    tokens = ids(2, N)
    out = net(tokens, mask=everything.padded([0, 4]))
    assert_same(out[1:, 4:], net(tokens[1:, 4:]))
    assert_same(out[:1], net(tokens[:1]))


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (everything, everything),
        (keys(torch.arange(N) % 2 == 0), keys(torch.arange(N) % 2 == 0)),
        (keys(torch.arange(N) % 2 == 0) & queries(torch.arange(N) % 2 == 0), keys(torch.arange(N) % 2 == 0)),
        (padding(lengths=[3, 5]), padding(lengths=[3, 5], on="keys")),
        (padding(lengths=[3, 5], on="queries"), everything),
        (everything.padded([3, 5]), padding(starts=[3, 5], on="keys")),
        (prefix(3) & padding(starts=[3, 5]), prefix(3) & padding(starts=[3, 5], on="keys")),
        (causal, nothing),
        (causal.padded([3, 5]), nothing),
        (causal & prefix(3), nothing),
        (everything.packed([4, 9]), nothing),
    ],
    ids=str,
)
def test_what_a_register_sees(mask: Mask, seen: Mask) -> None:
    assert seen_by_all(mask) == seen


# -- memories ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"attn_mask": STRICTLY_BEFORE.to_dense(N)}, {"mask": STRICTLY_BEFORE}, {}])
def test_memory_keys_stand_beside_every_mask(given: dict[str, object]) -> None:
    """In x-transformers `attn_mask` crashes with memory keys."""
    layers = decoder(attn_num_mem_kv=3)
    out = layers(features(2, N), **given)
    with torch.no_grad():
        block_of(layers).attn.mem_v.add_(1.0)
    assert (out != layers(features(2, N), **given)).any(dim=-1).all()
    for place in (0, 7):
        assert not moved(layers, features(1, N), place, **given)[0, :place].any()


# -- what the form of an expression proves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        causal,
        window(3) | causal & local(5),
        (causal - prefix(2)).packed([4, 9]),
        local(3) & causal,
        everything,
        local(2),
        causal | prefix(3),
        ~causal,
        causal.T,
        documents([4, 9]),
    ],
    ids=str,
)
def test_a_proof_that_nothing_is_later_holds(mask: Mask) -> None:
    ahead = pairs_ahead(mask, N, 1, 1)
    assert ahead == int(mask.to_dense(N).triu(1).sum())
    assert not (looks_back(mask) and ahead)
