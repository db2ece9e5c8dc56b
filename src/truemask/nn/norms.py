"""Normalisation, without biases. The gain may be stored as its distance from 1, so that weight decay pulls it to 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Norm(nn.Module):
    """A gain over the last axis. `unit_offset`: the parameter holds gain - 1 (x-transformers' default)."""

    def __init__(self, dim: int, *, unit_offset: bool, eps: float) -> None:
        super().__init__()
        self.shape = (dim,)
        self.offset = 1.0 if unit_offset else 0.0
        self.eps = eps
        self.gain = nn.Parameter(torch.full((dim,), 1.0 - self.offset))

    def weight(self) -> Tensor:
        """The gain itself, [d]."""
        return self.gain + self.offset if self.offset else self.gain

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, unit_offset={bool(self.offset)}, eps={self.eps}"


class LayerNorm(_Norm):
    """(x - mean) / sqrt(var + eps) * gain over the last axis."""

    def __init__(self, dim: int, *, unit_offset: bool = True, eps: float = 1e-5) -> None:
        super().__init__(dim, unit_offset=unit_offset, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight(), None, self.eps)


class RMSNorm(_Norm):
    """x / sqrt(mean(x * x) + eps) * gain over the last axis; Zhang and Sennrich, arXiv 1910.07467."""

    def __init__(self, dim: int, *, unit_offset: bool = True, eps: float = 1e-8) -> None:
        super().__init__(dim, unit_offset=unit_offset, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight(), self.eps)


class HeadRMSNorm(nn.Module):
    """RMSNorm over the features of every head, with a gain per head: x is (b, h, n, d). Always a unit offset."""

    def __init__(self, heads: int, dim_head: int, *, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.zeros(heads, 1, dim_head))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * (self.gain + 1.0)
