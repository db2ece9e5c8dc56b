"""The cache of plans: choices by structure, for decoding; exact calls and what their backends worked out for them.

Decoding asks about another offset and another length in every step. What is chosen for few queries is therefore kept
under the mask without its outermost `at` and `take` and the request without its lengths, and holds for a range of
lengths; only what the backend works out (`lower`) is made for the exact mask and sizes, once for all layers of a model.
Calls with many queries take longer than a plan: theirs are made for the exact call.

What is kept is bounded in bytes: of what backends worked out, and of the masks, with their data and what they remember.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from truemask.attention.planning.selection import SHORT, Choice, Plan, Selection, checked_job, select, select_again
from truemask.backends.backend import Backend, Proposal
from truemask.backends.base import Job, Lowered, Request
from truemask.backends.context import check_backend, named_here
from truemask.common.real_tensors import ordinary_tensors
from truemask.masks.compose.reindex import At, Take
from truemask.masks.core.data import Data
from truemask.masks.core.mask import Mask

MOST_PLANS = 256
MOST_STEPS = 64  # of them for few queries: a long answer must not drive out the plans of training
MOST_BYTES = 1 << 28  # of masks and what was lowered; the newest is kept whatever its size


def structure_key(mask: Mask, request: Request, wanted: str | None) -> Hashable:
    """What two calls with few queries must share to share a choice: all but offsets, positions and lengths."""
    varies = mask.batch_size != 1  # `take` may give each sample its own positions
    rows = 1 << (request.q_len - 1).bit_length() if request.q_len else 0
    shape = request.bias_shape
    lengths = (*shape[:2], *(size > 1 for size in shape[2:])) if shape else ()
    return structure_of(mask), varies, rows, request._replace(q_len=0, kv_len=0, bias_shape=lengths), wanted


def structure_of(mask: Mask) -> Mask:
    """The mask without its outermost offsets and positions."""
    while isinstance(mask, (At, Take)):
        mask = mask.base
    return mask


# -- bytes -------------------------------------------------------------------------------------------------------------

PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, Request))  # what holds no array
Parts = dict[tuple[int, int], int]  # bytes of the memory at an address, by that and its size


def arrays_in(thing: object, counted: Mask | None = None) -> Parts:
    """The memory of all arrays that a mask or a job holds: its data, and what was worked out and is remembered.

    What single numbers take, and what a user's function holds, is not counted, nor what `counted` holds.

    >>> from truemask.masks.leaves.per_token import keys
    >>> sum(arrays_in(keys([True] * 500)).values()) >= 500
    True
    """
    found: Parts = {}
    seen = {id(counted)}
    left: list[Any] = [thing]
    while left:
        one = left.pop()
        kind = type(one)
        if kind in PLAIN or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, (Tensor, np.ndarray)):
            place = memory_of(one)
            found.update({place: place[1]} if place else {})
        elif kind is dict:
            left += list(one.values())  # in one step: another thread may be remembering something
        elif isinstance(one, (tuple, list)):
            left += () if kind is list and one and type(one[0]) in PLAIN else one
        elif kind.__module__.startswith("truemask."):
            left += list(getattr(one, "__dict__", {}).values())
            left += [one.tensor] if kind is Data else []
    return found


def memory_of(array: Tensor | np.ndarray) -> tuple[int, int] | None:
    """The address and the bytes of the memory that an array is part of; None for a single number."""
    root: Any = array
    while isinstance(root, np.ndarray) and isinstance(root.base, (np.ndarray, Tensor)):
        root = root.base
    if isinstance(root, np.ndarray):
        return root.__array_interface__["data"][0], root.nbytes
    if root.numel() < 2:
        return None
    storage = root.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class Tally:
    """Bytes that several holders have: what they share counts once."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._holders: Counter[tuple[int, int]] = Counter()

    def swap(self, before: Parts, after: Parts) -> None:
        """A holder of `before` holds `after` from now on."""
        for part, size in after.items():
            self.nbytes += 0 if self._holders[part] else size
            self._holders[part] += 1
        for part, size in before.items():
            self._holders[part] -= 1
            if not self._holders[part]:
                self.nbytes -= size
                del self._holders[part]


# -- what is kept ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Entry:
    """The plan of an exact call, and what its backend has worked out for it."""

    key: Hashable
    plan: Plan
    proposal: Proposal
    lowered: Lowered | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: Parts = field(default_factory=dict[tuple[int, int], int])
    used: int = 0  # when last
    counted: Mask | None = None  # what its family holds, and has been counted there

    def weighed(self, made: Lowered | None = None) -> Parts:
        """The memory that it holds now, or with what has been lowered just now."""
        lowered = self.lowered if made is None else made
        own = {} if lowered is None else {(-id(self), 0): lowered.nbytes}
        return {**arrays_in(self.plan.job, self.counted), **own}

    @property
    def backend(self) -> Backend:
        """Who runs the call."""
        return self.plan.choice.backend

    @property
    def is_short(self) -> bool:
        """Whether the call has few queries, so that its plan is worth little."""
        return self.plan.job.request.q_len <= SHORT


