"""Timing: contestants take turns (A B C C B A ...), so that a noisy minute hits all of them; medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

Run = Callable[[], object]
LONG = 2.0  # seconds; a first run that takes longer is no warm-up any more, but counts
HOPELESS = 10.0  # times slower than the fastest


class Timing(NamedTuple):
    """Seconds of a run: the median, the lower and the upper quartile, the least, and how many runs that was."""

    median: float
    low: float
    high: float
    least: float
    runs: int

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


def clock(run: Run) -> float:
    """Seconds that one run takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def turns(
    contestants: Mapping[str, Run], seconds: float, *, least: int = 3, most: int = 1000, outsiders: Collection[str] = ()
) -> Iterator[tuple[str, float]]:
    """Who ran, and how long, one by one. Each gets about so many seconds, and `least` to `most` runs.

    The first run of each warms up and is not told, unless it is `LONG`. An outsider who is `HOPELESS` times slower in
    it than the fastest is out: that run is told and stays the only one.
    """
    first = {name: clock(run) for name, run in contestants.items()}
    spent, runs, going = dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0), list(contestants)
    for name, took in first.items():
        out = name in outsiders and took > HOPELESS * min(first.values())
        if out:
            going.remove(name)
        if out or took > LONG:
            spent[name], runs[name] = took, 1
            yield name, took
    order = 1
    while going:
        order = -order  # A B C C B A: nobody always follows the same rival
        for name in going[::order]:
            took = clock(contestants[name])
            spent[name] += took
            runs[name] += 1
            yield name, took
            if runs[name] >= most or (runs[name] >= least and spent[name] + took > seconds):
                going.remove(name)


def timing(found: list[float]) -> Timing:
    """The runs of one contestant, summed up."""
    low, median, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return Timing(median, low, high, min(found), len(found))


def race(
    contestants: Mapping[str, Run],
    seconds: float = 1.0,
    *,
    least: int = 3,
    most: int = 1000,
    outsiders: Collection[str] = (),
) -> dict[str, Timing]:
    """Every contestant's timing, as `turns` runs them.

    >>> found = race({"a": lambda: sum(range(10)), "b": lambda: None}, 0.0, least=5)
    >>> [(name, timing.runs) for name, timing in found.items()]
    [('a', 5), ('b', 5)]
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for name, took in turns(contestants, seconds, least=least, most=most, outsiders=outsiders):
        found[name].append(took)
    return {name: timing(times) for name, times in found.items()}
