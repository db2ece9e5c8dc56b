"""Timing: contestants take turns (A B C C B A ...), so that a noisy minute hits all of them; medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

Run = Callable[[], object]
LONG_RUN_SECONDS = 2.0  # seconds; a first run that takes longer is no warm-up any more, but counts
HOPELESS_RATIO = 10.0  # times slower than the fastest


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
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def turns(
    contestants: Mapping[str, Run], seconds: float, *, least: int = 3, most: int = 1000, outsiders: Collection[str] = ()
) -> Iterator[tuple[str, float]]:
    """Who ran, and how long, one by one. Each gets about so many seconds, and `least` to `most` runs.

    The first run of each warms up and is not told, unless it takes `LONG_RUN_SECONDS`. An outsider who is
    `HOPELESS_RATIO` times slower in it than the fastest is out: that run is told and stays the only one.
    """
    first = {name: clock(run) for name, run in contestants.items()}
    spent, runs, contestants_left = dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0), list(contestants)
    for name, seconds_taken in first.items():
        out = name in outsiders and seconds_taken > HOPELESS_RATIO * min(first.values())
        if out:
            contestants_left.remove(name)
        if out or seconds_taken > LONG_RUN_SECONDS:
            spent[name], runs[name] = seconds_taken, 1
            yield name, seconds_taken
    order = 1
    while contestants_left:
        order = -order  # A B C C B A: nobody always follows the same rival
        for name in contestants_left[::order]:
            seconds_taken = clock(contestants[name])
            spent[name] += seconds_taken
            runs[name] += 1
            yield name, seconds_taken
            if runs[name] >= most or (runs[name] >= least and spent[name] + seconds_taken > seconds):
                contestants_left.remove(name)


def timing(seconds: list[float]) -> Timing:
    """The runs of one contestant, summed up."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Timing(median, low, high, min(seconds), len(seconds))


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
    times_by_name: dict[str, list[float]] = {name: [] for name in contestants}
    for name, took in turns(contestants, seconds, least=least, most=most, outsiders=outsiders):
        times_by_name[name].append(took)
    return {name: timing(times) for name, times in times_by_name.items()}
