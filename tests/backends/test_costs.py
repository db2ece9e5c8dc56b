"""What backends are said to cost: by machine, instruction set, dtype, direction and size; what nobody measured."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import truemask as tm
from truemask.attention.planning.cache import CACHE
from truemask.backends import sdpa
from truemask.backends.base import Request
from truemask.backends.costs import calibration_file as calibration
from truemask.backends.costs import model as costs
from truemask.backends.costs.prediction import cell_seconds, rows_at_once, seconds, share, spread
from truemask.backends.costs.rates import Both, Pace, Rates
from truemask.backends.costs.shipped import NATIVE, TORCH

REQUEST = Request(1, 2, 2, 61, 61, 64, 64, torch.float32, torch.device("cpu"))


def _forget() -> None:
    costs.forget()
    CACHE.clear()


# -- which constants ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["amx", "avx512_bf16"])
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A processor on which torch multiplies bf16 with AMX, and the native kernel's instruction set."""
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    monkeypatch.setattr(costs, "has_amx", lambda: True)
    monkeypatch.setattr(costs, "processor", lambda: "Intel(R) Xeon(R) Processor, AVX512")
    monkeypatch.setattr(costs, "isa_in_use", lambda: request.param)
    monkeypatch.setattr(sdpa, "native_halves", lambda: (torch.bfloat16,))
    _forget()
    yield request.param
    monkeypatch.undo()
    _forget()


@pytest.mark.parametrize("mask", [tm.everything, tm.causal])
@pytest.mark.parametrize(("n", "d"), [(512, 64), (4096, 64), (4096, 128)])
def test_plain_bf16_is_torchs_where_only_torch_multiplies_with_amx(amx: str, mask: tm.Mask, n: int, d: int) -> None:
    assert tm.plan(mask, n, head_dim=d, dtype=torch.bfloat16).backend == ("native" if amx == "amx" else "sdpa")


@pytest.mark.usefixtures("amx")
def test_where_torch_has_amx_sparse_bf16_is_not() -> None:
    assert tm.plan(tm.causal & tm.window(256), 8192, dtype=torch.bfloat16).backend != "sdpa"


