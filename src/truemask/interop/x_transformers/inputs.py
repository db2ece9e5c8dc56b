"""What a stack of x-transformers' layers knows about its input and its attention does not: registers and left padding.

The forwards of the stack (`AttentionLayers`) and of the wrappers around it say it, as long as they run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from truemask.errors import MaskError
from truemask.interop.checkpointing import Checkpoints
from truemask.interop.scopes import REPLICATE, USES, under

T = TypeVar("T")


@dataclass(frozen=True)
class StackInput:
    """How many rows of one input of a stack are registers, and where its samples begin."""

    front: int = 0
    back: int = 0
    starts: tuple[int, ...] | None = None
    only_starts: bool = False  # whether the key mask of self-attention says nothing but `starts`
    cached: int = 0  # rows whose keys are cached, registers included
    dropped: int = 0  # and those before them, whose keys a full cache has dropped
    problem: str = ""  # why the positions of tokens are not known


@torch.compiler.disable(recursive=True)
def set_variable(variable: ContextVar[T], value: T) -> T:
    """Set a variable of the context; the value that it had."""
    before = variable.get()
    variable.set(value)
    return before


class StackKey:
    """One stack, by which its attention finds the input that it is given."""

    @property
    def running(self) -> StackInput | None:
        """What the stack, or a wrapper around it, runs on in this context; None if none does."""
        return next((stack_input for key, stack_input in reversed(STACK_INPUTS.get()) if key is self), None)

    def here(self, around: Checkpoints) -> StackInput:
        """The same, or what it was in the forward that is recomputed without the stack."""
        return around.as_in_forward(self, lambda: self.running) or StackInput()

    @torch.compiler.disable(recursive=True)
    def _begin(self, stack_input: StackInput) -> tuple[tuple[StackKey, StackInput], ...]:
        return set_variable(STACK_INPUTS, (*STACK_INPUTS.get(), (self, stack_input)))

    @torch.compiler.disable(recursive=False)
    def run(self, stack_input: StackInput, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """A forward of the stack, or of a wrapper, on such an input."""
        before = self._begin(stack_input)
        try:
            return forward(*args, **named)
        finally:
            set_variable(STACK_INPUTS, before)


STACK_INPUTS: ContextVar[tuple[tuple[StackKey, StackInput], ...]] = ContextVar(
    "truemask_inputs", default=()
)  # the innermost last


class ForwardProxy:
    """Takes the place of a module's forward, and keeps the one that was there."""

    def __init__(self, module: Any) -> None:
        self.module, self.previous = module, vars(module).get("forward")
        self.users = 0
        vars(module)[REPLICATE] = self.replicate

    def original(self, *args: Any, **named: Any) -> Any:
        if self.previous is not None:
            return self.previous(*args, **named)
        return type(self.module).forward(self.module, *args, **named)

    def replicate(self) -> nn.Module:
        """For DataParallel: a replica with a stand-in of its own, which has the uses of the thread that makes it."""
        replica: Any = getattr(type(self.module), REPLICATE)(self.module)
        twin: Any = copy.copy(self)
        twin.module = replica
        del vars(replica)[REPLICATE]
        vars(replica)["forward"] = partial(under, USES.get(), twin)
        return replica


class WrapperForward(ForwardProxy):
    """Stands in for `TransformerWrapper.forward` and the like: what is put before, and after, the tokens."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.stack_key = StackKey()

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.stack_key.run(self._input(args, named), self.original, *args, **named)

    @torch.compiler.disable(recursive=True)
    def _input(self, args: tuple[Any, ...], named: dict[str, Any]) -> StackInput:
        module, keywords = self.module, arguments(self.module, args, named)
        problem = ""
        if size(module, "memory_tokens") and getattr(module, "memory_tokens_interspersed_every", None):
            problem = (
                "its memory tokens stand between the tokens (memory_tokens_interspersed_every), so a mask's "
                "positions would count them; build the wrapper without that option"
            )
        front, back = counted(module, keywords), size(module, "register_tokens")
        return StackInput(front, back, starts_of(keywords.get("seq_start_pos")), problem=problem)


class StackForward(ForwardProxy):
    """Stands in for `AttentionLayers.forward`: left padding, and where a cached call goes on."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.stack_key = StackKey()

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.stack_key.run(self._input(args, named), self.original, *args, **named)

    @torch.compiler.disable(recursive=True)
    def _input(self, args: tuple[Any, ...], named: dict[str, Any]) -> StackInput:
        keywords, outer = arguments(self.module, args, named), self.stack_key.running or StackInput()
        only_starts = keywords.get("seq_start_pos") is not None and keywords.get("self_attn_kv_mask") is None
        cache = keywords.get("cache")
        cached = cached_length(cache)
        return replace(
            outer,
            only_starts=only_starts,
            starts=starts_of(keywords.get("seq_start_pos")) or outer.starts,
            cached=cached,
            dropped=0 if cache is None else max(0, cache.cache_length - cached),
        )


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


def counted(module: nn.Module, keywords: dict[str, Any]) -> int:
    """How many rows a wrapper puts before the tokens."""
    prepended = keywords.get("prepend_embeds")
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
    layers = [x for x in cache.attn_intermediates if getattr(x, "layer_type", None) == "a" and x.cached_kv is not None]
    return layers[0].cached_kv[0].shape[-2] if layers else cache.cache_length


def known_positions(stack_input: StackInput, recurrent: bool) -> None:
    """Raise where the positions of tokens cannot be told from what attention is given."""
    problem = stack_input.problem
    if recurrent and (stack_input.front or stack_input.back):
        problem = (
            "its recurrence memory (mems) holds memory tokens or prepended embeddings of earlier segments, which a "
            "mask's positions would count; use the model without them"
        )
    if problem:
        raise MaskError(f"a mask cannot be used on this x-transformers model: {problem}")
