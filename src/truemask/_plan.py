"""Who runs a call: every backend is asked, the cheapest willing one is kept, and the answer can be read (law 8)."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from truemask._call import read_call
from truemask._door import check_flag, checked_length
from truemask._explain import explain_plan, refusal, top_left_warning, upside_down_warning
from truemask.backends.base import Backend, Job, Lowered, Request
from truemask.backends.registry import BACKENDS, backends
from truemask.errors import MaskError, PlanError, describe, suggest
from truemask.masks.core import Mask
from truemask.masks.data_store import whole

MOST_PLANS = 256
MOST_BYTES = 1 << 28  # of lowered masks; the newest is kept whatever its size


@dataclass(frozen=True, eq=False)
class Plan:
    """How one kind of call runs: `str(plan)` is the table of backends with their reasons and predicted costs.

    `backend` is the chosen one's name; `objections` says of every backend why it cannot run the call (an empty list: it
    can); `costs` are predicted seconds of those that can.
    """

    job: Job
    backend: str
    objections: dict[str, list[str]]
    costs: dict[str, float]
    ways: dict[str, str]
    warning: str = ""

    @property
    def mask(self) -> Mask:
        """The mask that was planned for."""
        return self.job.mask

    @property
    def request(self) -> Request:
        """Sizes, dtype and flags of the call."""
        return self.job.request

    def __str__(self) -> str:
        return explain_plan(self.job, self.backend, self.objections, self.costs, self.ways, self.warning)

    def __repr__(self) -> str:
        return f"<Plan of `{self.mask}`: {self.backend}>"


def choose(mask: Mask, request: Request, wanted: str | None) -> Plan:
    """Ask every backend about the call; `wanted` names the only one that may run it."""
    checked_length(mask, request.batch, request.heads, request.q_len, request.kv_len)
    if wanted is not None and wanted not in backends():
        raise PlanError(
            f"there is no backend {wanted!r}{suggest(str(wanted), backends())} (known: {', '.join(backends())})"
        )
    job = Job(mask, request)
    objections = {backend.name: backend.objections(job) for backend in BACKENDS}
    willing = [backend for backend in BACKENDS if not objections[backend.name]]
    allowed = [backend for backend in willing if wanted in (None, backend.name)]
    if not allowed:
        raise PlanError(refusal(job, objections, wanted))
    costs = {backend.name: backend.cost(job) for backend in willing}
    best = min(allowed, key=lambda backend: (backend.last_resort, costs[backend.name]))
    ways = {backend.name: backend.way(job) for backend in willing}
    return Plan(job, best.name, objections, costs, ways, top_left_warning(job) or upside_down_warning(job))


# -- the cache ---------------------------------------------------------------------------------------------------------


def plan_key(mask: Mask, request: Request, wanted: str | None) -> Hashable:
    """What two calls must share to share a plan.

    The one place that knows: when offsets travel as numbers, here is where `at` is peeled off the mask and lengths
    become buckets.
    """
    return mask, request, wanted


@dataclass(eq=False)
class Entry:
    """A plan, its backend, and what that backend has worked out for it."""

    key: Hashable
    plan: Plan
    backend: Backend
    lowered: Lowered | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class CacheInfo(NamedTuple):
    """What a plan cache has done: plans found and made, masks lowered, entries and bytes held now."""

    hits: int
    misses: int
    lowered: int
    entries: int
    nbytes: int


class PlanCache:
    """Plans and lowered masks by key, the least recently used given up first; safe for threads."""

    def __init__(self, most_plans: int = MOST_PLANS, most_bytes: int = MOST_BYTES) -> None:
        self.most_plans, self.most_bytes = most_plans, most_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._hits = self._misses = self._lowered = self._nbytes = 0

    def entry(self, mask: Mask, request: Request, wanted: str | None) -> Entry:
        """The plan for such a call, made now if there is none."""
        if wanted is not None and not isinstance(wanted, str):
            raise TypeError(f"backend must be None or one of {', '.join(backends())}, got {describe(wanted)}")
        key = plan_key(mask, request, wanted)
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self._hits += 1
                return found
        made = choose(mask, request, wanted)  # outside the lock: two threads may do it twice, neither waits
        backend = next(b for b in BACKENDS if b.name == made.backend)
        with self._lock:
            self._misses += 1
            entry = self._entries.setdefault(key, Entry(key, made, backend))
            self._shrink()
        return entry

    def lowered(self, entry: Entry) -> Lowered:
        """What the entry's backend works out ahead; done once, however many threads and layers ask."""
        if entry.lowered is not None:
            return entry.lowered
        with entry.lock:
            if entry.lowered is None:
                with torch.inference_mode(False), torch.no_grad():
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
        while len(self._entries) > 1 and (len(self._entries) > self.most_plans or self._nbytes > self.most_bytes):
            _, oldest = self._entries.popitem(last=False)
            self._nbytes -= oldest.lowered.nbytes if oldest.lowered else 0

    def info(self) -> CacheInfo:
        """The counts so far."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, self._lowered, len(self._entries), self._nbytes)

    def clear(self) -> None:
        """Forget every plan and set the counts to zero."""
        with self._lock:
            self._entries.clear()
            self._hits = self._misses = self._lowered = self._nbytes = 0


CACHE = PlanCache()


# -- the public question -----------------------------------------------------------------------------------------------


@overload
def plan(
    mask: Mask | Tensor | None,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    grad: bool = False,
    backend: str | None = None,
    **keywords: Any,
) -> Plan: ...


@overload
def plan(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, *, backend: str | None = None, **keywords: Any
) -> Plan: ...


def plan(*given: Any, backend: str | None = None, **keywords: Any) -> Plan:
    """Which backend would run a call, why, and at what predicted cost: `plan(mask, q_len)` or `plan(q, k, v, mask)`.

    Both take `attend`'s keywords (`bias`, `softcap`, `sink_logits`, `dropout`, `return_lse`, ...) and touch no data.

    Args:
        mask: as `attend` takes it.
        q_len: queries; then `kv_len`, keys (default: as many as positions have passed).
        batch: samples, and `heads`, `kv_heads` (default: heads), `head_dim=64`, `dtype=torch.float32`, `device="cpu"`.
            By default one sample and 8 heads, or as many as the mask holds data for.
        grad: whether the backward counts.
        q, k, v: tensors instead of sizes; on the meta device they stand for such tensors on the CPU.

    Raises:
        MaskError: the mask cannot answer for the sizes. PlanError: no backend, or not the one named, can run the call.

    >>> from truemask.masks.positional import causal, window
    >>> plan(causal, q_len=1024).backend
    'sdpa'
    >>> plan(causal & window(64), 512, softcap=30.0).objections["sdpa"]
    ['softcap: the kernel has no soft cap']
    """
    tensors = _speaks_of_tensors(given, keywords)
    mask, request = (_from_tensors if tensors else _from_sizes)(**_by_name(given, keywords, tensors))
    return CACHE.entry(mask, request, backend).plan


def _speaks_of_tensors(given: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether the arguments are those of `plan(q, k, v, mask)`; otherwise they are those of `plan(mask, q_len)`."""
    if not keywords.keys().isdisjoint("qkv"):
        return True
    if len(given) == 1:
        return isinstance(given[0], Tensor) and given[0].ndim == 4 and given[0].is_floating_point()
    return len(given) > 1 and isinstance(given[0], Tensor) and isinstance(given[1], Tensor)