@pytest.mark.parametrize("mask", [tm.everything, tm.causal, tm.causal & tm.window(64)])
def test_native_is_not_held_against_amx_unless_it_was_measured(
    amx: str, mask: tm.Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless sdpa cannot run the call; and fp32 goes by the nearest costs."""
    monkeypatch.delitem(NATIVE, ("amx", "Intel"))
    _forget()
    bf16 = {"dtype": torch.bfloat16, "grad": True}
    assert bool(costs.table().unmeasured) == (amx == "amx")
    if costs.table().unmeasured:
        for n in (16, 128, 1024, 8192):
            plan = tm.plan(mask, n, **bf16)
            sure = {name: cost for name, cost in plan.costs.items() if name != "native"}
            if min(sure, key=sure.__getitem__) == "sdpa":
                assert plan.backend == "sdpa"
        plan = tm.plan(tm.causal, 2048, **bf16)
        assert f"native with {amx} was not measured: it is priced as with avx512_bf16 on an Intel Xeon" in str(plan)
        assert "in bf16 not held against sdpa" in str(plan)
        softcapped = tm.plan(tm.causal, 2048, **bf16, softcap=30.0)
        assert softcapped.backend == min(softcapped.costs, key=softcapped.costs.__getitem__)
    assert tm.plan(tm.causal, 8192).backend == "native"


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512_bf16"])
def test_an_instruction_set_that_was_named_has_its_own_price(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    monkeypatch.setattr(costs, "processor", lambda: "AMD EPYC, AVX512")
    before = costs.shipped()[0]
    monkeypatch.setattr(costs, "isa_in_use", lambda: isa)
    table = costs.shipped()[0]
    assert table.native == NATIVE[isa, "AMD"].rates
    assert table.sdpa == before.sdpa


def test_a_plan_says_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    monkeypatch.setattr(costs, "processor", lambda: "A processor of 2030")
    monkeypatch.setattr(costs, "isa_in_use", lambda: "avx512")
    _forget()
    said = costs.source()
    assert re.match(r"the shipped costs \(those of torch are an .*'s; native with avx512 was not measured: it is", said)
    assert said in str(tm.plan(tm.causal, 67))
    monkeypatch.undo()
    _forget()


@pytest.mark.parametrize("name", TORCH)
def test_shipped_costs_are_taken_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are the same with any threads."""
    monkeypatch.setenv("TRUEMASK_COSTS", name)
    _forget()
    assert calibration.costs_file() is None
    table = costs.table()
    assert (table.sdpa, table.block_sparse, table.reference) == TORCH[name].rates
    assert table.native == NATIVE[TORCH[name].native].rates
    before, threads = tm.plan(tm.causal, 512).costs, torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        CACHE.clear()
        assert tm.plan(tm.causal, 512).costs == before
    finally:
        torch.set_num_threads(threads)
    monkeypatch.undo()
    _forget()


# -- the model ---------------------------------------------------------------------------------------------------------


def _rates(**paces: float) -> Rates:
    """Calls that take nothing, and so many billions a second by dtype."""
    return Rates(1e-12, 1e-12, paces={name: Both(*[Pace(pace * 1e9, pace * 1e9)] * 2) for name, pace in paces.items()})


def test_costs_depend_on_the_dtype() -> None:
    rates, request = _rates(fp32=6.0, fp64=2.0, bf16=12.0, fp16=3.0), REQUEST
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    took = [seconds(rates, request._replace(dtype=dtype), 1e9) for dtype in dtypes]
    assert [found / took[0] for found in took] == pytest.approx([1.0, 3.0, 0.5, 2.0])
    assert seconds(rates, request._replace(grad=True), 1e9) == pytest.approx(3.5 * took[0])


@pytest.mark.parametrize("at128", [50e9, 90e9, 150e9])
def test_costs_depend_on_the_head_size(at128: float) -> None:
    request, pace = REQUEST, Pace(100e9, at128)
    took = [cell_seconds(pace, request._replace(head_dim=d, value_dim=d)) for d in (16, 32, 64, 128, 256)]
    assert took == sorted(took)
    assert took[2] == pytest.approx(2.56e-9)
    assert took[3] == pytest.approx(512 / at128)


def test_few_rows_and_few_tasks_take_longer() -> None:
    pace = Pace(100e9, 100e9, rows1=0.1, rows32=0.5, rows64=0.8)
    assert share(pace, [1, 32, 100, 191, 192, 767, 768]) == pytest.approx([0.1, 0.5, 0.5, 0.5, 0.8, 0.8, 1.0])
    assert [rows_at_once(rows) for rows in (1, 191, 192, 768)] == [32, 32, 64, 256]
    assert 0.1 < share(pace, 16) < 0.5
    rates, threads = replace(_rates(fp32=1.0), threads=2), torch.get_num_threads()
    try:
        with costs.assumed(replace(costs.table(), fixed=False)):
            torch.set_num_threads(2)
            assert [spread(rates, tasks) for tasks in (0, 1, 2, 3, 4)] == pytest.approx([2, 2, 1, 4 / 3, 1])
            torch.set_num_threads(8)
            assert spread(rates) == pytest.approx(1 / 4)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def zen4(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine on which few rows were measured, its kernel, and one thread."""
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    monkeypatch.setattr(costs, "torch_kind", lambda: "avx512")
    monkeypatch.setattr(costs, "processor", lambda: "AMD EPYC, AVX512")
    monkeypatch.setattr(costs, "isa_in_use", lambda: "avx512_bf16")
    monkeypatch.setattr(sdpa, "native_halves", lambda: (torch.bfloat16,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _forget()
    yield
    torch.set_num_threads(threads)
    monkeypatch.undo()
    _forget()


@pytest.mark.usefixtures("zen4")
@pytest.mark.parametrize(
    ("rows", "keys", "microseconds"),
    [  # least of many in turns: 8 heads of 64, fp32, sdpa and native
        (9, 64, (66, 70)),
        (8, 64, (62, 59)),
        (33, 128, (183, 205)),
        (32, 128, (171, 186)),
        (48, 512, (850, 649)),
        (32, 512, (544, 554)),
        (16, 2048, (1951, 1275)),
        (40, 2048, (3478, 2850)),
        (64, 2048, (4740, 3430)),
        (192, 2048, (11275, 8914)),
    ],
)
def test_few_rows_are_priced_as_they_were_measured(rows: int, keys: int, microseconds: tuple[int, int]) -> None:
    """Within a third, and whoever is a fifth faster is chosen: where keys are read, and where they are packed."""
    plan = tm.plan(tm.everything, rows, keys)
    took: dict[str, float] = {"sdpa": microseconds[0], "native": microseconds[1]}
    for name, truth in took.items():
        assert 0.75 < plan.costs[name] * 1e6 / truth < 1.34, name
    assert took[plan.backend] < 1.2 * min(took.values())


@pytest.mark.usefixtures("zen4")
@pytest.mark.parametrize("keys", [64, 512, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_rows_never_cost_less(keys: int, dtype: torch.dtype) -> None:
    """Of the native kernel: neither where it begins to pack keys nor anywhere else. Nor twice as much."""
    rows = range(1, 200)
    took = [tm.plan(tm.everything, n, keys, dtype=dtype).costs["native"] for n in rows]
    steps = [later / before for before, later in itertools.pairwise(took)]
    assert min(steps) >= 1, rows[steps.index(min(steps))]
    assert max(steps) < 2, rows[steps.index(max(steps))]


@pytest.mark.usefixtures("zen4")
def test_a_dtype_that_torchs_kernel_does_not_have_costs_its_conversions() -> None:
    """In fp16 a tiny call of sdpa takes 15 us longer than in fp32, and a training step of it 45 us."""
    costs = {
        (dtype, grad): tm.plan(tm.causal, 16, dtype=dtype, grad=grad).costs["sdpa"]
        for dtype in (torch.float32, torch.float16)
        for grad in (False, True)
    }
    for grad, microseconds in ((False, 15), (True, 45)):
        more = costs[torch.float16, grad] - costs[torch.float32, grad]
        assert more * 1e6 == pytest.approx(microseconds, abs=6)
    assert tm.plan(tm.causal, 16, dtype=torch.float16).backend == "native"


@pytest.mark.usefixtures("zen4")
def test_heads_that_share_keys_lie_side_by_side_while_they_fit() -> None:
    """As in the kernel: eight rows of each of four heads are one strip; 17 of each are one for each head."""
    shared = {n: tm.plan(tm.everything, n, 2048, heads=32, kv_heads=8).costs["native"] for n in (8, 16, 17, 32)}
    own = {n: tm.plan(tm.everything, n, 2048, heads=32).costs["native"] for n in (8, 17, 32)}
    assert shared[8] < own[8]
    assert shared[16] < 1.3 * shared[17]
    assert shared[32] == pytest.approx(own[32], rel=0.2)


@pytest.mark.parametrize("q_len", [1, 611])
def test_plans_are_kept_for_the_threads_in_use(q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a short call, too, whose choice is kept for other lengths; and what was planned before is found again."""
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    _forget()
    threads, mask = torch.get_num_threads(), tm.causal.at(q_start=700)
    before = tm.plan(mask, q_len, heads=60)
    cost = before.costs["sdpa"]
    try:
        torch.set_num_threads(threads + 3)
        other = tm.plan(mask, q_len, heads=60)
        assert other.choice is not before.choice
        assert other.costs["sdpa"] < cost
    finally:
        torch.set_num_threads(threads)
    assert CACHE.info().misses == 2
    assert tm.plan(mask, q_len, heads=60) is before
    monkeypatch.undo()
    _forget()
