"""What a stack of x-transformers' layers knows about its input and its attention does not: registers and left padding.

Hooks on the stack (`AttentionLayers`) and on the wrappers around it write it down before the layers run.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from truemask.errors import MaskError


class PerThread(threading.local):
    """A value that each thread has of its own; a copy, and a pickle, begins without any."""

    value: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, ()


@dataclass
class Input:
    """How many rows of one input of a stack are registers, and where its samples begin."""

    front: int = 0
    back: int = 0
    starts: tuple[int, ...] | None = None
    only_starts: bool = False  # whether the key mask of self-attention says nothing but `starts`
    cached: int = 0  # rows whose keys are cached, registers included
    dropped: int = 0  # and those before them, whose keys a full cache has dropped
    inside: bool = False  # whether a wrapper is running, which has written down its registers
    problem: str = ""  # why the positions of tokens are not known


class Frame:
    """The input that each thread runs through one stack.

    A thread that has run none reads the latest of any: a backward recomputes checkpointed layers in a thread of its
    own.
    """

    def __init__(self) -> None:
        self._own, self._latest = PerThread(), Input()

    @property
    def now(self) -> Input:
        """What this thread's call of the stack was given."""
        return self._own.value or self._latest

    def written(self) -> Input:
        """The same, to be written down by this thread."""
        if self._own.value is None:
            self._own.value = Input()
        self._latest = self._own.value
        return self._latest


class BeforeWrapper:
    """A hook before `TransformerWrapper.forward` and the like: what is put before, and after, the tokens."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    @torch.compiler.disable(recursive=True)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given, frame = arguments(module, args, named), self.frame.written()
        frame.front, frame.back, frame.problem = counted(module, given), size(module, "register_tokens"), ""
        frame.inside, frame.starts = True, starts_of(given.get("seq_start_pos"))
        if size(module, "memory_tokens") and getattr(module, "memory_tokens_interspersed_every", None):
            frame.problem = (
                "its memory tokens stand between the tokens (memory_tokens_interspersed_every), so a mask's "
                "positions would count them; build the wrapper without that option"
            )


class AfterWrapper:
    """A hook after it: the next call of the stack may come without a wrapper."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    @torch.compiler.disable(recursive=True)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        self.frame.written().inside = False


class BeforeStack:
    """A hook before `AttentionLayers.forward`: left padding, and where a cached call goes on."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    @torch.compiler.disable(recursive=True)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given, frame = arguments(module, args, named), self.frame.written()
        if not frame.inside:
            frame.front, frame.back, frame.starts, frame.problem = 0, 0, None, ""
        frame.only_starts = given.get("seq_start_pos") is not None and given.get("self_attn_kv_mask") is None
        frame.starts = starts_of(given.get("seq_start_pos")) or frame.starts
        cache = given.get("cache")
        frame.cached = cached_length(cache)
        frame.dropped = 0 if cache is None else max(0, cache.cache_length - frame.cached)


@torch.compiler.disable(recursive=True)
def arguments(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """What a forward was given, by name; TypeError as the forward itself would raise it."""
    bound = signature_of(type(module)).bind(module, *args, **named).arguments
    bound.pop("self")
    return {**bound, **bound.pop("kwargs", {})}


@lru_cache(maxsize=256)
def signature_of(kind: type[nn.Module]) -> inspect.Signature:
    """The signature of a module's forward."""
    return inspect.signature(kind.forward)


def counted(module: nn.Module, given: dict[str, Any]) -> int:
    """How many rows a wrapper puts before the tokens."""
    prepended = given.get("prepend_embeds")
    classes = getattr(module, "num_cls_tokens", 1) if size(module, "cls_token") else 0
    return size(module, "memory_tokens") + classes + (0 if prepended is None else prepended.shape[1])


def size(module: nn.Module, name: str) -> int:
    """The first size of a parameter; 0 if the module does not have it."""
    value = getattr(module, name, None)
    return len(value) if isinstance(value, Tensor) else 0


def starts_of(starts: Tensor | None) -> tuple[int, ...] | None:
    """Left pads of each sample; None if there are none."""
    if starts is None or not bool((starts > 0).any()):
        return None
    return tuple(starts.tolist())


def cached_length(cache: Any) -> int:
    """How many rows a cache holds keys of."""
    if cache is None:
        return 0
    own = [x for x in cache.attn_intermediates if getattr(x, "layer_type", None) == "a" and x.cached_kv is not None]
    return own[0].cached_kv[0].shape[-2] if own else cache.cache_length


def known_positions(frame: Input, recurrent: bool) -> None:
    """Raise where the positions of tokens cannot be told from what attention is given."""
    problem = frame.problem
    if recurrent and (frame.front or frame.back):
        problem = (
            "its recurrence memory (mems) holds memory tokens or prepended embeddings of earlier segments, which a "
            "mask's positions would count; use the model without them"
        )
    if problem:
        raise MaskError(f"a mask cannot be used on this x-transformers model: {problem}")
