"""Plans: who is chosen and why, the table, the refusals, and a cache that is bounded, shared and safe."""

from __future__ import annotations

import pickle
import re
import threading
from typing import Any

import pytest
import torch

import truemask as tm
from tests.support.equality import assert_same
from tests.support.oracle import Three, three
from truemask.attention.planning import cache as _cache
from truemask.attention.planning.cache import CACHE, PlanCache
from truemask.attention.planning.plan import plan
from truemask.backends import sdpa
from truemask.backends.backend import Proposal
from truemask.backends.base import Job, Lowered, Request
from truemask.backends.registry import BACKENDS, backends
from truemask.common.memory import arrays_in, memory_of
from truemask.masks.core.exact_form import exact_slabs

ODD: Any = (5, 7)
MASK = tm.causal & (tm.window(5) | tm.prefix(2))
QKV = three(torch.zeros(2, 4, 7, 8) for _ in range(3))


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    CACHE.clear()


# -- the question ------------------------------------------------------------------------------------------------------


def test_the_cheapest_willing_backend_and_never_the_reference_unasked() -> None:
    found = plan(MASK, 40)
    assert found.backend == "sdpa"
    assert found.objections["sdpa"] == found.objections["reference"] == []
    assert 0 < found.costs["sdpa"] < found.costs["reference"]
    assert plan(MASK, 40, backend="reference").backend == "reference"
    assert plan(MASK, 40, return_weights=True).backend == "reference"
    assert list(found.objections) == list(backends())


def test_costs_grow_with_work() -> None:
    def cost(mask: tm.Mask = tm.everything, q_len: int = 1000, **keywords: Any) -> float:
        return plan(mask, q_len, **keywords).costs["sdpa"]

    assert cost(q_len=2000) > 3 * cost()
    assert cost(tm.causal) < 0.8 * cost()
    assert cost(grad=True) > 3 * cost()
    assert cost(dtype=torch.float64) > 2 * cost()
    assert cost(batch=2) > 1.9 * cost()


def test_both_forms_are_one_question() -> None:
    q, k, v = torch.zeros(2, 6, 7, 8), torch.zeros(2, 3, 11, 8), torch.zeros(2, 3, 11, 8)
    sizes: dict[str, Any] = {"kv_len": 11, "batch": 2, "heads": 6, "kv_heads": 3, "head_dim": 8}
    assert plan(q, k, v, tm.local(3)) is plan(tm.local(3), 7, **sizes)
    assert plan(q=q, k=k, v=v, mask=tm.local(3)) is plan(mask=tm.local(3), q_len=7, **sizes)
    on_meta = plan(q.to("meta"), k.to("meta"), v.to("meta"), tm.local(3))
    assert on_meta is plan(q, k, v, tm.local(3))
    assert plan(q.requires_grad_(), k, v, tm.local(3)) is plan(tm.local(3), 7, grad=True, **sizes)


def test_defaults_come_from_the_mask() -> None:
    assert plan(tm.causal.at(q_start=5), 3).request.kv_len == 8
    assert plan(tm.padding(lengths=[3, 5, 7]), 7).request.batch == 3
    assert plan(tm.per_head([tm.causal, tm.local(3), tm.everything]), 7).request.heads == 3
    assert plan(torch.ones(3, 5, dtype=torch.bool), 3).request.kv_len == 5
    assert plan(None, 3).mask == tm.everything


