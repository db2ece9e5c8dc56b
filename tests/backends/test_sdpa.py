"""How `sdpa` runs: flags only where they are proven, the front end of other devices, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from tests.backends.test_agree import MASKS, Problem, agree
from tests.laws.test_attend_laws import MASKED, Given, hold_law_6
from truemask.attention.call import AttendArgs, read_call
from truemask.attention.planning.plan import CACHE, plan
from truemask.backends import sdpa
from truemask.backends.base import Job
from truemask.backends.sdpa import MAX_DENSE_BYTES, SdpaProposal, front_end, lower_dense, with_bias
from truemask.masks.core.mask import Mask


def job(mask: Mask, q_len: int, kv_len: int | None = None, **keywords: Any) -> Job:
    return plan(mask, q_len, kv_len, **keywords).job


EVERYTHING = [
    (tm.everything, 5, 7),
    (tm.causal | ~tm.causal, 5, 7),
    (tm.causal.at(q_start=6), 1, 7),
    (tm.local(300), 300, 300),
    (tm.causal | tm.prefix(700), 500, 700),
    (tm.padding(lengths=[300, 300], on="keys"), 300, 300),
    (tm.documents([1000]), 1000, 1000),
    (tm.random(1.0), 300, 300),
]
CAUSAL = [
    (tm.causal, 7, 7),
    (tm.causal, 7, 11),
    (tm.causal, 1000, 700),
    (tm.window(1000), 1000, 1000),
    (tm.causal & tm.padding(lengths=[600, 600], on="keys"), 600, 600),
    (~~tm.causal & tm.everything, 600, 600),
    (tm.causal.packed([777]), 777, 777),
    (tm.causal.at(q_start=5, k_start=5), 640, 640),
    (tm.tree([-1, *range(300)]), 301, 301),
]
NEITHER = [
    (tm.window(999), 1000, 1000),
    (tm.window(5), 7, 7),
    (tm.causal.at(q_start=1), 600, 600),
    (tm.causal - tm.keys(torch.arange(600) == 311), 600, 600),
    (tm.causal | tm.dense(torch.arange(640 * 640).view(640, 640) == 5 * 640 + 635), 640, 640),
    (tm.causal.packed([299, 1]), 300, 300),
    (tm.padding(lengths=[300, 299], on="keys"), 300, 300),
    (tm.per_head([tm.causal, tm.window(300)]), 301, 301),
    (tm.nothing, 300, 300),
]


@pytest.mark.parametrize(
    ("pattern", "mask", "q_len", "kv_len"),
    [
        *(("everything", *case) for case in EVERYTHING),
        *(("causal", *case) for case in CAUSAL),
        *(("other", *case) for case in NEITHER),
    ],
    ids=str,
)
def test_patterns_are_proven_at_the_sizes(pattern: str, mask: Mask, q_len: int, kv_len: int) -> None:
    batch, heads = max(1, mask.batch_size), max(2, mask.head_count)
    found = job(mask, q_len, kv_len, batch=batch, heads=heads)
    dense = mask.to_dense(q_len, kv_len, batch=batch, heads=heads)
    truth = {"everything": torch.ones_like(dense), "causal": torch.ones_like(dense).tril()}
    assert found.pattern == pattern
    assert pattern == next((name for name, cells in truth.items() if torch.equal(cells, dense)), "other")


def test_a_flag_takes_no_memory_and_a_mask_only_what_varies() -> None:
    assert SdpaProposal(job(tm.causal, 700)).lower().nbytes == 0
    assert SdpaProposal(job(tm.everything, 700)).lower().nbytes == 0
    dense = SdpaProposal(job(tm.keys(torch.arange(700) > 3), 500, 700, batch=2)).lower().data.dense
    assert dense.additive.shape == (1, 1, 1, 700)
    assert SdpaProposal(job(tm.window(3), 500)).lower().data.dense.additive.shape == (1, 1, 500, 500)


@pytest.fixture
def native_halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a CPU that computes in bfloat16 and float16 itself."""
    monkeypatch.setattr(sdpa, "native_halves", lambda: (torch.bfloat16, torch.float16))
    CACHE.clear()
    yield
    CACHE.clear()


