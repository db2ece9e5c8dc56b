"""What a forward was told of positions: `position_ids`, how many keys its cache held, and from where a model counts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class CallerPositions(NamedTuple):
    """What the caller of a forward said, and what the model adds to every position."""

    positions: Tensor | None = None  # position_ids `[b or 1, q]`, as they were passed
    cached: int | None = None  # keys that the cache held
    first: int = 0  # the position of a sample's first token


def first_position(model: nn.Module) -> int:
    """The position of a sample's first token: 0 for nearly all models, `padding_idx + 1` where RoBERTa's way is kept.

    Where learned positions keep an entry for padding (RoBERTa, XLM-R, CamemBERT, ESM, MPNet, Longformer, ...), tokens
    count from the entry after it. PaliGemma counts from 1.

    >>> from truemask.interop.positions import first_position
    >>> first_position(nn.Linear(2, 2))
    0
    """
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        place = getattr(table, "padding_idx", None)
        if isinstance(table, nn.Module) and isinstance(place, int):
            return place + 1
    configs = [getattr(module, "config", None) for module in model.modules()]
    return int(any(getattr(config, "model_type", None) == "paligemma" for config in configs))
