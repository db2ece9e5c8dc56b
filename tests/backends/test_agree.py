"""Every backend against the fp64 oracle: results and gradients, options alone and together, in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support import oracle
from tests.support.cases import CASES, Case
from tests.support.oracle import Three, three
from truemask.attention.planning.plan import plan
from truemask.backends import registry
from truemask.backends.backend import ANY_DEVICE
from truemask.backends.base import Request
from truemask.backends.shared.dropout import kept
from truemask.masks.core.mask import Mask
from truemask.masks.core.queries import indices

TRAINING = Request(1, 1, 1, 1, 1, 1, 1, torch.float32, torch.device("cpu"), grad=True)
BACKENDS = {backend.name: backend.tolerance for backend in registry.BACKENDS}  # what each declares for each dtype
FORWARD_ONLY = {  # on the CPU; what they compute is compared without gradients
    backend.name
    for backend in registry.BACKENDS
    if (backend.devices.get("cpu") or backend.devices[ANY_DEVICE]).lacks(TRAINING)
}
DTYPES = list(BACKENDS["sdpa"])

pytestmark = pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")  # rectangles are on purpose here


@pytest.fixture(autouse=True)
def direction(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients for a backend that has none: those of the oracle are zeros then, too."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    with torch.set_grad_enabled(name not in FORWARD_ONLY):
        yield


class Problem(NamedTuple):
    """Sizes (different primes, but for the heads) and a mask."""

    mask: Mask
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 5
    kv_len: int = 7
    head_dim: int = 3
    value_dim: int = 3

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Three:
        torch.manual_seed(seed)
        q = torch.randn(self.batch, self.heads, self.q_len, self.head_dim, dtype=torch.float64)
        k = torch.randn(self.batch, self.kv_heads, self.kv_len, self.head_dim, dtype=torch.float64)
        v = torch.randn(self.batch, self.kv_heads, self.kv_len, self.value_dim, dtype=torch.float64)
        return three(x.to(dtype).requires_grad_() for x in (q, k, v))

    @property
    def allowed(self) -> Tensor:
        return self.mask.to_dense(self.q_len, self.kv_len, batch=self.batch, heads=self.heads)


MASKS = {
    "everything": tm.everything,
    "nothing": tm.nothing,
    "causal": tm.causal.at(q_start=2),
    "top-left": tm.causal | tm.prefix(1),
    "sinks and window": tm.causal & (tm.window(3) | tm.prefix(2)),
    "dead rows and keys": tm.window(3) - tm.blocks(2),
    "padding": tm.padding(lengths=[3, 7], on="keys"),
    "left padding": tm.causal.padded([3, 0]),
    "per head": tm.per_head([tm.local(i) for i in range(4)]),
    "per sample and head": tm.random(0.5, per_head=True) & tm.keys(torch.arange(14).view(2, 7) % 5 != 1),
    "keys": tm.keys(torch.arange(7) % 3 != 0),
}


def exact(name: str) -> torch.dtype:
    """The widest dtype that a backend computes in."""
    return max(BACKENDS[name], key=lambda dtype: dtype.itemsize)


def agree(name: str, problem: Problem, dtype: torch.dtype, options: dict[str, Any], extra: dict[str, Any]) -> None:
    """Results and gradients of a backend equal the oracle's; `options` go to both, `extra` to the oracle alone."""
    leaves = problem.tensors(dtype)
    more = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    wants_lse = not plan(*leaves, problem.mask, return_lse=True, **options).objections[name]
    got = tm.attend(*leaves, problem.mask, backend=name, return_lse=wants_lse, **options)
    out, lse = got if isinstance(got, tuple) else (got, None)
    oracle_options: dict[str, Any] = {
        key: value for key, value in options.items() if key != "bias" or isinstance(value, Tensor)
    }
    want = oracle.attention(*leaves, problem.allowed, **(oracle_options | extra))
    assert out.dtype == dtype
    close(out, want.out, BACKENDS[name][dtype], "out")
    grad_out = torch.randn_like(want.out).to(dtype)
    pairs = [(out, want.out, grad_out)]
    if lse is not None:
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        close(lse, want.lse, BACKENDS[name][dtype], "lse")
        pairs.append((lse, want.lse, torch.randn_like(want.lse).to(lse.dtype)))
    inputs = [*leaves, *more]
    mine = gradients([(a, g) for a, _, g in pairs], inputs)
    theirs = gradients([(b, g.double()) for _, b, g in pairs], inputs)
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        close(a, b, BACKENDS[name][dtype] * 2, f"gradient {i}")


