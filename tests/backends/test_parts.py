"""fp32 and fp16 as sums of bf16 in tiles: they must say what floats say, and what they cannot say goes to floats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.backends.test_native import MASKS, OPTIONS, agree, results, tensors
from tests.laws.test_precision import MASK, SCALES, assert_no_more_error, masked_sdpa
from truemask.backends.base import Request
from truemask.backends.costs.model import table
from truemask.backends.costs.rates import Both, NativeRates, Pace
from truemask.backends.isa import VARIABLE
from truemask.backends.native.library import missing
from truemask.backends.native.parts import BOTH, NEITHER, InParts, forced, in_parts, native_paces

pytestmark = pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture(autouse=True, params=["amx", "amx_emulated"])
def in_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, request.param)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    with forced(BOTH):
        yield


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mask", ["documents", "dead rows", "per head"])
def test_every_option(options: dict[str, Any], mask: str) -> None:
    agree(tensors(2, 4, 2, 130, 130, 24, 40), MASKS[mask], **options)


@pytest.mark.parametrize(("q", "k"), [(65, 70), (9, 64), (64, 1), (40, 3001)])
@pytest.mark.parametrize(("d", "dv"), [(1, 72), (20, 7), (64, 128)])
def test_sizes(q: int, k: int, d: int, dv: int) -> None:
    agree(tensors(1, 2, 1, q, k, d, dv), tm.causal.at(q_start=max(0, k - q)) & (tm.window(1000) | tm.prefix(2)))


@DTYPES
@SCALES
def test_law_10(dtype: torch.dtype, scale: int) -> None:
    assert_no_more_error(lambda q, k, v: tm.attend(q, k, v, MASK, backend="native"), masked_sdpa, dtype, scale)


@DTYPES
def test_scores_keep_the_digits_of_floats(dtype: torch.dtype) -> None:
    """Whatever the output is rounded to: lse is not."""
    made = [x.detach() for x in tensors(1, 2, 2, 100, 100, 64, 64, dtype)[:3]]
    made[0] *= 10
    found = tm.attend(*made, tm.causal, backend="native", return_lse=True)[1]
    expected = tm.attend(*(x.double() for x in made), tm.causal, backend="reference", return_lse=True)[1]
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@DTYPES
def test_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    before, made = torch.get_num_threads(), tensors(2, 4, 2, 200, 200, 32, 32, dtype)
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(results(made, MASKS["sinks"], "native"))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_they_are_another_way() -> None:
    made = tensors(1, 1, 1, 64, 64, 32, 32)
    with forced(NEITHER):
        floats = results(made, tm.causal, "native")
    assert not torch.equal(floats[0], results(made, tm.causal, "native")[0])


@pytest.mark.parametrize("planted", [3.4e38, torch.inf, -torch.inf, torch.nan, 1e-35, 1e-40])
@pytest.mark.parametrize("of", range(4), ids=["q", "k", "v", "dout"])
@pytest.mark.parametrize("mask", ["everything", "window"])
def test_what_parts_cannot_say_is_computed_in_floats(planted: float, of: int, mask: str) -> None:
    """Bit for bit as if parts had not been tried, seen or hidden."""
    made = tensors(1, 2, 1, 130, 130, 16, 16)
    made[of].detach()[0, 0, 7, 3] = planted

    def run(way: InParts) -> list[Tensor]:
        with forced(way):
            out = tm.attend(*made[:3], MASKS[mask], backend="native", scale=0.1)
        return [out.detach(), *torch.autograd.grad(out, made[:3], made[3])]

    before_it_came = NEITHER if of == 3 else BOTH
    for a, b in zip(run(before_it_came._replace(backward=True)), run(NEITHER), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_infinities_of_fp16() -> None:
    made = tensors(1, 1, 1, 70, 70, 16, 16, torch.float16)
    made[2].detach()[0, 0, 40] = torch.inf
    out = tm.attend(*made[:3], tm.causal, backend="native")
    assert out[:, :, :40].isfinite().all()
    assert out[:, :, 40:].isinf().all()


@pytest.mark.parametrize("size", [2.0**-100, 1e30])
def test_far_sizes_keep_their_digits(size: float) -> None:
    """Values of such a size, whose parts are still normal numbers."""
    q, k, v, back = tensors(1, 2, 2, 100, 100, 32, 32)
    out = tm.attend(q, k, v * size, tm.causal, backend="native")
    expected = tm.attend(q.double(), k.double(), v.double(), tm.causal, backend="reference")
    torch.testing.assert_close(out.double() / size, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), back), torch.autograd.grad(expected, (q, k, v), back), strict=True
    ):
        torch.testing.assert_close(a.double() / size, b.double(), rtol=1e-4, atol=1e-5)


def test_the_quicker_way_is_taken() -> None:
    """By the paces that are known, of each direction and head size."""
    numbers, slow, quick = table().native.numbers(), Pace(1e11, 1e11), Pace(2e11, 1e11)
    r = Request(1, 8, 8, 64, 64, 64, 64, torch.float32, torch.device("cpu"), True)
    with forced(None):
        for parts, expected in (
            (Both(quick, slow), InParts(True, False)),
            (Both(slow, quick), InParts(False, True)),
            (Both(slow, slow), NEITHER),
        ):
            rates = replace(table().native, paces={"fp32": Both(slow, slow), "fp32_parts": parts})
            assert in_parts(rates, r) == expected
            assert in_parts(rates, r._replace(head_dim=128, value_dim=128)) == NEITHER
            assert native_paces(rates, r) == Both(*(max(a, slow, key=lambda pace: pace.d64) for a in parts))
        assert in_parts(NativeRates.of(numbers), r) == NEITHER  # nothing is known
