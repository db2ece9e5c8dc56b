"""How well a model foretells a text under a mask, read in pieces through a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from truemask.masks.core.mask import Mask
from truemask.textmodels.text_model import TextModel, TextModelError, Tokens

Progress = Callable[[int], None]  # hears how many tokens are read


@dataclass(frozen=True)
class Score:
    """What a text costs under a mask."""

    mask: str
    tokens: int  # judged: all but the first
    bytes: int  # of the text, behind the first token
    nats: float

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Which can be compared between models, whatever their tokens."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def score(model: TextModel, text: Tokens, mask: Mask | None, chunk: int, progress: Progress = lambda _: None) -> Score:
    """The negative log-likelihood of a text's tokens, each given those before it that the mask shows.

    `chunk` tokens are read at a time, which decides memory and speed and not the result. Raises TextModelError if there
    is nothing to judge or the model's positions end before the text does, and MaskError if the mask cannot be read
    through a cache.
    """
    count = len(text.ids)
    if count < 2:
        raise TextModelError("the text has one token, and the first is only read: there is nothing to judge")
    model.check_tokens(count - 1)  # the last token is foretold and not read
    nats = 0.0
    with model.reading(mask, count - 1) as read:
        for start in range(0, count - 1, chunk):
            ids = text.ids[start : min(start + chunk, count - 1)]
            targets = text.ids[start + 1 : start + 1 + len(ids)]
            nats += float(F.cross_entropy(read(ids).float(), targets, reduction="none").double().sum())
            progress(start + len(ids))
    meant = mask if mask is not None else model.own_mask
    return Score("the model's own" if meant is None else str(meant), count - 1, text.judged_bytes, nats)
