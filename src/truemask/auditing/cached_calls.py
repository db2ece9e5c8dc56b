"""How models are called with a cache: the same tokens, some at once and the rest step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truemask.auditing.cross_attention import context_of
from truemask.auditing.declared_masks import is_hugging_face, is_peer
from truemask.auditing.multimodal import VectorModel
from truemask.auditing.subject import AuditedModel, per_position, seed_everything
from truemask.generation.kv_cache import KVCache
from truemask.nn.wrappers import TransformerWrapper

MAX_SINGLE_STEPS = 6
GROWING_KEYWORDS = ("attention_mask", "mask")  # with a cache these speak of the cached positions too
STEP_KEYWORDS = ("position_ids", "token_type_ids", "mm_token_type_ids")  # these speak of the new tokens
DECODER_PREFIX = "decoder_"


class NoCache(Exception):
    """A model that gives none, or one that cannot do what is asked, in words."""


class BeamSwap(NamedTuple):
    """Beams that change places: before token `at` the rows of the batch stand as `rows` `[b]` says."""

    at: int
    rows: Tensor


Decode = Callable[[AuditedModel, list[int], BeamSwap | None], Tensor]


def decoder_of(subject: AuditedModel) -> tuple[Decode | None, str]:
    """How this model is called with a cache, or why the audit does not; neither for models without a known cache."""
    model = subject.model
    if subject.embedded:
        has_cache = is_hugging_face(subject) and not isinstance(model, VectorModel)
        return None, "decoding with a cache was not tried, because embeddings go in" if has_cache else ""
    if _is_decoder(subject):
        return (_hugging_face, "") if _takes_past(model) else (None, "")
    others = [name for name in _other_tensors(subject) if not _read_again(subject, name)]
    if bool(subject.signal_places.any()):
        if bool(subject.signal_places[:, -1].any()):
            return None, "decoding with a cache was not tried, because images stand at the end of the batch"
    elif others:
        return None, f"decoding with a cache was not tried, because of {', '.join(others)} in the batch"
    if isinstance(model, TransformerWrapper):
        return _truemask, ""
    if is_peer(subject) and getattr(model, "can_cache_kv", False):
        return _x_transformers, ""
    return (_hugging_face, "") if is_hugging_face(subject) and _takes_past(model) else (None, "")


def has_beams(decode: Decode) -> bool:
    """Whether rows of its cache can change places."""
    return decode is _hugging_face


def stops(n: int, signal_places: Tensor | None = None) -> list[int]:
    """Where the calls end: half of the tokens at once (and all `signal_places`), some single ones, the rest at once.

    >>> stops(8), stops(20)
    ([4, 5, 6, 7, 8], [10, 11, 12, 13, 14, 15, 16, 20])
    """
    last = (
        0
        if signal_places is None or not bool(signal_places.any())
        else int(signal_places.any(dim=0).nonzero().max()) + 1
    )
    first = max(1, n // 2, last)
    singles = list(range(first, min(n, first + MAX_SINGLE_STEPS) + 1))
    return singles if singles[-1] == n else [*singles, n]


def _is_decoder(subject: AuditedModel) -> bool:
    return str(subject.name).startswith(DECODER_PREFIX)


def _takes_past(model: nn.Module) -> bool:
    """Whether it is called with `past_key_values`, or hands all keywords on to a model that is."""
    parameters = inspect.signature(model.forward).parameters
    if "past_key_values" in parameters:
        return True
    inside = any(_takes_past(part) for part in model.children())
    return inside and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _other_tensors(subject: AuditedModel) -> list[str]:
    """The tensors of the call that do not speak of its tokens one by one."""
    tensors = [(name, value) for name, value in subject.keywords.items() if isinstance(value, Tensor)]
    return [name for name, value in tensors if name not in (*GROWING_KEYWORDS, *STEP_KEYWORDS) or value.ndim != 2]


def _read_again(subject: AuditedModel, name: str) -> bool:
    """Whether this is the context of one of x-transformers' decoders, or its padding, which every step is given."""
    context = context_of(subject)
    return is_peer(subject) and context is not None and name in (context.name, context.padding)


