"""What the backends say of one job, each asked once: whoever chooses, prints or advises reads it here."""

from __future__ import annotations

from functools import cached_property

from truemask.backends.backend import Backend, Proposal
from truemask.backends.base import Job
from truemask.backends.registry import BACKENDS


class Proposals:
    """Every backend's answer, in the order in which a plan shows them."""

    def __init__(self, answers: dict[Backend, Proposal | list[str]]) -> None:
        self.answers = answers

    @classmethod
    def of(cls, job: Job) -> Proposals:
        """Ask all of them."""
        return cls({backend: backend.propose(job) for backend in BACKENDS})

    @cached_property
    def willing(self) -> dict[str, Proposal]:
        """The proposals there are, by the backend's name."""
        return {backend.name: answer for backend, answer in self.answers.items() if isinstance(answer, Proposal)}

    @cached_property
    def objections(self) -> dict[str, list[str]]:
        """Of every backend, why it cannot run the job; empty if it can."""
        return {backend.name: answer if isinstance(answer, list) else [] for backend, answer in self.answers.items()}

    @cached_property
    def costs(self) -> dict[str, float]:
        """Predicted seconds of those that can."""
        return {name: proposal.cost for name, proposal in self.willing.items()}

    @cached_property
    def descriptions(self) -> dict[str, str]:
        """How each of those would run it."""
        return {name: proposal.description for name, proposal in self.willing.items()}

    def best(self, wanted: str | None = None) -> Backend | None:
        """The cheapest willing backend, a last resort only if nobody else is; `wanted` names the only one in question.

        One whose cost nobody has measured is not held against `sdpa`.

        Nobody is asked for a cost where there is nothing to compare.
        """
        able = [backend for backend in self.answers if backend.name in self.willing and wanted in (None, backend.name)]
        if len(able) > 1:
            able.sort(key=lambda backend: (backend.last_resort, self.costs[backend.name]))
        sure = [backend for backend in able if not self.willing[backend.name].doubt]
        return next(iter(sure if sure and sure[0].name == "sdpa" else able), None)

    def forget(self, but: Backend | None = None) -> None:
        """Give up what was worked out to answer; `but` may need it to run the job."""
        for name, proposal in self.willing.items():
            if but is None or name != but.name:
                proposal.forget()
