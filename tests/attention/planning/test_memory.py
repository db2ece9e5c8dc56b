"""A shelf counts what its holders hold: shared memory once, and none that was given up."""

from __future__ import annotations

from truemask.attention.planning.shelf import Holder, Shelf
from truemask.common.memory import Memory


class Holding(Holder):
    """Holds what it is told to."""

    def __init__(self, key: str, **pieces: int) -> None:
        super().__init__(key)
        self.pieces = pieces

    def memory(self) -> Memory:
        return {(ord(name), size): size for name, size in self.pieces.items()}


def test_shared_memory_counts_once_and_goes_with_its_last_holder() -> None:
    shelf: Shelf[Holding] = Shelf()
    one, two = Holding("one", a=100, b=10), Holding("two", a=100, c=1)
    for holder in (one, two):
        shelf.put(holder)
        shelf.weigh(holder)
    assert shelf.nbytes == 111
    shelf.drop(one)
    assert shelf.nbytes == 101
    shelf.drop(two)
    assert shelf.nbytes == 0


def test_weighing_again_counts_what_is_held_now() -> None:
    shelf: Shelf[Holding] = Shelf()
    holder = Holding("one", a=100)
    shelf.put(holder)
    shelf.weigh(holder)
    holder.pieces = {"a": 100, "b": 20}
    assert shelf.nbytes == 100
    shelf.weigh(holder)
    assert shelf.nbytes == 120
    holder.pieces = {"b": 20}
    shelf.weigh(holder)
    assert shelf.nbytes == 20


def test_who_is_asked_for_is_the_last_to_go() -> None:
    shelf: Shelf[Holding] = Shelf()
    for key in ("one", "two", "three"):
        shelf.put(Holding(key))
    assert shelf.get("one") is not None
    assert shelf.get("four") is None
    assert [holder.key for holder in shelf] == ["two", "three", "one"]
    shelf.clear()
    assert (list(shelf), shelf.nbytes) == ([], 0)
