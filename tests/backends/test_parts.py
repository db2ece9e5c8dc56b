"""fp32 and fp16 as sums of bf16 in tiles: they must say what floats say, and what they cannot say goes to floats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.backends.test_native import MASKS, OPTIONS, agree, results, tensors
from tests.laws.test_precision import MASK, SCALES, assert_no_more_error, masked_sdpa
from truemask.backends.base import Request
from truemask.backends.costs import model
from truemask.backends.costs.calibration_file import store
from truemask.backends.costs.model import assumed, table
from truemask.backends.costs.rates import Both, Pace
from truemask.backends.isa import VARIABLE
from truemask.backends.native.library import isa, missing
from truemask.backends.native.parts import forced, in_parts, native_paces

pytestmark = pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture(autouse=True, params=["amx", "amx_emulated"])
def in_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, request.param)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    with forced(True):
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
    with forced(False):
        floats = results(made, tm.causal, "native")
    assert not torch.equal(floats[0], results(made, tm.causal, "native")[0])


PLANTED = pytest.mark.parametrize("planted", [3.4e38, 2e18, torch.inf, -torch.inf, torch.nan, 1e-35, 1e-40])


def run(made: list[Tensor], mask: tm.Mask, in_parts: bool = True) -> list[Tensor]:
    """out, dq, dk, dv."""
    with forced(in_parts):
        out = tm.attend(*made[:3], mask, backend="native", scale=0.1)
    return [out.detach(), *torch.autograd.grad(out, made[:3], made[3])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@PLANTED
@pytest.mark.parametrize("of", range(4), ids=["q", "k", "v", "dout"])
def test_what_parts_cannot_say_is_computed_in_floats(planted: float, of: int) -> None:
    """The rows that it reaches, to the last bit; others are as if it were not there, and so are keys that they see."""
    mask, seen = tm.window(20), tm.window(20).to_dense(130)[0, 0]
    made = tensors(1, 2, 1, 130, 130, 16, 16)
    clean = run(made, mask)
    made[of].detach()[0, 0, 60, 3] = planted
    found, floats = run(made, mask), run(made, mask, in_parts=False)
    rows = torch.zeros(2, 130, dtype=torch.bool)
    rows[: 1 if of in (0, 3) else 2] = seen[:, 60] if of in (1, 2) else torch.arange(130) == 60
    keys = (seen & rows.any(0)[:, None]).any(0)
    assert rows.any()
    assert not keys.all()
    for a, b, before in list(zip(found, floats, clean, strict=True))[:2]:
        assert same_bits(a[0][~rows], before[0][~rows])
        if of < 3:
            assert same_bits(a[0][rows], b[0][rows])
        else:  # the output came before, in parts
            torch.testing.assert_close(a[0][rows], b[0][rows], rtol=1e-5, atol=1e-6, equal_nan=True)
    for a, b, before in list(zip(found, floats, clean, strict=True))[2:]:
        assert same_bits(a[0, 0, ~keys], before[0, 0, ~keys])
        torch.testing.assert_close(a[0, 0, keys], b[0, 0, keys], rtol=1e-3, atol=1e-5, equal_nan=True)


@PLANTED
def test_what_nobody_sees_changes_no_bit(planted: float) -> None:
    made = tensors(2, 2, 1, 100, 130, 16, 16)
    mask = tm.causal.at(q_start=20)
    clean = run(made, mask)
    for x in made[1:3]:
        x.detach()[:, :, 125] = planted
    for a, b in zip(run(made, mask), clean, strict=True):
        assert same_bits(a, b)


def test_scores_that_overflow() -> None:
    """To -inf, in products of large numbers of which parts would make infinity less infinity."""
    q, k, v, back = tensors(1, 1, 1, 80, 80, 16, 16)
    q, k = ((x.detach().abs() * 1e22).requires_grad_() for x in (q, k))
    k.detach()[0, 0, 5] *= -1
    found, floats = run([q, k, v, back], tm.causal), run([q, k, v, back], tm.causal, in_parts=False)
    for a, b in zip(found, floats, strict=True):
        assert same_bits(a, b)


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
    """By the paces that are known, of both directions together; nothing else is left of what is forced in a block."""
    slow, quick, slowest = Pace(1e11, 1e11), Pace(2e11, 1e11), Pace(5e10, 5e10)
    r = Request(1, 8, 8, 64, 64, 64, 64, torch.float32, torch.device("cpu"), False)
    with forced(None):
        for parts, expected in ((Both(quick, slow), (True, True)), (Both(quick, slowest), (True, False))):
            rates = replace(table().native, paces={"fp32": Both(slow, slow), "fp32_parts": parts})
            with assumed(replace(table(), native=rates)):
                assert (in_parts(r), in_parts(r._replace(grad=True))) == expected
                assert not in_parts(r._replace(head_dim=128, value_dim=128))
                assert native_paces(rates, r) == parts
        with assumed(replace(table(), native=replace(rates, paces={"fp32": Both(slow, slow)}))):
            assert not in_parts(r)  # nothing is known


def test_the_choice_knows_no_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured with two decides for one as well: results depend on no number of threads."""
    monkeypatch.setenv("TRUEMASK_COSTS", str(tmp_path / "costs.json"))
    slow, quick = Pace(1e11, 1e11), Pace(2e11, 2e11)
    rates = replace(
        table().native, paces={**table().native.paces, "fp32": Both(slow, slow), "fp32_parts": Both(quick, quick)}
    )
    costs = {name: getattr(model.shipped()[0], name).numbers() for name in model.BACKENDS}
    r = Request(1, 8, 8, 64, 64, 64, 64, torch.float32, torch.device("cpu"), True)
    before = torch.get_num_threads()
    model.forget()
    try:
        torch.set_num_threads(2)
        store(costs | {"native": {isa(): rates.numbers()}})
        model.forget()
        with forced(None):
            for threads in (2, 1, 4):
                torch.set_num_threads(threads)
                assert in_parts(r)
    finally:
        torch.set_num_threads(before)
        monkeypatch.undo()
        model.forget()


def test_a_block_leaves_nothing_behind() -> None:
    made = tensors(1, 2, 2, 100, 100, 16, 16)
    with forced(None):
        plain = results(made, tm.causal, "native")
    in_block = results(made, tm.causal, "native")
    with forced(None):
        after = results(made, tm.causal, "native")
    assert not torch.equal(in_block[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(after, plain, strict=True))


def test_plans_say_so() -> None:
    for says, mask in ((True, tm.causal & tm.window(9)), (False, tm.causal & tm.window(8))):
        with forced(says):
            text = str(tm.plan(mask, 256, 256, heads=2, head_dim=16, backend="native"))
        assert ("as sums of bf16" in text) == says