@pytest.mark.usefixtures("native_halves")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_it_is_the_same_kernel(dtype: torch.dtype, grad: bool) -> None:
    """Bit for bit what `F.scaled_dot_product_attention` gives, without a mask, with the flag and with a mask."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 67, 16).to(dtype).requires_grad_(grad) for _ in range(3))
    mask = tm.window(7)
    for given, want in (
        (tm.everything, scaled_dot_product_attention(q, k, v)),
        (tm.causal, scaled_dot_product_attention(q, k, v, is_causal=True)),
        (mask, scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense(67))),
    ):
        assert torch.equal(tm.attend(q, k, v, given), want)


@pytest.mark.usefixtures("native_halves")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["everything", "sinks and window", "dead rows and keys", "padding"])
@pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")
def test_native_half_precision_agrees(dtype: torch.dtype, name: str) -> None:
    problem = Problem(MASKS[name])
    agree("sdpa", problem, dtype, {}, {})
    agree("sdpa", problem, dtype, {"bias": torch.randn(7)}, {})
    agree("sdpa", problem, dtype, {"sink_logits": torch.randn(4).requires_grad_()}, {})


@pytest.mark.usefixtures("native_halves")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MASKED)
def test_native_half_precision_contains(dtype: torch.dtype, name: str) -> None:
    mask, plant = MASKED[name]
    hold_law_6(Given.make(2, 4, 2, 11, 11, dtype), mask, plant, "sdpa", head=1)


@pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")
def test_the_front_end_of_other_devices() -> None:
    """What CUDA would run, run on the CPU: rectangles, shared keys, dead rows with zeros and zero gradients, biases."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64).requires_grad_()
    k, v = (torch.randn(2, 2, 7, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    bias = torch.randn(4, 5, 7, dtype=torch.float64)
    for mask in (tm.causal, tm.everything, tm.window(2) - tm.blocks(2)):
        for given in (None, bias):
            call = read_call(q, k, v, mask, AttendArgs(bias=given))
            found = Job(mask, call.request)
            kernel = SdpaProposal(found).lower().data
            if given is not None:
                kernel = kernel._replace(dense=with_bias(kernel.dense, call.inputs, found))
            out = front_end(call.inputs, kernel)
            want = tm.attend(q, k, v, mask, backend="reference", bias=given)
            torch.testing.assert_close(out, want)
            grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, want)]
            torch.testing.assert_close(*grads)


def test_objections_name_what_is_missing() -> None:
    bias = torch.zeros(8, 5, 5, requires_grad=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"softcap": 1.0}, "soft cap"),
        ({"dropout": 0.1}, "drop"),
        ({"return_weights": True}, "weights"),
        ({"bias": bias}, "gradient of a bias"),
        ({"bias": tm.alibi(torch.ones(8, requires_grad=True))}, "gradient of a bias"),
    ]
    for keywords, word in cases:
        found = plan(tm.causal, 5, **keywords)
        assert found.backend != "sdpa"
        assert word in " ".join(found.objections["sdpa"])
    assert plan(tm.causal, 5, device="cuda", return_lse=True).objections["sdpa"] == [
        "return_lse: the kernel gives it on the CPU only"
    ]


def test_masks_too_large_to_be_dense_are_refused_before_they_are_made() -> None:
    length = 1 << 16
    assert length * length * 4 > MAX_DENSE_BYTES
    assert "GiB" in plan(tm.window(5), length).objections["sdpa"][0]
    assert not plan(tm.causal, length).objections["sdpa"]
    assert not plan(tm.everything, length).objections["sdpa"]
    assert not plan(tm.keys(torch.arange(length) > 5), length, batch=2).objections["sdpa"]


def test_the_copies_of_a_bias_count() -> None:
    """A mask, a bias object's values, and the two joined are there at once; and joining takes its time."""
    length = 1 << 13
    one = 8 * length * length * 4
    assert one * 2 == MAX_DENSE_BYTES
    assert not plan(tm.everything, length, bias=torch.zeros(8, 1, length)).objections["sdpa"]
    assert not plan(tm.everything, length, bias=tm.alibi(torch.ones(8))).objections["sdpa"]
    found = plan(tm.window(5), length, bias=tm.alibi(torch.ones(8)))
    assert found.objections["sdpa"] == ["a dense mask and bias of 4.2 GiB: the limit is 4.0 GiB"]
    assert plan(tm.causal, 512).costs["sdpa"] < plan(tm.window(5), 512).costs["sdpa"]
    bias = torch.zeros(8, 512, 512)
    assert plan(tm.window(5), 512, bias=bias).costs["sdpa"] > 1.2 * plan(tm.window(5), 512).costs["sdpa"]


def test_dead_rows_are_found_once() -> None:
    assert lower_dense(job(tm.causal & tm.window(3), 7)).dead is None
    dead = lower_dense(job(tm.window(3) - tm.blocks(2), 7)).dead
    assert dead is not None
    assert dead[0, 0].tolist() == [True, True, False, False, False, False, False]
