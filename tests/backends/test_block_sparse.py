"""The portable sparse backend: strips cover the mask exactly; groups, chunks and threads change nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import truemask as tm
from tests.support.oracle import three
from tests.support.strategies import Drawn, Reach, expressions
from truemask.attention.planning.cache import CACHE
from truemask.backends.base import Job, Request
from truemask.backends.block_sparse import backend as block_sparse
from truemask.backends.block_sparse import batching as groups
from truemask.backends.block_sparse import flash_path as strip_kernel
from truemask.backends.block_sparse import math_path as strip_math
from truemask.backends.block_sparse.backend import StripsProposal
from truemask.backends.block_sparse.batching import Steps
from truemask.backends.block_sparse.from_slabs import from_slabs
from truemask.backends.block_sparse.from_tiles import from_tiles
from truemask.backends.block_sparse.gather_scatter import add, gathered, put, strided
from truemask.backends.block_sparse.interleave import interleaved
from truemask.backends.block_sparse.strips import ALL, CAUSAL, FROM_MASK, Strips, from_cells
from truemask.backends.costs.model import table
from truemask.backends.native.backend import Native
from truemask.masks.core.mask import Mask

pytestmark = pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")

SINKS = tm.causal & (tm.window(37) | tm.prefix(3))
BIGBIRD = tm.blocks(16, back=1, ahead=1) | tm.random(0.1, block=16, seed=3) | tm.global_tokens([0, 1])
MASKS: dict[str, Mask] = {
    "window": tm.window(41),
    "sinks": SINKS,
    "big bird": BIGBIRD,
    "packed": tm.causal.packed([53, 7, 1, 101, 79, 90]),
    "prefix-lm": (tm.causal | tm.prefix(11)).packed([53, 108, 170]),
    "per element": tm.random(0.3, seed=1),
    "dead rows": tm.window(19) - tm.blocks(23),
    "dilated": tm.local(40) & tm.dilated(3),
    "few keys": tm.causal & tm.strided(50),
    "padding": tm.causal.padded([29, 0]),
    "heads": tm.per_head([tm.causal, tm.window(5), tm.nothing, SINKS]),
    "samples and heads": tm.random(0.2, block=9, per_head=True) & tm.padding(lengths=[331, 111], on="keys"),
    "everything": tm.everything,
    "nothing": tm.nothing,
}


def leaves(b: int, h: int, y: int, n: int, m: int, d: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(n + m)
    shapes = ((b, h, n, d), (b, y, m, d), (b, y, m, d))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def both(mask: Mask, tensors: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """Results and gradients."""
    out, lse = tm.attend(*three(tensors), mask, backend=backend, return_lse=True, **options)
    torch.manual_seed(7)
    more = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    arriving = (torch.randn_like(out), torch.randn_like(lse))
    found = torch.autograd.grad((out, lse), [*tensors, *more], arriving, allow_unused=True)
    grads: list[Tensor | None] = list(found)
    return [out.detach(), lse.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def agree(mask: Mask, tensors: list[Tensor], **options: Any) -> None:
    pairs = zip(*(both(mask, tensors, name, **options) for name in ("block_sparse", "reference")), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


# -- strips ------------------------------------------------------------------------------------------------------------


def painted(strips: Strips, mask: Mask) -> Tensor:
    """The cells that strips let through."""
    dense = torch.zeros(*strips.shape, strips.q_len, strips.kv_len, dtype=torch.bool)
    whole = mask.to_dense(strips.q_len, strips.kv_len, batch=strips.shape[0], heads=strips.shape[1])
    taken = torch.zeros(*strips.shape, strips.q_len, dtype=torch.int64)
    for i in range(len(strips)):
        b, h, q0, q1 = (int(x[i]) for x in (strips.b, strips.h, strips.q0, strips.q1))
        columns = torch.from_numpy(strips.columns(i))
        assert len(columns) == strips.widths[i] > 0
        assert bool((columns.diff() > 0).all())
        kind = int(strips.pattern[i])
        cells = torch.ones(q1 - q0, len(columns), dtype=torch.bool)
        if kind >= 0:
            cells = torch.from_numpy(strips.patterns[kind].cells.copy())
            assert not cells.all()
        elif kind == CAUSAL:
            cells = cells.tril()
        elif kind == FROM_MASK:
            cells = whole[b, h, q0:q1][:, columns]
        dense[b, h, q0:q1, columns] = cells
        taken[b, h, q0:q1] += 1
    assert int(taken.max() if taken.numel() else 0) <= 1
    assert (
        torch.equal(torch.from_numpy(strips.dead()) | (taken == 0), ~dense.any(-1))
        or (strips.pattern == FROM_MASK).any()
    )
    return dense


@given(drawn=expressions(), height=st.integers(1, 7), keys=st.integers(1, 7), budget=st.sampled_from([0, 1 << 20]))
def test_strips_cover_the_mask_exactly(drawn: Drawn, height: int, keys: int, budget: int) -> None:
    reach, mask = drawn.reach, drawn.mask
    want = mask.to_dense(reach.q, reach.k, batch=reach.batch, heads=reach.heads)
    tiles = mask.tiles(reach.q, reach.k, (height, keys), batch=reach.batch, heads=reach.heads)
    assert torch.equal(painted(from_tiles(tiles, budget), mask), want)
    assert torch.equal(painted(from_cells(want.numpy()), mask), want)
    job = job_of(mask, reach.q, reach.k, reach.batch, reach.heads)
    planes = block_sparse.slabs_of(job)
    if planes is not None:
        strips = from_slabs(planes, reach.q, reach.k, (want.shape[0], want.shape[1]), height)
        assert torch.equal(painted(strips, mask), want)


def test_patterns_are_kept_once() -> None:
    for mask, most in ((tm.window(41), 4), (SINKS, 6), (tm.causal.packed([60] * 5), 3)):
        planes = block_sparse.slabs_of(job_of(mask, 300, 300))
        assert planes is not None
        strips = from_slabs(planes, 300, 300, (1, 1), 20)
        assert 15 <= len(strips) <= 17
        assert len(strips.patterns) <= most
    long = block_sparse.slabs_of(job_of(tm.causal.packed([3000, 10]), 3010, 3010))
    assert long is not None
    assert from_slabs(long, 3010, 3010, (1, 1), 64).pattern.tolist() == [CAUSAL, 0]
    assert (from_tiles(tm.blocks(32).tiles(320, block=32)).pattern == ALL).all()


def job_of(mask: Mask, q: int, k: int, batch: int = 1, heads: int = 2, *, grad: bool = False) -> Job:
    return Job(mask, Request(batch, heads, heads, q, k, 64, 64, torch.float32, torch.device("cpu"), grad))


def test_a_moving_interval_beside_fixed_keys_is_interleaved() -> None:
    starts = 7 + 5 * np.arange(6)
    intervals = np.stack([np.stack([0 * starts, 0 * starts + 1], 1), np.stack([starts, starts + 23], 1)], 1)
    found = interleaved(intervals)
    assert found is not None
    for i in range(6):
        columns = np.concatenate([np.arange(*interval) for interval in intervals[i]])
        own = found.keys[i * found.step : i * found.step + found.width].numpy()
        assert own[found.source >= 0].tolist() == [columns[c] for c in found.source if c >= 0]
        assert sorted(found.source[found.source >= 0]) == list(range(24))
    assert interleaved(intervals[:2]) is None
    assert interleaved(intervals[[0, 1, 3, 4]]) is None
    assert interleaved(np.repeat(intervals[:, 1:], 2, axis=1)) is None


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_rows_are_found_whatever_the_strides(layout: str) -> None:
    x = {
        "contiguous": torch.randn(3, 11, 5),
        "transposed": torch.randn(11, 3, 5).transpose(0, 1),
        "sliced": torch.randn(3, 11, 15)[..., 5:10],
        "expanded": torch.randn(1, 11, 5).expand(3, -1, -1),
    }[layout]
    places = torch.tensor([[3, 4, 9], [0, 10, 1]])
    assert torch.equal(gathered(x, places), x[:, places].transpose(0, 1))
    steps = strided(x, Steps(1, 3), slice(1, 3), 4)
    assert torch.equal(steps, torch.stack([x[:, 4:8], x[:, 7:11]]))
    if layout == "expanded":
        return
    total, new = x.clone(), torch.randn(2, 3, 4, 5)
    add(x, Steps(1, 3), None, slice(1, 3), new)
    total[:, 4:8] += new[0]
    total[:, 7:11] += new[1]
    torch.testing.assert_close(x, total)
    put(x, None, places, slice(0, 2), torch.tensor([[True, True, False], [True, True, True]]), new[:, :, :3])
    total[:, [3, 4]], total[:, [0, 10, 1]] = new[0, :, :2], new[1, :, :3]
    torch.testing.assert_close(x, total)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shared", [1, 2])
def test_masks_at_sizes_of_many_strips(name: str, shared: int) -> None:
    agree(MASKS[name], leaves(2, 4, 4 // shared, 331, 331))


@pytest.mark.parametrize("name", ["sinks", "big bird", "per element", "heads", "dead rows"])
def test_small_chunks_and_groups_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One strip a call, masks kept as bits, patterns not kept: the same numbers."""
    tensors = leaves(2, 4, 2, 331, 331)
    want = both(MASKS[name], tensors, "block_sparse")
    for module, constant, value in (
        (strip_kernel, "COPIED_BYTES", 1),
        (groups, "MAX_FLOAT_BYTES", 0),
        (groups, "CALL_CELLS", 1 << 30),
        (groups, "CALL_BYTES", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, constant, value)
            forget()
            for mine, theirs in zip(both(MASKS[name], tensors, "block_sparse"), want, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    forget()


def forget() -> None:
    """Plans made with other constants."""
    CACHE.clear()


def unkept(strips: Callable[..., Strips]) -> Callable[..., Strips]:
    def made(*args: Any, **keywords: Any) -> Strips:
        found = strips(*args, **keywords)
        return Strips(
            **{**vars(found), "pattern": np.minimum(found.pattern, ALL) - (found.pattern >= 0), "patterns": ()}
        )

    return made


@pytest.mark.parametrize("name", ["sinks", "per element", "heads", "dead rows", "padding"])
@pytest.mark.parametrize("options", [{}, {"bias": tm.alibi(torch.tensor([0.1, 0.2, 0.3, 0.4]))}], ids=["plain", "bias"])
def test_patterns_that_are_not_kept_are_asked_for(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    monkeypatch.setattr(block_sparse, "from_slabs", unkept(from_slabs))
    monkeypatch.setattr(block_sparse, "from_tiles", unkept(from_tiles))
    agree(MASKS[name], leaves(2, 4, 2, 331, 331), **options)
    forget()


@pytest.mark.parametrize("name", ["sinks", "big bird", "packed", "padding", "heads", "dead rows"])
@pytest.mark.parametrize("option", ["softcap", "dropout", "bias", "learned bias", "row bias", "learned alibi", "sinks"])
def test_options_at_sizes_of_many_strips(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strip_math, "SCORE_BYTES", 1 << 18)
    torch.manual_seed(11)
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    options: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 0.9, "sink_logits": torch.randn(4, dtype=torch.float64).requires_grad_()},
        "dropout": {"dropout": 0.4},
        "bias": {"bias": torch.randn(2, 1, 331, 331, dtype=torch.float64)},
        "learned bias": {"bias": torch.randn(1, 4, 331, 331, dtype=torch.float64).requires_grad_()},
        "row bias": {"bias": torch.randn(4, 1, 331, dtype=torch.float64).requires_grad_(), "softcap": 2.0},
        "learned alibi": {"bias": tm.alibi(slopes)},
        "sinks": {"sink_logits": torch.randn(4, dtype=torch.float64).requires_grad_()},
    }
    tensors = leaves(2, 4, 2, 331, 331)
    found: list[list[Tensor]] = []
    for backend in ("block_sparse", "reference"):
        torch.manual_seed(3)
        found.append(both(MASKS[name], tensors, backend, **options[option]))
        if option == "learned alibi":
            out = tm.attend(*three(tensors), MASKS[name], backend=backend, **options[option])
            found[-1].append(torch.autograd.grad(out.sin().sum(), slopes)[0])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@settings(max_examples=40)
@given(drawn=expressions(reach=Reach(67, 71, 2, 2), depth=3), shared=st.sampled_from([1, 2]), option=st.integers(0, 3))
def test_random_expressions(drawn: Drawn, shared: int, option: int) -> None:
    options: list[dict[str, Any]] = [{}, {"softcap": 1.5}, {"bias": tm.alibi(torch.tensor([0.5, 0.25]))}, {}]
    if option == 3:
        options[3] = {"sink_logits": torch.tensor([0.5, -1.0], dtype=torch.float64)}
    agree(drawn.mask, leaves(2, 2, 2 // shared, 67, 71, 3), **options[option])


@pytest.mark.parametrize("q_len", [1, 2, 17])
@pytest.mark.parametrize("kv_len", [1, 40, 333])
def test_a_few_rows_against_many_keys(q_len: int, kv_len: int) -> None:
    for mask in (SINKS, BIGBIRD, tm.random(0.5), tm.padding(lengths=[kv_len // 2, kv_len], on="keys"), MASKS["heads"]):
        agree(mask.at(q_start=max(0, kv_len - q_len)), leaves(2, 4, 2, q_len, kv_len))


@pytest.mark.parametrize("mask", ["sinks", "dead rows", "padding"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
def test_gradcheck(mask: str, options: dict[str, Any]) -> None:
    tensors = leaves(2, 2, 1, 23, 23, 2)

    def call(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = tm.attend(*three(x), MASKS[mask], backend="block_sparse", return_lse=True, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("hostile", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("name", ["sinks", "big bird", "packed", "padding", "per element", "dilated"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["kernel", "math"])
def test_what_is_hostile_reaches_those_who_see_it_only(hostile: float, name: str, options: dict[str, Any]) -> None:
    """In keys, in values and in what comes back to rows: forward and backward."""
    mask, n = MASKS[name], 331
    tensors = [x.detach().float() for x in leaves(2, 2, 2, n, n)]
    torch.manual_seed(1)
    arriving = torch.randn(2, 2, n, 5)
    allowed = mask.to_dense(n, batch=2, heads=2).expand(2, 2, n, n)
    poisoned = [x.clone() for x in tensors]
    poisoned[1][0, 1, [3, 200]] = hostile
    poisoned[2][0, 1, 150, 1] = hostile
    bad_arriving = arriving.clone()
    bad_arriving[0, 1, 77] = hostile

    def run(x: list[Tensor], g: Tensor) -> list[Tensor]:
        own = [a.clone().requires_grad_() for a in x]
        out = tm.attend(*three(own), mask, backend="block_sparse", **options)
        return [out.detach(), *torch.autograd.grad(out, own, g)]

    clean, dirty = run(tensors, arriving), run(poisoned, bad_arriving)
    rows = torch.zeros(2, 2, n, dtype=torch.bool)
    rows[0, 1] = allowed[0, 1][:, [3, 200, 150]].any(-1)
    torch.testing.assert_close(dirty[0][~rows], clean[0][~rows], rtol=1e-4, atol=1e-5)
    if hostile != hostile:
        assert dirty[0][rows].isnan().any(-1).all()
    rows[0, 1, 77] = True
    keys = (allowed & rows[..., None]).any(2)
    torch.testing.assert_close(dirty[1][~rows], clean[1][~rows], rtol=1e-4, atol=1e-5)
    for i in (2, 3):
        torch.testing.assert_close(dirty[i][~keys], clean[i][~keys], rtol=1e-4, atol=1e-5)


# -- promises ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["kernel", "math"])
def test_the_number_of_threads_changes_no_bit(options: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            forget()
            parts: list[Tensor] = []
            for name in ("sinks", "big bird", "packed", "padding"):
                parts += both(MASKS[name], leaves(2, 4, 2, 331, 331, 16, torch.float32), "block_sparse", **options)
            found.append(parts)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


MEMORY = """
import resource, sys, torch, truemask as tm
torch.set_num_threads(1)
mask = tm.causal.padded([0, 100, 1000, 4000])
n = int(sys.argv[1])
q, k, v = (torch.randn(4, 8, n, 64, requires_grad=True) for _ in range(3))
g = torch.randn(4, 8, n, 64)
small = [x[:, :, :512].detach().requires_grad_() for x in (q, k, v)]
torch.autograd.grad(tm.attend(*small, mask, backend="block_sparse", **eval(sys.argv[2])), small, g[:, :, :512])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = tm.attend(q, k, v, mask, backend="block_sparse", **eval(sys.argv[2]))
grads = torch.autograd.grad(out, (q, k, v), g)
results = sum(x.nbytes for x in (out, *grads))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - results)
"""


@pytest.mark.timing
@pytest.mark.parametrize("options", ["{}", "{'softcap': 30.0}"])
def test_memory_is_that_of_inputs_results_and_a_chunk(options: str) -> None:
    """Padded causal, b 4, h 8: SDPA's dense mask alone would be 256 MiB at n 4096."""
    n = 4096 if options == "{}" else 1024
    done = subprocess.run([sys.executable, "-c", MEMORY, str(n), options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100e6


def test_a_lowered_job_says_its_size() -> None:
    job = job_of(BIGBIRD, 1024, 1024)
    proposal = StripsProposal(job)
    lowered = proposal.lower()
    held = 0
    for plane in lowered.data.planes:
        for group in plane.groups:
            tensors = [group.row_places, group.key_places, group.real, group.widths]
            masking = group.masking
            tensors += [] if masking is None else [masking.table, masking.bits, masking.which]
            held += sum(x.nbytes for x in tensors if x is not None)
    assert held <= lowered.nbytes <= held + 2048
    proposal.forget()
    assert not any(isinstance(x, Strips) for x in vars(proposal).values())


def test_it_is_chosen_where_a_mask_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no native kernel."""
    monkeypatch.setattr(Native, "propose", lambda self, job: ["it is on holiday"])
    CACHE.clear()
    for mask in (tm.window(512), tm.causal.packed([700] * 12), tm.causal & (tm.window(256) | tm.prefix(4))):
        found = tm.plan(mask, 8192)
        assert found.backend == "block_sparse"
        assert found.costs["block_sparse"] < found.costs["sdpa"] / 4
        assert "strips of " in found.ways["block_sparse"]
    assert tm.plan(tm.causal, 8192).backend == "sdpa"
    assert tm.plan(tm.everything, 8192).backend == "sdpa"
    assert tm.plan(tm.window(512), 8192, grad=True).costs["block_sparse"] > found.costs["block_sparse"]
    assert tm.plan(tm.causal & tm.window(64), 2048, softcap=30.0).backend == "block_sparse"
    assert table().block_sparse.call_group > 0
    CACHE.clear()


@pytest.mark.parametrize(
    ("keywords", "word"),
    [({"return_weights": True}, "weights"), ({"device": "cuda"}, "the device cuda")],
)
def test_objections(keywords: dict[str, Any], word: str) -> None:
    assert word in " ".join(tm.plan(tm.window(5), 64, backend="reference", **keywords).objections["block_sparse"])


def test_second_derivatives_are_refused_by_name() -> None:
    for softcap in (None, 3.0):
        tensors = leaves(1, 2, 2, 23, 23)
        out = tm.attend(*three(tensors), SINKS, backend="block_sparse", softcap=softcap)
        (dq,) = torch.autograd.grad(out.sin().sum(), tensors[0], create_graph=True)
        with pytest.raises(tm.PlanError, match=r"'block_sparse' has no second derivative.*backend=\"reference\""):
            dq.sum().backward()
