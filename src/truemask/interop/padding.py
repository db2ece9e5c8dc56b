"""Padding of a batch as a mask, and what it does to positions: a token's is the number of real tokens before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.token_spans import token_positions, token_spans
from truemask.masks.leaves.per_token import keys, padding

ROUNDED_KEYS = 256  # data of tokens reaches up to a multiple of this, so that a step of generation changes no mask


class BatchPadding(NamedTuple):
    """The real keys; logical positions `[n]` or `[b, n]` where pads move them; how many pads begin each sample.

    A token's position counts on behind the last key. `starts` are known if pads stand nowhere else but before and
    behind. `lasts`: there are none but those before, so that it holds for tokens that come.
    """

    keys: Mask = everything
    positions: Tensor | None = None
    starts: list[int] | None = None
    lasts: bool = True


def batch_padding(real: Tensor | None, stop: int) -> BatchPadding:
    """The padding among the first `stop` keys; flags `[b, n]` that end before say nothing of those behind."""
    if real is None:
        return BatchPadding()
    real = torch.nn.functional.pad(real, (0, max(0, stop - real.shape[1])))[:, :stop].cpu()
    if bool(real.all()):
        return BatchPadding()
    spans = token_spans(real)
    solid = bool(spans.solid.all())
    first = torch.where(spans.tokens > 0, spans.first, stop)
    only_left = solid and bool((first + spans.tokens == stop).all())
    starts = (first[:1] if bool((first == first[0]).all()) else first).tolist()
    real = torch.nn.functional.pad(real, (0, -stop % ROUNDED_KEYS), value=True)
    real_keys = padding(starts=starts if len(starts) > 1 else starts[0], on="keys") if only_left else keys(alike(real))
    positions = alike(token_positions(real).clamp(min=0))
    if not solid:
        return BatchPadding(real_keys, positions, lasts=False)
    if any(starts):
        return BatchPadding(real_keys, positions, starts, only_left)
    return BatchPadding(real_keys, lasts=False)


def alike(rows: Tensor) -> Tensor:
    """`[b, n]` on the CPU, or `[n]` where all samples have the same: such a mask is cheaper."""
    rows = rows.detach().to("cpu")
    return rows[0] if rows.ndim == 2 and bool((rows == rows[:1]).all()) else rows
