"""What a constant is: the pace of a backend in one dtype and direction, and what each backend has beside that.

All numbers are above zero. `call...` and `step` are seconds, `rows...` shares, `mixed` a factor, `lanes` rows of a
vector, all others per second with all threads that they were measured with. Stored constants have these names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

R = TypeVar("R", bound="Rates")

DIRECTIONS = ("forward", "backward")
PARTS = "_parts"  # behind a dtype: computed as sums of bf16, which the native kernel can do where there are tiles
MOST_SHARE = 2.0  # of full speed that few rows may seem to reach: beyond that the two were not measured alike


def is_speed(path: str) -> bool:
    """Whether a constant is of a second, and more is better.

    >>> [is_speed(path) for path in ("fp32.forward.d64", "join", "call", "fp32.forward.rows32", "mixed")]
    [True, True, False, False, False]
    """
    name = path.split(".")[-1]
    return not name.startswith(("call", "step", "rows", "mixed", "threads", "lanes"))


@dataclass(frozen=True)
class Pace:
    """Useful arithmetic a second at head sizes of 64 and 128, and how much of it few rows reach.

    `step` is what a thread loses whenever it begins with a block of rows; `rows1` to `rows64` are the shares of full
    speed of so many rows at a time (see `prediction.rows_at_once`), which torch's kernel has and others ignore.
    """

    d64: float
    d128: float
    step: float = 1e-6
    rows1: float = 0.08
    rows32: float = 0.7
    rows64: float = 0.9


class Both(NamedTuple):
    """The paces of the two directions."""

    forward: Pace
    backward: Pace


@dataclass(frozen=True)
class Rates:
    """A backend's constants: `paces` by dtype; `call` is what any call takes, `call_backward` its backward beside."""

    call: float
    call_backward: float
    threads: float = 2  # that all of them were measured with
    paces: Mapping[str, Both] = field(default_factory=dict)
    dtypes: ClassVar = ("fp32", "fp64", "bf16", "fp16")

    @classmethod
    def of(cls: type[R], numbers: Mapping[str, Any]) -> R:
        """From what `numbers` gave; `ValueError` names the one that cannot be."""
        names = {one.name for one in fields(cls)} - {"paces"}
        given = {key: value for key, value in numbers.items() if key != "paces"}
        if set(given) != names:
            raise ValueError(f"{', '.join(sorted(set(given) ^ names))}: not what {cls.__name__} holds")
        paces = {dtype: Both(*(Pace(**both[way]) for way in DIRECTIONS)) for dtype, both in numbers["paces"].items()}
        if lacking := [dtype for dtype in cls.dtypes if dtype not in paces]:
            raise ValueError(f"nothing is said of {', '.join(lacking)}")
        rates = cls(**given, paces=paces)
        for path, number in rates.flat().items():
            if type(number) not in (int, float) or not 0 < number < math.inf:
                raise ValueError(f"{path} = {number!r} is no constant above 0")
        return rates

    def numbers(self) -> dict[str, Any]:
        """As plain dictionaries, as files hold them."""
        paces = {
            dtype: {way: asdict(pace) for way, pace in zip(DIRECTIONS, both, strict=True)}
            for dtype, both in self.paces.items()
        }
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "paces"} | {"paces": paces}

    def flat(self) -> dict[str, float]:
        """All numbers by path: `call`, `bf16.forward.d64`."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "paces"}
        for dtype, both in self.paces.items():
            for way, pace in zip(DIRECTIONS, both, strict=True):
                found |= {f"{dtype}.{way}.{name}": number for name, number in asdict(pace).items()}
        return found

    def absurd(self) -> str:
        """What no machine has, in words: few rows that are far quicker than full speed; empty if there is nothing."""
        for path, number in self.flat().items():
            if ".rows" in path and number > MOST_SHARE:
                return f"{path} = {number:.2f} of full speed is more than {MOST_SHARE}"
        return ""

    def with_threads(self: R, threads: int) -> R:
        """The same with so many threads, each as quick as now."""
        speeds = (path for path in self.flat() if is_speed(path) and path != "peak")
        return replace(self.scaled(dict.fromkeys(speeds, threads / self.threads)), threads=threads)

    def scaled(self: R, factors: Mapping[str, float]) -> R:
        """The same with the numbers of some paths multiplied."""
        numbers = self.numbers()
        for path, factor in factors.items():
            *way, name = path.split(".")
            place = numbers["paces"][way[0]][way[1]] if way else numbers
            place[name] *= factor
        return type(self).of(numbers)


@dataclass(frozen=True)
class SdpaRates(Rates):
    """`join`: bytes a second, of all its copies, at which a bias becomes dense and meets its mask; `masked`: scores a
    second to which a dense mask is added; `read`: bytes a second at which keys and values come that caches do not hold.
    """

    join: float = 3.7e9
    masked: float = 4e9
    read: float = 20e9


@dataclass(frozen=True)
class StripRates(Rates):
    """`call_group`: each group of strips; `copy`: bytes a second of rows gathered and added; `join` as above."""

    call_group: float = 60e-6
    copy: float = 24e9
    join: float = 1.5e9


@dataclass(frozen=True)
class NativeRates(Rates):
    """`read`: bytes a second at which keys and values of fp32 come, which few queries wait for, and `few`, their
    arithmetic; `read_halves` and `few_halves`, those of half precision; `pack` and `pack_halves`: bytes a second at
    which keys and values are laid out for many queries; `mixed`: how many times longer a MIXED tile takes; `lanes`:
    rows that a vector holds; `peak`: arithmetic a second in fp32 of one thread, by which `truemask doctor` knows the
    machine again.
    """

    dtypes: ClassVar = ("fp32", "bf16", "fp16")
    dtypes_in_parts: ClassVar = (f"fp32{PARTS}", f"fp16{PARTS}")  # paces of which are known or not

    read: float = 20e9
    read_halves: float = 15e9
    few: float = 60e9
    few_halves: float = 60e9
    pack: float = 30e9
    pack_halves: float = 30e9
    mixed: float = 1.5
    lanes: float = 16
    peak: float = 100e9
