"""Which use of a model holds where code runs: a `tm.use` in its own context, a `tm.enable` everywhere.

A context is Python's (`contextvars`): a thread has its own, and so has a task of asyncio, which begins with a copy of
the one that made it. Nothing here says what a use changes; `ScopedValue` only says which of several values counts here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import count
from threading import Lock
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from weakref import WeakValueDictionary

from torch import nn

from truemask.errors import MaskError
from truemask.interop.checkpointing import NO_CHECKPOINTS, Checkpoints, checkpoints, in_backward

T = TypeVar("T")
S = TypeVar("S", bound="Shared")
REPLICATE = "_replicate_for_data_parallel"  # what DataParallel asks of each module

USES: ContextVar[tuple[int, ...]] = ContextVar("truemask_uses", default=())  # by number, the innermost last
NUMBERS = count(1)
LASTING: WeakValueDictionary[int, ActiveUse] = WeakValueDictionary()


# -- one use -----------------------------------------------------------------------------------------------------------


class ActiveUse:
    """One use of a model, from its entry on. `stop` ends it; what it changed in the model is given back a little later.

    That is when no graph is left that may recompute what ran in it: such a graph holds the use.
    """

    def __init__(self, everywhere: bool) -> None:
        self.number, self.everywhere = next(NUMBERS), everywhere
        self._values: list[ScopedValue[Any]] = []
        self._ends: list[Callable[[], object]] = []
        LASTING[self.number] = self
        if not everywhere:
            USES.set((*_lasting(), self.number))

    def __del__(self) -> None:
        self._give_back()

    def change(self, do: Callable[[], Callable[[], object]]) -> None:
        """Change something that uses share; what `do` returns takes it back."""
        with guarded():
            self._ends.append(do())

    def set_value(self, scoped: ScopedValue[T], value: T, *, held: bool = True) -> None:
        """From now on this use's value counts in its context. `held`: who remembers the value holds the use."""
        scoped.take(self.number, ScopedEntry(value, self if held else None), self.everywhere)
        self._values.append(scoped)

    def stop(self) -> None:
        """The end of the use, in whatever context; nothing if that is done."""
        with guarded():
            while self._values:
                self._values.pop().leave(self.number)
        LASTING.pop(self.number, None)
        USES.set(_lasting())

    def abandon(self) -> None:
        """The end of a use that could not begin: nothing ran in it, so what it changed is given back now."""
        self.stop()
        self._give_back()

    def _give_back(self) -> None:
        WAITING.extend(reversed(self._ends))
        self._ends.clear()
        _settle()


def _lasting() -> tuple[int, ...]:
    return tuple(number for number in USES.get() if number in LASTING)


# -- what several uses share -------------------------------------------------------------------------------------------

LOCK = Lock()
WAITING: deque[Callable[[], object]] = deque()  # ends of uses, which may come to pass while garbage is collected


@contextmanager
def guarded() -> Iterator[None]:
    """Alone with what uses share."""
    with LOCK:
        yield
    _settle()


def _settle() -> None:
    while WAITING and LOCK.acquire(blocking=False):
        try:
            while WAITING:
                WAITING.popleft()()
        finally:
            LOCK.release()


# -- which value counts ------------------------------------------------------------------------------------------------


class ScopedEntry(NamedTuple, Generic[T]):
    """What a use says, and the use itself, which lasts as long as somebody remembers this."""

    value: T
    active_use: ActiveUse | None


class ScopedValue(Generic[T]):
    """What several uses say about one thing. A copy keeps to them; a pickle keeps what counted where it was made."""

    def __init__(self, always: T | None = None) -> None:
        self.always = always
        self._for_good = None if always is None else ScopedEntry(always, None)
        self._entries: dict[int, ScopedEntry[T]] = {}
        self._everywhere: tuple[int, ...] = ()

    def take(self, number: int, entry: ScopedEntry[T], everywhere: bool) -> None:
        self._entries[number] = entry
        if everywhere:
            self._everywhere += (number,)

    def leave(self, number: int) -> None:
        self._entries.pop(number, None)
        self._everywhere = tuple(other for other in self._everywhere if other != number)

    def here(self, around: Checkpoints | None = None) -> T | None:
        """The value that counts in this context, or did in the forward that is recomputed; None if no use holds."""
        entry = self.entry(around)
        return None if entry is None else entry.value

    def entry(self, around: Checkpoints | None = None) -> ScopedEntry[T] | None:
        """The same, with the use that says it."""
        around = checkpoints() if around is None else around
        entry = self.now() if around is NO_CHECKPOINTS else around.as_in_forward(self, self.now)
        if entry is None and around.recomputed is None and self._entries and in_backward():
            raise MaskError(
                "a layer of a model in use runs inside `backward`, outside any block, and not by "
                "torch.utils.checkpoint, so under which mask its forward ran cannot be told: call `backward` inside "
                "the block, or checkpoint by torch.utils.checkpoint"
            )
        return entry

    def now(self) -> ScopedEntry[T] | None:
        """The value that counts in this context, with the use that says it."""
        for number in (*reversed(USES.get()), *reversed(self._everywhere)):
            if number in LASTING and (entry := self._entries.get(number)) is not None:
                return entry
        return self._for_good

    def __deepcopy__(self, memo: dict[int, object]) -> ScopedValue[T]:
        twin = ScopedValue(self.always)
        twin._entries = {number: ScopedEntry(entry.value, None) for number, entry in dict(self._entries).items()}
        twin._everywhere = self._everywhere
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        entry = self.now()
        return ScopedValue, (None if entry is None else entry.value,)


# -- what stands on a module -------------------------------------------------------------------------------------------


class Shared(Protocol):
    """What stands on a module as long as somebody wants it there."""

    users: int


def install(module: nn.Module, name: str, fits: Callable[[Any], bool], make: Callable[[], S]) -> S:
    """Something in an attribute of a module, made by the first of the uses that want it there; `users` counts them.

    One that a copy or a pickle came with stays, if it fits.
    """
    shared: Any = vars(module).get(name)
    if not fits(shared):
        shared = vars(module)[name] = make()
        shared.users = 0
    shared.users += 1
    return shared


def uninstall(module: nn.Module, name: str, shared: Shared) -> bool:
    """The end of what `install` began; whether that was the last, so that nothing stands there any more."""
    shared.users -= 1
    last = not shared.users and vars(module).get(name) is shared
    if last:
        del vars(module)[name]
    return last


def under(uses: tuple[int, ...], function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """A call in this thread, under the uses of another one."""
    token = USES.set(uses)
    try:
        return function(*args, **named)
    finally:
        USES.reset(token)


class Replicas:
    """Takes the place of a model's `_replicate_for_data_parallel`: replicas run in threads of their own.

    Theirs are the uses of the thread that made them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.users = model, 0

    def __call__(self) -> nn.Module:
        replica: nn.Module = getattr(type(self.model), REPLICATE)(self.model)
        vars(replica).pop(REPLICATE, None)
        forward = vars(replica).get("forward") or partial(type(replica).forward, replica)
        vars(replica)["forward"] = partial(under, USES.get(), forward)
        return replica


class Kept:
    """Something that belongs to one model and not to its copies, kept in that model so that both end together."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __deepcopy__(self, _: object) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def kept(model: nn.Module, name: str) -> Kept:
    """What a model keeps under a name of its own."""
    return vars(model).setdefault(name, Kept())
