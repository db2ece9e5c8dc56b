"""Small x-transformers models, and what it means that two runs of them compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.equality import assert_same
from truemask.masks.compose.per_axis import per_head
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.patterns import dilated
from truemask.masks.leaves.per_token import prefix
from truemask.masks.leaves.predicate import predicate

X: Any = pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `peers` has it)")


HEADS, SIZE, WORDS, LENGTH = 4, 8, 29, 13


def stack(kind: str = "Decoder", depth: int = 2, **options: Any) -> Any:
    return getattr(X, kind)(dim=HEADS * SIZE, depth=depth, heads=HEADS, attn_dim_head=SIZE, **options)


def model(kind: str = "Decoder", wrap: dict[str, Any] | None = None, depth: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    net = X.TransformerWrapper(
        num_tokens=WORDS, max_seq_len=64, attn_layers=stack(kind, depth, **options), **(wrap or {})
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():  # what begins at 0 or 1 would hide mistakes
            if parameter.ndim == 1 or "sink" in name or "mem" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return net.eval()


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(1, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(net: Any, *args: Any, **named: Any) -> tuple[Tensor, list[Tensor]]:
    """The output of a model, and the gradients of its parameters."""
    net.zero_grad()
    out = net(*args, **named)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out * weights).sum().backward()
    return out.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]


def same(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> None:
    """Outputs, and gradients at the size of the largest: those of a key's bias are sums that cancel."""
    assert_same(ours[0], theirs[0])
    largest = max((float(plain.abs().max()) for plain in theirs[1]), default=0.0)
    for mine, plain in zip(ours[1], theirs[1], strict=True):
        assert_same(mine, plain, scale=largest)


MASKS = {
    "window": window(4),
    "sinks": window(3) | (prefix(2) & causal),
    "dilated": dilated(2) & causal,
    "heads": per_head([causal, window(2), window(5), dilated(3) & causal]),
    "function": predicate(lambda b, h, q, k: (k <= q) & ((q - k) % 3 != 1)),
}


def cells(mask: Mask, n: int = LENGTH) -> Tensor:
    """The mask as x-transformers takes it: `[h or 1, n, n]`."""
    return mask.to_dense(n, heads=HEADS)[0]


def behind(mask: Mask, front: int, n: int = LENGTH) -> Tensor:
    """`mask` behind `front` registers that see one another and are seen by all."""
    full = torch.zeros(front + n, front + n, dtype=torch.bool)
    full[:, :front] = True
    full[front:, front:] = mask.to_dense(n)[0, 0]
    return full
