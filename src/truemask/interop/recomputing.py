"""What a checkpointed function ran under, kept for the day on which `backward` recomputes it.

torch runs such a function again in `backward`: perhaps behind the `tm.use` that it ran in, inside another one, or in a
thread of autograd's own. So what counted in the forward is written on the object by which torch remembers to recompute
it, which lives as long as that may happen: the `ctx` of `CheckpointFunction` (reentrant), or the `_CheckpointFrame`.
Both are found on Python's stack, which tells a recomputation from a forward in every thread.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint as torchs

from truemask.errors import MaskError

T = TypeVar("T")
NOTES = "_truemask_notes"  # the attribute of a checkpoint with what its forward ran under


@dataclass(frozen=True)
class Several:
    """Noted where a checkpointed function ran the same thing under different uses, which it goes on to hold."""

    values: tuple[object, ...]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints that a call is a forward of, and the one that it recomputes, if any."""

    forwards: tuple[Any, ...] = ()
    recomputed: Any = None

    def note(self, key: Hashable, value: object) -> None:
        """Write down what the forward runs under, by whom it concerns."""
        for checkpoint in self.forwards:
            notes = vars(checkpoint).setdefault(NOTES, {})
            before = notes.setdefault(key, value)
            if before is not value:
                notes[key] = Several((before, value))

    def as_in_forward(self, key: Hashable, now: Callable[[], T]) -> T:
        """What counts now, which is written down; in a recomputation what counted in its forward."""
        found = now() if self.recomputed is None else self.noted(key)
        self.note(key, found)
        return found

    def noted(self, key: Hashable) -> Any:
        """What was written down in the forward that is recomputed; None if nothing was."""
        found = vars(self.recomputed).get(NOTES, {}).get(key)
        if isinstance(found, Several):
            raise MaskError(
                "a checkpointed function ran the same layer under different `tm.use`s, so which one holds when "
                "`backward` recomputes it cannot be told: checkpoint a function inside each block instead"
            )
        return found


def checkpoints() -> Checkpoints:
    """Those around the call that runs now, in this thread."""
    forwards = [] if (innermost := _hooked()) is None else [innermost]
    for frame in _frames():
        kind = KINDS.get(id(frame.f_code))
        if kind is None:
            continue
        checkpoint, recomputed = kind(frame.f_locals)
        if recomputed:
            return Checkpoints(tuple(forwards), checkpoint)
        if checkpoint is not None:
            forwards.append(checkpoint)
    return Checkpoints(tuple(forwards))


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return torch._C._current_graph_task_id() >= 0


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


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


SAVES = _inside(torchs._checkpoint_hook.__init__.__code__, "pack_hook")

# what a function of torch.utils.checkpoint says of the checkpoint by its variables, and whether it is recomputed there
TOLD: dict[CodeType, Callable[[dict[str, Any]], tuple[Any, bool]]] = {
    torchs.CheckpointFunction.forward.__code__: lambda names: (names["ctx"], False),
    torchs.CheckpointFunction.backward.__code__: lambda names: (names["ctx"], True),
    inspect.unwrap(torchs.checkpoint).__code__: _generated,
    _inside(torchs._checkpoint_hook.__init__.__code__, "unpack_hook"): lambda names: (names["frame"], True),
}
KINDS = {id(code): kind for code, kind in TOLD.items()}  # dynamo's code has no hash
