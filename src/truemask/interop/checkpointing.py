"""What a checkpointed function ran under, kept for the day on which `backward` recomputes it.

torch runs such a function again in `backward`: perhaps behind the `tm.use` that it ran in, inside another one, or in a
thread of autograd's own. So what counted in the forward is written on the object by which torch remembers to recompute
it, which lives as long as that may happen: the `ctx` of `CheckpointFunction` (reentrant), or the `_CheckpointFrame`.
Both are found on Python's stack, which tells a recomputation from a forward in every thread.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint as torch_checkpoint

from truemask.errors import MaskError

T = TypeVar("T")
RECORDS = "_truemask_records"  # the attribute of a checkpoint with what its forward ran under


@dataclass
class RecordedCalls:
    """What the calls of one thing ran under in a checkpointed function, in their order, and how many were run again."""

    values: list[Any] = field(default_factory=list)
    turn: object = None  # the backward that runs them again
    again: int = 0

    def next(self, turn: object) -> Any:
        """What the next call of this backward ran under."""
        if all(value is self.values[0] for value in self.values):
            return self.values[0]
        if turn != self.turn:
            self.turn, self.again = turn, 0
        self.again += 1
        if self.again > len(self.values):
            raise MaskError(
                f"a checkpointed function ran a layer {len(self.values)} times, and more often when `backward` "
                "recomputes it, so under which mask it runs now cannot be told"
            )
        return self.values[self.again - 1]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints that a call is a forward of, and the one that it recomputes, if any, with the backward's name."""

    forwards: tuple[Any, ...] = ()
    recomputed: Any = None
    turn: object = None

    def as_in_forward(self, key: Hashable, now: Callable[[], T]) -> T:
        """What counts now, which is written down; in a recomputation what counted in its forward, None if unknown."""
        value: Any = now() if self.recomputed is None else self._recorded(key)
        for checkpoint in self.forwards:
            vars(checkpoint).setdefault(RECORDS, {}).setdefault(key, RecordedCalls()).values.append(value)
        return value

    def _recorded(self, key: Hashable) -> Any:
        calls: RecordedCalls | None = vars(self.recomputed).get(RECORDS, {}).get(key)
        return None if calls is None else calls.next(self.turn)


NO_CHECKPOINTS = Checkpoints()


def checkpoints() -> Checkpoints:
    """Those around the call that runs now, in this thread."""
    forwards = [] if (innermost := _hooked()) is None else [innermost]
    for frame in _checkpoint_frames():
        names = frame.f_locals
        checkpoint, recomputed = READERS_BY_CODE_ID[id(frame.f_code)](names)
        if recomputed:
            turn = names.get("gid", torch._C._current_graph_task_id())
            return Checkpoints(tuple(forwards), checkpoint, turn)
        if checkpoint is not None and checkpoint not in forwards:
            forwards.append(checkpoint)
    return Checkpoints(tuple(forwards)) if forwards else NO_CHECKPOINTS


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return torch._C._current_graph_task_id() >= 0


def _checkpoint_frames() -> list[FrameType]:
    """The calls of torch.utils.checkpoint on Python's stack, the innermost first; every layer of a model asks."""
    found, readers = [], READERS_BY_CODE_ID
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if id(frame.f_code) in readers:
            found.append(frame)
        frame = frame.f_back
    return found


def _inside(code: CodeType, name: str) -> CodeType:
    """The code of a function that is defined inside another one."""
    return next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name)


def _hooked() -> Any:
    """The `_CheckpointFrame` whose hooks save the tensors of this call: its function may not stand on the stack."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    saves: Any = None if hooks is None else hooks[0]
    return saves.__closure__[0].cell_contents if getattr(saves, "__code__", None) is SAVES else None


def _generated(names: dict[str, Any]) -> tuple[Any, bool]:
    """The frame that `checkpoint(use_reentrant=False)` keeps, in a generator that waits while the function runs."""
    generator = names.get("gen")
    waiting = None if generator is None else generator.gi_frame
    return None if waiting is None else waiting.f_locals.get("new_frame"), False


SAVES = _inside(torch_checkpoint._checkpoint_hook.__init__.__code__, "pack_hook")

# what a function of torch.utils.checkpoint says of the checkpoint by its variables, and whether it is recomputed there
CHECKPOINT_FRAMES: dict[CodeType, Callable[[dict[str, Any]], tuple[Any, bool]]] = {
    torch_checkpoint.CheckpointFunction.forward.__code__: lambda names: (names["ctx"], False),
    torch_checkpoint.CheckpointFunction.backward.__code__: lambda names: (names["ctx"], True),
    inspect.unwrap(torch_checkpoint.checkpoint).__code__: _generated,
    _inside(torch_checkpoint._checkpoint_hook.__init__.__code__, "unpack_hook"): lambda names: (names["frame"], True),
}
READERS_BY_CODE_ID = {id(code): reader for code, reader in CHECKPOINT_FRAMES.items()}  # dynamo's code has no hash
