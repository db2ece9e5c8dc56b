"""Law 10: speed never buys error. No backend is further from fp64 than 1.5 times SDPA in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from tests.laws.test_attend_laws import BACKENDS, Given


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1, 3, 10])
def test_law_10_no_more_error_than_sdpa(backend: str, dtype: torch.dtype, scale: int) -> None:
    mask = tm.causal & (tm.window(37) | tm.prefix(3))
    call = Given.make(2, 4, 4, 127, 127, dtype, d=32)
    call = call._replace(q=call.q * scale, k=call.k * scale)
    allowed = mask.to_dense(127)

    def errors(attention: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in call[:3]]
        out = attention(*leaves)
        return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, call.grad_out.to(dtype)))]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    exact, theirs = errors(plain, torch.float64), errors(plain, dtype)
    mine = errors(lambda q, k, v: tm.attend(q, k, v, mask, backend=backend), dtype)
    for a, b, want in zip(mine, theirs, exact, strict=True):
        assert (a - want).square().mean().sqrt() <= 1.5 * (b - want).square().mean().sqrt()
        assert (a - want).abs().max() <= 1.5 * (b - want).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_law_10_with_sinks(dtype: torch.dtype) -> None:
    """SDPA with the sink as one more key of zero value, its logit given as a bias, is what sinks are compared with."""
    call = Given.make(2, 4, 4, 127, 127, dtype, d=32)
    sinks = torch.linspace(-2, 6, 4)

    def one_more_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.cat([sinks.view(1, 4, 1, 1).expand(2, 4, 127, 1), torch.zeros(2, 4, 127, 127)], -1).to(q.dtype)
        bias = bias.masked_fill(torch.ones(127, 128, dtype=torch.bool).triu(2), -torch.inf)
        zero = torch.zeros_like(k[:, :, :1])
        return scaled_dot_product_attention(q, torch.cat([zero, k], 2), torch.cat([zero, v], 2), attn_mask=bias)

    def results(attention: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in call[:3]]
        out = attention(*leaves)
        return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, call.grad_out.to(dtype)))]

    exact, theirs = results(one_more_key, torch.float64), results(one_more_key, dtype)
    mine = results(lambda q, k, v: tm.attend(q, k, v, tm.causal, sink_logits=sinks, backend="sdpa"), dtype)
    for a, b, want in zip(mine, theirs, exact, strict=True):
        assert (a - want).square().mean().sqrt() <= 1.5 * (b - want).square().mean().sqrt()
        assert (a - want).abs().max() <= 1.5 * (b - want).abs().max()
