"""How `flex` runs: every mask of the catalogue eagerly, a few structures compiled once, what is masked stays masked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from tests.support.cases import CASES, Case
from tests.support.oracle import Three, three
from truemask.attention.planning.cache import CACHE
from truemask.attention.planning.plan import plan
from truemask.backends.base import Job
from truemask.backends.flex import backend as flex
from truemask.backends.flex.backend import Flex, FlexProposal
from truemask.backends.flex.score_mod import MIN_TABLE_SIZE, padded
from truemask.masks.core.mask import Mask

pytestmark = [
    pytest.mark.filterwarnings("ignore::truemask.ConventionWarning"),  # rectangles are on purpose here
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # torch's own, when it compiles
]


def tensors(
    q_len: int, kv_len: int, batch: int = 2, heads: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Three:
    torch.manual_seed(seed)
    shapes = ((batch, heads, q_len, 5), (batch, heads // 2 or 1, kv_len, 5), (batch, heads // 2 or 1, kv_len, 3))
    return three(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# -- without compiling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_catalogue(case: Case) -> None:
    heads = case.heads if case.heads > 1 else 2
    q, k, v = tensors(case.q_len, case.kv_len, case.batch, heads)
    k, v = (x[:, :1] for x in (k, v))
    found, want = (
        tm.attend(q, k, v, case.make(), backend=name, return_lse=True, sink_logits=torch.ones(heads), softcap=2.0)
        for name in ("flex", "reference")
    )
    close(found, want)


class Steps(tm.Bias):
    """A bias of one's own that no tracer could follow."""

    parameters = ()
    head_count = 1

    def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).double() / 7 if int(q.max()) > 3 else (q - k).double() / 5


@pytest.mark.parametrize("make", [lambda: tm.alibi(torch.rand(4)), lambda: tm.relative(torch.randn(4, 9)), Steps])
def test_bias_objects(make: Callable[[], tm.Bias]) -> None:
    bias, mask = make(), (tm.causal & tm.window(4)).packed([3, 8])
    close(*(tm.attend(*tensors(11, 11), mask, bias=bias, backend=name) for name in ("flex", "reference")))


@pytest.mark.parametrize("hostile", [torch.nan, torch.inf, 3e38])
def test_law_6_what_is_masked_does_not_reach_the_result(hostile: float) -> None:
    q, k, v = tensors(7, 11, dtype=torch.float32)
    mask = tm.causal & tm.window(3)
    want = tm.attend(q, k, v, mask, backend="flex", return_lse=True)
    k[:, :, 8:], v[:, :, 7:] = hostile, -hostile
    close(tm.attend(q, k, v, mask, backend="flex", return_lse=True), want, 1e-6)


@pytest.mark.parametrize("scale", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_law_10_no_more_error_than_sdpa(dtype: torch.dtype, scale: int) -> None:
    mask, (q, k, v) = tm.causal & (tm.window(37) | tm.prefix(3)), tensors(127, 127, dtype=torch.float32)
    given = three(x.to(dtype) for x in (q * scale, k * scale, v))
    dense = mask.to_dense(127)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True).double()

    exact = sdpa(*three(x.double() for x in given))
    theirs, mine = sdpa(*given) - exact, tm.attend(*given, mask, backend="flex").double() - exact
    assert mine.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt()
    assert mine.abs().max() <= 1.5 * theirs.abs().max()


def test_autocast_does_not_round_its_products() -> None:
    q, k, v = tensors(13, 13, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = tm.attend(q, k, v, tm.causal, backend="flex")
    assert out.dtype == torch.bfloat16
    want = tm.attend(*(x.bfloat16().float() for x in (q, k, v)), tm.causal)
    tolerance = Flex.tolerance[torch.bfloat16]
    torch.testing.assert_close(out, want.bfloat16(), rtol=tolerance, atol=tolerance)


# -- who may call, and what is refused ---------------------------------------------------------------------------------


def test_on_the_cpu_only_its_name_chooses_it() -> None:
    q, k, v = tensors(64, 64)
    for options in ({}, {"softcap": 1.0}, {"return_lse": True}, {"sink_logits": torch.zeros(4)}):
        assert plan(q, k, v, tm.causal & tm.window(3), **options).backend != "flex"
        assert plan(q, k, v, tm.causal & tm.window(3), **options, backend="flex").backend == "flex"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"grad": True}, "gradients: FlexAttention has no backward on the CPU"),
        ({"dropout": 0.1}, "dropout: FlexAttention has none"),
        ({"return_weights": True}, "return_weights: FlexAttention never gives the weights"),
        ({"q_len": 1 << 17}, "scores of 512 GiB without compiling: the limit is 4.0 GiB"),
        ({"device": "mps"}, "mps: FlexAttention is run on the CPU and on CUDA only"),
    ],
)
def test_objections(options: dict[str, Any], reason: str) -> None:
    given = {"mask": tm.causal & tm.window(3), "q_len": 64, "backend": None} | options
    assert reason in plan(**given).objections["flex"]