def test_a_plan_touches_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dense mask is made, however long the call."""
    monkeypatch.setattr(sdpa, "lower_dense", None)
    length = 1 << 20
    assert plan(tm.causal & tm.window(64), length).objections["sdpa"][0].startswith("a dense mask of")
    assert plan(tm.causal, length).ways["sdpa"] == "the causal flag"
    assert CACHE.info().lowered == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan(MASK, 5, backend="refrence"), "no backend 'refrence', did you mean 'reference'?"),
        (lambda: plan(MASK, 5, backend="sdpa", softcap=1.0, dropout=0.1), "sdpa: softcap"),
        (lambda: plan(tm.keys(torch.ones(3, dtype=torch.bool)), 5), "5 queries and 5 keys"),
        (lambda: plan(*ODD), "plan takes (mask, q_len, ...) or (q, k, v, mask), got int 5 and int 7 first"),
        (lambda: plan(MASK, -1), "q_len must be at least 0"),
        (lambda: plan(MASK, 5, heads=3, kv_heads=2), "3 query heads are no multiple of 2 key heads"),
        (lambda: plan(MASK, 5, heads=0), "heads must be at least 1"),
        (lambda: plan(MASK, 5, kv_heads=0), "kv_heads must be at least 1"),
        (lambda: plan(MASK, 5, head_dim=-1), "head_dim must be at least 1"),
        (lambda: plan(MASK, 5, head_dim=6.5), "head_dim must be a whole number, got float 6.5"),  # pyright: ignore
        (lambda: plan(torch.ones(5, 5, dtype=torch.bool, device="meta"), 5), "the mask is a meta tensor"),
    ],
)
def test_refusals(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        call()
    assert words in str(caught.value)


def test_unknown_keywords_are_named() -> None:
    with pytest.raises(TypeError, match="no keyword 'sofcap', did you mean 'softcap'"):
        plan(MASK, 5, sofcap=1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan(), "plan takes (mask, q_len, ...) or (q, k, v, mask, ...): mask is missing"),  # pyright: ignore
        (lambda: plan(MASK), "plan takes (mask, q_len, ...) or (q, k, v, mask, ...): q_len is missing"),  # pyright: ignore
        (lambda: plan(QKV[0]), "k is missing"),
        (lambda: plan(*QKV[:2]), "v is missing"),
        (lambda: plan(q=QKV[0], k=QKV[1], mask=MASK), "v is missing"),  # pyright: ignore
        (lambda: plan(*QKV, MASK, heads=4), "sizes, dtype, device and grad come from the tensors: leave out 'heads'"),
        (lambda: plan(*QKV, MASK, device="cpu"), "come from the tensors: leave out 'device'"),
        (lambda: plan(*QKV, MASK, MASK), "plan takes (q, k, v, mask) by place and the rest by name, got 5 by place"),
        (lambda: plan(*QKV, MASK, mask=MASK), "plan was given mask twice"),
        (lambda: plan(MASK, 5, 5, 5), "plan takes (mask, q_len, kv_len) by place and the rest by name, got 4"),
        (lambda: plan(MASK, 5, keywords=1), "plan: there is no keyword 'keywords'"),
        (lambda: plan(*QKV, keywords=1), "plan: there is no keyword 'keywords'"),
        (lambda: plan(MASK, 5, dtype="float16"), "plan: dtype must be a torch.dtype, got str 'float16'"),  # pyright: ignore
        (lambda: plan(MASK, 5, grad="no"), "grad must be True or False"),  # pyright: ignore
        (lambda: plan(MASK, 5, backend=["sdpa"]), f"backend must be None or one of {', '.join(backends())}"),  # pyright: ignore
    ],
)
def test_arguments_are_those_of_one_form(call: Any, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert words in str(caught.value)
    assert "_from_" not in str(caught.value)
    assert "read_call" not in str(caught.value)


def test_no_layout_is_suspected_of_sizes() -> None:
    """Without tensors there is nothing to transpose, and 8 heads are only the default."""
    with pytest.raises(tm.MaskError, match=r"\(the call has 1 sample, 8 heads, 5 queries and 5 keys\)"):
        plan(tm.keys(torch.ones(3, dtype=torch.bool)), 5)


def test_plans_for_other_machines_take_tensors_of_this_one() -> None:
    for device in ("cpu", "meta"):
        bias, sinks = torch.zeros(4, 7, 7, device=device), torch.zeros(4, device=device)
        found = plan(MASK, 7, heads=4, device="cuda", bias=bias)
        assert (found.request.device.type, found.request.bias) == ("cuda", "tensor")
        assert plan(MASK, 7, heads=4, bias=bias, sink_logits=sinks).request.device.type == "cpu"
        q, k, v = (x.to("meta") for x in QKV)
        assert plan(q, k, v, MASK, bias=bias, sink_logits=sinks).request.sinks


def test_what_wants_a_gradient_says_so_in_both_forms() -> None:
    sinks = torch.zeros(4, requires_grad=True)
    sizes: dict[str, Any] = {"batch": 2, "heads": 4, "head_dim": 8, "sink_logits": sinks}
    assert plan(MASK, 7, **sizes).request.grad
    assert plan(MASK, 7, **sizes) is plan(*QKV, MASK, sink_logits=sinks)


def test_a_refusal_lists_everybodys_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (backend for backend in BACKENDS if backend.name != "sdpa"):
        monkeypatch.setattr(type(backend), "propose", lambda self, job: ["it is on holiday"])
    with pytest.raises(tm.PlanError) as caught:
        plan(MASK, 5, softcap=1.0, return_weights=True)
    assert str(caught.value).splitlines() == [
        "no backend can run `causal & (window(5) | prefix(2))` with "
        "q [1, 8, 5, 64], k and v [1, 8, 5, 64], float32 on cpu, forward:",
        "  native: it is on holiday",
        "  sdpa: softcap: the kernel has no soft cap",
        "  sdpa: return_weights: the kernel never holds the weights",
        *(f"  {name}: it is on holiday" for name in backends()[2:]),
    ]


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_shows_mask_sizes_tiles_and_backends() -> None:
    lines = str(plan(tm.causal & tm.window(256), 1024, dropout=0.1, return_weights=True, grad=True)).splitlines()
    assert lines[0] == "causal & window(256)"
    assert lines[1] == "q [1, 8, 1024, 64], k and v [1, 8, 1024, 64], float32 on cpu, forward and backward"
    assert lines[2] == "tiles of 128 x 128: 43 empty, 14 mixed, 7 full; 21.89% of the pairs"
    assert lines[3].split() == ["backend", "predicted", "how,", "or", "why", "not"]
    assert lines[4].startswith("  native")
    (sdpa,) = (i for i, line in enumerate(lines) if line.startswith("  sdpa"))
    assert all(line.startswith(" " * 27) for line in lines[5:sdpa])  # more reasons of native's, where there is none
    assert "cannot  dropout: the kernel cannot drop" in lines[sdpa]
    assert lines[sdpa + 1].strip() == "return_weights: the kernel never holds the weights"
    (chosen,) = (line for line in lines if line.startswith(">"))
    assert chosen.startswith("> reference")
    assert chosen.endswith("plain torch, in chunks of rows")


def test_the_table_ends_with_the_warning() -> None:
    found = plan(tm.causal, 3, 7)
    assert str(found).splitlines()[-1] == f"warning: {found.warning}"
    assert "`.at(q_start=4)`" in found.warning
    assert "attend was given" not in found.warning
    assert "warning" not in str(plan(tm.causal, 7, 7))
    assert "chosen for" not in str(plan(tm.causal, 77))


def test_the_table_is_cheap_when_the_density_is_not() -> None:
    text = str(plan(tm.random(0.5), 1 << 14))
    assert "0.0% to 100.0% of the pairs" in text


@pytest.mark.parametrize(
    ("mask", "keywords", "way"),
    [
        (tm.everything, {}, "no mask"),
        (tm.causal, {}, "the causal flag"),
        (tm.window(3), {}, "dense mask, 1.9 KiB"),
        (tm.keys(torch.arange(22) > 3), {}, "dense mask, 88 B"),
        (tm.everything, {"bias": tm.alibi(torch.ones(8))}, "dense bias, 15 KiB"),
        (tm.causal, {"bias": torch.zeros(22)}, "dense mask and bias, 1.9 KiB"),
    ],
)
def test_ways(mask: tm.Mask, keywords: dict[str, Any], way: str) -> None:
    assert plan(mask, 22, **keywords).ways["sdpa"] == way


def test_printing_a_plan_is_short_in_lists() -> None:
    assert repr(plan(tm.causal, 5)) == "<Plan of `causal`: sdpa>"


# -- the cache ---------------------------------------------------------------------------------------------------------


def tensors(n: int = 7, **keywords: Any) -> Three:
    return three(torch.randn(2, 4, n, 8, **keywords) for _ in range(3))


def test_the_same_mask_in_every_layer_is_lowered_once() -> None:
    """Equal masks share a plan too: built anew, unpickled, or given as an equal tensor."""
    for _ in range(6):
        tm.attend(*tensors(), tm.causal & (tm.window(5) | tm.prefix(2)))
    tm.attend(*tensors(), pickle.loads(pickle.dumps(MASK)))
    info = CACHE.info()
    assert (info.misses, info.hits, info.lowered, info.entries) == (1, 6, 1, 1)
    for _ in range(3):
        tm.attend(*tensors(), torch.ones(7, 7, dtype=torch.bool).tril(2))
    assert CACHE.info().lowered == 2


def test_training_and_inference_and_numbers() -> None:
    """A plan depends on kinds and flags, not on numbers such as scale, softcap or dropout."""
    for scale in (0.1, 0.2, 0.3):
        tm.attend(*tensors(), MASK, scale=scale)
        tm.attend(*tensors(), MASK, softcap=scale, dropout=scale)
    assert CACHE.info().misses == 2
    tm.attend(*tensors(requires_grad=True), MASK)
    assert CACHE.info().misses == 3


def test_plans_and_bytes_are_bounded() -> None:
    cache = PlanCache(most_plans=5, most_bytes=4000)
    request = plan(MASK, 11).request
    entries = [cache.entry(tm.window(1), request, None)]
    for size in range(1, 21):
        entries.append(cache.entry(tm.window(size), request, None))
        cache.lowered(entries[-1])
        info = cache.info()
        assert info.entries <= 5
        assert info.nbytes <= 4000
    assert cache.info().lowered == 20
    assert cache.entry(tm.window(20), request, None) is entries[-1]
    large = cache.entry(MASK, request._replace(q_len=101, kv_len=101), "sdpa")
    assert cache.lowered(large).nbytes > 4000
    assert cache.info().entries == 1  # the newest stays, whatever its size
    assert cache.lowered(large) is cache.lowered(cache.entry(MASK, large.plan.request, "sdpa"))


def held_in(cache: PlanCache) -> int:
    """The bytes of what a cache holds, each array once."""
    return sum({piece: size for holder in cache._kept for piece, size in holder.memory().items()}.values())


def entries_of(cache: PlanCache) -> list[_cache.Entry]:
    return [holder for holder in cache._kept if isinstance(holder, _cache.Entry)]


def random_cells(n: int, seed: int, rows: int | None = None) -> torch.Tensor:
    return torch.rand(2, 1, rows or n, n, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("rows", [1, 64, 65, 301])
def test_fresh_dense_masks_are_counted_and_given_up(rows: int) -> None:
    """A mask for each step, as a collator makes them: their cells and what they remember count too."""
    request = plan(tm.everything, rows, 301, batch=2).request

    def filled(cache: PlanCache, masks: int) -> list[_cache.Entry]:
        made: list[_cache.Entry] = []
        for seed in range(masks):
            made.append(cache.entry(tm.dense(random_cells(301, seed, rows)), request, None))
            cache.lowered(made[-1])
        return made

    alone = PlanCache()
    filled(alone, 1)
    size = alone.info().nbytes
    assert size == held_in(alone) > 2 * rows * 301
    cache = PlanCache(most_bytes=6 * size)
    entries = filled(cache, 20)
    assert cache.info().nbytes == held_in(cache) <= 6 * size
    kept = entries_of(cache)
    assert 3 <= len(kept) <= 7
    assert kept == entries[-len(kept) :]
    assert sum(isinstance(holder, _cache.Family) for holder in cache._kept) <= 7


def test_what_masks_share_counts_once() -> None:
    """Steps of decoding under one mask with data: the data once, however many steps are kept."""
    data = tm.keys(torch.arange(20_000) % 7 > 0)
    cache = PlanCache()
    request = plan(data, 1, 20_000).request
    for step in range(50):
        cache.lowered(cache.entry(data.at(k_start=step), request._replace(kv_len=20_000 - step), "sdpa"))
    info = cache.info()
    lowered = sum(entry.lowered.nbytes for entry in entries_of(cache) if entry.lowered)
    assert info.entries == 50
    assert lowered + 20_000 <= info.nbytes < lowered + 3_000_000


def test_a_random_mask_keeps_no_runs() -> None:
    """What has no pattern takes a few times its cells, and is looked at tile by tile; what has one keeps its runs."""
    n = 601
    mask = tm.dense(random_cells(n, 0)[:1])
    tm.plan(mask, n)
    assert mask.nbytes < 3 * n * n
    assert exact_slabs(mask, 0, 0, n, n) is None
    assert torch.equal(mask.to_dense(n), random_cells(n, 0)[:1])
    assert int(mask.count(n)) == int(random_cells(n, 0)[:1].sum())
    for named in (tm.causal & tm.window(50), tm.dilated(2), tm.causal.packed([100, 300, 201])):
        assert tm.dense(named.to_dense(n)).equivalent(named, n)
        assert exact_slabs(tm.dense(named.to_dense(n)), 0, 0, n, n) is not None


@pytest.mark.parametrize("backend", [name for name in backends() if name != "flex"])
def test_the_positions_that_a_bias_is_asked_about_are_counted(backend: str) -> None:
    q, k = torch.zeros(4, 1, 1, 8), torch.zeros(4, 1, 1000, 8)
    CACHE.clear()
    with torch.inference_mode():
        tm.attend(q, k, k, tm.causal.padded([0, 1, 2, 3]).at(q_start=999), bias=tm.alibi(1), backend=backend)
    (entry,) = entries_of(CACHE)
    assert CACHE.info().nbytes > sum(side.nbytes for side in entry.plan.job.positions)
    assert not any(side.is_inference() for side in entry.plan.job.positions)  # calls outside of it share them
    before = CACHE.info().nbytes
    tm.attend(q, k, k, tm.causal.padded([0, 1, 2, 3]).at(q_start=999), bias=tm.alibi(1), backend=backend)
    assert CACHE.info().nbytes == before


def test_a_printed_plan_keeps_nothing_that_was_worked_out_for_it() -> None:
    printed = plan(tm.causal & tm.dense(random_cells(512, 0)[:1]), 512, backend="reference")
    assert str(printed)
    assert printed.explain()
    for proposal in printed.proposals.willing.values():
        assert not memory_of(arrays_in(part for name, part in vars(proposal).items() if name != "job"))


def test_an_entry_given_up_while_in_use_still_works() -> None:
    cache = PlanCache(most_plans=1)
    request = plan(MASK, 11).request
    first = cache.entry(MASK, request, None)
    cache.lowered(cache.entry(tm.window(2), request, None))
    held = cache.info().nbytes
    assert cache.lowered(first).data is not None
    assert cache.info().nbytes == held


class Hasty(threading.Thread):
    """Fills the cache with other plans, over and over."""

    def __init__(self, cache: PlanCache, first: int) -> None:
        super().__init__()
        self.cache, self.first, self.lowest = cache, first, 0

    def run(self) -> None:
        request = plan(MASK, 11).request
        for size in range(300):
            self.cache.lowered(self.cache.entry(tm.window(self.first + size % 7), request, None))
            self.lowest = min(self.lowest, self.cache.info().nbytes)


def test_bytes_are_counted_in_the_step_that_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives an entry up after it was lowered takes off what was added before: never more."""
    cache = PlanCache(most_plans=2)
    request = plan(MASK, 11).request
    entry = cache.entry(MASK, request, None)
    real = cache._lock

    class Late:
        """Lets another thread's plans in just before the lock is taken for counting."""

        def __enter__(self) -> None:
            cache._lock = real
            for size in (1, 2, 3):
                cache.entry(tm.window(size), request, None)
            real.acquire()

        def __exit__(self, *_: object) -> None:
            real.release()

    cache._lock = Late()  # pyright: ignore
    cache.lowered(entry)
    assert all(kept.lowered is None for kept in entries_of(cache))
    assert cache.info().nbytes == held_in(cache)
    assert cache.info().entries == 2


