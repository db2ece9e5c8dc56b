"""Every importer and exporter against the library that it names, and back again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import truemask as tm
from tests.support.strategies import Reach, expressions, reaches

INF = float("inf")
B, H, Q, K, D = 3, 2, 5, 7, 11
FULL_SHAPES = [(Q, K), (B, H, Q, K), (1, H, Q, K), (B, 1, Q, K), (1, 1, Q, K)]
SHAPES = [*FULL_SHAPES, (B, 1, 1, K), (B, H, 1, K), (1, H, 1, K), (1, 1, 1, K), (1, K)]  # one row for all queries


def dense(mask: tm.Mask, batch: int = B, heads: int = H, q_len: int = Q, kv_len: int = K) -> Tensor:
    return mask.to_dense(q_len, kv_len, batch=batch, heads=heads).expand(batch, heads, q_len, kv_len)


def flags(*shape: int, seed: int = 0) -> Tensor:
    """Random booleans in which every query sees a key, because the libraries disagree about those that do not."""
    cells = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    cells[..., 0] = True
    return cells


def attention(visible: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax over what is visible; zeros for a query that sees nothing."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -INF)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def tensors(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, n, D, dtype=torch.float64, generator=draw) for n in (Q, K, K))
    return q, k, v


# -- F.scaled_dot_product_attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(Q, K), (B, H, Q, K), (1, H, Q, K), (B, 1, Q, K), (1, 1, Q, K), (B, 1, 1, K)], ids=str
)
def test_sdpa_means_what_torch_does_with_it(shape: tuple[int, ...]) -> None:
    mask, (q, k, v) = flags(*shape), tensors()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(attention(dense(tm.from_torch_sdpa(mask)), q, k, v), expected)


def test_sdpa_is_causal_is_causal() -> None:
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attention(dense(tm.causal), q, k, v), expected)


@given(st.data())
def test_sdpa_round_trip(data: st.DataObject) -> None:
    reach: Reach = data.draw(reaches())
    mask = data.draw(expressions(depth=3, reach=reach)).mask
    sizes: dict[str, Any] = {"batch": reach.batch, "heads": reach.heads}
    exported = tm.to_torch_sdpa(mask, reach.q, reach.k, **sizes)
    assert exported.dtype == torch.bool
    assert exported.ndim == 4
    assert tm.from_torch_sdpa(exported).equivalent(mask, reach.q, reach.k, **sizes)


def test_sdpa_refuses_what_it_cannot_know() -> None:
    with pytest.raises(tm.MaskError, match=r"two readings.*unsqueeze\(0\).*head.*unsqueeze\(1\).*sample"):
        tm.from_torch_sdpa(flags(2, Q, K))
    with pytest.raises(tm.MaskError, match="from_additive"):
        tm.from_torch_sdpa(torch.zeros(Q, K))
    with pytest.raises(tm.MaskError, match=r"only 0 and 1.*boolean mask"):
        tm.from_torch_sdpa(torch.ones(Q, K))
    with pytest.raises(tm.MaskError, match=r"int64 \[5, 7\].*only 0 and 1.*from_torch_mha"):
        tm.from_torch_sdpa(torch.ones(Q, K, dtype=torch.int64))
    with pytest.raises(tm.MaskError, match=r"bool \[7\]"):
        tm.from_torch_sdpa(flags(K))
    with pytest.raises(tm.MaskError, match="torch tensor"):
        tm.from_torch_sdpa([[True]])  # pyright: ignore[reportArgumentType]


# -- additive ----------------------------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_additive_takes_zero_and_at_or_below_half_of_the_lowest(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    hidden = [-INF, lowest, lowest / 2, lowest * 0.75]
    mask = tm.from_additive(torch.tensor([[0.0, -0.0, *hidden]], dtype=dtype))
    assert mask.to_dense(1, 6)[0, 0].tolist() == [[True, True, False, False, False, False]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [1.0, -1.0, 1e-3, -1e4, INF, float("nan"), "just above half"], ids=str)
def test_additive_calls_everything_else_a_bias(dtype: torch.dtype, value: float | str) -> None:
    half = torch.finfo(dtype).min / 2
    number = half * 0.99 if isinstance(value, str) else value
    with pytest.raises(tm.MaskError, match=r"bias and not a mask.*bias="):
        tm.from_additive(torch.tensor([[0.0, -INF, number]], dtype=dtype))


def test_additive_says_what_a_number_looks_like() -> None:
    with pytest.raises(tm.MaskError, match=r"holds 1, .*only 0 and 1.*from_torch_sdpa.*from_torch_mha"):
        tm.from_additive(flags(Q, K).float())
    with pytest.raises(tm.MaskError, match=r"holds -1e\+09, which is a bias"):
        tm.from_additive(torch.tensor([[0.0, -1e9]]))
    with pytest.raises(tm.MaskError, match=r"bool \[5, 7\].*from_torch_sdpa \(True = attend\) or from_torch_mha"):
        tm.from_additive(flags(Q, K))
    with pytest.raises(tm.MaskError, match=r"int64.*only 0 and 1"):
        tm.from_additive(flags(Q, K).long())
    with pytest.raises(tm.MaskError, match=r"axes='bqk'.*axes='hqk'"):
        tm.from_additive(torch.zeros(2, Q, K))


def test_additive_means_what_torch_does_with_it() -> None:
    q, k, v = tensors()
    visible = flags(B, H, Q, K)
    for number in (-INF, torch.finfo(torch.float64).min):
        bias = torch.zeros(B, H, Q, K, dtype=torch.float64).masked_fill(~visible, number)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        assert torch.allclose(attention(dense(tm.from_additive(bias)), q, k, v), expected)


def test_one_row_for_all_queries_is_key_padding() -> None:
    real = torch.tensor([[True, True, False], [True, False, False]])
    padding = tm.keys(real)
    assert tm.from_torch_sdpa(real[:, None, None]) == padding
    assert tm.from_additive(tm.to_additive(padding, 1, 3)) == padding  # BERT's extended mask, (b, 1, 1, k)
    assert tm.from_keras(real[:, None]) == padding
    assert tm.from_x_transformers(attn_mask=real[:, None, None]) == padding
    assert tm.from_torch_sdpa(real[0][:, None]) == tm.queries(real[0])
    per_head = tm.from_torch_sdpa(real[None, :, None])
    assert per_head == tm.per_head([tm.keys(line) for line in real])


def test_additive_reads_torchs_own_causal_mask_and_axes() -> None:
    square = nn.Transformer.generate_square_subsequent_mask(7)
    assert tm.from_additive(square).equivalent(tm.causal, 7)
    per_head = torch.zeros(2, Q, K).masked_fill(~flags(2, Q, K), -INF)
    assert tm.from_additive(per_head, axes="hqk").head_count == 2
    assert tm.from_additive(per_head, axes="bqk").batch_size == 2


def test_additive_ignores_gradients_and_does_not_keep_the_tensor() -> None:
    bias = torch.zeros(3, 3, requires_grad=True)
    mask = tm.from_additive(bias)
    with torch.no_grad():
        bias.fill_(-INF)
    assert mask.to_dense(3).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_to_additive(dtype: torch.dtype) -> None:
    mask = tm.causal & tm.prefix([1, 2, 5])
    found = tm.to_additive(mask, Q, K, dtype=dtype)
    assert found.dtype == dtype
    assert found.shape == (B, 1, Q, K)
    assert torch.equal(found == 0, mask.to_dense(Q, K))
    assert (found[~mask.to_dense(Q, K)] == -INF).all()
    assert tm.from_additive(found).equivalent(mask, Q, K)
    with pytest.raises(tm.MaskError, match="int64"):
        tm.to_additive(mask, Q, K, dtype=torch.int64)


# -- nn.MultiheadAttention ---------------------------------------------------------------------------------------------


def mha(q: Tensor, k: Tensor, **masks: Tensor | None) -> Tensor:
    """The weights `[b, h, q, k]` that `nn.MultiheadAttention` gives the keys."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(H * D, H, batch_first=True, dtype=torch.float64)
    return layer(q, k, k, average_attn_weights=False, **masks)[1]


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return (
        torch.randn(B, Q, H * D, dtype=torch.float64, generator=draw),
        torch.randn(B, K, H * D, dtype=torch.float64, generator=draw),
    )


