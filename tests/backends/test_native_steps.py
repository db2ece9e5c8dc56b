"""Steps of decoding on the native kernel: what is lowered for the rows around one serves each of them, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from truemask.attention.call import AttendArgs, read_call
from truemask.attention.planning import cache as _cache
from truemask.attention.planning.cache import CACHE, Rows
from truemask.backends.backend import Proposal
from truemask.backends.base import Job
from truemask.backends.native.backend import Native
from truemask.backends.native.library import missing

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"the move is whoever installs a C++ compiler: {missing()}"),
    pytest.mark.filterwarnings("ignore::truemask.ConventionWarning"),
]
N = 200
MASKS = {
    "causal": tm.causal,
    "a window and sinks": tm.causal & (tm.window(70) | tm.prefix(4)),
    "blocks": tm.causal & tm.blocks(48),
    "dilated": tm.causal & tm.dilated(3),
    "left padded": (tm.causal & tm.window(90)).padded([0, 130]),
    "by head": tm.per_head([tm.causal, tm.causal & tm.window(5), tm.nothing, tm.prefix(9)]),
    "both sides": tm.local(40),
    "documents that end": tm.causal & tm.documents(lengths=[90, 110]),
    "keys from elsewhere on": tm.causal.at(q_start=3, k_start=1),
    "without exact form": tm.causal & tm.random(0.5),
}


def numbers(seed: int, heads: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, heads, N, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alone(q: Tensor, k: Tensor, v: Tensor, mask: tm.Mask) -> tuple[Tensor, Tensor | None]:
    """out and lse of a call whose row was lowered for itself."""
    call = read_call(q, k, v, mask, AttendArgs(backend="native", return_lse=True))
    native = Native()
    proposal = native.propose(Job(call.mask, call.request))
    assert isinstance(proposal, Proposal)
    result = native.run(proposal.lower(), call.inputs, proposal.job)
    return result.out, result.lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_a_step_is_the_same_bits_whatever_came_before(name: str, dtype: torch.dtype) -> None:
    mask, (q, k, v) = MASKS[name], (numbers(seed, heads, dtype) for seed, heads in enumerate((4, 2, 2)))
    CACHE.clear()
    for row in range(N):
        stop = row + 1 if name != "both sides" else min(N, row + 30)
        step = q[:, :, row : row + 1], k[:, :, :stop], v[:, :, :stop], mask.at(q_start=row)
        shared = tm.attend(*step, backend="native", return_lse=True)
        assert all(torch.equal(x, y) for x, y in zip(shared, alone(*step), strict=True)), row
        exact = tm.attend(*(x.double() for x in step[:3]), step[3], backend="reference")
        assert (shared[0] - exact).abs().max() < (1e-5 if dtype == torch.float32 else 3e-2), row


def rows_kept() -> list[Rows]:
    return [held for held in CACHE._kept if isinstance(held, Rows)]  # pyright: ignore[reportPrivateUsage]


def test_what_is_lowered_serves_64_rows() -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, N, 8)
    CACHE.clear()
    for row in range(64, N):
        tm.attend(q, k[:, :, : row + 1], k[:, :, : row + 1], tm.causal.at(q_start=row), backend="native")
    kept = rows_kept()
    assert [rows.mask for rows in kept] == [tm.causal.at(q_start=start) for start in (64, 128, 192)]
    assert CACHE.info().nbytes >= sum(rows.lowered.nbytes for rows in kept if rows.lowered is not None) > 0


def test_what_is_lowered_for_rows_is_bounded() -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 8, 8)
    CACHE.clear()
    for row in range(0, 64 * (_cache.MAX_STEPS + 9), 64):
        tm.attend(q, k, k, tm.causal.at(q_start=row), backend="native")
    assert len(rows_kept()) == _cache.MAX_STEPS


def test_rows_that_a_mask_cannot_answer_for_are_not_asked_about() -> None:
    """Data that ends behind the step, and a user's function, which may index what is not there yet."""
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 10, 8)
    flags = torch.arange(10) % 2 == 0
    asked: list[int] = []

    def of_flags(b: Any, h: Any, at: Any, to: Any) -> Any:
        asked.append(int(at.max()))
        return flags[to] & (at >= to)

    for mask in (tm.keys(flags) & tm.causal, tm.predicate(of_flags)):
        got = tm.attend(q, k, k, mask.at(q_start=9), backend="native")
        assert torch.allclose(got, tm.attend(q, k, k, tm.dense(flags[None]), backend="reference"), atol=1e-6)
    assert max(asked) == 9


def test_a_step_with_gradients_is_lowered_for_itself() -> None:
    q, k = torch.randn(1, 2, 1, 8).requires_grad_(), torch.randn(1, 2, 100, 8).requires_grad_()
    mask = (tm.causal & tm.window(70)).at(q_start=99)
    found = [
        torch.autograd.grad(tm.attend(q, k, k, mask, backend=name).square().sum(), (q, k))
        for name in ("native", "reference")
    ]
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*found, strict=True))
