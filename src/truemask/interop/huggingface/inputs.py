"""Hooks on the models in use, which note what a forward is told of positions; they bring `torch._dynamo`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from truemask.common.warning import warn
from truemask.interop.huggingface.forward_context import begin_forward, end_forward, give_cache
from truemask.interop.huggingface.sized_cache import sized_cache
from truemask.interop.positions import CallerPositions, first_position
from truemask.interop.scopes import Kept, install, uninstall

WATCH_ATTRIBUTE = "_truemask_watch"  # the attribute of a model that is watched
GRAPH_BREAK_REASON = "`tm.use` plans each call, so a graph ends at masks and attention"


class BeforeForward:
    """A hook before a model's forward. `in_use` says whether the model is, in the context of a call."""

    def __init__(self, first: int, in_use: Callable[[nn.Module], bool]) -> None:
        self.first, self.in_use, self.warned = first, in_use, False

    @torch.compiler.disable(recursive=True, reason=GRAPH_BREAK_REASON)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any] | None = None) -> None:
        if named is None or not self.in_use(module):  # None: another thread has just taken the hook away
            return
        arguments = {**dict(zip(names_of(type(module)), args, strict=False)), **named}
        positions = arguments.get("position_ids")
        caller_positions = CallerPositions(_two_axes(positions), _length(arguments.get("past_key_values")), self.first)
        context = begin_forward(module, caller_positions)
        give_cache(context, module, sized_cache(arguments.get("past_key_values")))
        if context.whole is context and self.first and isinstance(positions, Tensor) and not self.warned:
            self._warn_if_smaller(module, positions, arguments.get("input_ids"))

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

    @torch.compiler.disable(recursive=True, reason=GRAPH_BREAK_REASON)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        end_forward(module)


@lru_cache(maxsize=256)
def names_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """The arguments of a module's forward, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


class Watch:
    """Hooks on a model, or a part that is one, which note what a forward is told, as long as somebody wants them."""

    def __init__(self, model: nn.Module, first: int, in_use: Callable[[nn.Module], bool]) -> None:
        before: Any = BeforeForward(first, in_use)
        self.before = before
        after: Any = AfterForward()
        handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]
        self.users, self._handles = 0, Kept(handles)

    def end(self, model: nn.Module) -> None:
        """One of those who want them does no more; with the last one they go."""
        if uninstall(model, WATCH_ATTRIBUTE, self):
            for handle in self._handles.value or ():
                handle.remove()


def watch(model: nn.Module, part: nn.Module, in_use: Callable[[nn.Module], bool]) -> Callable[[], None]:
    """Watch a part of a model, or the model; what is returned ends that."""
    first = first_position(model)
    watching = install(
        part, WATCH_ATTRIBUTE, lambda value: isinstance(value, Watch), lambda: Watch(part, first, in_use)
    )
    watching.before.warned = False  # each use may say it once
    return partial(watching.end, part)


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