def gradients(pairs: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """Of the results with what comes back to them; zeros where nothing arrives."""
    live = [(result, grad) for result, grad in pairs if result.requires_grad]
    if not live:
        return [torch.zeros_like(x) for x in inputs]
    results, grads = zip(*live, strict=True)
    found = torch.autograd.grad(results, inputs, grads, allow_unused=True)
    some: list[Tensor | None] = list(found)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, some, strict=True)]


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    got, want = got.detach(), want.detach()
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), what
    assert torch.equal(got[~finite].double(), want[~finite].double()), what
    size = float(want[finite].abs().max()) if finite.any() else 0.0
    off = float((got.double() - want.double())[finite].abs().max()) if finite.any() else 0.0
    assert off <= tolerance * max(1.0, size), f"{what}: off by {off:.3g} at size {size:.3g}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(name: str, mask: str) -> None:
    agree(name, Problem(MASKS[mask]), exact(name), {}, {})


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_catalogue(name: str, case: Case) -> None:
    """Every mask there is, in every dtype: two query heads share a key head where the mask says nothing of heads."""
    mask = case.make()
    heads = case.heads if mask.head_count != 1 else 2
    for dtype in BACKENDS[name]:
        agree(name, Problem(mask, case.batch, heads, 1, case.q_len, case.kv_len), dtype, {}, {})


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in BACKENDS for dtype in BACKENDS[name]])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    agree(name, Problem(MASKS["sinks and window"]), dtype, {}, {})
    agree(name, Problem(MASKS["dead rows and keys"]), dtype, {"scale": 0.7}, {})


SHAPES = [
    {"heads": 3, "kv_heads": 3},
    {"heads": 3, "kv_heads": 1},
    {"value_dim": 2},
    {"value_dim": 13},
    {"batch": 0},
    {"q_len": 0},
    {"kv_len": 0},
    {"q_len": 0, "kv_len": 0},
    {"q_len": 1},
    {"kv_len": 1},
    {"head_dim": 1, "value_dim": 1},
    {"q_len": 11, "kv_len": 3},
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [tm.everything, tm.causal.at(q_start=1), tm.local(3)], ids=str)
def test_shapes(name: str, sizes: dict[str, int], mask: Mask) -> None:
    agree(name, Problem(mask)._replace(**sizes), exact(name), {}, {})


def options(problem: Problem) -> dict[str, dict[str, Any]]:
    """Every option that changes the numbers."""
    torch.manual_seed(5)
    cells = (problem.batch, problem.heads, problem.q_len, problem.kv_len)
    hidden = torch.randn(1, 1, *cells[2:], dtype=torch.float64)
    hidden[..., 0, :] = -torch.inf
    hidden[..., :, 1] = -torch.inf
    return {
        "scale": {"scale": -0.3},
        "softcap": {"softcap": 0.8},
        "sinks": {"sink_logits": torch.randn(problem.heads, dtype=torch.float64).requires_grad_()},
        "heavy sink": {"sink_logits": torch.full((problem.heads,), 25.0, dtype=torch.float64).requires_grad_()},
        "no sink": {"sink_logits": torch.full((problem.heads,), -torch.inf, dtype=torch.float64)},
        "bias": {"bias": torch.randn(cells, dtype=torch.float64)},
        "bias row": {"bias": torch.randn(cells[-1], dtype=torch.float64)},
        "bias column": {"bias": torch.randn(1, cells[1], cells[2], 1, dtype=torch.float64)},
        "bias of -inf": {"bias": hidden},
        "learned bias": {"bias": torch.randn(1, *cells[1:], dtype=torch.float64).requires_grad_()},
    }


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("option", options(Problem(tm.causal)))
@pytest.mark.parametrize("mask", ["everything", "causal", "dead rows and keys"])
def test_options(name: str, option: str, mask: str) -> None:
    problem, dtype = Problem(MASKS[mask]), exact(name)
    given = options(problem)[option]
    if plan(*problem.tensors(dtype), problem.mask, **given).objections[name]:
        with pytest.raises(tm.PlanError):
            tm.attend(*problem.tensors(dtype), problem.mask, backend=name, **given)
        return
    agree(name, problem, dtype, given, {})


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in BACKENDS for dtype in BACKENDS[name]])
def test_sinks_and_bias_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    problem = Problem(MASKS["sinks and window"])
    torch.manual_seed(3)
    sinks = torch.randn(problem.heads).to(dtype).requires_grad_()
    agree(name, problem, dtype, {"sink_logits": sinks, "bias": torch.randn(7).to(dtype)}, {})


def test_everything_together_on_the_reference() -> None:
    problem = Problem(MASKS["per sample and head"], value_dim=5)
    given = options(problem)
    chosen = {key: value for name in ("softcap", "sinks", "learned bias") for key, value in given[name].items()}
    agree("reference", problem, torch.float64, {"scale": 0.9, **chosen}, {})