def additive(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -INF)


@pytest.mark.parametrize("style", [lambda hidden: hidden, additive], ids=["bool", "float"])
@pytest.mark.parametrize(
    ("attn", "padding"),
    [((Q, K), None), ((B * H, Q, K), None), (None, (B, K)), ((Q, K), (B, K)), ((B * H, Q, K), (B, K))],
    ids=str,
)
def test_mha_sees_exactly_the_keys_that_the_mask_lets_through(
    attn: tuple[int, ...] | None, padding: tuple[int, ...] | None, style: Callable[[Tensor], Tensor]
) -> None:
    attn_mask = None if attn is None else style(~flags(*attn, seed=3))
    key_padding = None if padding is None else style(~flags(*padding, seed=4))
    seen = mha(*inputs(), attn_mask=attn_mask, key_padding_mask=key_padding) > 0
    mask = tm.from_torch_mha(attn_mask, key_padding, num_heads=H)
    assert torch.equal(dense(mask), seen)


def test_mha_exports_run_in_torch() -> None:
    samples, heads = tm.prefix([2, 5, 7]), tm.per_head([tm.local(2), tm.everything])
    for mask in (
        tm.window(3),
        samples,
        tm.window(3) | samples,
        heads,
        heads & samples,
        tm.random(0.5, per_head=True) | tm.prefix(1),
    ):
        exported = tm.to_torch_mha(mask, Q, K, batch=B, num_heads=H)
        assert exported.shape == ((Q, K) if mask == tm.window(3) else (B * H, Q, K))
        assert torch.equal(mha(*inputs(), attn_mask=exported) > 0, dense(mask))
        assert tm.from_torch_mha(exported, num_heads=H).equivalent(mask, Q, K, batch=B, heads=H)


