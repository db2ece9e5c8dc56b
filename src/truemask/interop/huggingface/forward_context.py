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

from torch import Tensor, nn

from truemask.interop.checkpointing import in_backward
from truemask.interop.huggingface.masks import ModelMask
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.positions import CallerPositions


class ForwardContext:
    """What the layers of one forward share; of no forward, where a layer is called by itself.

    `outer`: the forward in which this one runs. `whole`: the outermost one that it is a part of. `rows`: the
    self-attention that ran last, and its mask, by which the cross-attention behind it knows where the rows stand.
    `tensor`: a 4-D mask, its version, and what it was read as, which the layers share.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        caller_positions: CallerPositions | None = None,
        outer: ForwardContext | None = None,
        depth: int = 0,
    ) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._caller_positions, self.outer, self.depth = caller_positions or CallerPositions(), outer, depth
        self.running, self.whole = model is not None, self
        self.rows: tuple[AttentionLayer, ModelMask] | None = None
        self.tensor: tuple[weakref.ref[Tensor], int, ModelMask] | None = None

    @property
    def caller_positions(self) -> CallerPositions:
        """What the caller said; behind the forward only `backward` hears it, and no layer that is called by itself."""
        return self._caller_positions if self.running or in_backward() else CallerPositions()

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
        self.whole = whole
        if self._caller_positions.positions is not None:
            self._caller_positions = self._caller_positions._replace(positions=whole._caller_positions.positions)

    def finish(self) -> None:
        """The end of the forward; what the caller said is kept for layers that `backward` computes once more."""
        self.running, self.rows, self.tensor = False, None, None


CONTEXT: ContextVar[ForwardContext | None] = ContextVar("truemask_forward", default=None)


def begin_forward(model: nn.Module, caller_positions: CallerPositions) -> ForwardContext:
    """The context of a forward that begins here."""
    outer, depth = CONTEXT.get(), _depth()
    while outer is not None and not (outer.running and outer.depth < depth):
        outer = outer.outer  # it has ended, or was interrupted: what runs around this call is not as deep
    context = ForwardContext(model, caller_positions, outer, depth)
    if outer is not None:
        context.belongs_to(outer.whole, model)
    CONTEXT.set(context)
    return context


def end_forward(model: nn.Module) -> None:
    """The end of that forward: the layers that come next are those of the one around it."""
    context = CONTEXT.get()
    while context is not None and not context.runs(model):
        context = context.outer
    if context is None:
        return  # it began before it was watched
    context.finish()
    CONTEXT.set(context.outer or context)


def forward_context() -> ForwardContext:
    """That of the innermost forward which runs here. Layers that run in none share the one that ended last, or one."""
    context = CONTEXT.get()
    if context is None:
        context = ForwardContext()
        CONTEXT.set(context)
    return context


def _depth() -> int:
    """How many calls are on Python's stack."""
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth
