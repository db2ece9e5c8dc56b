"""Whether fp32 and fp16 are multiplied as sums of bf16 in tiles: where that was measured to be the quicker way.

The kernel splits a float into three bf16 and a number of fp16 into two, and adds up the products that are not below its
last digit; what bf16 cannot say (infinity, NaN, beyond 3.39e38, below 2^-110) it computes in floats after all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from truemask.backends.base import Request
from truemask.backends.costs.prediction import cell_seconds, pace_name, paces
from truemask.backends.costs.rates import PARTS, Both, NativeRates
from truemask.backends.native.library import isa


class InParts(NamedTuple):
    """Of the two directions of a call."""

    forward: bool
    backward: bool


NEITHER, BOTH = InParts(False, False), InParts(True, True)
_forced: InParts | None = None


@contextmanager
def forced(in_parts: InParts | None) -> Iterator[None]:
    """Calls in the block are computed, and priced, in parts or not; None: by costs. To measure, and for tests."""
    global _forced
    before, _forced = _forced, in_parts
    try:
        yield
    finally:
        _forced = before


NEITHER = InParts(False, False)


def or_forced(planned: InParts, r: Request) -> InParts:
    """What was planned, or what is forced here where there is a choice."""
    if _forced is None or pace_name(r) == "bf16" or not isa().startswith("amx"):
        return planned
    return _forced


def in_parts(rates: NativeRates, r: Request) -> InParts:
    """By the paces of both ways at the call's head size; never where there are no tiles, or that pace is not known."""
    name = pace_name(r)
    parts = rates.paces.get(name + PARTS)
    if parts is None or not isa().startswith("amx"):
        return or_forced(NEITHER, r)
    quicker = (cell_seconds(a, r) < cell_seconds(b, r) for a, b in zip(parts, rates.paces[name], strict=True))
    return or_forced(InParts(*quicker), r)


def native_paces(rates: NativeRates, r: Request) -> Both:
    """Those of the way in which the call is computed."""
    floats = paces(rates, r)
    parts = rates.paces.get(pace_name(r) + PARTS, floats)
    return Both(*(b if way else a for a, b, way in zip(floats, parts, in_parts(rates, r), strict=True)))
