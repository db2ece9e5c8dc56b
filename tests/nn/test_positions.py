"""Positions are the mask's: a document means the same alone, packed, padded and continued (law 2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.equality import assert_same
from tests.support.nn_models import FEATURES, decoder, encoder, featured, features, ids, wrapped
from truemask.errors import MaskError
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, window
from truemask.masks.leaves.patterns import dilated
from truemask.masks.leaves.per_token import prefix
from truemask.nn.positions import AbsolutePositionalEmbedding, RotaryEmbedding, rotate

LENGTHS = [5, 3, 11]
MASKS = [causal, causal & (window(3) | prefix(2)), causal & (blocks(2, back=1) | dilated(3))]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_packed_equals_alone(feature: str, mask: Mask) -> None:
    net, row = featured(feature), ids(1, sum(LENGTHS))
    packed = net(row, mask=mask.packed(LENGTHS))
    alone = torch.cat([net(part, mask=mask) for part in row.split(LENGTHS, dim=1)], dim=1)
    assert_same(packed, alone)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_padded_equals_alone(feature: str, mask: Mask) -> None:
    net, longest = featured(feature), max(LENGTHS)
    rows = [ids(length, seed=length) for length in LENGTHS]
    starts = [longest - length for length in LENGTHS]
    batch = torch.stack(
        [torch.nn.functional.pad(row, (start, 0), value=30) for row, start in zip(rows, starts, strict=True)]
    )
    out = net(batch, mask=mask.padded(starts))
    for b, row in enumerate(rows):
        assert_same(out[b, starts[b] :], net(row[None], mask=mask)[0])


def test_rows_of_several_packings_in_a_batch() -> None:
    net, rows = featured("absolute"), ids(2, 8)
    packed = net(rows, mask=causal.packed([[5, 3], [2, 6]]))
    assert_same(packed[1, 2:], net(rows[1:, 2:])[0])
    assert_same(packed[0, 5:], net(rows[:1, 5:])[0])


def test_the_callers_positions_come_first() -> None:
    net, row = featured("absolute"), ids(1, 8)
    restarting = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    mask = causal.packed([5, 3])
    same_rows = mask.to_dense(8)[0, 0]
    assert_same(net(row, mask=mask), net(row, attn_mask=same_rows, pos=restarting))
    assert not torch.allclose(net(row, mask=mask), net(row, attn_mask=same_rows))


@pytest.mark.parametrize("feature", ["absolute", "rotary", "registers"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (causal.packed([2, 4]) & causal.packed([3, 3]), "packed"),
        (causal.take(k=[5, 4, 3, 2, 1, 0]), "another position as queries than as keys"),
        (causal.take(q=[1, 2, 3, 4, 5, 5]), "another position as queries than as keys"),
        (window(3).at(k_start=2), "another position as queries than as keys"),
    ],
    ids=str,
)
def test_a_mask_with_two_positions_for_a_token_needs_the_callers(feature: str, mask: Mask, message: str) -> None:
    net, row, pos = featured(feature), ids(2, 6), torch.arange(6)
    with pytest.raises(MaskError, match=rf"{message}.*pass pos= in the call"):
        net(row, mask=mask, causal=False)
    given = net(row, mask=mask, pos=pos, causal=False)
    assert_same(given, net(row, attn_mask=mask.to_dense(6, 6), pos=pos, causal=False))


def test_a_model_without_positions_asks_for_none() -> None:
    net, row, mask = featured("no positions"), ids(2, 6), causal.take(k=[5, 4, 3, 2, 1, 0])
    assert_same(net(row, mask=mask, causal=False), net(row, attn_mask=mask.to_dense(6), causal=False))


def test_terms_that_agree_have_one_position() -> None:
    net, row = featured("rotary"), ids(2, 6)
    assert_same(
        net(row, mask=causal.packed([2, 4]) & window(2).packed([2, 4])), net(row, mask=window(2).packed([2, 4]))
    )
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    mask = causal.take(q=order, k=order)
    assert_same(net(row, mask=mask, causal=False), net(row, attn_mask=mask.to_dense(6), pos=order, causal=False))


def test_absolute_positions_have_an_end_and_say_so() -> None:
    net = wrapped()
    with pytest.raises(
        ValueError, match="position 47 has no embedding: max_seq_len=47 positions were learned, 0 to 46"
    ):
        net(ids(1, 48))
    assert net(ids(1, 53), mask=causal.packed([23, 30])).isfinite().all()  # each document is short enough


def test_rotary_positions_have_no_end() -> None:
    assert featured("rotary")(ids(1, 59)).shape == (1, 59, 31)


def test_rotary_layers_need_no_absolute_embedding() -> None:
    """x-transformers' rule, so that the same keywords build the same model."""
    assert wrapped(decoder(rotary_pos_emb=True, rotary_emb_dim=4)).pos_emb is None
    assert wrapped(use_abs_pos_emb=False).pos_emb is None
    assert isinstance(wrapped().pos_emb, AbsolutePositionalEmbedding)


