"""The native kernel: every instruction set that was built, threads, forks, odd sizes, and what happens without it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import truemask as tm
from tests.support.strategies import Drawn, expressions
from truemask.attention.planning.cache import CACHE
from truemask.backends import isa as isa_files
from truemask.backends.costs.calibration_file import processor
from truemask.backends.costs.shipped import vendor_of
from truemask.backends.isa import ISAS, VARIABLE, file_of
from truemask.backends.native import abi as native_abi
from truemask.backends.native import library as native_library
from truemask.backends.native.backend import Native
from truemask.backends.native.library import isa, library, missing
from truemask.cli.doctor.doctor import findings
from truemask.masks.core.mask import Mask

BUILT = [name for name in ISAS if file_of(name).is_file()]
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"the move is whoever installs a C++ compiler: {missing()}"),
    pytest.mark.filterwarnings("ignore::truemask.ConventionWarning"),
]


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors(
    b: int, h: int, y: int, q: int, k: int, d: int, dv: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v that want gradients, and what comes back to out."""
    numbers = torch.Generator().manual_seed(0)  # its own, since tests of threads make tensors in several at once
    shapes = ((b, h, q, d), (b, y, k, d), (b, y, k, dv), (b, h, q, dv))
    made = [torch.randn(shape, generator=numbers).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def results(made: list[Tensor], mask: Mask, backend: str, **options: Any) -> list[Tensor]:
    """out, lse and the gradients of both."""
    out, lse = tm.attend(*made[:3], mask, backend=backend, return_lse=True, **options)
    back = (1 + lse.detach().square()).reciprocal()  # no `cos`: torch's own hangs in a fork of a process with threads
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), made[:3], (made[3].to(out.dtype), back))]


def agree(made: list[Tensor], mask: Mask, tolerance: float = 2e-5, **options: Any) -> None:
    """The kernel's results are those of the reference in fp64."""
    torch.manual_seed(3)
    mine = results(made, mask, "native", **options)
    torch.manual_seed(3)
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in made]
    theirs = results(doubles, mask, "reference", **options)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), mine, theirs, strict=True):
        finite = b.isfinite()
        assert torch.equal(a[~finite].double(), b[~finite]), name
        off = float((a - b)[finite].abs().max()) if finite.any() else 0.0
        size = float(b[finite].abs().max()) if finite.any() else 0.0
        assert off <= tolerance * max(1.0, size), f"{name}: off by {off:.3g} at size {size:.3g}"