def _keywords_between(subject: AuditedModel, start: int, stop: int) -> dict[str, Any]:
    """The keywords of a call that brings the tokens from `start` to `stop`; pictures come with the first."""
    keywords = dict(subject.keywords)
    prefix = DECODER_PREFIX if _is_decoder(subject) else ""
    for names, first in ((GROWING_KEYWORDS, 0), (STEP_KEYWORDS, start)):
        for name in (prefix + name for name in names):
            if isinstance(keywords.get(name), Tensor) and keywords[name].ndim == 2:
                keywords[name] = keywords[name][:, first:stop]
    first_call_only = _other_tensors(subject) if start and not prefix and bool(subject.signal_places.any()) else []
    return {name: value for name, value in keywords.items() if name not in first_call_only}


def _run(subject: AuditedModel, ids: Tensor, keywords: dict[str, Any]) -> Any:
    seed_everything(subject.seed)
    return subject.model(**{subject.name: ids}, **keywords) if subject.name else subject.model(ids, **keywords)


def _hugging_face(subject: AuditedModel, ends: list[int], swap: BeamSwap | None) -> Tensor:
    parts, past, start = [], None, 0
    encoded: dict[str, Any] = {}
    for stop in ends:
        if swap is not None and start == swap.at:
            past = _reordered(subject.model, past, swap.rows)
        early = swap is not None and start < swap.at
        ids = subject.inputs[:, start:stop]
        keywords = _encoded(subject, _keywords_between(subject, start, stop), encoded) | {
            "use_cache": True,
            "past_key_values": past,
        }
        result = _run(subject, ids[swap.rows] if early and swap is not None else ids, keywords)
        past = getattr(result, "past_key_values", None)
        if past is None:
            raise NoCache("the model returned none")
        encoder_states = getattr(result, "encoder_last_hidden_state", None)
        encoded = (
            {"encoder_outputs": (encoder_states,)}
            if isinstance(encoder_states, Tensor) and _is_decoder(subject)
            else encoded
        )
        part = per_position(result, subject.batch, stop - start, type(subject.model).__name__)
        parts.append(part[swap.rows] if early and swap is not None else part)
        start = stop
    return torch.cat(parts, dim=1)


def _encoded(subject: AuditedModel, keywords: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Any]:
    """The keywords with what the encoder made in the place of what it reads, as `generate` calls each step."""
    context = context_of(subject) if encoded else None
    rest = {name: value for name, value in keywords.items() if context is None or name != context.name}
    return rest | encoded


def _reordered(model: Any, past: Any, rows: Tensor) -> Any:
    """The cache with its rows in another order, as beams do it."""
    if hasattr(past, "reorder_cache"):
        past.reorder_cache(rows)
        return past
    if not hasattr(model, "_reorder_cache"):
        raise NoCache(f"a {type(past).__name__} has no reorder_cache")
    return model._reorder_cache(past, rows)


def _truemask(subject: AuditedModel, ends: list[int], swap: BeamSwap | None) -> Tensor:
    model: Any = subject.model
    cache, parts, start = KVCache(model, batch=subject.batch, tokens=subject.length), [], 0
    for stop in ends:
        parts.append(
            _run(subject, subject.inputs[:, start:stop], _keywords_between(subject, start, stop) | {"cache": cache})
        )
        cache.advance()
        start = stop
    return torch.cat(parts, dim=1)


def _x_transformers(subject: AuditedModel, ends: list[int], swap: BeamSwap | None) -> Tensor:
    """Its calls bring the whole text and answer for the last token only."""
    parts, cache = [], None
    for stop in [ends[0], *range(ends[0] + 1, subject.length + 1)]:
        keywords = _keywords_between(subject, 0, stop) | {"return_intermediates": True, "cache": cache}
        outputs, cache = _run(subject, subject.inputs[:, :stop], keywords)
        parts.append(outputs if not parts else outputs[:, -1:])
    return torch.cat(parts, dim=1)
