"""Flags of real tokens, as every library has them beside its batch: where each sample's tokens stand.

A tensor of flags is bool `[b, n]`, True at a token and False at padding.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenSpans(NamedTuple):
    """From the first token of each sample to its last, int64 `[b]`; where a sample has none, all of it from 0 on.

    `solid`, bool `[b]`: no pads stand between the tokens. `tokens`: how many tokens there are.
    """

    first: Tensor
    stop: Tensor
    tokens: Tensor
    solid: Tensor


def token_spans(real: Tensor) -> TokenSpans:
    """Where the tokens of each sample stand.

    >>> import torch
    >>> spans = token_spans(torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool())
    >>> spans.first.tolist(), spans.stop.tolist(), spans.solid.tolist()
    ([1, 0, 0], [3, 4, 4], [True, False, True])
    """
    flags = real.int()
    first, stop, tokens = flags.argmax(1), real.shape[1] - flags.flip(1).argmax(1), flags.sum(1)
    return TokenSpans(first, stop, tokens, (stop - first == tokens) | (tokens == 0))


def token_positions(real: Tensor) -> Tensor:
    """The position of each token, which is the number of tokens before it; a pad has that of the token before, or -1.

    >>> import torch
    >>> token_positions(torch.tensor([[False, True, False, True]])).tolist()
    [[-1, 0, 0, 1]]
    """
    return real.long().cumsum(1) - 1