def test_bytes_are_never_negative_among_threads() -> None:
    cache = PlanCache(most_plans=2)
    threads = [Hasty(cache, 1 + 2 * i) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(thread.lowest for thread in threads) == 0
    assert cache.info().nbytes == held_in(cache)
    cache.clear()
    assert cache.info().nbytes == 0


def test_dead_masks_take_a_quarter_of_a_gigabyte_at_most() -> None:
    assert CACHE.most_bytes == 256 << 20


# -- decoding ----------------------------------------------------------------------------------------------------------

LATER: dict[str, tuple[int, Any]] = {  # samples, and the mask of the row at position i
    "causal": (1, lambda i: tm.causal.at(q_start=i)),
    "window and sinks": (1, lambda i: (tm.causal & (tm.window(37) | tm.prefix(4))).at(q_start=i)),
    "left padded": (3, lambda i: MASK.padded([0, 5, 11]).at(q_start=i)),
    "registers": (1, lambda i: MASK.prepended(q=2, k=3).at(q_start=i)),
    "a rolled cache": (1, lambda i: (tm.causal & tm.window(53)).take(q=[i], k=[*range(i + 1)][::-1])),
    "the rows of each sample": (2, lambda i: tm.causal.take(q=[[i], [i - 1]])),
}


@pytest.mark.parametrize("start", [0, 63, 700, 1021])
@pytest.mark.parametrize("name", LATER)
def test_two_hundred_decoding_steps_make_one_plan(name: str, start: int) -> None:
    """And lower once in each step, however many layers there are."""
    batch, mask = LATER[name]
    start += 11
    memory = torch.randn(batch, 2, start + 200, 8)
    q = torch.randn(batch, 4, 1, 8)
    for i in range(start, start + 200):
        for _ in range(2):
            tm.attend(q, memory[:, :, : i + 1], memory[:, :, : i + 1], mask(i))
    info = CACHE.info()
    assert (info.misses, info.hits, info.lowered) == (1, 399, 200)
    assert info.entries <= _cache.MAX_STEPS


def test_the_rows_of_decoding_are_those_of_the_whole() -> None:
    q, k, v = three(torch.randn(2, 4, 97, 8, dtype=torch.float64) for _ in range(3))
    mask = (tm.causal & (tm.window(13) | tm.prefix(4))).padded([0, 7])
    whole = tm.attend(q, k, v, mask)
    for first in (0, 1, 50):
        for rows in (1, 3, 7):
            stop = first + rows
            part = tm.attend(q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop], mask.at(q_start=first))
            assert_same(part, whole[:, :, first:stop])


