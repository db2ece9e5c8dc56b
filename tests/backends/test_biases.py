"""Bias objects: their numbers, their checks, and what a bias of one's own needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import truemask as tm

ZERO = torch.zeros((), dtype=torch.int64)


def table_of(bias: tm.Bias, q_len: int, kv_len: int, heads: int) -> Tensor:
    """All values, `[h, q, k]`."""
    return bias.value(ZERO, torch.arange(heads)[:, None, None], torch.arange(q_len)[:, None], torch.arange(kv_len))


def test_alibi_is_the_papers_formula() -> None:
    slopes = torch.tensor([2.0**-1, 2.0**-2, 2.0**-3])
    got = table_of(tm.alibi(slopes), 5, 7, 3)
    for h in range(3):
        for q in range(5):
            for k in range(7):
                assert got[h, q, k] == -slopes[h] * abs(q - k)


def test_relative_clips_distances() -> None:
    table = torch.arange(2 * 5.0).view(2, 5)
    got = table_of(tm.relative(table), 7, 11, 2)
    past = table_of(tm.relative(table, bidirectional=False), 7, 11, 2)
    for h in range(2):
        for q in range(7):
            for k in range(11):
                assert got[h, q, k] == table[h, min(max(k - q, -2), 2) + 2]
                assert past[h, q, k] == table[h, min(max(q - k, 0), 4)]


def t5_bucket(distance: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """T5's bucket of `k - q`, as the paper's appendix and its released code define it."""
    bucket = 0
    if bidirectional:
        buckets //= 2
        bucket = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    growth = torch.tensor(distance).float().div(exact).log() / math.log(max_distance / exact) * (buckets - exact)
    return bucket + min(exact + int(growth), buckets - 1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (6, 11)])
def test_logarithmic_buckets_are_t5s(bidirectional: bool, buckets: int, max_distance: int) -> None:
    bias = tm.relative(torch.arange(float(buckets))[None], max_distance=max_distance, bidirectional=bidirectional)
    got = table_of(bias, 331, 331, 1)
    for distance in range(-330, 331):
        q, k = max(0, -distance), max(0, distance)
        assert got[0, q, k] == t5_bucket(distance, buckets, max_distance, bidirectional), distance


class Recency(tm.Bias):
    """A bias of one's own: a learned number times the logarithm of the distance."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    @property
    def head_count(self) -> int:
        return 1

    def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return -self.weight * torch.log1p((q - k).abs().to(self.weight.dtype))