MASKS = {
    "everything": tm.everything,
    "causal": tm.causal,
    "window": tm.causal & tm.window(70),
    "sinks": tm.causal & (tm.window(33) | tm.prefix(3)),
    "documents": tm.causal.packed([63, 1, 64, 2]),
    "dead rows": tm.window(80) - tm.blocks(50),
    "random": tm.random(0.3),
    "per head": tm.per_head([tm.causal, tm.nothing, tm.local(9), tm.everything]),
    "per sample": tm.padding(lengths=[17, 130]) & tm.causal,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.4},
    "no scale": {"scale": 0.0},
    "softcap": {"softcap": 1.5},
    "sinks": {"sink_logits": torch.tensor([0.0, 3.0, -2.0, 40.0])},
    "bias": {"bias": torch.linspace(-3, 3, 130 * 130).view(1, 1, 130, 130)},
    "bias of keys": {"bias": torch.linspace(-3, 3, 130)},
    "alibi": {"bias": tm.alibi(torch.tensor([0.5, 0.25, 0.1, 0.0]))},
    "relative": {"bias": tm.relative(torch.linspace(-2, 2, 4 * 33).view(4, 33))},
    "t5": {"bias": tm.relative(torch.linspace(-2, 2, 32)[None], max_distance=100)},
    "dropout": {"dropout": 0.3},
    "many": {"softcap": 2.0, "sink_logits": torch.zeros(4), "dropout": 0.2, "bias": tm.alibi(torch.full((4,), 0.1))},
}


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_variant_and_option(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    assert isa() == name
    for mask in ("causal", "documents", "dead rows", "per head"):
        agree(tensors(2, 4, 2, 130, 130, 24, 40), MASKS[mask], **options)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    agree(tensors(2, 4, 4, 130, 130, 16, 16), MASKS[name])


@pytest.mark.parametrize("d", [1, 3, 8, 20, 64, 100, 256])
@pytest.mark.parametrize("dv", [1, 7, 72])
def test_head_sizes(d: int, dv: int) -> None:
    agree(tensors(1, 2, 1, 65, 70, d, dv), tm.causal.at(q_start=5))


@pytest.mark.parametrize("q", [1, 2, 15, 63, 64, 65, 200])
@pytest.mark.parametrize("k", [1, 63, 64, 129, 3001])
@pytest.mark.parametrize("y", [1, 4])
def test_lengths(q: int, k: int, y: int) -> None:
    """Few queries and many keys are cut into parts; query heads that share keys are stacked."""
    agree(tensors(2, 4, y, q, k, 16, 16), tm.causal.at(q_start=max(0, k - q)) & (tm.window(1000) | tm.prefix(2)))


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("q", "y"), [(1, 4), (1, 1), (3, 2), (7, 1), (32, 4)])
def test_few_queries(name: str, dtype: torch.dtype, q: int, y: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are read as they lie, by parts of what is seen; what nobody sees of them is NaN."""
    monkeypatch.setenv(VARIABLE, name)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    n = 2300
    masks = (tm.window(1500) | tm.prefix(3), tm.local(1 << 20) & tm.random(0.9), tm.strided(5))
    for d, dv, mask in zip((64, 80, 9), (48, 128, 16), masks, strict=True):
        mask = (tm.causal & mask).at(q_start=n - 1 - q)
        made = [x.detach() for x in tensors(2, 4, y, q, n, d, dv, dtype)]
        with torch.no_grad():
            hidden = ~mask.to_dense(q, n)[0, 0].any(0)
            assert hidden.any()
            expected = tm.attend(*(x.double() for x in made[:3]), mask, backend="reference", return_lse=True)
            for x in made[1:3]:
                x[:, :, hidden] = torch.nan
            found = tm.attend(*made[:3], mask, backend="native", return_lse=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, atol=Native.tolerance[dtype], rtol=Native.tolerance[dtype])


@pytest.mark.parametrize("name", BUILT)
def test_more_keys_than_a_cache_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles: several strips go through a chunk of keys before the next."""
    monkeypatch.setenv(VARIABLE, name)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    made = [x.detach() for x in tensors(1, 2, 2, 4200, 4200, 64, 64, torch.bfloat16)[:3]]
    mask = tm.causal & (tm.window(200) | tm.prefix(4))
    expected = tm.attend(*(x.double() for x in made), mask, backend="block_sparse")
    found = tm.attend(*made, mask, backend="native")
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_are_not_there_meet_no_infinity(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score of -inf is a weight of 0; beside 41 queries there are zeros, and those times infinity would be NaN."""
    monkeypatch.setenv(VARIABLE, name)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    q, k, v = (x.detach() for x in tensors(1, 1, 1, 41, 128, 16, 16, dtype)[:3])
    q[..., 0], k[0, 0, 7, 0] = 1, -torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = tm.attend(*leaves, backend="native")
    _, dk, dv = torch.autograd.grad(out.float().sum(), leaves)
    assert out.isfinite().all()
    assert dk[..., 1:].isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("n", [4, 130])
def test_large_scores(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest of scores of 1e12 less itself is 0: the row is the value of that key."""
    monkeypatch.setenv(VARIABLE, name)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    for dtype in (torch.float32, torch.bfloat16):
        _, _, v = (x.detach() for x in tensors(1, 2, 2, n, n, 16, 16, dtype)[:3])
        q, k = torch.zeros(2, 1, 2, n, 16).to(dtype)
        q[..., 0], k[..., 0] = 1, torch.linspace(-1, 1, n) * 1e12
        out = tm.attend(q, k, v, tm.causal & tm.window(70), scale=1 / 3, backend="native")
        assert torch.equal(out[:, :, :1], v[:, :, :1])
        assert torch.equal(out[:, :, -1], v[:, :, -1])


@pytest.mark.parametrize("name", BUILT)
def test_sums_of_large_equal_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores so large that there is no room beside them: a tile of equal ones, and then higher ones."""
    monkeypatch.setenv(VARIABLE, name)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    q, k, v = (x.detach() for x in tensors(1, 1, 1, 100, 192, 16, 16, torch.bfloat16)[:3])
    q[...], k[...] = 0, 0
    q[..., 0], k[:, :, :64, 0], k[:, :, 64:, 0] = 1, 2.0**30, 2.0**31
    out, lse = tm.attend(q, k, v, scale=1.0, backend="native", return_lse=True)
    torch.testing.assert_close(out.float(), v[:, :, 64:].float().mean(2, True).expand(out.shape), atol=2e-2, rtol=0)
    assert lse.isfinite().all()


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("size", [1e4, 1e6])
@pytest.mark.parametrize("n", [8, 128])
def test_gradients_of_large_scores(name: str, size: float, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers whose scores are exact: a log-sum-exp of such a size has no digits for what lies between keys."""
    monkeypatch.setenv(VARIABLE, name)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    mask = tm.causal.at(q_start=128 - n)
    for dtype, most in ((torch.float32, 3e-6), (torch.bfloat16, 1e-2)):
        q, k, v, back = tensors(1, 2, 2, n, 128, 64, 64, dtype)
        q, k = ((x.detach().sign() * by).requires_grad_() for x, by in ((q, size / 8), (k, 1)))
        found = torch.autograd.grad(tm.attend(q, k, v, mask, backend="native"), (q, k, v), back)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out = tm.attend(*exact, mask, backend="reference")
        for a, b in zip(found, torch.autograd.grad(out, exact, back.double()), strict=True):
            assert (a.double() - b).abs().max() <= most * b.abs().max()


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("biased", [False, True])
def test_no_bit_of_a_row_follows_from_another_row(name: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 6 to the last bit: what one query sees raises no other's base."""
    monkeypatch.setenv(VARIABLE, name)
    if missing():
        pytest.skip(f"the move is whoever has such a processor: {missing()}")
    q, k, v = (x.detach() for x in tensors(1, 1, 1, 64, 1024, 16, 16, torch.bfloat16)[:3])
    q, k[..., 0] = q.abs() * 0.2 + 0.75, torch.linspace(0, 120, 1024)
    bias = torch.randn(1, 1, 64, 1024) if biased else None
    clean = tm.attend(q, k, v, backend="native", bias=bias, scale=1.0, return_lse=True)
    others = torch.arange(64) != 5
    for planted in (torch.nan, 3e38, 40.0):
        q[:, :, 5] = planted
        found = tm.attend(q, k, v, backend="native", bias=bias, scale=1.0, return_lse=True)
        for a, b in zip(found, clean, strict=True):
            assert torch.equal(a[:, :, others], b[:, :, others])


def test_values_that_some_rows_see_are_not_finite() -> None:
    """A tile of few rows that differ: the rows that do not see the value are as if it were not there."""
    q, k, v = (x.detach() for x in tensors(1, 4, 2, 6, 300, 32, 32)[:3])
    mask = tm.causal.at(q_start=290)
    clean = tm.attend(q, k, v, mask, backend="native")
    v[:, :, 293] = torch.inf
    found = tm.attend(q, k, v, mask, backend="native")
    assert torch.equal(found[:, :, :3], clean[:, :, :3])
    assert not found[:, :, 3:].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    made = tensors(1, 4, 2, 130, 130, 40, 24, dtype)
    agree(made, MASKS["sinks"], Native.tolerance[dtype])
    assert tm.attend(*made[:3], MASKS["sinks"], backend="native").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [5, 16])
def test_what_is_not_finite_stays_behind_the_mask(dtype: torch.dtype, d: int) -> None:
    """Planted in every tensor, in sizes that fit vectors and in those that do not: what may not see it is unchanged."""
    made = tensors(1, 4, 2, 150, 150, d, d, dtype)
    mask, seen = tm.causal.packed([70, 80]), slice(0, 70)
    clean = results(made, mask, "native")
    tolerance = 2e-5 if dtype == torch.float32 else Native.tolerance[torch.bfloat16]
    with torch.no_grad():
        for x, value in zip(made, (torch.nan, torch.inf, torch.nan, -torch.inf), strict=True):
            x[:, :, 100, d // 2] = value
    found = results(made, mask, "native")
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), clean, found, strict=True):
        torch.testing.assert_close(a[:, :, seen], b[:, :, seen], atol=tolerance, rtol=tolerance, msg=name)
    assert found[0][:, :, 100:].isnan().any()


def test_a_gradient_of_lse_far_below_a_sink() -> None:
    """Keys share nothing with the sink, whose weight is all of 1; among themselves they share the gradient of lse."""
    made = tensors(1, 2, 1, 66, 66, 8, 8)
    with torch.no_grad():
        made[0].fill_(-5)
        made[1].add_(12)
    agree(made, tm.causal, sink_logits=torch.tensor([0.0, 90.0]))


@given(drawn=expressions(depth=3), d=st.integers(1, 40), dv=st.integers(1, 40), shared=st.sampled_from([1, 2, 3]))
@settings(max_examples=60, deadline=None)
def test_random_masks(drawn: Drawn, d: int, dv: int, shared: int) -> None:
    reach = drawn.reach
    shared = shared if reach.heads % shared == 0 else 1
    agree(tensors(reach.batch, reach.heads, reach.heads // shared, reach.q, reach.k, d, dv), drawn.mask)


def test_threads_change_nothing(threads: None) -> None:
    """1, 2 and 4 threads give the same bits, forward and backward, decoding too."""
    for made in (tensors(1, 3, 1, 300, 300, 32, 32), tensors(1, 4, 2, 1, 5000, 32, 32)):
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(results(made, tm.local(1 << 20) & tm.random(0.9), "native"))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_dropout_drops_the_cells_of_the_rule() -> None:
    """A value that names its key shows which weights are zero: the same as the reference's."""
    n = 130
    q, v = torch.zeros(1, 2, n, 8), torch.eye(n).expand(1, 2, n, n)
    found = []
    for backend in ("native", "reference"):
        torch.manual_seed(11)
        found.append(tm.attend(q, q, v, tm.causal, dropout=0.5, backend=backend))
    assert torch.equal(found[0] == 0, found[1] == 0)
    torch.testing.assert_close(*found)


def test_strides_are_taken_as_they_are() -> None:
    """Transposed, sliced and expanded tensors give what their copies give, bit for bit."""
    q = torch.randn(2, 65, 4, 24).transpose(1, 2)
    k = torch.randn(1, 2, 70, 48)[..., ::2].expand(2, -1, -1, -1)
    v = torch.randn(2, 2, 72, 16)[:, :, 1:-1, 3:]
    views = tm.attend(q, k, v, tm.causal.at(q_start=5), backend="native")
    copies = tm.attend(
        *(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)), tm.causal.at(q_start=5), backend="native"
    )
    assert torch.equal(views, copies)


# -- processes and threads ---------------------------------------------------------------------------------------------


def _in_a_child(answers: Any) -> None:
    made = tensors(1, 2, 2, 100, 100, 16, 16)
    answers.put([x.tolist() for x in results(made, tm.causal, "native")])


@pytest.mark.skipif(sys.platform == "win32", reason="the move is nobody's: Windows has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_computes_the_same() -> None:
    made = tensors(1, 2, 2, 100, 100, 16, 16)
    expected = results(made, tm.causal, "native")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_a_child, args=(answers,))
    child.start()
    found = answers.get(timeout=60)
    child.join(60)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(torch.tensor(a), b)


def test_two_threads_at_once() -> None:
    made = tensors(1, 4, 4, 200, 200, 32, 32)
    expected = results(made, MASKS["random"], "native")
    wrong: list[str] = []

    def work() -> None:
        own = [x.detach().clone().requires_grad_(x.requires_grad) for x in made]
        for _ in range(5):
            found = results(own, MASKS["random"], "native")
            wrong.extend("other numbers" for a, b in zip(found, expected, strict=True) if not torch.equal(a, b))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_lack_of_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A library whose kernel finds no room."""

        def tm_forward(self, call: Any) -> int:
            return 1

    monkeypatch.setattr(native_library, "library", Full)
    with pytest.raises(MemoryError, match=r"found no memory for q \[1, 2, 100, 16\], 100 keys"):
        tm.attend(*tensors(1, 2, 2, 100, 100, 16, 16)[:3], tm.causal, backend="native")


KEEPS = """
import torch, truemask as tm

def mapped():  # MiB
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

torch.set_num_threads(2)
def call(tokens):
    q = torch.randn(1, 8, tokens, 128, dtype=torch.bfloat16, requires_grad=True)
    tm.attend(q, q, q, tm.causal & tm.window(16), backend="native").sum().backward()
    size = q.numel() * q.element_size() / 2**20
    del q
    return size

call(64)
before = mapped()
largest = max(call(tokens) for tokens in (512, 1024, 4096, 8192))
print(mapped() - before, largest)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory is used")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="the move is nobody's: sanitizers keep memory themselves"
)
def test_memory_that_is_kept_is_bounded() -> None:
    """Calls of 16 MiB tensors pack and sum up more than 64 MiB, of which no more than 64 MiB may stay."""
    trimmed = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", KEEPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **trimmed})
    grown, largest = map(float, done.stdout.split())
    assert largest == 16
    assert grown < 64 + 24


def test_plans_keep_nothing_large() -> None:
    """Whoever wins: what a backend worked out to name its price is numbers and words."""
    CACHE.clear()
    made = tm.plan(~tm.documents([54] * 75 + [46]), 4096)
    assert set(made.costs) >= {"native", "block_sparse", "sdpa"}
    for proposal in made.proposals.willing.values():
        kept = {name: value for name, value in vars(proposal).items() if name != "job"}
        assert len(pickle.dumps(kept)) < 1000


def test_cells_that_do_not_fit_are_refused_before_they_are_made() -> None:
    """Every tile of `random` differs: its cells grow with the square of the length. Those of a window do not."""
    n = 1 << 16
    assert tm.plan(tm.random(0.3), n).objections["native"] == [
        "512 MiB of cells in tiles that differ: the limit is 256 MiB"
    ]
    assert tm.plan(tm.random(0.3), n // 2).objections["native"] == []
    assert tm.plan(tm.causal & tm.window(1000), 1 << 20).objections["native"] == []


# -- without it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [("off", "TRUEMASK_ISA=off says so"), ("avx3", f"'avx3' is none of {', '.join(ISAS)}, off")],
)
def test_a_plan_says_why_there_is_no_kernel(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    CACHE.clear()  # of what was planned with the kernel
    made = tm.plan(tm.causal & tm.window(8), 511)
    assert made.backend != "native"
    assert any(words in reason for reason in made.objections["native"])
    with pytest.raises(tm.PlanError, match="native kernel is missing"):
        library()


def test_a_library_with_another_structure_or_other_constants_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_abi, "TILE", 128)
    native_library._loaded.cache_clear()
    assert missing() == "it was built from other sources than these: install truemask again"
    monkeypatch.undo()
    native_library._loaded.cache_clear()
    assert not missing()


def test_the_set_that_is_named_is_loaded() -> None:
    for name in isa_files.built()[isa_files.built().index(isa()) :]:
        kernel, why = native_library._loaded(name)
        assert kernel is not None, why
        assert Path(kernel._name) == file_of(name)


def test_a_library_that_was_never_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(isa_files, "FOLDER", tmp_path)
    native_library._loaded.cache_clear()
    assert "it was not built" in missing()
    (tmp_path / "missing.txt").write_text("the compiler was on holiday\n")
    native_library._loaded.cache_clear()
    assert missing() == "it was not built: the compiler was on holiday"
    (tmp_path / "truemask_base.so").write_text("no library")
    native_library._loaded.cache_clear()
    assert "cannot be loaded" in missing()
    monkeypatch.undo()
    native_library._loaded.cache_clear()
    assert not missing()


def test_what_the_compiler_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what an older build made of it; all else is built, and what is wrong with the sources is still an error."""
    build = runpy.run_path(str(ROOT / "tools" / "native_build.py"))["build"]
    sets: dict[str, list[str]] = {"base": [], "avx9": ["-mavx9"]}
    changed = {"SOURCES": tmp_path, "variants": lambda: sets}
    for name, value in changed.items():
        monkeypatch.setitem(build.__globals__, name, value)
    (tmp_path / "kernel.cpp").write_text('extern "C" int tm_usable() { return 1; }')
    (tmp_path / "truemask_avx9.so").write_text("an older build")
    assert build(tmp_path) == ""
    assert {path.name for path in tmp_path.glob("*.so")} == {"truemask_base.so"}
    said = (tmp_path / "missing.txt").read_text()
    assert said.startswith("avx9: ")
    assert said.endswith("does not know these instructions; a newer compiler does (`CXX` names one)\n")
    (tmp_path / "kernel.cpp").write_text("no C++")
    assert "failed for base" in build(tmp_path)
    del sets["avx9"]
    (tmp_path / "kernel.cpp").write_text('extern "C" int tm_usable() { return 0; }')
    assert build(tmp_path) == ""
    assert not (tmp_path / "missing.txt").exists()


# -- which one is taken ------------------------------------------------------------------------------------------------

ALL_FLAGS = frozenset().union(*(one.processor for one in isa_files.SETS))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (ALL_FLAGS, "amx"),
        (ALL_FLAGS - {"amx_bf16"}, "avx512_bf16"),
        (ALL_FLAGS - {"amx_tile", "avx512_bf16"}, "avx512"),
        (ALL_FLAGS - {"avx512vl"}, "avx2"),
        (ALL_FLAGS - {"avx512f", "fma"}, "base"),
        (frozenset({"sse2"}), "base"),
    ],
)
def test_the_best_that_the_processor_has(flags: frozenset[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Linux's flags. What is emulated runs anywhere and is never chosen."""
    monkeypatch.setattr(isa_files, "processor_flags", lambda: flags)
    monkeypatch.setattr(isa_files, "built", lambda: list(ISAS))
    monkeypatch.setattr(isa_files, "refusal", lambda library: "")
    assert isa_files.in_use("", "") == expected
    assert isa_files.in_use("", "amx_emulated") == "amx_emulated"
    assert isa_files.in_use("", "amx") == ("amx" if expected == "amx" else "")
    monkeypatch.setattr(isa_files, "built", lambda: ["amx_emulated"])
    assert isa_files.in_use("", "") == ""


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("AVX512 ...", ("avx512", "avx2", "base", "amx_emulated")),
        ("AVX2", ("avx2", "base", "amx_emulated")),
        ("DEFAULT", ("base", "amx_emulated")),
    ],
)
def test_torchs_word_where_linux_lists_no_flags(
    word: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa_files, "processor_flags", frozenset)
    assert isa_files.runs_on(word) == names


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A processor with AMX whose system does not let this process use it; the set that is taken instead."""
    monkeypatch.delenv(VARIABLE, raising=False)
    native_library._loaded.cache_clear()
    own, source = "avx512_bf16" if isa() == "amx" else isa(), tmp_path / "refuses.cpp"
    shutil.copy(file_of(isa()), tmp_path / file_of(own).name)
    source.write_text('extern "C" int tm_usable() { return -3; }')
    compiler = runpy.run_path(str(ROOT / "tools" / "native_build.py"))["compiler"]()
    if compiler is None:
        pytest.skip("the move is whoever installs a C++ compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "truemask_amx.so", source], check=True)
    flags = isa_files.processor_flags() | ALL_FLAGS
    monkeypatch.setattr(isa_files, "processor_flags", lambda: flags)
    monkeypatch.setattr(isa_files, "FOLDER", tmp_path)
    native_library._loaded.cache_clear()
    CACHE.clear()
    yield own
    monkeypatch.undo()
    native_library._loaded.cache_clear()
    CACHE.clear()


def test_a_set_that_the_system_refuses_is_passed_over(refused: str) -> None:
    """The next best one is loaded, and plans and the doctor say why."""
    why = "amx: the system does not let this process use tiles"
    assert isa() == refused
    assert native_library.passed_over() == [why]
    assert f"; not by {why}" in str(tm.plan(tm.causal & tm.window(8), 511))
    assert findings()["facts"]["native kernel"] == f"compiled for {refused}; not for {why}"


def test_a_set_that_is_named_and_refused_is_an_error(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "amx")
    assert missing() == "amx: the system does not let this process use tiles"
    monkeypatch.setenv(VARIABLE, refused)
    assert not missing()
    assert native_library.passed_over() == []


def test_a_set_that_is_named_and_left_out_says_what_the_compiler_lacked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In plans and from the doctor, if the processor has it; else that it has not."""
    why = "amx: g++ does not know these instructions; a newer compiler does (`CXX` names one)"
    (tmp_path / "truemask_base.so").write_text("never loaded, since another set is named")
    (tmp_path / "missing.txt").write_text(f"{why}\n")
    monkeypatch.setattr(isa_files, "FOLDER", tmp_path)
    monkeypatch.setenv(VARIABLE, "amx")
    for has, expected in ((ALL_FLAGS, why), (frozenset(("sse2",)), "built are base; this processor runs base, amx_")):
        monkeypatch.setattr(isa_files, "processor_flags", lambda has=has: has)
        native_library._loaded.cache_clear()
        CACHE.clear()
        assert missing().startswith(expected)
        assert f"there is no native kernel: {expected}" in str(tm.plan(tm.causal & tm.window(8), 511))
        assert findings()["facts"]["native kernel"].startswith(f"none: {expected}")
    monkeypatch.undo()
    native_library._loaded.cache_clear()
    CACHE.clear()


def test_products_of_bf16_are_as_the_pages_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs where AMD's processors have them, tiles where they are or are emulated."""
    pairs = "pairs" if vendor_of(processor()) == "AMD" else "floats"
    for name in isa_files.built():
        if name in isa_files.runs_on(torch.backends.cpu.get_cpu_capability()) and not isa_files.refusal(file_of(name)):
            monkeypatch.setenv(VARIABLE, name)
            expected = {"amx": "tiles", "amx_emulated": "tiles", "avx512_bf16": pairs}.get(name, "floats")
            assert native_library.products_of_bf16() == expected


def test_the_peak_is_of_all_threads(threads: None) -> None:
    for halves in (False, True):
        torch.set_num_threads(2)
        assert native_library.peak(0.001, halves) > 0
