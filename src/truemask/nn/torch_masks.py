"""The masks that torch's `MultiheadAttention` takes, read: True, or -inf, is masked out."""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.common.real_tensors import cannot_look
from truemask.errors import MaskError
from truemask.masks.foreign.tensors import highest_hidden


def hidden_and_bias(value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """One of torch's masks as what it hides (True = masked out) and what it adds; None where it does nothing.

    >>> hidden_and_bias(torch.tensor([[0.0, -torch.inf], [0.0, 2.0]]))
    (tensor([[False,  True], [False, False]]), tensor([[0., 0.], [0., 2.]]))
    """
    if value is None or not value.is_floating_point():
        return value, None
    hidden = value.detach() <= highest_hidden(value.dtype)
    if cannot_look():  # -inf hides too
        return None, value.masked_fill(hidden, -torch.inf)
    rest = value.masked_fill(hidden, 0.0)
    return hidden if hidden.any() else None, rest if value.requires_grad or rest.any() else None


def says_causal(attn_mask: Tensor, hidden: Tensor | None, q: int, k: int) -> bool:
    """Whether an `attn_mask` hides exactly the later keys; MaskError if it shows one, which contradicts `is_causal`."""
    if cannot_look():
        return False
    later = torch.ones(q, k, dtype=torch.bool, device=attn_mask.device).triu(1)
    shown = later if hidden is None else (later & hidden) != later
    if shown.any():
        row, column = shown.nonzero()[0, -2:].tolist()
        raise MaskError(
            f"MultiheadAttention: is_causal=True hides later keys, and attn_mask shows query {row} the key {column}. "
            "For attn_mask alone leave out is_causal; for both, ANDed, pass mask=causal instead of is_causal=True"
        )
    return hidden is not None and hidden.ndim == 2 and torch.equal(hidden, later)
