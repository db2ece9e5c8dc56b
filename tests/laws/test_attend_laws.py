"""Laws 5, 6, 8 and 9 of `attend`, and random calls against the fp64 oracle, forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import truemask as tm
from tests.support import oracle
from tests.support.equality import assert_same
from tests.support.oracle import three
from tests.support.strategies import Drawn, expressions
from truemask.attention.planning.plan import Plan, plan
from truemask.backends.base import Inputs, Result
from truemask.backends.shared import containment as contain
from truemask.masks.core.mask import Mask

BACKENDS = ("native", "sdpa", "block_sparse", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(name, dtype) for name in BACKENDS for dtype in DTYPES if (name, dtype) != ("native", torch.float64)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}
HOSTILE = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38)

pytestmark = pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")


class Given(NamedTuple):
    """One call's tensors and the gradients that come back to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor

    @classmethod
    def make(cls, b: int, h: int, y: int, q: int, k: int, dtype: torch.dtype, seed: int = 0, d: int = 5) -> Given:
        torch.manual_seed(seed)
        shapes = ((b, h, q, d), (b, y, k, d), (b, y, k, d), (b, h, q, d), (b, h, q))
        return cls(*(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes))


class Found(NamedTuple):
    """What attention gave: results and gradients."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def run(call: Given, mask: Mask, backend: str, **options: Any) -> Found:
    leaves = three(x.clone().requires_grad_() for x in call[:3])
    out, lse = tm.attend(*leaves, mask, backend=backend, return_lse=True, **options)
    grads = torch.autograd.grad((out, lse), leaves, (call.grad_out, call.grad_lse.to(lse.dtype)))
    return Found(out.detach(), lse.detach(), *grads)


def expected(call: Given, allowed: Tensor, **options: Any) -> Found:
    leaves = three(x.double().requires_grad_() for x in call[:3])
    want = oracle.attention(*leaves, allowed, **options)
    pairs = [(want.out, call.grad_out.double()), (want.lse, call.grad_lse.double())]
    results, gradients = (
        zip(*((a, g) for a, g in pairs if a.requires_grad), strict=True) if want.out.requires_grad else ((), ())
    )
    grads = torch.autograd.grad(results, leaves, gradients, allow_unused=True) if results else (None,) * 3
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
    return Found(want.out.detach(), want.lse.detach(), *filled)


def same(got: Tensor, want: Tensor, where: Tensor, dtype: torch.dtype, what: str) -> None:
    """Equal within the dtype's tolerance wherever `where` says that it must be."""
    a, b = got.double()[where], want.double()[where]
    infinite = b.isinf()
    assert torch.equal(a[infinite], b[infinite]), what
    a, b = a[~infinite], b[~infinite]
    size = max(1.0, float(b.abs().max()) if len(b) else 0.0)
    worst = float((a - b).abs().max()) if len(b) else 0.0
    assert worst <= TOLERANCE[dtype] * size, f"{what}: off by {worst} at size {size}"


# -- law 5: a query that may attend to nothing gets zeros --------------------------------------------------------------

DEAD = {
    "nothing": tm.nothing,
    "some rows": tm.window(3) - tm.blocks(2),
    "padding": tm.causal.padded([4, 0]),
    "one head": tm.per_head([tm.causal, tm.nothing, tm.local(1), tm.everything]),
    "no such keys": tm.window(2),
}


