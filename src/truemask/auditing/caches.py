"""Cached against uncached: the same tokens, some at once and the rest step by step, must give the same outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from truemask.auditing.kinds import is_hugging_face, is_peer
from truemask.auditing.models import Subject, per_position, seed_everything
from truemask.auditing.signals import Signals
from truemask.generation.cache import KVCache
from truemask.nn.wrappers import TransformerWrapper

MOST_STEPS = 6
GROWS = ("attention_mask", "mask")  # with a cache these speak of the cached positions too
MOVES = ("position_ids", "token_type_ids")  # these speak of the new tokens

Decode = Callable[[Subject, list[int]], Tensor | None]


def decoder_of(subject: Subject) -> tuple[Decode | None, str]:
    """How this model is called with a cache, or why the audit does not; neither for models without a known cache."""
    model, given = subject.model, subject.keywords
    if subject.embedded:
        known = is_hugging_face(subject) and not isinstance(model, Signals)
        return None, "decoding with a cache was not tried, because embeddings go in" if known else ""
    if str(subject.name).startswith("decoder_"):
        return None, "decoding with a cache was not tried, because this is an encoder-decoder"
    tensors = [(name, value) for name, value in given.items() if isinstance(value, Tensor)]
    others = [name for name, value in tensors if name not in (*GROWS, *MOVES) or value.ndim != 2]
    if others:
        return None, f"decoding with a cache was not tried, because of {', '.join(others)} in the batch"
    if isinstance(model, TransformerWrapper):
        return _truemask, ""
    if is_peer(subject) and getattr(model, "can_cache_kv", False):
        return _x_transformers, ""
    takes = inspect.signature(model.forward).parameters
    if is_hugging_face(subject) and "past_key_values" in takes and "use_cache" in takes:
        return _hugging_face, ""
    return None, ""


def stops(n: int) -> list[int]:
    """Where the calls end: half of the tokens at once, some single ones, the rest at once.

    >>> stops(8), stops(20)
    ([4, 5, 6, 7, 8], [10, 11, 12, 13, 14, 15, 16, 20])
    """
    first = max(1, n // 2)
    singles = list(range(first, min(n, first + MOST_STEPS) + 1))
    return singles if singles[-1] == n else [*singles, n]


def _cut(subject: Subject, start: int, stop: int) -> dict[str, Any]:
    """The keywords of a call that brings the tokens from `start` to `stop`."""
    cut = dict(subject.keywords)
    for names, first in ((GROWS, 0), (MOVES, start)):
        for name in names:
            if isinstance(cut.get(name), Tensor) and cut[name].ndim == 2:
                cut[name] = cut[name][:, first:stop]
    return cut


def _run(subject: Subject, ids: Tensor, keywords: dict[str, Any]) -> Any:
    seed_everything(subject.seed)
    return subject.model(**{subject.name: ids}, **keywords) if subject.name else subject.model(ids, **keywords)


def _hugging_face(subject: Subject, ends: list[int]) -> Tensor | None:
    parts, past, start = [], None, 0
    for stop in ends:
        keywords = _cut(subject, start, stop) | {"use_cache": True, "past_key_values": past}
        result = _run(subject, subject.inputs[:, start:stop], keywords)
        past = getattr(result, "past_key_values", None)
        if past is None:
            return None
        parts.append(per_position(result, subject.batch, stop - start, type(subject.model).__name__))
        start = stop
    return torch.cat(parts, dim=1)


def _truemask(subject: Subject, ends: list[int]) -> Tensor:
    model: Any = subject.model
    cache, parts, start = KVCache(model, batch=subject.batch, tokens=subject.length), [], 0
    for stop in ends:
        parts.append(_run(subject, subject.inputs[:, start:stop], _cut(subject, start, stop) | {"cache": cache}))
        cache.advance()
        start = stop
    return torch.cat(parts, dim=1)


def _x_transformers(subject: Subject, ends: list[int]) -> Tensor:
    """Its calls bring the whole text and answer for the last token only."""
    parts, cache = [], None
    for stop in [ends[0], *range(ends[0] + 1, subject.length + 1)]:
        keywords = _cut(subject, 0, stop) | {"return_intermediates": True, "cache": cache}
        outputs, cache = _run(subject, subject.inputs[:, :stop], keywords)
        parts.append(outputs if not parts else outputs[:, -1:])
    return torch.cat(parts, dim=1)
