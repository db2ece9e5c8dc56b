"""Who runs a call: every backend is asked, the cheapest willing one is kept, and the answer can be read (law 8)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from truemask.attention.planning.advice import advice
from truemask.attention.planning.table import explain_plan, refusal
from truemask.attention.validation import checked_length
from truemask.backends.base import Backend, Job, Request
from truemask.backends.context import check_backend
from truemask.backends.registry import BACKENDS
from truemask.diagnosis.convention_warnings import one_axis, top_left, upside_down
from truemask.errors import PlanError
from truemask.masks.core.mask import Mask

SHORT = 64  # queries up to which a choice is kept for other lengths: making it takes longer than such a call
FEW = 1024  # keys up to which such a choice holds at least


class Choice(NamedTuple):
    """A backend, the numbers of queries and keys that it was chosen for, and the numbers of keys that it is kept for.

    Of more than `SHORT` queries a choice is kept for its own sizes alone.
    """

    backend: Backend
    q_len: int
    kv_len: int
    low: int
    high: int

    @property
    def text(self) -> str:
        """A line of a printed plan, where the choice may be another call's."""
        if self.q_len > SHORT:
            return ""
        return f"chosen for q_len {self.q_len}, kv_len {self.kv_len}; kept while kv_len is {self.low} to {self.high}"


@dataclass(frozen=True, eq=False)
class Plan:
    """How one kind of call runs: `str(plan)` is the table of backends with their reasons and predicted costs.

    `backend` is the chosen one's name; `objections` says of every backend why it cannot run the call (an empty list: it
    can); `costs` are predicted seconds of those that can, `ways` how they would. For up to 64 queries, as in decoding,
    the backend may have been chosen for another number of keys (`choice` says which); everything else speaks of the
    call itself.
    """

    job: Job
    choice: Choice
    warning: str = ""

    @property
    def backend(self) -> str:
        """The name of the backend that runs the call."""
        return self.choice.backend.name

    @cached_property
    def objections(self) -> dict[str, list[str]]:
        """Of every backend, why it cannot run the call."""
        return {backend.name: backend.objections(self.job) for backend in BACKENDS}

    @cached_property
    def costs(self) -> dict[str, float]:
        """Predicted seconds of those that can run it."""
        return {backend.name: backend.cost(self.job) for backend in BACKENDS if not self.objections[backend.name]}

    @cached_property
    def ways(self) -> dict[str, str]:
        """How each of those would run it."""
        return {backend.name: backend.way(self.job) for backend in BACKENDS if not self.objections[backend.name]}

    @property
    def mask(self) -> Mask:
        """The mask that was planned for."""
        return self.job.mask

    @property
    def request(self) -> Request:
        """Sizes, dtype and flags of the call."""
        return self.job.request

    def __str__(self) -> str:
        notes = [self.choice.text, f"warning: {self.warning}" if self.warning else ""]
        return explain_plan(self.job, self.backend, self.objections, self.costs, self.ways, notes)

    def explain(self) -> str:
        """In sentences: why this backend, what each refusing one objects to, and what would make the call faster."""
        return advice(self.job, self.backend, self.objections, self.costs)

    def __repr__(self) -> str:
        return f"<Plan of `{self.mask}`: {self.backend}>"


def choose(job: Job, wanted: str | None) -> Choice:
    """Ask every backend about the job; `wanted` names the only one that may run it."""
    check_backend(wanted)
    objections = {backend.name: backend.objections(job) for backend in BACKENDS}
    willing = [backend for backend in BACKENDS if not objections[backend.name] and wanted in (None, backend.name)]
    if not willing:
        raise PlanError(refusal(job, objections, wanted))
    best = willing[0]
    if len(willing) > 1:
        best = min(willing, key=lambda backend: (backend.last_resort, backend.cost(job)))
    kv_len = job.request.kv_len
    low = 0 if kv_len <= FEW else kv_len // 4
    return Choice(best, job.request.q_len, kv_len, low, max(4 * kv_len, FEW))


def planned(job: Job, choice: Choice) -> Plan:
    """The choice as the plan of one job, with what should be said of it."""
    mask, r = job.mask, job.request
    slip = top_left(mask, r.q_len, r.kv_len) or one_axis(mask, r.q_len, r.kv_len)
    slip = slip or upside_down(mask, r.q_len, r.kv_len)
    return Plan(job, choice, slip)


def checked_job(mask: Mask, request: Request) -> Job:
    """The mask and the request as a job, if the mask can answer for the sizes (law 3)."""
    checked_length(mask, request.batch, request.heads, request.q_len, request.kv_len)
    return Job(mask, request)
