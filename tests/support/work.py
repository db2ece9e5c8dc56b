"""How much work a call is, counted and not timed: the same on every machine, however loaded."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple


class Work(NamedTuple):
    """What a call gave, the functions that were called on the way (C's too), and the most bytes it held at once.

    The two together bound its time: a loop shows in `calls`, a large array in `peak_bytes`.
    """

    answer: Any
    calls: int
    peak_bytes: int


def work_of(run: Callable[[], Any]) -> Work:
    """Run it and count; bytes are Python's and numpy's, torch's own memory is not seen."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    profiler = sys.getprofile()
    tracemalloc.start()
    sys.setprofile(count)
    try:
        answer = run()
    finally:
        sys.setprofile(profiler)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return Work(answer, calls, peak_bytes)