def test_on_cuda_sparse_masks_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan says for CUDA; nothing runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flex, "find_spec", lambda name: name)
    assert not Flex().last_resort
    CACHE.clear()
    try:
        sizes = {"device": "cuda", "dtype": torch.bfloat16, "grad": True}
        assert plan(tm.causal & tm.window(256), 4096, **sizes).backend == "flex"
        assert plan(tm.causal.packed([1000, 3096]), 4096, **sizes).backend == "flex"
        assert plan(tm.causal, 4096, **sizes).backend == "sdpa"
        assert plan(tm.everything, 4096, **sizes).backend == "sdpa"
        found = plan(tm.random(0.1), 4096, **sizes | {"dtype": torch.float64}, head_dim=8).objections["flex"]
        assert [text.split(":")[0] for text in found] == ["torch.float64", "head sizes below 16", "`random`"]
    finally:
        CACHE.clear()


# -- compiled ----------------------------------------------------------------------------------------------------------


def test_padded_data_reads_beyond_its_end_as_before() -> None:
    table = torch.arange(6).view(2, 3)
    wide = padded(table)
    assert wide.shape == (2, MIN_TABLE_SIZE)
    assert torch.equal(wide[:, :5], torch.tensor([[0, 1, 2, 2, 2], [3, 4, 5, 5, 5]]))
    assert padded(torch.zeros(MIN_TABLE_SIZE + 1)).shape == (4 * MIN_TABLE_SIZE,)
    for kept in (torch.zeros(()), torch.zeros(0), torch.zeros(2, 3, 4)):
        assert padded(kept) is kept


def test_what_is_lowered_says_its_size() -> None:
    """Lists of two rows and columns at least, and four tables of a packed row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "COMPILE_ON_CPU", True)
        job = Job(tm.causal.packed([10, 27]), plan(tm.causal, 37).request)
        lists = 4 * (2 + 2 * 2) * 4
        assert FlexProposal(job).lower().nbytes == lists + 4 * MIN_TABLE_SIZE * 8
    assert FlexProposal(job).lower().nbytes == 0


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with `TRUEMASK_FLEX_COMPILE=1`."""
    if shutil.which("g++") is None or not torch.cpu._is_avx2_supported():
        pytest.skip("needs g++ and AVX2")
    monkeypatch.setattr(flex, "COMPILE_ON_CPU", True)
    CACHE.clear()
    yield
    CACHE.clear()


def compiled(mask: Mask, q_len: int, kv_len: int | None = None, **options: Any) -> int:
    """Run compiled, compare with the reference; how often was compiled."""
    q, k, v = tensors(q_len, kv_len or mask.kv_len_for(q_len), dtype=torch.float32)
    assert "compiled" in plan(q, k, v, mask, **options).ways["flex"]
    before = counters["stats"]["unique_graphs"]
    close(*(tm.attend(q, k, v, mask, backend=name, **options) for name in ("flex", "reference")), 1e-5)
    return counters["stats"]["unique_graphs"] - before


def packed(*lengths: int) -> Mask:
    return (tm.causal & (tm.window(40) | tm.prefix(3))).packed(lengths)


STRUCTURES = {
    "a window": lambda n: (tm.causal & tm.window(n // 5)).at(q_start=1 + n % 7),
    "documents": lambda n: packed(n // 3, n // 2, n - n // 3 - n // 2),
    "padding, per head": lambda n: tm.per_head([tm.local(n // 9), *[tm.causal] * 3]).padded([n // 4, 0]),
}


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("name", STRUCTURES)
def test_compiled_once_for_a_structure(name: str) -> None:
    """Other lengths, shorter than a block and longer, other documents, other numbers: the same compiled function."""
    make = STRUCTURES[name]
    lengths = (300, 517, 100, 640)
    assert [compiled(make(n), n) for n in lengths] == [1, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_compiled_scores() -> None:
    """A soft cap and ALiBi with new numbers are no new compilation; dead rows are zeros; a hidden NaN stays hidden."""
    mask = packed(100, 57) & tm.queries(torch.arange(157) % 11 != 0)
    first = compiled(mask, 157, softcap=2.0, bias=tm.alibi(torch.rand(4)))
    assert first == 1
    assert compiled(mask, 157, softcap=3.0, bias=tm.alibi(torch.rand(4))) == 0
    q, k, v = tensors(157, 157, dtype=torch.float32)
    k[:, :, 120:] = torch.nan
    found, want = (tm.attend(q, k, v, mask, backend=name) for name in ("flex", "reference"))
    torch.testing.assert_close(found, want, equal_nan=True)
    assert not found[:, :, :100].isnan().any()


@pytest.mark.usefixtures("compiling")
def test_what_is_not_compiled_on_the_cpu() -> None:
    """The log-sum-exp, sinks, fp64 and the hash of `random` run without compiling, and the plan says so."""
    q, k, v = tensors(37, 37, dtype=torch.float32)
    doubles = three(x.double() for x in (q, k, v))
    for given, mask, options in (
        ((q, k, v), tm.causal, {"return_lse": True}),
        ((q, k, v), tm.causal, {"sink_logits": torch.zeros(4)}),
        ((q, k, v), tm.random(0.5), {}),
        (doubles, tm.causal, {}),
    ):
        assert "without compiling" in plan(*given, mask, **options).ways["flex"]
        close(*(tm.attend(*given, mask, backend=name, **options) for name in ("flex", "reference")), 1e-5)
