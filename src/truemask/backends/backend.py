"""The contract of a backend: what it declares that it can do, what it proposes for a job, and how it runs it.

What is declared: the options, dtypes and kinds of bias that it honours on each kind of device, by the names of
`Request`'s fields, and how far its results may be from fp64. What it does not declare it refuses, option by option, in
its own words where it has some: an option that is new to `attend` is refused by all until they say that they have it.

A plan asks once, `propose(job)`: the answer is a list of reasons why not, in words, or a `Proposal`. No data is touched
to make either, nothing large is built, and no reason depends on the values of tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from truemask.backends.base import OPTIONS, Inputs, Job, Lowered, Request, Result

ANY_DEVICE = "any"  # the key for every device that is not named
BIASES = frozenset(("tensor", "alibi", "relative", "object"))


class Capabilities(NamedTuple):
    """What a backend honours on one kind of device."""

    options: frozenset[str]  # of `OPTIONS`
    biases: frozenset[str] = BIASES  # of the kinds of `Request.bias`
    dtypes: frozenset[torch.dtype] | None = None  # None: those that `tolerance` names

    def lacks(self, r: Request) -> set[str]:
        """The fields of the request that ask for more."""
        lacks = r.options - self.options
        if r.bias and r.bias not in self.biases:
            lacks.add("bias")
        return lacks


class Around(NamedTuple):
    """The rows around a step of decoding, as a call of their own, and which of them the step is."""

    job: Job
    row: int


class Proposal(ABC):
    """How a backend would run one job.

    What it costs and how it is described is worked out when somebody asks. What is worked out for that and serves
    `lower` too is kept until then, or until somebody else is chosen and `forget` is called.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    @abstractmethod
    def cost(self) -> float:
        """Predicted seconds on this kind of machine, of the forward, and of the backward too if `request.grad`."""

    @property
    @abstractmethod
    def description(self) -> str:
        """How it would run the job, in a few words for the plan's table."""

    @abstractmethod
    def lower(self) -> Lowered:
        """Whatever can be worked out before the tensors come (a dense mask, lists of tiles).

        It happens once for each plan; the result is immutable, shared between threads and layers, and says its own size
        in bytes.
        """

    def around(self) -> Around | None:
        """The call of many rows that this one's only row is one of, if what is lowered for those serves each of them.

        So that steps of decoding share it. None: the row is lowered for itself.
        """
        return None

    @property
    def doubt(self) -> bool:
        """Whether the cost is too uncertain to be held against `sdpa`, where that is the cheapest of the others."""
        return False

    def forget(self) -> None:  # noqa: B027 - most have nothing to give up
        """Give up all but numbers and words."""


class Backend(ABC):
    """One way to compute attention; `base` says what it owes."""

    name: ClassVar[str]  # what `backend=` calls it
    devices: ClassVar[Mapping[str, Capabilities]]  # by `torch.device.type`, or `ANY_DEVICE`
    tolerance: ClassVar[Mapping[torch.dtype, float]]  # of results against fp64, relative to the largest (at least 1)
    words: ClassVar[Mapping[str, str]] = {}  # what to say of "device", "dtype" and options that it lacks, in order

    @property
    def last_resort(self) -> bool:
        """Whether it is chosen only by name, or when nobody else is willing."""
        return False

    @abstractmethod
    def propose(self, job: Job) -> Proposal | list[str]:
        """How it would run the job, which is a promise to run it; or every reason why it cannot."""

    def can_run(self, job: Job) -> bool:
        """Whether it would."""
        return isinstance(self.propose(job), Proposal)

    @abstractmethod
    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        """The attention."""

    def repeated(self, lowered: Lowered, inputs: Inputs, job: Job) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`run` for out alone, without gradients, for more q, k and v of the same make as those of `inputs`."""
        numbers = inputs[3:]
        return lambda q, k, v: self.run(lowered, Inputs(q, k, v, *numbers), job).out

    def unavailable(self) -> str:
        """Why it runs nothing at all here; empty if it does."""
        return ""

    def lacking(self, r: Request) -> list[str]:
        """The reasons that follow from what it declares."""
        able = self.devices.get(r.device.type) or self.devices.get(ANY_DEVICE)
        reasons = [] if able else [self._words("device", r)]
        if why := self.unavailable():
            reasons.append(why)
        able = able or self.devices["cpu"]
        lacks = able.lacks(r)
        if r.dtype not in (able.dtypes or self.tolerance):
            lacks.add("dtype")
        if lacks:
            order = dict.fromkeys((*self.words, "dtype", *OPTIONS))
            reasons += [self._words(name, r) for name in order if name in lacks]
        return reasons

    def _words(self, name: str, r: Request) -> str:
        text = self.words.get(name, f"{name}: the backend {self.name!r} has none")
        return text.format_map(r._asdict())
