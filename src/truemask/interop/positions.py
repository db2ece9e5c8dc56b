"""What a forward was told of positions: `position_ids`, how many keys its cache held, and from where a model counts."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truemask.nn.doors import warn


class Told(NamedTuple):
    """What the caller of a forward said, and what the model adds to every position."""

    positions: Tensor | None = None  # position_ids `[b or 1, q]`, as they were passed
    cached: int | None = None  # keys that the cache held
    first: int = 0  # the position of a sample's first token


class Forward(threading.local):
    """The models of which this thread runs the forward, the outermost first, each with what it was told.

    `last` is what the layers of the innermost were told: a backward may compute them once more.
    """

    def __init__(self) -> None:
        self.running: list[tuple[weakref.ref[nn.Module], Told]] = []
        self.last = Told()

    def begin(self, module: nn.Module, told: Told) -> bool:
        """Note a call of a model; whether it is part of no other one that runs.

        Positions are the outermost caller's, as far as they are handed on: a model makes some for its parts too.
        """
        if self.running:
            outer = self.running[0][0]()
            if outer is None or outer is module or all(module is not part for part in outer.modules()):
                self.running.clear()  # left behind by a forward that was interrupted
        if self.running and told.positions is not None:
            told = told._replace(positions=self.running[0][1].positions)
        self.running.append((weakref.ref(module), told))
        self.last = told
        return len(self.running) == 1

    def end(self, module: nn.Module) -> None:
        """The end of that call: the layers that come next are those of the model around it."""
        while self.running and self.running.pop()[0]() is not module:
            continue
        if self.running:
            self.last = self.running[-1][1]


FORWARD = Forward()


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


# -- hooks -------------------------------------------------------------------------------------------------------------


class BeforeForward:
    """A hook before a model's forward."""

    def __init__(self, first: int) -> None:
        self.first, self.warned = first, False

    @torch.compiler.disable(recursive=True)
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

    @torch.compiler.disable(recursive=True)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        FORWARD.end(module)


@lru_cache(maxsize=256)
def names_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """The arguments of a module's forward, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def watch(model: nn.Module, parts: list[nn.Module]) -> Callable[[], None]:
    """Hooks on a model and its parts that are models, which note what a forward is told; what is returned ends them."""
    before: Any = BeforeForward(first_position(model))
    after: Any = AfterForward()
    handles = []
    for part in parts:
        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(after, always_call=True))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


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
