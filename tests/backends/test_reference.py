"""The reference: bounded chunks, every derivative, and the three products that it stands on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import truemask as tm
from tests.support.oracle import Three, three
from truemask.attention.call import AttendArgs, read_call
from truemask.backends.shared.eager import eager_attention
from truemask.backends.shared.masked_matmul import contained_product, gather, outer, scatter

# Torch's own forward mode still scripts a few formulas when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

MASK = tm.causal & (tm.window(3) | tm.prefix(2)) - tm.dilated(5)


def leaves(
    b: int = 1, h: int = 2, y: int = 1, q: int = 3, k: int = 5, d: int = 2, dtype: torch.dtype = torch.float64
) -> Three:
    torch.manual_seed(0)
    shapes = ((b, h, q, d), (b, y, k, d), (b, y, k, d))
    return three(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.4}, {"softcap": 0.7, "bias": torch.ones(13, 1) / 7}],
    ids=["plain", "dropout", "softcap and bias"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_chunks_change_nothing(options: dict[str, Any], grad: bool) -> None:
    """One row at a time gives what all rows at once give, gradients and dropped cells included."""
    qkv = three(x.detach().requires_grad_(grad) for x in leaves(2, 4, 2, 13, 11))
    inputs = read_call(*qkv, MASK, AttendArgs(**options)).inputs._replace(seed=5)
    results = [eager_attention(inputs, MASK, want_weights=True, chunk_bytes=size) for size in (1, 1000, 1 << 23)]
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    if grad:
        grads = [torch.autograd.grad((r.out.sin().sum(),), qkv) for r in results]
        for found in grads[1:]:
            torch.testing.assert_close(found, grads[0], rtol=1e-12, atol=1e-13)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


def test_memory_is_bounded_in_both_directions() -> None:
    """Nothing larger than a chunk's scores (or q, k and v themselves) is ever made."""
    qkv = leaves(1, 2, 2, 257, 257, 3)
    inputs = read_call(*qkv, MASK).inputs
    with Largest() as largest:
        eager_attention(inputs, MASK, chunk_bytes=16 * 2 * 257 * 8).out.sum().backward()
    assert largest.numel <= 16 * 2 * 257


def test_computes_in_fp64_when_asked() -> None:
    qkv = three(x.detach() for x in leaves(1, 2, 1, 13, 13, 7, torch.float32))
    inputs = read_call(*qkv, MASK).inputs
    exact = eager_attention(inputs._replace(**dict(zip("qkv", (x.double() for x in qkv), strict=True))), MASK)
    found = eager_attention(inputs, MASK, compute=torch.float64)
    assert found.out.dtype == torch.float32
    assert found.lse is not None
    assert found.lse.dtype == torch.float64
    assert torch.equal(found.out, exact.out.float())


# -- derivatives -------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    out, lse = tm.attend(q, k, v, MASK.at(q_start=2), backend="reference", return_lse=True, **options)
    return out, lse.masked_fill(lse == -torch.inf, 0)


def test_first_and_second_derivatives() -> None:
    bias = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    sinks = torch.randn(2, dtype=torch.float64).requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        return attend(q, k, v, bias=bias, sink_logits=sinks, softcap=1.5)

    given = (*leaves(), bias, sinks)
    assert gradcheck(call, given, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, given, fast_mode=True)


def test_second_derivatives_through_recomputed_chunks() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager_attention(read_call(q, k, v, MASK).inputs, MASK, chunk_bytes=1).out

    assert gradgradcheck(call, leaves(), fast_mode=True)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 1, None), (2, None, 0), (None, None, 3)], ids=str)
def test_vmap_is_a_loop(in_dims: tuple[int | None, ...]) -> None:
    torch.manual_seed(1)
    qkv = leaves(2, 4, 2, 3, 5)
    many = [
        x if dim is None else torch.stack([x * (i + 1) for i in range(3)], dim)
        for x, dim in zip(qkv, in_dims, strict=True)
    ]
    found = torch.vmap(attend, in_dims=in_dims)(*many)
    for i in range(3):
        one = attend(*three(x if dim is None else x.select(dim, i) for x, dim in zip(many, in_dims, strict=True)))
        for a, b in zip(found, one, strict=True):
            torch.testing.assert_close(a[i], b)


def test_gradients_for_each_sample_by_vmap_of_grad() -> None:
    q, k, v = (x.detach() for x in leaves(1, 2, 1, 3, 5))
    samples = torch.stack([q, 2 * q, -q])

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return attend(q, k, v)[0].sin().sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(samples, k)
    for i, sample in enumerate(samples):
        x, y = sample.requires_grad_(), k.clone().requires_grad_()
        want = torch.autograd.grad(loss(x, y), (x, y))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a[i], b)


def test_forward_mode_and_jacobians() -> None:
    q, k, v = (x.detach() for x in leaves())
    tangent = torch.randn_like(q)
    with forward_ad.dual_level():
        out = tm.attend(forward_ad.make_dual(q, tangent), k, v, MASK.at(q_start=2))
        pushed = forward_ad.unpack_dual(out).tangent
    call = functools.partial(tm.attend, k=k, v=v, mask=MASK.at(q_start=2))
    for jacobian in (torch.func.jacfwd(call)(q), torch.func.jacrev(call)(q)):
        torch.testing.assert_close(torch.tensordot(jacobian, tangent, 4), pushed)


# -- the three products ------------------------------------------------------------------------------------------------

FORMS = [
    (outer, "gnd,md->gnm", (2, 3, 2), (5, 2)),
    (gather, "gnm,md->gnd", (2, 3, 5), (5, 2)),
    (scatter, "gnm,gnd->md", (2, 3, 5), (2, 3, 2)),
]


@pytest.mark.parametrize(("form", "formula", "x", "y"), FORMS, ids=["outer", "gather", "scatter"])
def test_products_are_the_sum_they_say_and_differentiable(form: Any, formula: str, x: Any, y: Any) -> None:
    torch.manual_seed(0)
    allowed = torch.rand(2, 2, 3, 5) < 0.6
    a, c = (torch.randn(2, *shape, dtype=torch.float64).requires_grad_() for shape in (x, y))
    inputs, output = formula.split("->")
    first, second = (f"z{part}" for part in inputs.split(","))
    if form is outer:
        want = torch.einsum(f"{first},{second}->z{output}", a, c) * allowed
    else:
        want = torch.einsum(f"{first},{second}->z{output}", a * allowed, c)
    torch.testing.assert_close(form(a, c, allowed), want)
    assert gradcheck(lambda a, c: form(a, c, allowed), (a, c), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(lambda a, c: form(a, c, allowed), (a, c), fast_mode=True)


VALUES = (0.0, 1.5, -2.0, torch.inf, -torch.inf, torch.nan)


def test_contained_product_is_the_sum_over_allowed_cells() -> None:
    """What each cell should hold is summed one term at a time, in the arithmetic of NaN and infinities."""
    torch.manual_seed(0)
    allowed = torch.rand(31, 7) < 0.5
    w = torch.randn(31, 7).masked_fill(~allowed, 0) * (torch.rand(31, 7) < 0.8)
    x = torch.tensor(VALUES)[torch.randint(len(VALUES), (7, 11))]
    want = torch.tensor(
        [
            [sum((w[i, j] * x[j, c] for j in range(7) if allowed[i, j]), torch.zeros(())) for c in range(11)]
            for i in range(31)
        ]
    )
    torch.testing.assert_close(contained_product(w, x, lambda: allowed), want, equal_nan=True)
    assert torch.isfinite(want).any()
    assert want.isnan().any()
    assert want.isinf().any()
