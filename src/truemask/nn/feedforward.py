"""The feedforward of a layer: GELU by default, SwiGLU with `glu` and `swish`, squared ReLU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from truemask.nn.config import FeedForwardConfig


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


class FeedForward(nn.Module):
    """(b, n, d) -> (b, n, d) through dim * mult features.

    With `glu` the first projection gives twice the inner size, (value, gate), and the activation acts on the gate
    (Shazeer, arXiv 2002.05202). `no_bias` leaves no bias anywhere, the gated projection included.
    """

    def __init__(self, dim: int, config: FeedForwardConfig) -> None:
        super().__init__()
        inner = int(dim * config.mult)
        self.config = config
        self.act = _relu_squared if config.relu_squared else F.silu if config.swish else F.gelu
        self.proj_in = nn.Linear(dim, inner * (2 if config.glu else 1), bias=not config.no_bias)
        self.dropout = nn.Dropout(config.dropout)
        self.proj_out = nn.Linear(inner, dim, bias=not config.no_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)  # b n (2) inner
        if self.config.glu:
            value, gate = x.chunk(2, dim=-1)
            x = value * self.act(gate)
        else:
            x = self.act(x)
        return self.proj_out(self.dropout(x))
