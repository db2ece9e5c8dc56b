"""Hooks on the models in use, which note what a forward is told of positions; they bring `torch._dynamo`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from truemask.interop.positions import FORWARD, REASON, Told, first_position
from truemask.nn.doors import warn


class BeforeForward:
    """A hook before a model's forward; one for all uses of the model, which `users` counts. A copy keeps its own."""

    def __init__(self, first: int) -> None:
        self.first, self.users, self.warned = first, 1, False
        self.handles: list[RemovableHandle] = []

    def __deepcopy__(self, _: object) -> BeforeForward:
        return BeforeForward(self.first)

    def __reduce__(self) -> tuple[type[BeforeForward], tuple[int]]:
        return BeforeForward, (self.first,)

    @torch.compiler.disable(recursive=True, reason=REASON)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = {**dict(zip(names_of(type(module)), args, strict=False)), **named}
        positions = given.get("position_ids")
        told = Told(_two_axes(positions), _length(given.get("past_key_values")), self.first)
        outermost = FORWARD.begin(module, told)
        if outermost and self.first and isinstance(positions, Tensor) and not self.warned:
            self._warn_if_smaller(module, positions, given.get("input_ids"))

    def _warn_if_smaller(self, module: nn.Module, positions: Tensor, ids: object) -> None:
        """Say it, once, if a token is told a position before the first one."""
        smaller = positions < self.first
        pad = getattr(getattr(module, "config", None), "pad_token_id", None)
        if pad is not None and isinstance(ids, Tensor) and ids.shape[-1:] == positions.shape[-1:]:
            smaller = smaller & (ids != pad)
        if positions.is_meta or not bool(smaller.any()):
            return
        self.warned = True
        warn(
            f"{type(module).__name__} counts the positions of tokens from {self.first} (its padding has the one "
            f"before), and position_ids hold {int(positions.min())}: every token gets the embedding of another one. "
            f"Pass position_ids + {self.first}; packing does it with first_position={self.first}"
        )


class AfterForward:
    """A hook after it."""

    @torch.compiler.disable(recursive=True, reason=REASON)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        FORWARD.end(module)


@lru_cache(maxsize=256)
def names_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """The arguments of a module's forward, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def watch(model: nn.Module, parts: list[nn.Module]) -> Callable[[], None]:
    """Hooks on a model and its parts that are models, which note what a forward is told; what is returned ends them."""
    first = first_position(model)
    hooks = [_hooked(part, first) for part in parts]

    def end() -> None:
        for hook in hooks:
            hook.users -= 1
            while hook.handles and not hook.users:
                hook.handles.pop().remove()

    return end


def _hooked(part: nn.Module, first: int) -> BeforeForward:
    """The hook that stands before a model, as one use more wants it."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, BeforeForward):
            hook.users, hook.warned = hook.users + 1, False
            return hook
    before: Any = BeforeForward(first)
    after: Any = AfterForward()
    before.handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
    before.handles.append(part.register_forward_hook(after, always_call=True))
    return before


def _two_axes(positions: object) -> Tensor | None:
    """position_ids `[b or 1, q]`; of those that have several rows for a token, the one of text, if it is there."""
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.is_meta:
        return None
    if positions.ndim == 3 and positions.shape[0] == 4:  # text, time, height, width
        return positions[0]
    return positions if positions.ndim == 2 else positions[None] if positions.ndim == 1 else None


def _length(cache: Any) -> int | None:
    """The keys that a cache holds; None without one, and where only its tensors know."""
    length = getattr(cache, "get_seq_length", lambda: None)()
    return length if isinstance(length, int) else None
