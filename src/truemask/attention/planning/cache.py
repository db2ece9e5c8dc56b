"""The cache of plans: choices by structure, for decoding; exact calls and what their backends worked out for them.

Decoding asks about another offset and another length in every step. What is chosen for few queries is therefore kept
under the mask without its outermost `at` and `take` and the request without its lengths, and holds for a range of
lengths; only what the backend works out (`lower`) is made for the exact mask and sizes, once for all layers of a model.
Calls with many queries take longer than a plan: theirs are made for the exact call. Prices depend on the number of
threads that torch uses, so every key has it.

What is kept is bounded in bytes: of what backends worked out, and of the masks, with their data and what they remember.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from truemask.attention.planning.selection import (
    SHORT_QUERIES,
    Choice,
    Plan,
    Selection,
    checked_job,
    select,
    select_again,
)
from truemask.attention.planning.shelf import Holder, Shelf
from truemask.backends.backend import Backend, Proposal
from truemask.backends.base import Job, Lowered, Request
from truemask.common.memory import Memory, arrays_in, memory_of
from truemask.common.real_tensors import ordinary_tensors
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.core.memory import mask_memory
from truemask.masks.structure.placement import without_positions

MAX_PLANS = 256
MAX_STEPS = 64  # of them for few queries: a long answer must not drive out the plans of training
MAX_BYTES = 1 << 28  # of masks and what was lowered; the newest is kept whatever its size


def structure_key(mask: Mask, request: Request, wanted: str | None, threads: int) -> Hashable:
    """What two calls with few queries must share to share a choice: all but offsets, positions and lengths."""
    varies = mask.batch_size != 1  # `take` may give each sample its own positions
    rows = 1 << (request.q_len - 1).bit_length() if request.q_len else 0
    shape = request.bias_shape
    lengths = (*shape[:2], *(size > 1 for size in shape[2:])) if shape else ()
    sizeless = request._replace(q_len=0, kv_len=0, bias_shape=lengths)
    return without_positions(mask), varies, rows, sizeless, wanted, threads


# -- what is kept ------------------------------------------------------------------------------------------------------


class Entry(Holder):
    """The plan of an exact call, and what its backend has worked out for it."""

    def __init__(self, key: Hashable, plan: Plan, selection: Selection) -> None:
        super().__init__(key)
        self.plan, self.proposal = plan, selection.proposal
        self.lowered: Lowered | None = None
        self.lock = threading.Lock()
        self.structure: Mask | None = None  # what its family holds, and has been counted there

    def memory(self) -> Memory:
        """The mask, what was worked out for the job and to name its price, and what was lowered."""
        worked_out = memory_of(arrays_in(list(vars(self.proposal).values())))
        lowered = {} if self.lowered is None else {(-id(self), 0): self.lowered.nbytes}
        return mask_memory(self.plan.mask, self.structure) | worked_out | lowered

    @property
    def backend(self) -> Backend:
        """Who runs the call."""
        return self.plan.choice.backend

    @property
    def is_short(self) -> bool:
        """Whether the call has few queries, so that its plan is worth little."""
        return self.plan.request.q_len <= SHORT_QUERIES


class Family(Holder):
    """The choices for calls that share a structure."""

    def __init__(self, key: Hashable, mask: Mask) -> None:
        super().__init__(key)
        self.mask = mask
        self.choices: list[Choice] = []

    def memory(self) -> Memory:
        """The mask."""
        return mask_memory(self.mask)


class Rows(Holder):
    """What was lowered for rows of which each is a step of decoding; None where the mask has no exact form for them."""

    def __init__(self, key: Hashable, job: Job, backend: Backend) -> None:
        super().__init__(key)
        self.mask, self.lowered = job.mask, self._lowered(job, backend)

    @staticmethod
    def _lowered(job: Job, backend: Backend) -> Lowered | None:
        try:
            checked_job(job.mask, job.request)
        except MaskError:  # its data ends before
            return None
        proposal = backend.propose(job) if job.exact is not None else None
        return proposal.lower() if isinstance(proposal, Proposal) else None

    def memory(self) -> Memory:
        """The mask, and what was lowered."""
        return mask_memory(self.mask) | ({} if self.lowered is None else {(-id(self), 0): self.lowered.nbytes})


Kept = Entry | Family | Rows


class CacheInfo(NamedTuple):
    """What a plan cache has done: plans found and made, masks lowered, entries and bytes held now.

    The bytes are those of what was lowered and of the masks themselves, each array once, whoever else holds it too. A
    call that runs by an earlier call's choice, as in decoding, has found a plan.
    """

    hits: int
    misses: int
    lowered: int
    entries: int
    nbytes: int


class PlanCache:
    """Plans and lowered masks by key, the least recently used given up first; safe for threads."""

    def __init__(self, most_plans: int = MAX_PLANS, most_bytes: int = MAX_BYTES) -> None:
        self.most_plans, self.most_bytes = most_plans, most_bytes
        self.most_steps = min(MAX_STEPS, most_plans)
        self._lock = threading.Lock()
        self._kept: Shelf[Kept] = Shelf()
        self._numbers: Counter[str] = (
            Counter()
        )  # of entries, of those for few queries, of families, of rows; and of events

    def entry(self, mask: Mask, request: Request, wanted: str | None) -> Entry:
        """The plan for such a call, made now if there is none; `wanted` names the backend."""
        threads = torch.get_num_threads()
        key = mask, request, wanted, threads
        with self._lock:
            if isinstance(kept := self._kept.get(key), Entry):
                self._numbers["hits"] += 1
                return kept
        with ordinary_tensors():
            job = checked_job(mask, request)
            is_short = request.q_len <= SHORT_QUERIES
            family = structure_key(mask, request, wanted, threads) if is_short else None
            selection = None if family is None else self._selected_before(family, job)
            is_new = selection is None
            if selection is None:
                selection = select(job, wanted)  # outside the lock: two threads may do it twice, neither waits
            entry = Entry(key, selection.plan(job), selection)
        with self._lock:
            self._numbers["misses" if is_new else "hits"] += 1
            if is_new and family is not None:
                self._keep_choice(family, entry.plan)
            return self._keep(entry, family)

    def _selected_before(self, key: Hashable, job: Job) -> Selection | None:
        """By an earlier choice that holds for this job."""
        with self._lock:
            family = self._kept.get(key)
            choices = list(family.choices) if isinstance(family, Family) else []
        return next(filter(None, (select_again(job, choice) for choice in choices)), None)

    def _keep_choice(self, key: Hashable, plan: Plan) -> None:
        family = self._kept.get(key)
        if not isinstance(family, Family):
            family = Family(key, without_positions(plan.mask))
            self._put(family)
        family.choices.append(plan.choice)
        self._kept.weigh(family)

    def _keep(self, entry: Entry, family: Hashable) -> Entry:
        """The entry, or another thread's that came first. A step of decoding is weighed when it is lowered."""
        if isinstance(kept := self._kept.get(entry.key), Entry):
            return kept
        self._put(entry)
        if family is None:
            self._kept.weigh(entry)
        elif isinstance(holder := self._kept.get(family), Family):
            entry.structure = holder.mask
            self._kept.touch(entry)  # newer than its family
        self._shrink()
        return entry

    def lowered(self, entry: Entry) -> Lowered:
        """What the entry's backend works out ahead; done once, however many threads and layers ask."""
        if entry.lowered is not None:
            return entry.lowered
        with entry.lock:
            if entry.lowered is None:
                with ordinary_tensors(), torch.inference_mode(False), torch.no_grad():
                    lowered = self._lowered_around(entry) or entry.proposal.lower()
                    entry.proposal.forget()
                    if entry.plan.request.bias_object:
                        _ = entry.plan.job.positions  # now, so that they are weighed with the job
                with self._lock:  # kept and counted in one step: nobody gives up what was not counted
                    entry.lowered = lowered
                    self._numbers["lowered"] += 1
                    if self._kept.get(entry.key) is entry:
                        self._kept.weigh(entry)
                        self._shrink()
            return entry.lowered

    def _lowered_around(self, entry: Entry) -> Lowered | None:
        """What an entry for the rows around holds: steps of decoding share it."""
        around = entry.proposal.around()
        if around is None:
            return None
        key = Rows, around.job.mask, around.job.request, entry.plan.backend, torch.get_num_threads()
        with self._lock:
            rows = self._kept.get(key)
        if not isinstance(rows, Rows):
            rows = Rows(key, around.job, entry.backend)
            with self._lock:
                self._put(rows)
                self._kept.weigh(rows)
                self._shrink()
        return None if rows.lowered is None else rows.lowered._replace(nbytes=0, row=around.row)

    def _put(self, holder: Kept) -> None:
        self._kept.put(holder)
        self._numbers.update(_counted_as(holder))

    def _drop(self, holder: Kept) -> None:
        self._kept.drop(holder)
        self._numbers.subtract(_counted_as(holder))

    def _drop_oldest(self, condition: Callable[[Kept], bool]) -> bool:
        """Whether there was one."""
        oldest = next(filter(condition, self._kept), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _shrink(self) -> None:
        limits = {
            "steps": self.most_steps,
            "rows": self.most_steps,
            "entries": self.most_plans,
            "families": self.most_plans,
        }
        for name, most in limits.items():
            while self._numbers[name] > most:
                self._drop_oldest(lambda holder, name=name: name in _counted_as(holder))
        while self._kept.nbytes > self.most_bytes and self._drop_oldest(self._is_not_the_last):
            pass

    def _is_not_the_last(self, holder: Kept) -> bool:
        """The newest entry and the newest family are kept whatever their size."""
        return self._numbers[_counted_as(holder)[0]] > 1

    def info(self) -> CacheInfo:
        """The counts so far."""
        with self._lock:
            for holder in self._kept:
                self._kept.weigh(holder)  # a mask may have worked out more since
            n = self._numbers
            return CacheInfo(n["hits"], n["misses"], n["lowered"], n["entries"], self._kept.nbytes)

    def clear(self) -> None:
        """Forget every plan and set the counts to zero."""
        with self._lock:
            self._kept.clear()
            self._numbers.clear()


def _counted_as(holder: Kept) -> tuple[str, ...]:
    if not isinstance(holder, Entry):
        return ("families",) if isinstance(holder, Family) else ("rows",)
    return ("entries", "steps") if holder.is_short else ("entries",)


CACHE = PlanCache()
