"""What a cache keeps, in the order in which it was used, and the bytes of all of it: what several share counts once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from truemask.common.memory import Memory


class Holder(ABC):
    """Something that is kept under a key and holds memory."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.counted: Memory = {}  # what it held when it was last weighed

    @abstractmethod
    def memory(self) -> Memory:
        """What it holds now."""


H = TypeVar("H", bound=Holder)


class Shelf(Generic[H]):
    """Holders by key, the least recently used first. Not safe for threads: whoever has one locks it."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._holders: OrderedDict[Hashable, H] = OrderedDict()
        self._sharing: Counter[tuple[int, int]] = Counter()  # how many hold a piece of memory

    def __iter__(self) -> Iterator[H]:
        return iter(self._holders.values())

    def get(self, key: Hashable) -> H | None:
        """The holder, which has been used just now."""
        holder = self._holders.get(key)
        if holder is not None:
            self._holders.move_to_end(holder.key)  # the same object, which need not be hashed again to be the last
        return holder

    def touch(self, holder: H) -> None:
        """It has been used just now."""
        self._holders.move_to_end(holder.key)

    def put(self, holder: H) -> None:
        """Keep it; it is weighed when somebody says so."""
        self._holders[holder.key] = holder

    def weigh(self, holder: H) -> None:
        """Count what the holder holds now, instead of what it held before."""
        memory = holder.memory()
        self._add(memory)
        self._take_off(holder.counted)
        holder.counted = memory

    def drop(self, holder: H) -> None:
        """Give it up."""
        del self._holders[holder.key]
        self._take_off(holder.counted)

    def clear(self) -> None:
        """Give up all."""
        self._holders.clear()
        self._sharing.clear()
        self.nbytes = 0

    def _add(self, memory: Memory) -> None:
        for piece, size in memory.items():
            self.nbytes += 0 if self._sharing[piece] else size
            self._sharing[piece] += 1

    def _take_off(self, memory: Memory) -> None:
        for piece, size in memory.items():
            self._sharing[piece] -= 1
            if not self._sharing[piece]:
                self.nbytes -= size
                del self._sharing[piece]