def _by_name(given: tuple[Any, ...], keywords: dict[str, Any], tensors: bool) -> dict[str, Any]:
    """All arguments by name, checked against the names of their form."""
    form, other, places, needs = SIZES_FORM, TENSORS_FORM, ("mask", "q_len", "kv_len"), ("mask", "q_len")
    if tensors:
        form, other, places, needs = TENSORS_FORM, SIZES_FORM, ("q", "k", "v", "mask"), ("q", "k", "v")
    if len(given) > len(places):
        raise TypeError(f"plan takes ({', '.join(places)}) by place and the rest by name, got {len(given)} by place")
    named = dict(zip(places, given, strict=False))
    for name in keywords:
        if name in named:
            raise TypeError(f"plan was given {name} twice, by place and by name")
        if tensors and name in other and name not in form:
            raise TypeError(f"plan: sizes, dtype, device and grad come from the tensors: leave out {name!r}")
        if name not in form:
            raise TypeError(f"plan: there is no keyword {name!r}{suggest(name, form)}")
    named.update(keywords)
    for name in needs:
        if name not in named:
            raise TypeError(f"plan takes (mask, q_len, ...) or (q, k, v, mask, ...): {name} is missing")
    return named


def _from_tensors(q: Tensor, k: Tensor, v: Tensor, mask: object = None, **keywords: Any) -> tuple[Mask, Request]:
    call = read_call(q, k, v, mask, **keywords)
    return call.mask, call.request


def _from_sizes(
    mask: Mask | Tensor | None,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    grad: bool = False,
    **keywords: Any,
) -> tuple[Mask, Request]:
    if isinstance(q_len, Tensor) or not (mask is None or isinstance(mask, (Mask, Tensor))):
        given = f"{describe(mask)} and {describe(q_len)}"
        raise MaskError(f"plan takes (mask, q_len, ...) or (q, k, v, mask), got {given} first")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"plan: dtype must be a torch.dtype, got {describe(dtype)}")
    q_len, head_dim = whole(q_len, "q_len"), whole(head_dim, "head_dim", 1)
    if kv_len is None:
        kv_len = mask.kv_len_for(q_len) if isinstance(mask, Mask) else q_len if mask is None else mask.shape[-1]
    if isinstance(mask, Mask):
        batch = _held(mask.batch_size) if batch is None else batch
        heads = _held(mask.head_count) if heads is None else heads
    batch, heads = 1 if batch is None else whole(batch, "batch"), 8 if heads is None else whole(heads, "heads", 1)
    kv_heads = heads if kv_heads is None else whole(kv_heads, "kv_heads", 1)
    q = torch.empty(batch, heads, q_len, head_dim, dtype=dtype, device="meta")
    k = torch.empty(batch, kv_heads, whole(kv_len, "kv_len"), head_dim, dtype=dtype, device="meta")
    call = read_call(q, k, k, mask, device=torch.device(device), **keywords)
    checked_length(call.mask, batch, heads, q_len, k.shape[2], tensors=False)
    return call.mask, call.request._replace(grad=check_flag("grad", grad) or call.request.grad)


def _held(own: int) -> int | None:
    """For how many samples or heads a mask holds data, or None."""
    return own if own > 1 else None


def _names(*functions: Callable[..., Any]) -> frozenset[str]:
    names = (parameter for function in functions for parameter in inspect.signature(function).parameters)
    return frozenset(names) - {"keywords"}


OPTIONS = _names(read_call) - {"q", "k", "v", "mask", "device"}
SIZES_FORM, TENSORS_FORM = _names(_from_sizes) | OPTIONS, _names(_from_tensors) | OPTIONS