def test_a_bias_of_ones_own_trains() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 5, dtype=torch.float64) for _ in range(3))
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    bias = Recency(weight)
    dense = table_of(bias, 7, 7, 1)[None]
    grads = []
    for given in (bias, dense):
        out = tm.attend(q, k, v, tm.causal, bias=given)
        grads.append(torch.autograd.grad(out.sin().sum(), weight)[0])
    torch.testing.assert_close(*grads)
    assert tm.plan(q, k, v, tm.causal, bias=bias).backend == "block_sparse"
    assert tm.plan(q, k, v, tm.causal, bias=Recency(weight.detach())).backend == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_row_serves_all_heads(dtype: torch.dtype) -> None:
    assert tm.alibi(torch.ones(1)).head_count == 1
    got = table_of(tm.relative(torch.ones(1, 3, dtype=dtype)), 2, 3, 5)
    assert got.shape == (5, 2, 3)
    assert got.dtype == dtype


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tm.alibi(torch.ones(2, 2)), "slopes must be a float tensor [heads] that is not empty"),
        (lambda: tm.alibi(torch.ones(3, dtype=torch.int64)), "got int64 [3] on cpu"),
        (lambda: tm.alibi([0.5, 0.25]), "or a number of heads for the usual ones, as `alibi(8)`; got list [0.5, 0.25]"),  # pyright: ignore
        (lambda: tm.alibi(0), "alibi(heads) must be at least 1"),
        (lambda: tm.relative(torch.ones(3)), "table must be a float tensor [heads, buckets]"),
        (lambda: tm.relative(torch.ones(1, 8)), "has an odd number of columns"),
        (lambda: tm.relative(torch.ones(1, 33), max_distance=128), "has an even number of columns"),
        (lambda: tm.relative(torch.ones(1, 8), max_distance=6.5), "max_distance must be a whole number"),
        (lambda: tm.relative(torch.ones(1, 7), bidirectional="no"), "bidirectional must be True or False"),  # pyright: ignore
        (lambda: tm.relative(torch.ones(1, 8), max_distance=2), "max_distance=2 must be larger than the 2 distances"),
    ],
)
def test_mistakes_are_named(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(tm.MaskError) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 40])
def test_a_number_of_heads_has_the_usual_slopes(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    bias = tm.alibi(heads)
    torch.testing.assert_close(bias.parameters[0], theirs)
    if heads & (heads - 1) == 0:
        torch.testing.assert_close(theirs, torch.tensor([2.0 ** (-8 * i / heads) for i in range(1, heads + 1)]))


BACKENDS = ["native", "sdpa", "block_sparse", "reference"]
WHOLE = ["sdpa", "reference"]  # who asks about all cells of so small a call at once


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 7), (7, 0), (0, 0)])
@pytest.mark.parametrize("mask", [tm.local(3), tm.local(3).padded([0, 0]), tm.local(3).packed([0])], ids=str)
def test_no_queries_and_no_keys(backend: str, q_len: int, kv_len: int, mask: tm.Mask) -> None:
    if mask.kind == "packed" and q_len + kv_len:
        mask = mask.base.packed([q_len], [kv_len])  # pyright: ignore
    q, k = torch.randn(2, 3, q_len, 5), torch.randn(2, 3, kv_len, 5)
    for bias in (tm.alibi(torch.ones(3)), tm.relative(torch.ones(3, 7))):
        out = tm.attend(q, k, k, mask, bias=bias, backend=backend)
        assert torch.equal(out, torch.zeros(2, 3, q_len, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slopes_in_half_precision_know_every_distance(backend: str, dtype: torch.dtype) -> None:
    slopes = torch.tensor([0.5, 2.0])
    value = table_of(tm.alibi(slopes.to(dtype)), 1, 70001, 2)
    assert torch.equal(value, table_of(tm.alibi(slopes), 1, 70001, 2))
    q, k = torch.randn(1, 2, 1, 5), torch.randn(1, 2, 1031, 5)
    got, want = (tm.attend(q, k, k, bias=tm.alibi(s), backend=backend) for s in (slopes.to(dtype), slopes))
    assert torch.equal(got, want)


class Shaped(Recency):
    """Whatever it was given, as a value."""

    def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.weight


@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("mask", [tm.everything, tm.local(2)], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1), (3, 1, 7), (2, 1, 1, 1)], ids=str)
def test_values_of_any_rank_that_broadcasts(backend: str, mask: tm.Mask, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    value = torch.randn(shape)
    for options in ({}, {"sink_logits": torch.zeros(3)}):
        got = tm.attend(q, k, v, mask, bias=Shaped(value), backend=backend, **options)
        want = tm.attend(q, k, v, mask, bias=value.expand(2, 3, 5, 7), backend="reference", **options)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.5, "Shaped.value (of the bias object) must return a float tensor, got float 0.5"),
        (torch.ones(5, 7, dtype=torch.int64), "must return a float tensor, got int64 [5, 7] on cpu"),
        (torch.ones(2, 5, 7), "broadcasts to [b, h, q, k] = [2, 3, 5, 7], got float32 [2, 5, 7] on cpu"),
        (torch.ones(1, 1, 1, 5, 7), "got float32 [1, 1, 1, 5, 7] on cpu"),
    ],
)
def test_values_that_are_none_are_named(backend: str, value: object, words: str) -> None:
    class Wrong(Shaped):
        def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return value  # pyright: ignore

    Wrong.__name__ = "Shaped"
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with pytest.raises((TypeError, ValueError)) as caught:
        tm.attend(q, k, k, tm.local(3), bias=Wrong(torch.ones(())), backend=backend)
    assert words in str(caught.value)


class WritesPositions(tm.Bias):
    """Which works in place on what it is asked about."""

    parameters, head_count = (), 1  # type: ignore[assignment]

    def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return 0.1 * (k.clamp_(max=3) - q.clamp_(max=3)).float()


@pytest.mark.parametrize("backend", [name for name in tm.backends() if name not in ("native", "flex")])
def test_a_bias_may_write_to_what_it_is_asked_about(backend: str) -> None:
    q = torch.randn(1, 2, 16, 8)
    expected = tm.attend(q, q, q, tm.causal, bias=tm.alibi(2), backend=backend)
    first = tm.attend(q, q, q, tm.causal, bias=WritesPositions(), backend=backend)
    assert torch.equal(first, tm.attend(q, q, q, tm.causal, bias=WritesPositions(), backend=backend))
    assert torch.equal(expected, tm.attend(q, q, q, tm.causal, bias=tm.alibi(2), backend=backend))