@pytest.mark.parametrize("mask", ["everything", "sinks and window"])
def test_dropout_drops_the_cells_of_the_rule(mask: str) -> None:
    """The seed is drawn from torch's generator; the oracle is given the cells that the rule keeps."""
    problem = Problem(MASKS[mask])
    torch.manual_seed(17)
    torch.randn(problem.batch)  # any use of the generator before the call
    state = torch.get_rng_state()
    seed = int(torch.randint(1 << 32, ()))
    cells = kept(seed, 0.3, *indices(2, 4, 5, 7, "cpu"))
    leaves = problem.tensors()
    want = oracle.attention(*leaves, problem.allowed, kept=cells, dropout=0.3)
    torch.set_rng_state(state)
    out, weights = tm.attend(*leaves, problem.mask, dropout=0.3, return_weights=True)
    close(out, want.out, 1e-12, "out")
    close(weights, want.weights, 1e-12, "weights")
    grad_out = torch.randn_like(out)
    mine, theirs = (torch.autograd.grad(x, leaves, grad_out) for x in (out, want.out))
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, 1e-12, "gradient")


@pytest.mark.parametrize("bias", ["alibi", "relative", "t5"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_bias_objects_follow_the_positions_of_the_mask(name: str, bias: str, learned: bool) -> None:
    """Under `at` and `packed` a bias object is asked about logical positions; gradients reach its parameters."""
    torch.manual_seed(2)
    table = torch.randn(4, 9, dtype=torch.float64) if bias != "alibi" else torch.rand(4, dtype=torch.float64)
    table.requires_grad_(learned)
    made = {
        "alibi": lambda: tm.alibi(table),
        "relative": lambda: tm.relative(table),
        "t5": lambda: tm.relative(table[:, :8], max_distance=12, bidirectional=False),
    }[bias]()
    for mask, q, k in (
        (tm.causal.at(q_start=2), torch.arange(2, 7), torch.arange(7)),
        (tm.local(2).packed([2, 3], kv_lengths=[3, 4]), _restart(2, 3), _restart(3, 4)),
    ):
        problem = Problem(mask)
        if plan(*problem.tensors(exact(name)), mask, bias=made).objections[name]:
            assert learned
            continue
        h = torch.arange(4)[:, None, None]
        dense = made.value(torch.zeros((), dtype=torch.int64), h, q[:, None], k)[None]
        agree(name, problem, exact(name), {"bias": made}, {"bias": dense})
        if learned and torch.is_grad_enabled():
            out = tm.attend(*problem.tensors(), mask, bias=made, backend=name)
            want = oracle.attention(*problem.tensors(), problem.allowed, bias=dense)
            mine, theirs = (torch.autograd.grad(x.sin().sum(), table)[0] for x in (out, want.out))
            close(mine, theirs, 1e-12, "table")


def _restart(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


@pytest.mark.parametrize("name", BACKENDS)
def test_strides_do_not_matter(name: str) -> None:
    """Transposed, sliced and expanded tensors give what their copies give."""
    torch.manual_seed(1)
    dtype = exact(name)
    q = torch.randn(2, 5, 4, 3, dtype=dtype).transpose(1, 2)
    k = torch.randn(1, 2, 3, 14, dtype=dtype).mT[:, :, ::2].expand(2, -1, -1, -1)
    v = torch.randn(2, 2, 7, 5, dtype=dtype)[..., 2:]
    leaves = three(x.detach().requires_grad_() for x in (q, k, v))
    copies = three(x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v))
    results = [tm.attend(*x, MASKS["sinks and window"], backend=name) for x in (leaves, copies)]
    close(results[0], results[1], 1e-14, "out")
    sums = [(out.sin().sum(), torch.ones((), dtype=dtype)) for out in results]
    grads = [gradients([pair], list(x)) for pair, x in zip(sums, (leaves, copies), strict=True)]
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-14, "gradient")


@pytest.mark.parametrize("frozen", ["q", "k", "v", "qk", "kv", "qv"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in FORWARD_ONLY])
def test_only_what_wants_a_gradient_gets_one(name: str, frozen: str) -> None:
    problem = Problem(MASKS["causal"])
    leaves = problem.tensors(exact(name))
    whole = torch.autograd.grad(tm.attend(*leaves, problem.mask, backend=name).sin().sum(), leaves)
    some = three(x.detach().requires_grad_(key not in frozen) for key, x in zip("qkv", leaves, strict=True))
    tm.attend(*some, problem.mask, backend=name).sin().sum().backward()
    for key, x, want in zip("qkv", some, whole, strict=True):
        assert (x.grad is None) == (key in frozen)
        if x.grad is not None:
            close(x.grad, want, 1e-14, key)