def test_a_plan_says_for_what_it_was_chosen_and_speaks_of_the_call() -> None:
    first = plan(tm.causal.at(q_start=599), 1, dtype=torch.float64)
    later = plan(tm.causal.at(q_start=999), 1, dtype=torch.float64)
    assert CACHE.info().misses == 1
    assert "chosen for q_len 1, kv_len 600; kept while kv_len is 0 to 2400" in str(first)
    assert "chosen for q_len 1, kv_len 600; kept while kv_len is 0 to 2400" in str(later)
    assert str(later).startswith("causal.at(q_start=999)\nq [1, 8, 1, 64], k and v [1, 8, 1000, 64]")
    assert later.costs["reference"] > first.costs["reference"]
    assert later.request.kv_len == 1000
    far = plan(tm.causal.at(q_start=9999), 1, dtype=torch.float64)
    assert CACHE.info().misses == 2
    assert "chosen for q_len 1, kv_len 10000; kept while kv_len is 2500 to 40000" in str(far)
    assert plan(tm.causal.at(q_start=1199), 1, dtype=torch.float64).choice is first.choice


def test_what_differs_in_more_than_lengths_has_its_own_choice() -> None:
    def choices(mask: tm.Mask, q_len: int, **keywords: Any) -> int:
        plan(mask, q_len, **keywords)
        return CACHE.info().misses

    mask = tm.causal.at(q_start=100)
    assert choices(mask, 1) == 1
    assert choices(mask.at(q_start=5), 1) == 1
    assert choices(tm.window(5).at(q_start=100), 1) == 2
    assert choices(mask, 1, grad=True) == 3
    assert choices(mask, 1, heads=4) == 4
    assert choices(mask, 5) == 5
    assert choices(mask, 7) == 5  # 5 to 8 queries
    assert choices(mask, 1, bias=torch.zeros(101)) == 6
    assert choices(mask.at(q_start=1), 1, bias=torch.zeros(102)) == 6
    assert choices(mask, 1, backend="sdpa") == 7
    assert choices(mask, 65) == 8
    assert choices(mask, 66) == 9  # a plan costs less than such a call


