"""Whether fp32 and fp16 are multiplied as sums of bf16 in tiles: where that is known to be clearly quicker.

The kernel splits a float into three bf16 and a number of fp16 into two, and adds up the products that are not below its
last digit. Rows that have, see or get back what bf16 cannot say (infinity, NaN, numbers beyond 2^60 or very small ones)
are computed in floats after all, and only those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from truemask.backends.base import Request
from truemask.backends.costs.model import native_of_any_threads
from truemask.backends.costs.prediction import BACKWARD_PRODUCTS, cell_seconds, pace_name, paces
from truemask.backends.costs.rates import PARTS, Both, NativeRates
from truemask.backends.native.library import isa

LEAST_GAIN = 1.15  # packing parts takes longer, which dense calls of 1,024 keys hardly show and sparse ones do

_forced: ContextVar[bool | None] = ContextVar("in_parts", default=None)


@contextmanager
def forced(in_parts: bool | None) -> Iterator[None]:
    """Calls in the block are computed, and priced, in parts or not; None: by costs. To measure, and for tests."""
    token = _forced.set(in_parts)
    try:
        yield
    finally:
        _forced.reset(token)


def or_forced(planned: bool, r: Request) -> bool:
    """What was planned, or what is forced here where there is a choice."""
    wanted = _forced.get()
    return planned if wanted is None or pace_name(r) == "bf16" or not isa().startswith("amx") else wanted


def in_parts(r: Request) -> bool:
    """By the paces of both ways, forward and backward together: a backward weighs by what its forward summed. Parts
    must win by `LEAST_GAIN`.

    Never where there are no tiles, or that pace is not known; and whatever the number of threads, which no result
    depends on: by what was measured with another one, if there is nothing else.
    """
    if not isa().startswith("amx"):
        return False
    rates = native_of_any_threads()
    parts = rates.paces.get(pace_name(r) + PARTS)
    return parts is not None and _seconds(parts, r) * LEAST_GAIN < _seconds(paces(rates, r), r)


def _seconds(both: Both, r: Request) -> float:
    backward = BACKWARD_PRODUCTS * cell_seconds(both.backward, r) if r.grad else 0.0
    return cell_seconds(both.forward, r) + backward


def native_paces(rates: NativeRates, r: Request) -> Both:
    """Those of the way in which the call is computed."""
    floats = paces(rates, r)
    return rates.paces.get(pace_name(r) + PARTS, floats) if or_forced(in_parts(r), r) else floats