# -- angles ------------------------------------------------------------------------------------------------------------


def test_angles_are_exact_in_a_half_precision_model() -> None:
    """In x-transformers `.bfloat16()` rounds positions above 256, so that neighbours get the same angle."""
    layers = decoder(rotary_pos_emb=True, rotary_emb_dim=4)
    positions = torch.tensor([256, 257, 1000, 4097])
    assert layers.rotary is not None
    full = layers.rotary(positions, torch.float32)
    half = layers.rotary.bfloat16()(positions, torch.bfloat16)
    assert half.cos.dtype == torch.float32
    assert torch.equal(half.cos, full.cos)
    exact = positions.double()[:, None] * torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64)
    torch.testing.assert_close(full.cos[0, 0].double(), exact.cos(), rtol=0, atol=1e-3)
    assert layers.bfloat16()(features(1, 5).bfloat16()).dtype == torch.bfloat16


def test_scores_depend_on_distance_only() -> None:
    rotary, q, k = RotaryEmbedding(6), features(1, 1, 1)[..., :8], features(1, 1, 1, seed=1)[..., :8]
    scores = [
        (rotate(q, rotary(torch.tensor([i]), q.dtype)) * rotate(k, rotary(torch.tensor([j]), q.dtype))).sum()
        for i, j in ((5, 2), (1003, 1000), (0, -3))
    ]
    assert_same(torch.stack(scores), scores[0].expand(3))


def test_a_rotation_turns_pairs_and_leaves_the_rest() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 7.0], dtype=torch.float64).reshape(1, 1, 1, 5)
    turned = rotate(x, RotaryEmbedding(4)(torch.tensor([1]), x.dtype)).flatten()
    one, slow = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    assert_same(turned, torch.stack([one.cos(), one.sin(), -slow.sin(), slow.cos(), 7 * one]))


def test_interpolation_divides_positions() -> None:
    stretched = RotaryEmbedding(6, interpolation_factor=2.0)(torch.tensor([10]), torch.float64)
    assert_same(stretched.cos, RotaryEmbedding(6)(torch.tensor([5]), torch.float64).cos)


@pytest.mark.parametrize("mask", [everything, causal.packed([4, 7]), causal.padded([0, 5])], ids=str)
@pytest.mark.parametrize("kind", [decoder, encoder])
def test_alibi_takes_slopes_times_distance_off_the_scores(kind: Any, mask: Mask) -> None:
    """Every layer of every stack attends with this bias, and nothing else differs from a stack without it."""
    x, heads = features(2, 11), torch.arange(4.0)
    q, k = mask.positions(11)
    distances = (q[..., :, None] - k[..., None, :]).abs().reshape(-1, 1, 11, 11).double()
    penalty = -(0.25 ** (heads + 1))[:, None, None].double() * distances  # b|1 h q k
    plain = kind()
    for layer in plain.layers:
        layer.attn.bias = penalty
    assert_same(kind(alibi_pos_bias=True)(x, mask=mask), plain(x, mask=mask))


def test_what_has_no_place_has_no_distance() -> None:
    layers, x = decoder(alibi_pos_bias=True), features(2, 7)
    with pytest.raises(ValueError, match=r"pos= was given, and alibi_pos_bias counts.*mask.packed\(lengths\)"):
        layers(x, pos=torch.arange(7))
    with pytest.raises(ValueError, match="registers=2, but alibi_pos_bias counts distances, and registers stand no"):
        layers(x, registers=2)
    with pytest.raises(ValueError, match="registers=3, but alibi_pos_bias"):
        wrapped(layers, num_memory_tokens=3)
    with pytest.raises(ValueError, match="pos= was given, and alibi_pos_bias"):
        wrapped(layers)(ids(1, 3), pos=torch.arange(3))


def test_positions_for_a_model_without_any_are_refused() -> None:
    net = wrapped(use_abs_pos_emb=False)
    with pytest.raises(ValueError, match="has no positions"):
        net(torch.zeros(1, 3, dtype=torch.int64), pos=torch.arange(3))