def test_the_backend_of_an_earlier_choice_may_object() -> None:
    """Then another one is chosen, and both choices are kept."""
    mask = tm.window(5)
    first = plan(mask.at(q_start=20_000), 1, 20_001)
    limited = next(b for b in BACKENDS if b.name == first.backend)
    with pytest.MonkeyPatch.context() as patch:
        propose = type(limited).propose

        def limits(self: Any, job: Job) -> Proposal | list[str]:
            return ["too long"] if job.request.kv_len > 30_000 else propose(self, job)

        patch.setattr(type(limited), "propose", limits)
        longer = [plan(mask.at(q_start=i), 1, i + 1) for i in (40_000, 40_001, 40_002)]
        assert {found.backend for found in longer} & {first.backend} == set()
        assert CACHE.info().misses == 2
        assert plan(mask.at(q_start=20_002), 1, 20_003).backend == first.backend
        assert CACHE.info().misses == 2


def test_the_door_is_passed_in_every_step() -> None:
    """Law 3: a choice that is kept does not answer for positions beyond the data."""
    mask = tm.causal & tm.keys(torch.ones(101, dtype=torch.bool))
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 103, 8)
    for i in (99, 100):
        tm.attend(q, k[:, :, : i + 1], k[:, :, : i + 1], mask.at(q_start=i))
    with pytest.raises(tm.MaskError, match="101 keys, but was asked about 102"):
        tm.attend(q, k[:, :, :102], k[:, :, :102], mask.at(q_start=101))
    with pytest.warns(tm.ConventionWarning, match=r"`\.at\(q_start=100\)`"):
        tm.attend(q, k[:, :, :101], k[:, :, :101], mask)