@pytest.mark.parametrize(("backend", "dtype"), PAIRS)
@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("options", [{}, {"sink_logits": torch.full((4,), 2.0)}], ids=["plain", "sinks"])
def test_law_5_dead_rows_give_zeros(backend: str, dtype: torch.dtype, name: str, options: dict[str, Any]) -> None:
    """Also when what comes back to them is NaN: their gradients are zero, and nothing reaches the keys."""
    mask = DEAD[name]
    call = Given.make(2, 4, 2, 11, 7, dtype)
    dead = mask.dead_queries(11, 7, batch=2, heads=4).expand(2, 4, 11)
    assert dead.any()
    found = run(call, mask, backend, **options)
    poisoned = call._replace(
        q=call.q.masked_fill(dead[..., None], torch.inf),
        grad_out=call.grad_out.masked_fill(dead[..., None], torch.nan),
        grad_lse=call.grad_lse.masked_fill(dead, torch.inf),
    )
    again = run(poisoned, mask, backend, **options)
    for result in (found, again):
        assert not result.out[dead].any()
        assert not result.dq[dead].any()
        assert bool((result.lse[dead] == -torch.inf).all())
    for got, want in zip(again, found, strict=True):
        same(got, want, torch.ones_like(want, dtype=torch.bool), dtype, "poison in dead rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_5_holds_with_dropout_and_weights(dtype: torch.dtype) -> None:
    call = Given.make(1, 2, 2, 5, 7, dtype)
    out, weights = tm.attend(*call[:3], tm.queries(torch.arange(5) > 1), dropout=0.5, return_weights=True)
    assert not out[:, :, :2].any()
    assert not weights[:, :, :2].any()
    assert out[:, :, 2:].any()


# -- law 6: what is masked cannot leak ---------------------------------------------------------------------------------


class Plant(NamedTuple):
    """Where something hostile is put: rows of q or of the incoming gradient, keys of k or v, in one sample."""

    rows: tuple[int, ...] = ()
    grad_rows: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    hostile: float = torch.nan

    def into(self, call: Given, head: int, shared: int) -> Given:
        """The call with the plants in sample 0, one query head and its key head."""
        q, k, v, grad_out, _ = copies = Given(*(x.clone() for x in call))
        value = (
            max(min(self.hostile, torch.finfo(q.dtype).max), torch.finfo(q.dtype).min)
            if abs(self.hostile) < 1e39
            else self.hostile
        )
        q[0, head, list(self.rows)] = value
        grad_out[0, head, list(self.grad_rows)] = value
        k[0, head // shared, list(self.keys)] = value
        v[0, head // shared, list(self.values), 1] = value
        return copies

    def untouched(self, allowed: Tensor, head: int, shared: int) -> Found:
        """What must be as without the plants: bool tensors like the results, without the last axis."""
        b, h, q, k = allowed.shape
        forward, backward = torch.zeros(b, h, q, dtype=torch.bool), torch.zeros(b, h, q, dtype=torch.bool)
        hit = torch.zeros(b, h // shared, k, dtype=torch.bool)
        hit[0, head // shared, [*self.keys, *self.values]] = True
        forward |= (allowed & hit.repeat_interleave(shared, 1)[:, :, None]).any(-1)
        forward[0, head, list(self.rows)] = True
        backward |= forward
        backward[0, head, list(self.grad_rows)] = True
        reached = (allowed & backward[..., None]).any(2).unflatten(1, (-1, shared)).any(2)
        return Found(~forward, ~forward, ~backward, ~reached, ~reached)


def hold_law_6(
    call: Given, mask: Mask, plant: Plant, backend: str, head: int = 0, hostile: Sequence[float] = HOSTILE
) -> None:
    """Everything that the plants may not reach is what it is without them; a visible NaN does reach its row."""
    (b, h, n, _), (y, m) = call.q.shape, call.k.shape[1:3]
    allowed = mask.to_dense(n, m, batch=b, heads=h).expand(b, h, n, m)
    clean = expected(call, allowed)
    free = plant.untouched(allowed, head, h // y)
    seen = allowed[0, head][:, [*plant.keys, *plant.values]].any(-1)
    for value in hostile:
        found = run(plant._replace(hostile=value).into(call, head, h // y), mask, backend)
        for name, got, want, where in zip(Found._fields, found, clean, free, strict=True):
            same(got, want, where, call.q.dtype, f"{name} with {plant} of {value}")
        if value != value:
            assert not torch.isfinite(found.out[0, head][seen]).all(-1).any(), "a visible NaN was swallowed"


MASKED = {
    "the flag": (tm.causal, Plant(keys=(6,), values=(8,))),
    "a dense mask": (tm.window(3), Plant(keys=(6, 0), values=(8,))),
    "dead keys": (tm.keys(torch.arange(11) < 7), Plant(keys=(7, 9), values=(8, 10))),
    "rows": (tm.blocks(4), Plant(rows=(0, 5), grad_rows=(9,))),
    "no mask": (tm.everything, Plant(rows=(3,), grad_rows=(4,))),
    "per head": (tm.per_head([tm.causal, tm.window(2), tm.blocks(3), tm.nothing]), Plant(rows=(2,), keys=(8,))),
    "all of it": (tm.causal.packed([5, 6]), Plant(rows=(1,), grad_rows=(2,), keys=(3,), values=(4,))),
}


@pytest.mark.parametrize(("backend", "dtype"), PAIRS)
@pytest.mark.parametrize("name", MASKED)
def test_law_6_nothing_crosses_the_mask(backend: str, dtype: torch.dtype, name: str) -> None:
    mask, plant = MASKED[name]
    call = Given.make(2, 4, 2, 11, 11, dtype)
    hold_law_6(call, mask, plant, backend, head=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [3, 15, 517, 530])
def test_law_6_in_every_block_of_the_kernel(dtype: torch.dtype, place: int) -> None:
    """Keys in a full block of vectors, at its end, and in the kernel's second block of 512 and the rest after it."""
    mask = tm.local(1000) - tm.keys(torch.arange(531) == place)
    call = Given.make(1, 1, 1, 3, 531, dtype, d=16)
    hold_law_6(call, mask, Plant(keys=(place,)), "sdpa")
    hold_law_6(call, mask, Plant(values=(place,)), "sdpa")


@pytest.mark.parametrize("backend", BACKENDS)
def test_law_6_with_bias_sinks_and_options(backend: str) -> None:
    """A bias may be NaN where the mask hides it; sinks change nothing of this."""
    call = Given.make(1, 2, 1, 5, 7, torch.float32)
    mask = tm.causal.at(q_start=2) & tm.keys(torch.arange(7) != 3)
    bias = torch.randn(1, 1, 5, 7)
    poisoned = bias.masked_fill(~mask.to_dense(5, 7), torch.nan)
    planted = Plant(keys=(3,), values=(6,)).into(call, 0, 2)._replace(grad_out=call.grad_out)
    sinks = torch.zeros(2)
    found = run(planted, mask, backend, bias=poisoned, sink_logits=sinks)
    clean = run(call, mask, backend, bias=bias, sink_logits=sinks)
    rows = torch.tensor([True, True, True, True, False])
    same(
        found.out[:, :, rows],
        clean.out[:, :, rows],
        torch.ones_like(clean.out[:, :, rows], dtype=torch.bool),
        torch.float32,
        "out",
    )
    same(
        found.dq[:, :, rows],
        clean.dq[:, :, rows],
        torch.ones_like(clean.dq[:, :, rows], dtype=torch.bool),
        torch.float32,
        "dq",
    )


@pytest.mark.parametrize("grad", [False, True])
def test_hidden_keys_cost_another_run_and_no_detour(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    """NaN in padding that no row sees is taken out before the kernel runs again: `eager` is not needed."""
    mask = tm.causal & tm.keys(torch.arange(11) < 7)
    call = Given.make(2, 4, 2, 11, 11, torch.float32)
    planted = Plant(keys=(7, 9), values=(8, 10)).into(call, 1, 2)._replace(grad_out=call.grad_out)
    clean = run(call, mask, "sdpa")
    monkeypatch.setattr(contain, "eager_attention", None)
    if grad:
        for got, want in zip(run(planted, mask, "sdpa"), clean, strict=True):
            assert torch.equal(got, want)
    else:
        assert torch.equal(tm.attend(*planted[:3], mask, backend="sdpa"), clean.out)


def test_only_the_rows_concerned_take_the_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = contain.eager_attention

    def watched(inputs: Inputs, mask: Mask) -> Result:
        rows.append(inputs.q.shape[2])
        return real(inputs, mask)

    monkeypatch.setattr(contain, "eager_attention", watched)
    call = Given.make(1, 2, 1, 11, 11, torch.float64)
    hold_law_6(call, tm.causal, Plant(keys=(9,)), "sdpa", hostile=(torch.nan,))
    assert rows == [2, 2]  # rows 9 and 10 see key 9, forward and backward
    rows.clear()
    hold_law_6(call, tm.window(3), Plant(grad_rows=(4,)), "sdpa", hostile=(torch.inf,))
    assert rows == [1]


def test_a_false_alarm_changes_nothing() -> None:
    """Finite values whose sum overflows are computed again, to the same result."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    v = torch.full((1, 1, 9, 8), 3e38)
    out = tm.attend(q, k, v, tm.causal, backend="sdpa")
    assert_same(out, v)


# -- law 8: choosers can be asked --------------------------------------------------------------------------------------


def test_law_8_plan_takes_the_arguments_of_the_call() -> None:
    takes = inspect.signature(tm.attend).parameters
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    given: dict[str, Any] = {
        "bias": torch.zeros(5, 5),
        "scale": 0.5,
        "softcap": 3.0,
        "sink_logits": torch.zeros(4),
        "dropout": 0.1,
        "backend": "reference",
        "return_lse": True,
        "return_weights": True,
    }
    assert list(takes) == ["q", "k", "v", "mask", *given]
    for keywords in (given, *({key: value} for key, value in given.items())):
        by_tensors = plan(q, k, k, tm.causal, **keywords)
        by_sizes = plan(tm.causal, 5, heads=4, kv_heads=2, head_dim=8, **keywords)
        assert by_tensors is by_sizes  # the same question has the same answer, from the same cache
        assert isinstance(by_tensors, Plan)
        assert by_tensors.backend == keywords.get("backend", by_tensors.backend)
        tm.attend(q, k, k, tm.causal, **keywords)


# -- law 9: nothing is silently dropped --------------------------------------------------------------------------------


def test_law_9_second_derivatives_are_refused_by_name() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    out = tm.attend(q, k, v, tm.causal, backend="sdpa")
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    once = torch.autograd.grad(tm.attend(q, k, v, tm.causal, backend="reference").sin().sum(), q)[0]
    assert_same(dq.detach(), once)
    with pytest.raises(tm.PlanError, match='backend="reference"'):
        dq.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_law_9_transforms_choose_or_name_the_backend_that_has_them() -> None:
    q, k, v = (torch.randn(3, 1, 2, 5, 4) for _ in range(3))
    many = torch.vmap(lambda q, k, v: tm.attend(q, k, v, tm.causal))(q, k, v)
    for i in range(3):
        assert_same(many[i], tm.attend(q[i], k[i], v[i], tm.causal))
    with pytest.raises(tm.PlanError, match=r"vmap(.|\n)*backend='reference' can"):
        torch.vmap(lambda q, k, v: tm.attend(q, k, v, tm.causal, backend="sdpa"))(q, k, v)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(tm.PlanError, match="forward mode"):
        tm.attend(q[0], k[0], v[0], tm.causal, backend="sdpa")


@pytest.mark.parametrize("backend", BACKENDS)
def test_law_9_batches_of_gradients_are_refused_by_name(backend: str) -> None:
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    out = tm.attend(q, q, q, tm.causal, backend=backend)
    many = torch.randn(3, *out.shape)
    with pytest.raises(tm.PlanError, match=r"one gradient at a time(.|\n)*jacrev"):
        torch.autograd.grad(out, q, many, is_grads_batched=True, retain_graph=True)
    with pytest.raises(tm.PlanError, match="vectorize=True"):
        torch.autograd.functional.jacobian(lambda q: tm.attend(q, q, q, tm.causal, backend=backend), q, vectorize=True)
    if backend != "reference":
        with pytest.raises(tm.PlanError, match="one gradient at a time"):
            torch.vmap(lambda g: torch.autograd.grad(out, q, g)[0])(many)
        return
    found = torch.vmap(lambda g: torch.autograd.grad(out, q, g, retain_graph=True)[0])(many)
    for i in range(3):
        assert_same(found[i], torch.autograd.grad(out, q, many[i], retain_graph=True)[0])


def test_law_9_the_way_out_of_batches_of_gradients_works() -> None:
    q = torch.randn(1, 1, 3, 2, dtype=torch.float64)

    def call(q: Tensor) -> Tensor:
        return tm.attend(q, q, q, tm.causal, backend="reference")

    assert_same(torch.func.jacrev(call)(q), torch.autograd.functional.jacobian(call, q))


def test_law_9_mask_tensors_that_vmap_maps_over_are_refused_by_name() -> None:
    q = torch.randn(1, 2, 5, 4)
    for backend in (None, *BACKENDS):
        with pytest.raises(tm.PlanError, match=r"samples of one call"):
            torch.vmap(lambda m, b=backend: tm.attend(q, q, q, m, backend=b))(torch.ones(3, 5, 5, dtype=torch.bool))


# -- all together: random calls against the oracle ---------------------------------------------------------------------


@given(
    drawn=expressions(depth=3),
    pair=st.sampled_from(PAIRS),
    shared=st.sampled_from([1, 2]),
    hostile=st.sampled_from(HOSTILE),
    data=st.data(),
)
def test_random_calls_agree_with_the_oracle(
    drawn: Drawn, pair: tuple[str, torch.dtype], shared: int, hostile: float, data: st.DataObject
) -> None:
    """Any mask, any backend, any dtype, dead rows included, with something hostile anywhere: results and gradients."""
    backend, dtype = pair
    reach = drawn.reach
    shared = shared if reach.heads % shared == 0 else 1
    call = Given.make(
        reach.batch, reach.heads, reach.heads // shared, reach.q, reach.k, dtype, data.draw(st.integers(0, 99))
    )
    rows = st.lists(st.integers(0, reach.q - 1), max_size=2).map(tuple)
    keys = st.lists(st.integers(0, reach.k - 1), max_size=2).map(tuple)
    plant = Plant(data.draw(rows), data.draw(rows), data.draw(keys), data.draw(keys))
    hold_law_6(call, drawn.mask, plant, backend, data.draw(st.integers(0, reach.heads - 1)), (hostile,))
