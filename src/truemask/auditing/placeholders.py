"""Tokens that stand for something else: places of images, sounds and videos, read from a model's configuration.

A model counts its placeholders and fills each with a vector of its picture or sound. So an audit may not put another
token there, nor a placeholder anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TOKEN_ENDINGS = ("_token_id", "_token_ids", "_token_index")
SIGNAL_WORDS = {
    *("image", "images", "visual", "vision", "video", "videos", "frame", "audio", "sound", "speech"),
    *("boi", "eoi", "boa", "eoa"),  # where an image or a sound begins and ends
}


def special_tokens(model: nn.Module) -> dict[int, str]:
    """Every token that the configuration of a model, or of a part of it, gives a name: `{50: "image_token_index"}`."""
    configs = (getattr(module, "config", None) for module in model.modules())
    first = next((config for config in configs if hasattr(config, "model_type")), getattr(model, "config", None))
    return {token: name for name, token in _named_tokens(first)} if first is not None else {}


def placeholders(model: nn.Module) -> dict[int, str]:
    """Those of them that speak of images, sounds or videos."""
    return {token: name for token, name in special_tokens(model).items() if SIGNAL_WORDS & set(name.split("_"))}


def places_of(ids: Tensor, tokens: dict[int, str]) -> Tensor:
    """Where one of these tokens stands, bool like `ids`; nowhere in a sequence of vectors `[b, n, d]`."""
    if ids.is_floating_point() or not tokens:
        return torch.zeros(ids.shape[:2], dtype=torch.bool)
    return torch.isin(ids.cpu(), torch.tensor(sorted(tokens)))


def _named_tokens(config: Any) -> Iterator[tuple[str, int]]:
    settings = vars(config) if hasattr(config, "__dict__") else {}
    for name, value in settings.items():
        if name.endswith(TOKEN_ENDINGS):
            tokens = value if isinstance(value, (list, tuple)) else [value]
            yield from ((name, token) for token in tokens if isinstance(token, int) and not isinstance(token, bool))
        elif name == "vocabulary_map" and isinstance(value, dict):
            yield from (("image_token_id", value[token]) for token in ("<image>",) if token in value)
        elif name != "auto_map" and hasattr(value, "model_type"):
            yield from _named_tokens(value)