@dataclass(eq=False)
class Family:
    """The choices for calls that share a structure."""

    key: Hashable
    mask: Mask
    choices: list[Choice] = field(default_factory=list[Choice])
    parts: Parts = field(default_factory=dict[tuple[int, int], int])
    used: int = 0

    def weighed(self) -> Parts:
        """The memory that it holds now."""
        return arrays_in(self.mask)


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

    def __init__(self, most_plans: int = MOST_PLANS, most_bytes: int = MOST_BYTES) -> None:
        self.most_plans, self.most_bytes = most_plans, most_bytes
        self.most_steps = min(MOST_STEPS, most_plans)
        self._lock = threading.Lock()
        self._clock = itertools.count(1)
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._families: OrderedDict[Hashable, Family] = OrderedDict()
        self._tally = Tally()
        self._steps = 0  # entries for few queries
        self._hits = self._misses = self._lowered = 0

    def entry(self, mask: Mask, request: Request, wanted: str | None) -> Entry:
        """The plan for such a call, made now if there is none."""
        check_backend(wanted)
        wanted = named_here(wanted)
        key = mask, request, wanted
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._touch(self._entries, found)
                self._hits += 1
                return found
        with ordinary_tensors():
            made, family, new = self._made(key, *key)
        with self._lock:
            self._hits, self._misses = self._hits + (not new), self._misses + new
            if new and family is not None:
                self._keep(family, made.plan)
            entry = self._entries.setdefault(key, made)
            if entry is made:
                self._steps += made.is_short
                self._touch(self._entries, made)
                if family is None:
                    self._weigh(made)
                elif family in self._families:  # a step of decoding, which is weighed when it is lowered
                    made.counted = self._families[family].mask
            self._shrink()
        return entry

    def _made(self, key: Hashable, mask: Mask, request: Request, wanted: str | None) -> tuple[Entry, Hashable, bool]:
        """A plan, the family of calls that its choice is for (None: this call alone), and whether the choice is new."""
        job = checked_job(mask, request)
        family = structure_key(mask, request, wanted) if request.q_len <= SHORT else None
        selection = None if family is None else self._kept(family, job)
        new = selection is None
        if selection is None:
            selection = select(job, wanted)  # outside the lock: two threads may do it twice, neither waits
        return Entry(key, selection.plan(job), selection.proposal), family, new

    def _kept(self, family: Hashable, job: Job) -> Selection | None:
        """By an earlier choice that holds for this job."""
        with self._lock:
            known = self._families.get(family)
            if known is None:
                return None
            self._touch(self._families, known)
            choices = tuple(known.choices)
        return next(filter(None, (select_again(job, choice) for choice in choices)), None)

    def _keep(self, key: Hashable, plan: Plan) -> None:
        family = self._families.setdefault(key, Family(key, structure_of(plan.mask)))
        family.choices.append(plan.choice)
        self._touch(self._families, family)
        self._weigh(family)

    def _touch(self, kept: OrderedDict[Hashable, Any], one: Entry | Family) -> None:
        kept.move_to_end(one.key)
        one.used = next(self._clock)

    def _weigh(self, one: Entry | Family) -> None:
        self._count(one, one.weighed())

    def _count(self, one: Entry | Family, parts: Parts) -> None:
        self._tally.swap(one.parts, parts)
        one.parts = parts

    def lowered(self, entry: Entry) -> Lowered:
        """What the entry's backend works out ahead; done once, however many threads and layers ask."""
        if entry.lowered is not None:
            return entry.lowered
        with entry.lock:
            if entry.lowered is None:
                with ordinary_tensors(), torch.inference_mode(False), torch.no_grad():
                    made = entry.proposal.lower()
                    entry.proposal.forget()
                with self._lock:  # weighed, kept and counted in one step: nobody gives up what was not counted
                    parts = entry.weighed(made)
                    entry.lowered = made
                    self._lowered += 1
                    if self._entries.get(entry.key) is entry:
                        self._touch(self._entries, entry)
                        self._count(entry, parts)
                        self._shrink()
            return entry.lowered

    def _shrink(self) -> None:
        while self._steps > self.most_steps:
            self._drop(next(entry for entry in self._entries.values() if entry.is_short))
        while len(self._entries) > self.most_plans:
            self._drop(next(iter(self._entries.values())))
        while len(self._families) > self.most_plans:
            self._drop(next(iter(self._families.values())))
        while self._tally.nbytes > self.most_bytes and (oldest := self._oldest()):
            self._drop(oldest)

    def _oldest(self) -> Entry | Family | None:
        """What was used least recently, the newest of each kind aside."""
        kinds = self._entries, self._families
        heads = [next(iter(kept.values())) for kept in kinds if len(kept) > 1]
        return min(heads, key=lambda one: one.used, default=None)

    def _drop(self, one: Entry | Family) -> None:
        if isinstance(one, Entry):
            del self._entries[one.key]
            self._steps -= one.is_short
        else:
            del self._families[one.key]
        self._tally.swap(one.parts, {})

    def info(self) -> CacheInfo:
        """The counts so far."""
        with self._lock:
            for one in (*self._entries.values(), *self._families.values()):
                self._weigh(one)  # a mask may have worked out more since
            return CacheInfo(self._hits, self._misses, self._lowered, len(self._entries), self._tally.nbytes)

    def clear(self) -> None:
        """Forget every plan and set the counts to zero."""
        with self._lock:
            self._entries.clear()
            self._families.clear()
            self._tally = Tally()
            self._hits = self._misses = self._lowered = self._steps = 0


CACHE = PlanCache()
