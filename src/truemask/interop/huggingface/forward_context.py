"""One forward of a transformers model in use: what its caller said of positions, and what its layers read last.

Hooks of the model begin it and end it, an exception ends it too, and its layers ask for it. A forward may run others
inside of itself: those of the model's parts, which belong to it, and those of models that are none of its parts. Each
has a context of its own and knows the one around it; threads and tasks have their own, as Python's contexts are.
"""

from __future__ import annotations

import sys
import weakref
from contextvars import ContextVar
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from truemask.interop.checkpointing import NO_CHECKPOINTS, Checkpoints, checkpoints, in_backward
from truemask.interop.huggingface.masks import ModelMask
from truemask.interop.huggingface.sized_cache import SizedCache
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.positions import CallerPositions


class ForwardContext:
    """What the layers of one forward share; of no forward, where a layer is called by itself.

    `outer`: the forward in which this one runs. `rows`: the self-attention that ran last, and its mask, by which the
    cross-attention behind it knows where the rows stand. `tensor`: a 4-D mask, its version, and what it was read as,
    which the layers share. `cache`: that of the forward, if masks size it.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        caller_positions: CallerPositions | None = None,
        outer: ForwardContext | None = None,
        call: Call | None = None,
    ) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._caller_positions, self.outer, self._call = caller_positions or CallerPositions(), outer, call
        self.running = model is not None
        self._recomputes = self.running and (torch.is_grad_enabled() or checkpoints() is not NO_CHECKPOINTS)
        self._whole: ForwardContext | None = None  # None for itself: a circle would outlive the forward
        self.rows: tuple[AttentionLayer, ModelMask] | None = None
        self.tensor: tuple[weakref.ref[Tensor], int, ModelMask] | None = None
        self.cache: SizedCache | None = None

    @property
    def whole(self) -> ForwardContext:
        """The outermost forward that this one is a part of, or itself."""
        return self._whole or self

    @property
    def caller_positions(self) -> CallerPositions:
        """What the caller said; behind the forward only `backward` hears it, and no layer that is called by itself."""
        return self._caller_positions if self.running or in_backward() else CallerPositions()

    def checkpoints(self) -> Checkpoints:
        """Those around a layer that runs now. In a forward without gradients nothing will be recomputed."""
        settled = self.running and not self._recomputes and not torch.is_grad_enabled()
        return NO_CHECKPOINTS if settled else checkpoints()

    def runs_around(self, stack: list[FrameType]) -> bool:
        """Whether this forward has not ended, and the last call of a stack runs inside of it.

        Of an interrupt torch tells no hook: then its own call is on the stack no more.
        """
        if not self.running or self._call is None or self._call.depth >= len(stack):
            return False
        return self._call == call_at(stack, self._call.depth)

    def runs(self, model: nn.Module) -> bool:
        """Whether this is a forward of that model, and has not ended."""
        return self.running and self._model is not None and self._model() is model

    def belongs_to(self, whole: ForwardContext, model: nn.Module) -> None:
        """Make this a part of a forward around it, if its `model` is a part of that one's.

        Positions are the outermost caller's, as far as they are handed on: a model makes some for its parts too.
        """
        around = None if whole._model is None else whole._model()
        if around is None or around is model or all(model is not part for part in around.modules()):
            return
        self._whole = whole
        if self._caller_positions.positions is not None:
            self._caller_positions = self._caller_positions._replace(positions=whole._caller_positions.positions)

    def finish(self) -> None:
        """The end of the forward; what the caller said is kept for layers that `backward` computes once more."""
        self.running, self.rows, self.tensor, self.cache = False, None, None, None


CONTEXT: ContextVar[ForwardContext | None] = ContextVar("truemask_forward", default=None)


def begin_forward(model: nn.Module, caller_positions: CallerPositions) -> ForwardContext:
    """The context of a forward that begins here."""
    outer, stack = CONTEXT.get(), stack_of_forward()
    while outer is not None and not outer.runs_around(stack):
        outer = outer.outer  # it has ended, was interrupted, or runs in another thread
    context = ForwardContext(model, caller_positions, outer, call_at(stack, len(stack)))
    if outer is not None:
        context.belongs_to(outer.whole, model)
    CONTEXT.set(context)
    return context


def give_cache(context: ForwardContext, model: nn.Module, cache: SizedCache | None) -> None:
    """The cache that a forward was given. Raises MaskError if it is not for this model and its masks."""
    around = context.outer
    if cache is not None and (around is None or not around.running or around.cache is not cache):
        cache.admit(model)
    context.cache = cache


def end_forward(model: nn.Module) -> None:
    """The end of that forward: the layers that come next are those of the one around it."""
    context = CONTEXT.get()
    while context is not None and not context.runs(model):
        context = context.outer
    if context is None:
        return  # it began before it was watched
    cache, around = context.cache, context.outer
    context.finish()
    if cache is not None and (around is None or around.cache is not cache):
        cache.finish()
    CONTEXT.set(context.outer or context)


def forward_context() -> ForwardContext:
    """That of the innermost forward which runs here. Layers that run in none share the one that ended last, or one."""
    context = CONTEXT.get()
    if context is None:
        context = ForwardContext()
        CONTEXT.set(context)
    return context


# -- calls on Python's stack -------------------------------------------------------------------------------------------

HOOK_CALLERS = ("truemask.interop.huggingface", "torch._dynamo")  # whose calls end before the forward does


class Call(NamedTuple):
    """By what a call is known again while it runs. A frame that is gone may leave its `id`, not all else, to another.

    `owner`: the `id` of what the frame calls `self`. A frame itself would keep alive what its variables hold.
    """

    depth: int
    frame: int
    code: int
    owner: int


def call_at(stack: list[FrameType], depth: int) -> Call:
    """The call at that place of a stack, counted from 1."""
    frame = stack[depth - 1]
    return Call(depth, id(frame), id(frame.f_code), id(frame.f_locals.get("self")))


def stack_of_forward() -> list[FrameType]:
    """The calls on Python's stack, the outermost first; the last is torch's, which runs the hook and the forward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(HOOK_CALLERS):
        frame = frame.f_back
    stack: list[FrameType] = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack[::-1]
