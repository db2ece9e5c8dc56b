"""Leaks without a gradient below the rounding of sums: larger changes show them, and rounding is not taken for one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.auditing.test_faults import serious
from tests.support.audited_models import DIM, Planted, ids, tiny
from truemask.auditing.audit import audit
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.per_token import padding
from truemask.nn.layers import Decoder, Encoder

N = 9
LEAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "the text turned round": lambda x: x.flip(1),
    "the mean of the text": lambda x: x.mean(1, keepdim=True),
    "the next vector": lambda x: x.roll(-1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [4, 32])
@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_of_some_eps_is_found_without_a_gradient(name: str, eps: int, dtype: torch.dtype) -> None:
    size, leak = eps * torch.finfo(dtype).eps, LEAKS[name]
    report = audit(Planted(lambda x: x.cumsum(1) + size * leak(x.detach())).to(dtype).eval(), ids(2, N), causal)
    assert serious(report) == ["future-leak"], str(report)


def test_what_a_norm_bounds_is_found_by_what_it_does_each_time() -> None:
    """A larger change does no more behind a norm; the same small difference comes again."""
    size = 16 * torch.finfo(torch.float32).eps

    def leaks(x: Tensor) -> Tensor:
        return x.cumsum(1) + size * nn.functional.layer_norm(x.detach(), x.shape[-1:]).roll(-1, 1)

    report = audit(Planted(leaks).eval(), ids(2, N), causal)
    assert serious(report) == ["future-leak"], str(report)
    assert "in the same direction again and again" in report.findings[0].message
    assert "proves" not in report.findings[0].message


def test_a_window_and_padding_may_leak_so_little_too() -> None:
    size = 8 * torch.finfo(torch.float32).eps
    far = Planted(lambda x: x + size * x.detach().roll(3, 1) * (torch.arange(N) > 2)[:, None]).eval()
    assert "leak" in serious(audit(far, ids(2, N), window(2), layers=1))

    class Padded(Planted):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # pyright: ignore
            real = attention_mask[..., None]
            embedded = self.embedding(x)
            return (embedded * real).cumsum(1) + size * embedded.detach().flip(1).cumsum(1).flip(1) * real

    flags = (torch.arange(N) < torch.tensor([[N], [5]])).long()
    report = audit(Padded(None).eval(), {"x": ids(2, N), "attention_mask": flags}, "everything")
    assert "padding-matters" in serious(report), str(report)
    assert not report.leaks[0].any()


@pytest.mark.parametrize("features", [1, 8, 64])
@pytest.mark.parametrize("n", [7, 13, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_of_a_convolution_by_fft_does_not_grow_in_proportion(
    n: int, features: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(6)
    kernel = torch.randn(n, features, generator=generator, dtype=dtype)
    x = torch.randn(2, n, features, generator=generator, dtype=dtype)

    class Convolved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            product = torch.fft.rfft(x.detach(), 2 * n, dim=1) * torch.fft.rfft(kernel, 2 * n, dim=0)
            return torch.fft.irfft(product, 2 * n, dim=1)[:, :n]

    assert serious(audit(Convolved().eval(), x, causal)) == []


SOUND: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "decoder": (Decoder(dim=DIM, depth=2, heads=2), {}),
    "rotary": (Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True), {}),
    "window": (Decoder(dim=DIM, depth=2, heads=2), {"mask": window(3)}),
    "padding": (Encoder(dim=DIM, depth=2, heads=2), {"mask": padding(lengths=[N, 4])}),
    "dead rows": (Decoder(dim=DIM, depth=2, heads=2), {"mask": window(3) - window(1)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SOUND)
def test_sound_layers_raise_no_alarm(name: str, dtype: torch.dtype) -> None:
    layers, keywords = SOUND[name]
    x = torch.randn(2, N, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    report = audit(copy.deepcopy(layers).to(dtype).eval(), {"x": x, **keywords})
    assert serious(report) == [], str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma3", "GPT2", "Mixtral", "Mamba", "Qwen3Next"])
def test_sound_models_of_transformers_raise_no_alarm(kind: str, dtype: torch.dtype) -> None:
    """Experts sum in an order that follows from who is sent to them; recurrences and convolutions are there too."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    extra: dict[str, dict[str, Any]] = {
        "Mistral": {"sliding_window": 3},
        "Gemma3": {"sliding_window": 3, "head_dim": 8},
        "Mixtral": {"num_key_value_heads": 1, "num_local_experts": 4},
        "Mamba": {"state_size": 4, "pad_token_id": 0},
        "Qwen3Next": {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    }
    report = audit(tiny(kind, **extra.get(kind, {})).to(dtype), ids(2, N), causal, cache=False)
    assert [code for code in serious(report) if code != "blind-spots"] == [], str(report)
