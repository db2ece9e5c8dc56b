"""What the next-token loss counts: which tokens are targets, and what must be said of the masks around them.

Shapes: b batch, n tokens, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from truemask.common.formatting import describe
from truemask.common.warning import warn
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.structure.padding import marks_queries
from truemask.nn.forward_mask import Layout, pairs_ahead, token_positions


def next_token_loss(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The mean cross-entropy of targets (b, n) by logits (b, n, v), in nats; 0 if none of them counts."""
    logits = logits.flatten(0, 1)  # b*n v
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    targets = targets.flatten()
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


def check_tokens(tokens: Tensor, labels: Tensor | None) -> None:
    """Raise ValueError unless there are tokens to predict, and a label for each if there are labels."""
    if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
        raise ValueError(f"tokens are {describe(tokens)}; expected ids [b, n + 1] with at least two tokens a row")
    if labels is not None and labels.shape != tokens.shape:
        raise ValueError(
            f"labels are {describe(labels)}; expected one for each token, {list(tokens.shape)}, not shifted: "
            "the label of token i is predicted from the tokens before it"
        )


def follows(user: Mask, layout: Layout) -> Tensor:
    """Whether each token follows the one before it, bool [b|1, n]: both real, at neighbouring positions."""
    n = layout.new
    positions = token_positions(user, layout, None)
    positions = positions[None] if positions.ndim == 1 else positions
    real = torch.ones_like(positions, dtype=torch.bool)
    if any(map(marks_queries, user.walk())):
        real = ~user.dead_queries(n, n, batch=layout.batch, heads=layout.heads).all(dim=1)  # b|1 n
    follow = torch.zeros(torch.broadcast_shapes(positions.shape, real.shape), dtype=torch.bool)
    follow[:, 1:] = (positions[:, 1:] == positions[:, :-1] + 1) & real[:, 1:] & real[:, :-1]
    return follow


def check_length(name: str, value: object, tokens: Tensor) -> None:
    """Say what a tensor for the n tokens that the model reads misses: the loss masks speak of n + 1."""
    n = tokens.shape[1]
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] != n - 1:
        return
    if name == "mask" or n > 2:  # one key fits any number of them in attn_mask
        raise MaskError(
            f"{name}= is {describe(value)} and tokens are {describe(tokens)}: the mask speaks of all n + 1 = {n} "
            f"tokens, of which the model reads the first {n - 1}; make it for all of them"
        )


def warn_if_seen(user: Mask, layout: Layout) -> None:
    pairs = pairs_ahead(user, layout.new, layout.batch, layout.heads)
    if pairs:
        warn(
            f"with causal=False the mask `{user}` lets {pairs:,} pairs look ahead, at the tokens that the loss asks "
            "for: pass labels= with ignore_index at the tokens that may be seen"
        )
