"""The cache of plans: choices by structure, for decoding; exact calls and what their backends worked out for them.

Decoding asks about another offset and another length in every step. What is chosen for few queries is therefore kept
under the mask without its outermost `at` and `take` and the request without its lengths, and holds for a range of
lengths; only what the backend works out (`lower`) is made for the exact mask and sizes, once for all layers of a model.
Calls with many queries take longer than a plan: theirs are made for the exact call.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from truemask._choose import SHORT, Choice, Plan, checked_job, choose, planned
from truemask.backends.base import Backend, Job, Lowered, Request
from truemask.backends.registry import backends
from truemask.errors import describe
from truemask.masks.core import Mask
from truemask.masks.data_store import ordinary_tensors
from truemask.masks.reindex import At, Take

MOST_PLANS = 256
MOST_STEPS = 64  # of them for few queries: a long answer must not drive out the plans of training
MOST_BYTES = 1 << 28  # of lowered masks; the newest is kept whatever its size


def structure_key(mask: Mask, request: Request, wanted: str | None) -> Hashable:
    """What two calls with few queries must share to share a choice: all but offsets, positions and lengths."""
    varies = mask.batch_size != 1  # `take` may give each sample its own positions
    while isinstance(mask, (At, Take)):
        mask = mask.base
    rows = 1 << (request.q_len - 1).bit_length() if request.q_len else 0
    shape = request.bias_shape
    lengths = (*shape[:2], *(size > 1 for size in shape[2:])) if shape else ()
    return mask, varies, rows, request._replace(q_len=0, kv_len=0, bias_shape=lengths), wanted


@dataclass(eq=False)
class Entry:
    """The plan of an exact call, and what its backend has worked out for it."""

    key: Hashable
    plan: Plan
    lowered: Lowered | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def backend(self) -> Backend:
        """Who runs the call."""
        return self.plan.choice.backend

    @property
    def is_short(self) -> bool:
        """Whether the call has few queries, so that its plan is worth little."""
        return self.plan.job.request.q_len <= SHORT


class CacheInfo(NamedTuple):
    """What a plan cache has done: plans found and made, masks lowered, entries and bytes held now.

    A call that runs by an earlier call's choice, as in decoding, has found a plan.
    """

    hits: int
    misses: int
    lowered: int
    entries: int
    nbytes: int


class PlanCache:
    """Plans and lowered masks by key, the least recently used given up first; safe for threads."""

    def __init__(self, most_plans: int = MOST_PLANS, most_bytes: int = MOST_BYTES) -> None:
        self.most_plans, self.most_bytes = most_plans, most_bytes
        self.most_steps = min(MOST_STEPS, most_plans)
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._choices: OrderedDict[Hashable, list[Choice]] = OrderedDict()
        self._steps = 0  # entries for few queries
        self._hits = self._misses = self._lowered = self._nbytes = 0

    def entry(self, mask: Mask, request: Request, wanted: str | None) -> Entry:
        """The plan for such a call, made now if there is none."""
        if wanted is not None and not isinstance(wanted, str):
            raise TypeError(f"backend must be None or one of {', '.join(backends())}, got {describe(wanted)}")
        key = mask, request, wanted
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self._hits += 1
                return found
        with ordinary_tensors():
            made, family, new = self._made(key, *key)
        with self._lock:
            self._hits, self._misses = self._hits + (not new), self._misses + new
            if new and family is not None:
                self._keep(family, made.plan.choice)
            entry = self._entries.setdefault(key, made)
            self._steps += entry is made and made.is_short
            self._shrink()
        return entry

    def _made(self, key: Hashable, mask: Mask, request: Request, wanted: str | None) -> tuple[Entry, Hashable, bool]:
        """A plan, the family of calls that its choice is for (None: this call alone), and whether the choice is new."""
        job = checked_job(mask, request)
        family = structure_key(mask, request, wanted) if request.q_len <= SHORT else None
        choice = None if family is None else self._kept(family, job)
        new = choice is None
        if choice is None:
            choice = choose(job, wanted)  # outside the lock: two threads may do it twice, neither waits
        return Entry(key, planned(job, choice)), family, new

    def _kept(self, family: Hashable, job: Job) -> Choice | None:
        """An earlier choice that holds for this job, if its backend can run it."""
        with self._lock:
            choices = tuple(self._choices.get(family, ()))
        for choice in choices:
            if choice.low <= job.request.kv_len <= choice.high and not choice.backend.objections(job):
                return choice
        return None

    def _keep(self, family: Hashable, choice: Choice) -> None:
        self._choices.setdefault(family, []).append(choice)
        self._choices.move_to_end(family)
        while len(self._choices) > self.most_plans:
            self._choices.popitem(last=False)

    def lowered(self, entry: Entry) -> Lowered:
        """What the entry's backend works out ahead; done once, however many threads and layers ask."""
        if entry.lowered is not None:
            return entry.lowered
        with entry.lock:
            if entry.lowered is None:
                with ordinary_tensors(), torch.inference_mode(False), torch.no_grad():
                    made = entry.backend.lower(entry.plan.job)
                with self._lock:  # kept and counted in one step, so that nobody gives up bytes that were not counted
                    entry.lowered = made
                    self._lowered += 1
                    if self._entries.get(entry.key) is entry:
                        self._nbytes += made.nbytes
                        self._entries.move_to_end(entry.key)
                        self._shrink()
            return entry.lowered

    def _shrink(self) -> None:
        while self._steps > self.most_steps:
            self._drop(next(key for key, entry in self._entries.items() if entry.is_short))
        while len(self._entries) > 1 and (len(self._entries) > self.most_plans or self._nbytes > self.most_bytes):
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Hashable) -> None:
        oldest = self._entries.pop(key)
        self._steps -= oldest.is_short
        self._nbytes -= oldest.lowered.nbytes if oldest.lowered else 0

    def info(self) -> CacheInfo:
        """The counts so far."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, self._lowered, len(self._entries), self._nbytes)

    def clear(self) -> None:
        """Forget every plan and set the counts to zero."""
        with self._lock:
            self._entries.clear()
            self._choices.clear()
            self._hits = self._misses = self._lowered = self._nbytes = self._steps = 0


CACHE = PlanCache()
