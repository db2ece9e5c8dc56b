"""Law 10: speed never buys error. No backend is further from fp64 than 1.5 times SDPA in the same dtype.

One draw says little of a ratio of two rounding errors: those of several are put together.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from tests.laws.test_attend_laws import BACKENDS, Given
from truemask.backends.isa import ISAS, VARIABLE
from truemask.backends.native.library import missing

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

DRAWS, MORE = 8, 1.5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SCALES = pytest.mark.parametrize("scale", [1, 3, 10])


def results(attention: Attention, call: Given, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk and dv in fp64, of what was computed in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in call[:3]]
    out = attention(*leaves)
    grads = torch.autograd.grad(out, leaves, call.grad_out.to(dtype))
    return [x.detach().double().flatten() for x in (out, *grads)]


def assert_no_more_error(
    attention: Attention, sdpa: Attention, dtype: torch.dtype, scale: float = 1.0, rows: int = 127
) -> None:
    """Rms and largest error of several draws together, of the output and of each gradient."""
    count = DRAWS * max(1, 64 // rows)  # as many numbers of few rows
    draws = [Given.make(2, 4, 4, rows, 127, dtype, seed=draw, d=32) for draw in range(count)]
    draws = [call._replace(q=call.q * scale, k=call.k * scale) for call in draws]
    ways = ((attention, dtype), (sdpa, dtype), (sdpa, torch.float64))
    mine, theirs, exact = (
        [torch.cat(parts) for parts in zip(*(results(way, call, of) for call in draws), strict=True)]
        for way, of in ways
    )
    for a, b, want in zip(mine, theirs, exact, strict=True):
        assert (a - want).square().mean().sqrt() <= MORE * (b - want).square().mean().sqrt()
        assert (a - want).abs().max() <= MORE * (b - want).abs().max()


MASK = tm.causal & (tm.window(37) | tm.prefix(3))
ALLOWED = MASK.to_dense(127)


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=ALLOWED)


@pytest.mark.parametrize("backend", BACKENDS)
@DTYPES
@SCALES
def test_law_10_no_more_error_than_sdpa(backend: str, dtype: torch.dtype, scale: int) -> None:
    assert_no_more_error(lambda q, k, v: tm.attend(q, k, v, MASK, backend=backend), masked_sdpa, dtype, scale)


@pytest.mark.parametrize("isa", ISAS)
@DTYPES
@SCALES
def test_law_10_holds_for_every_instruction_set(
    isa: str, dtype: torch.dtype, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, isa)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    assert_no_more_error(lambda q, k, v: tm.attend(q, k, v, MASK, backend="native"), masked_sdpa, dtype, scale)


@pytest.mark.parametrize("rows", [8, 32])
@DTYPES
@SCALES
def test_law_10_holds_for_few_rows(rows: int, dtype: torch.dtype, scale: int) -> None:
    """Whose keys are read as they lie where no gradients are wanted: forward and backward sum scores alike."""
    mask = MASK.at(q_start=127 - rows)
    allowed = mask.to_dense(rows, 127)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    assert_no_more_error(lambda q, k, v: tm.attend(q, k, v, mask, backend="native"), sdpa, dtype, scale, rows)


@DTYPES
def test_law_10_with_sinks(dtype: torch.dtype) -> None:
    """SDPA with the sink as one more key of zero value, its logit given as a bias, is what sinks are compared with."""
    sinks = torch.linspace(-2, 6, 4)

    def one_more_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.cat([sinks.view(1, 4, 1, 1).expand(2, 4, 127, 1), torch.zeros(2, 4, 127, 127)], -1).to(q.dtype)
        bias = bias.masked_fill(torch.ones(127, 128, dtype=torch.bool).triu(2), -torch.inf)
        zero = torch.zeros_like(k[:, :, :1])
        return scaled_dot_product_attention(q, torch.cat([zero, k], 2), torch.cat([zero, v], 2), attn_mask=bias)

    def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tm.attend(q, k, v, tm.causal, sink_logits=sinks, backend="sdpa")

    assert_no_more_error(with_sinks, one_more_key, dtype)