def test_long_answers_do_not_drive_out_other_plans() -> None:
    kept = plan(MASK, 100)
    for i in range(3 * _cache.MAX_PLANS):
        plan(tm.causal.at(q_start=i), 1)
    assert plan(MASK, 100) is kept
    assert CACHE.info().entries == 1 + _cache.MAX_STEPS


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_share_one_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = sdpa.SdpaProposal.lower

    def slow(self: sdpa.SdpaProposal) -> Lowered:
        calls.append(1)
        threading.Event().wait(0.05)
        return real(self)

    monkeypatch.setattr(sdpa.SdpaProposal, "lower", slow)
    torch.manual_seed(0)
    given = tensors()
    want = tm.attend(*given, MASK, backend="reference")
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(tm.attend(*given, MASK, backend="sdpa"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 8
    for out in found:
        assert_same(out, want)


def test_a_mask_tensor_says_how_many_samples_and_heads_there_are() -> None:
    request = plan(torch.ones(4, 2, 9, 7, dtype=torch.bool), 9).request
    assert (request.batch, request.heads, request.q_len, request.kv_len) == (4, 2, 9, 7)
    assert plan(torch.ones(9, 7, dtype=torch.bool), 9).request.batch == 1
    with pytest.raises(tm.MaskError):
        plan(torch.ones((), dtype=torch.bool), 9)


def test_keys_know_the_backend_asked_for() -> None:
    assert plan(MASK, 5) is not plan(MASK, 5, backend="sdpa")


def test_requests_are_values() -> None:
    request = plan(MASK, 5).request
    assert isinstance(request, Request)
    assert hash(request) == hash(pickle.loads(pickle.dumps(request)))


def test_a_plan_explains_itself() -> None:
    """Why this backend, what the others object to, and what would make the call faster."""
    text = tm.plan(tm.causal, 2048, return_weights=True).explain()
    assert "reference runs it in a predicted" in text
    assert "nobody else can" in text
    for name in ("native", "sdpa", "block_sparse", "flex"):
        assert f"  {name} cannot: return_weights" in text
    assert "what would make it faster:\n  without return_weights: " in text


def test_an_explanation_names_what_a_dense_mask_is() -> None:
    band = tm.dense(torch.ones(2048, 2048, dtype=torch.bool).tril().triu(-127))
    plan = tm.plan(band, 2048, dtype=torch.float64)
    assert "float32 instead of float64" in plan.explain()
    cheapest = min(plan.costs, key=lambda name: plan.costs[name])
    assert f"{cheapest} runs it in a predicted" in plan.explain()


def test_an_explanation_of_a_named_backend_says_what_naming_it_costs() -> None:
    """Changes are compared with the fastest backend of the call as it is: other dtypes gain nothing here."""
    plan = tm.plan(tm.causal & tm.window(256), 2048, backend="reference")
    free = tm.plan(tm.causal & tm.window(256), 2048)
    times = f"{plan.costs['reference'] / plan.costs[free.backend]:.1f} times faster"
    text, faster = plan.explain().split("what would make it faster:\n")
    assert re.search(f"  {free.backend} would take [^,]+, {times}\n", text)
    assert re.fullmatch(f"  without `backend=`, if it was given: {free.backend} in [^,]+, {times}", faster)
    assert "0.0 times" not in text


def test_an_explanation_adds_a_change_to_a_free_choice() -> None:
    plan = tm.plan(tm.causal, 2048, dtype=torch.float64, backend="reference")
    without, narrower = plan.explain().split("what would make it faster:\n")[1].splitlines()
    assert without.startswith("  without `backend=`, if it was given: ")
    assert narrower.startswith("  float32 instead of float64: ")
    assert narrower.endswith(" times faster than that")


def test_an_explanation_with_nothing_to_gain() -> None:
    assert (
        tm.plan(tm.causal & tm.window(64), 256, dtype=torch.bfloat16, grad=True)
        .explain()
        .endswith("nothing that is known here would make it faster")
    )


def test_a_plan_pickles_whatever_it_worked_out() -> None:
    """Plans travel from the workers of a DataLoader; tiles hold functions, which do not."""
    mask = tm.causal & tm.dilated(3)
    plan = tm.plan(mask, 300)
    assert plan.job.tiles.counts.full == 0
    again = pickle.loads(pickle.dumps(plan))
    assert (again.backend, again.mask, again.request) == (plan.backend, mask, plan.request)
    assert str(again) == str(plan)
