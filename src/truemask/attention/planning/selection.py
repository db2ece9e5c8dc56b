"""Who runs a call: every backend is asked, the cheapest willing one is kept, and the answer can be read (law 8)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from truemask.attention.planning.advice import advice
from truemask.attention.planning.proposals import Proposals
from truemask.attention.planning.table import explain_plan, refusal
from truemask.attention.validation import checked_length
from truemask.backends.backend import Backend, Proposal
from truemask.backends.base import Job, Request
from truemask.backends.context import check_backend
from truemask.diagnosis.convention_warnings import one_axis, top_left, upside_down
from truemask.errors import PlanError
from truemask.masks.core.mask import Mask

SHORT_QUERIES = 64  # queries up to which a choice is kept for other lengths: making it takes longer than such a call
SHORT_KEYS = 1024  # keys up to which such a choice holds at least


class Choice(NamedTuple):
    """A backend, the numbers of queries and keys that it was chosen for, and the numbers of keys that it is kept for.

    Of more than `SHORT_QUERIES` queries a choice is kept for its own sizes alone.
    """

    backend: Backend
    q_len: int
    kv_len: int
    low: int
    high: int

    @property
    def text(self) -> str:
        """A line of a printed plan, where the choice may be another call's."""
        if self.q_len > SHORT_QUERIES:
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
    answers: Proposals | None = field(default=None, repr=False)  # if all were asked to choose for this very call

    def __getstate__(self) -> dict[str, Any]:
        """What backends answered stays behind, and is asked again."""
        return {"job": self.job, "choice": self.choice, "warning": self.warning, "answers": None}

    @property
    def backend(self) -> str:
        """The name of the backend that runs the call."""
        return self.choice.backend.name

    @cached_property
    def proposals(self) -> Proposals:
        """What every backend says of the call."""
        return self.answers or Proposals.of(self.job)

    @property
    def objections(self) -> dict[str, list[str]]:
        """Of every backend, why it cannot run the call."""
        return self.proposals.objections

    @property
    def costs(self) -> dict[str, float]:
        """Predicted seconds of those that can run it."""
        return self.proposals.costs

    @property
    def ways(self) -> dict[str, str]:
        """How each of those would run it."""
        return self.proposals.descriptions

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
        text = explain_plan(self.job, self.backend, self.proposals, notes)
        self.proposals.forget(but=self.choice.backend)
        return text

    def explain(self) -> str:
        """In sentences: why this backend, what each refusing one objects to, and what would make the call faster."""
        text = advice(self.job, self.backend, self.proposals)
        self.proposals.forget(but=self.choice.backend)
        return text

    def __repr__(self) -> str:
        return f"<Plan of `{self.mask}`: {self.backend}>"


class Selection(NamedTuple):
    """Who runs a job, and how: the choice, its proposal, and what all said if all were asked."""

    choice: Choice
    proposal: Proposal
    answers: Proposals | None = None

    def plan(self, job: Job) -> Plan:
        """The plan of the job, with what should be said of its mask."""
        mask, r = job.mask, job.request
        warning = top_left(mask, r.q_len, r.kv_len) or one_axis(mask, r.q_len, r.kv_len)
        return Plan(job, self.choice, warning or upside_down(mask, r.q_len, r.kv_len), self.answers)


def select(job: Job, wanted: str | None) -> Selection:
    """Ask every backend about the job; `wanted` names the only one that may run it."""
    check_backend(wanted)
    answers = Proposals.of(job)
    backend = answers.best(wanted)
    answers.forget(but=backend)
    if backend is None:
        raise PlanError(refusal(job, answers.objections, wanted))
    kv_len = job.request.kv_len
    low = 0 if kv_len <= SHORT_KEYS else kv_len // 4
    choice = Choice(backend, job.request.q_len, kv_len, low, max(4 * kv_len, SHORT_KEYS))
    return Selection(choice, answers.willing[backend.name], answers)


def select_again(job: Job, choice: Choice) -> Selection | None:
    """By an earlier choice that holds for this job, if its backend can run it."""
    if not choice.low <= job.request.kv_len <= choice.high:
        return None
    proposal = choice.backend.propose(job)
    return Selection(choice, proposal) if isinstance(proposal, Proposal) else None


def checked_job(mask: Mask, request: Request) -> Job:
    """The mask and the request as a job, if the mask can answer for the sizes (law 3)."""
    checked_length(mask, request.batch, request.heads, request.q_len, request.kv_len)
    return Job(mask, request)