def test_mha_unbatched_masks() -> None:
    hidden = ~flags(H, Q, K)
    mask = tm.from_torch_mha(hidden, torch.tensor([False] * 5 + [True] * 2), num_heads=H)
    assert (mask.batch_size, mask.head_count) == (1, H)
    assert torch.equal(dense(mask, batch=1)[0], ~hidden & (torch.arange(K) < 5))


def test_mha_allows_dead_rows_and_none() -> None:
    assert tm.from_torch_mha() == tm.everything
    dead = tm.from_torch_mha(torch.ones(Q, K, dtype=torch.bool))
    assert dead.equivalent(tm.nothing, Q, K)
    both = tm.from_torch_mha(torch.ones(3, 3, dtype=torch.bool).triu(1), torch.tensor([[True, True, False]]))
    assert both.dead_queries(3).tolist() == [[[True, True, False]]]


def test_mha_refuses_what_it_cannot_know() -> None:
    three = ~flags(B * H, Q, K)
    with pytest.raises(tm.MaskError, match="num_heads"):
        tm.from_torch_mha(three)
    with pytest.raises(tm.MaskError, match="6 is not a multiple of num_heads=4"):
        tm.from_torch_mha(three, num_heads=4)
    with pytest.raises(tm.MaskError, match=r"3 samples.*key_padding_mask of 2"):
        tm.from_torch_mha(three, ~flags(2, K), num_heads=H)
    with pytest.raises(tm.MaskError, match=r"\[1, 1, 5, 7\].*\(b \* num_heads, q, k\)"):
        tm.from_torch_mha(~flags(1, 1, Q, K), num_heads=H)
    with pytest.raises(tm.MaskError, match=r"key_padding_mask.*int64"):
        tm.from_torch_mha(key_padding_mask=torch.ones(B, K, dtype=torch.int64))
    with pytest.raises(tm.MaskError, match=r"attn_mask.*bias="):
        tm.from_torch_mha(torch.full((Q, K), 0.5))
    with pytest.raises(tm.MaskError, match="batch="):
        tm.to_torch_mha(tm.per_head([tm.causal, tm.nothing]), Q, K)
    with pytest.raises(tm.MaskError, match="num_heads="):
        tm.to_torch_mha(tm.prefix([1, 2]), Q, K)


# -- Hugging Face ------------------------------------------------------------------------------------------------------

ROWS = {
    "right": [[1, 1, 0], [1, 0, 0]],
    "left": [[0, 1, 1], [0, 0, 1]],
    "right, one row full": [[1, 1, 1], [1, 0, 0]],
    "none": [[1, 1, 1], [1, 1, 1]],
    "holes": [[1, 0, 1], [1, 1, 1]],
    "left and right": [[0, 1, 1], [1, 1, 0]],
    "an empty row": [[0, 0, 0], [1, 1, 0]],
    "one sample": [[1, 1, 0]],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_huggingface_speaks_of_keys_and_of_no_more_than_it_was_given(name: str, dtype: torch.dtype) -> None:
    rows = ROWS[name]
    mask = tm.from_huggingface_2d(torch.tensor(rows).to(dtype))
    assert mask == tm.keys(torch.tensor(rows).bool())
    assert not mask.varies_with_query
    exported = tm.to_huggingface_2d(mask, 3, batch=len(rows))
    assert exported.dtype == torch.int64
    assert exported.tolist() == rows
    with pytest.raises(tm.MaskError, match="3 keys, but was asked about 5"):
        mask.to_dense(1, 5, batch=len(rows))


@given(st.integers(1, 4), st.integers(1, 9), st.data())
def test_huggingface_round_trip(batch: int, length: int, data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    mask = tm.from_huggingface_2d(torch.tensor(rows))
    assert tm.to_huggingface_2d(mask, length, batch=batch).tolist() == rows
    seen = mask.to_dense(2, length, batch=batch).expand(batch, 1, 2, length)
    assert torch.equal(seen, torch.tensor(rows).bool()[:, None, None].expand_as(seen))


def test_huggingface_refuses_what_it_cannot_know() -> None:
    with pytest.raises(tm.MaskError, match=r"holds 2.*documents"):
        tm.from_huggingface_2d(torch.tensor([[1, 1, 2, 2, 0]]))
    with pytest.raises(tm.MaskError, match=r"float32.*from_additive.*attention_mask\.long\(\)"):
        tm.from_huggingface_2d(torch.ones(2, 3))
    with pytest.raises(tm.MaskError, match=r"\[2, 1, 3, 3\].*from_torch_sdpa.*from_additive"):
        tm.from_huggingface_2d(torch.ones(2, 1, 3, 3))
    with pytest.raises(tm.MaskError, match=r"varies with the query.*Pass only the padding"):
        tm.to_huggingface_2d(tm.causal & tm.padding(lengths=[2, 3], on="keys"), 3)
    with pytest.raises(tm.MaskError, match="varies with the head"):
        tm.to_huggingface_2d(tm.per_head([tm.prefix(1), tm.prefix(2)]), 3)
    assert tm.to_huggingface_2d(tm.causal | ~tm.causal, 3).tolist() == [
        [1, 1, 1]
    ]  # the same for every query, if not provably


# -- x-transformers ----------------------------------------------------------------------------------------------------


def x_transformers_weights(**masks: Tensor | None) -> Tensor:
    """Which keys x-transformers lets each query see, by running its attention."""
    library = pytest.importorskip("x_transformers.x_transformers")
    torch.manual_seed(0)
    layer = library.Attention(dim=H * D, heads=H, dim_head=D).double()
    x, _ = inputs()
    _, inside = layer(x, return_intermediates=True, **masks)
    return inside.post_softmax_attn > 0


@pytest.mark.parametrize(
    ("attn", "padding"),
    [
        ((Q, Q), None),
        ((H, Q, Q), None),
        ((B, H, Q, Q), None),
        ((B, 1, Q, Q), None),
        ((1, H, Q, Q), (B, Q)),
        (None, (B, Q)),
        ((Q, Q), (B, Q)),
    ],
    ids=str,
)
def test_x_transformers_sees_exactly_the_keys_that_the_mask_lets_through(
    attn: tuple[int, ...] | None, padding: tuple[int, ...] | None
) -> None:
    attn_mask, mask = (None if s is None else flags(*s, seed=7) for s in (attn, padding))
    found = tm.from_x_transformers(mask=mask, attn_mask=attn_mask, heads=H)
    expected = x_transformers_weights(mask=mask, attn_mask=attn_mask)
    assert torch.equal(dense(found, kv_len=Q), expected)


def test_x_transformers_exports_run_there() -> None:
    samples, heads = tm.prefix([2, 5, 3]), tm.per_head([tm.local(1), tm.everything])
    for mask in (tm.window(3), samples, heads, heads & samples):
        exported = tm.to_x_transformers(mask, Q, batch=B, heads=H)
        assert exported.ndim in (2, 4)
        assert torch.equal(x_transformers_weights(attn_mask=exported), dense(mask, kv_len=Q))
        assert tm.from_x_transformers(attn_mask=exported, heads=H).equivalent(mask, Q, batch=B, heads=H)


def test_x_transformers_reads_three_dimensions_as_heads() -> None:
    mask = tm.from_x_transformers(attn_mask=flags(2, Q, K))
    assert (mask.batch_size, mask.head_count) == (1, 2)
    with pytest.raises(tm.MaskError, match=r"\(h, q, k\).*4 heads.*unsqueeze\(1\)"):
        tm.from_x_transformers(attn_mask=flags(2, Q, K), heads=4)
    assert tm.from_x_transformers() == tm.everything
    padded = tm.from_x_transformers(mask=torch.tensor([[True, True, False], [True, False, False]]))
    assert padded.equivalent(tm.padding(lengths=[2, 1], on="keys"), 3)


def test_x_transformers_refuses_numbers_and_other_shapes() -> None:
    with pytest.raises(tm.MaskError, match=r"mask is int64.*bool"):
        tm.from_x_transformers(mask=torch.ones(B, K, dtype=torch.int64))
    with pytest.raises(tm.MaskError, match=r"attn_mask is float32.*from_additive"):
        tm.from_x_transformers(attn_mask=torch.zeros(Q, K))
    with pytest.raises(tm.MaskError, match=r"\(b, k\).*attn_mask\?"):
        tm.from_x_transformers(mask=flags(B, Q, K))


# -- Keras -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(B, Q, K), (1, Q, K), (Q, K), (B, H, Q, K)], ids=str)
def test_keras_broadcasts_over_missing_axes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cells = flags(*shape)
    full = cells[:, None] if len(shape) == 3 else cells
    assert torch.equal(dense(tm.from_keras(cells.to(dtype))), full.expand(B, H, Q, K))
    causal = tm.from_keras(cells.to(dtype), use_causal_mask=True)
    assert torch.equal(dense(causal), full.expand(B, H, Q, K) & torch.ones(Q, K, dtype=torch.bool).tril())


def test_keras_without_a_mask_and_with_other_numbers() -> None:
    assert tm.from_keras() == tm.everything
    assert tm.from_keras(use_causal_mask=True) == tm.causal
    with pytest.raises(tm.MaskError, match="from_additive"):
        tm.from_keras(torch.tensor([[[0.0, -INF]]]))
    with pytest.raises(tm.MaskError, match="holds 2"):
        tm.from_keras(torch.tensor([[[0, 2]]]))


def test_keras_round_trip() -> None:
    for mask, shape in (
        (tm.window(3), (1, Q, K)),
        (tm.prefix([1, 2, 3]), (B, Q, K)),
        (tm.per_head([tm.causal, tm.nothing]), (1, H, Q, K)),
    ):
        exported = tm.to_keras(mask, Q, K, batch=B, heads=H)
        assert exported.shape == shape
        assert tm.from_keras(exported).equivalent(mask, Q, K, batch=B, heads=H)


# -- all ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "export",
    [tm.to_torch_sdpa, tm.to_additive, tm.to_torch_mha, tm.to_x_transformers, tm.to_keras],
    ids=lambda f: f.__name__,
)
def test_exports_belong_to_the_caller(export: Callable[..., Tensor]) -> None:
    mask = tm.dense(flags(Q, K))
    before = mask.to_dense(Q, K)
    export(mask, Q, K).fill_(False)
    assert torch.equal(mask.to_dense(Q, K), before)


def test_the_inverted_mask_is_not_silently_the_same() -> None:
    """The mistake that started this project: the same tensor means the opposite in two of torch's own functions."""
    tensor = torch.ones(5, 5, dtype=torch.bool).tril()
    assert tm.from_torch_sdpa(tensor).equivalent(tm.causal, 5)
    assert tm.from_torch_mha(tensor).equivalent(~tm.causal, 5)
