"""`attend` where it is called: what it returns, and what it says to each mistake."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from tests.support.equality import assert_same
from tests.support.oracle import Three, three
from truemask.attention.planning.plan import CACHE
from truemask.backends.registry import BACKENDS


def qkv(b: int = 2, h: int = 4, y: int = 2, q: int = 5, k: int = 5, d: int = 8, **keywords: Any) -> Three:
    torch.manual_seed(0)
    return three(torch.randn(b, heads, n, d, **keywords) for heads, n in ((h, q), (y, k), (y, k)))


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse", "reference"])
def test_results_come_in_order(backend: str) -> None:
    given = qkv()
    out = tm.attend(*given, tm.causal, backend=backend)
    assert isinstance(out, Tensor)
    pair = tm.attend(*given, tm.causal, backend=backend, return_lse=True)
    assert [list(x.shape) for x in pair] == [[2, 4, 5, 8], [2, 4, 5]]
    if backend == "reference":
        pair = tm.attend(*given, tm.causal, backend=backend, return_weights=True)
        assert [list(x.shape) for x in pair] == [[2, 4, 5, 8], [2, 4, 5, 5]]
        all_three = tm.attend(*given, tm.causal, backend=backend, return_lse=True, return_weights=True)
        assert [x.ndim for x in all_three] == [4, 3, 4]
    assert_same(pair[0], out)


def test_weights_are_what_multiplied_v() -> None:
    q, k, v = qkv(y=4)
    out, weights = tm.attend(q, k, v, tm.causal, dropout=0.4, sink_logits=torch.zeros(4), return_weights=True)
    assert_same(weights @ v, out)
    assert not weights.triu(1).any()
    assert weights.dtype == q.dtype


def test_none_means_everything() -> None:
    given = qkv(k=7)
    assert torch.equal(tm.attend(*given), tm.attend(*given, tm.everything))
    assert torch.equal(tm.attend(*given, None), tm.attend(*given, torch.ones(5, 7, dtype=torch.bool)))


def test_bool_tensors_are_masks() -> None:
    q, k, v = qkv(y=4, k=7)
    torch.manual_seed(3)
    for shape in ((5, 7), (2, 4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (1, 4, 5, 1), (1, 1, 1, 1)):
        mask = torch.rand(shape) < 0.7
        want = scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(2, 4, 5, 7))
        assert_same(tm.attend(q, k, v, mask), want)


def test_heads_are_shared_in_blocks() -> None:
    q, k, v = qkv(h=6, y=3)
    many_k, many_v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    for backend in ("sdpa", "block_sparse", "reference"):
        assert_same(
            tm.attend(q, k, v, tm.causal, backend=backend), tm.attend(q, many_k, many_v, tm.causal, backend=backend)
        )


def test_dropout_repeats_with_the_seed_and_differs_without() -> None:
    given = qkv(q=19, k=19)
    torch.manual_seed(11)
    first = tm.attend(*given, tm.causal, dropout=0.5)
    second = tm.attend(*given, tm.causal, dropout=0.5)
    torch.manual_seed(11)
    again = tm.attend(*given, tm.causal, dropout=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    q, k = torch.zeros(3, 5, 67, 2), torch.zeros(3, 5, 71, 2)
    _, weights = tm.attend(q, k, k, dropout=0.3, return_weights=True)
    share = float((weights == 0).double().mean())
    assert abs(share - 0.3) < 0.01
    assert abs(float(weights.sum(-1).mean()) - 1) < 0.01


def test_autocast_is_that_of_sdpa() -> None:
    q, k, v = qkv(y=4)
    with torch.autocast("cpu", torch.bfloat16):
        out = tm.attend(q, k.bfloat16().float(), v, tm.causal)
        capped = tm.attend(q, k, v, tm.causal, softcap=50.0)
        want = scaled_dot_product_attention(q, k, v, is_causal=True)
        doubles = tm.attend(q.double(), k.double(), v.double(), tm.causal)
    assert out.dtype == capped.dtype == want.dtype == torch.bfloat16
    tolerance = max(backend.tolerance[torch.bfloat16] for backend in BACKENDS)
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    assert_same(doubles.float(), scaled_dot_product_attention(q, k, v, is_causal=True))


def test_meta_tensors_are_cast_as_those_that_they_stand_for() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        real, meta = (tm.attend(*(x.to(device) for x in (q, k, v)), tm.causal) for device in ("cpu", "meta"))
        assert real.dtype == meta.dtype == torch.bfloat16
        assert tm.plan(*(x.to("meta") for x in (q, k, v)), tm.causal) is tm.plan(q, k, v, tm.causal)


def test_meta_tensors_go_with_meta_biases_and_sinks() -> None:
    q, k, v = (x.to("meta") for x in qkv(k=7))
    for device in ("cpu", "meta"):
        bias, sinks = torch.zeros(4, 5, 7, device=device), torch.zeros(4, device=device)
        assert tm.attend(q, k, v, tm.local(3), bias=bias, sink_logits=sinks).shape == (2, 4, 5, 8)


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (x.to("meta") for x in qkv(k=7))
    out, lse, weights = tm.attend(q, k, v, tm.local(3), return_lse=True, return_weights=True)
    assert (out.shape, lse.shape, weights.shape) == ((2, 4, 5, 8), (2, 4, 5), (2, 4, 5, 7))
    assert out.is_meta


def test_inference_mode_and_training_share_what_was_lowered() -> None:
    given = qkv()
    mask = tm.local(2) - tm.dilated(3)
    with torch.inference_mode():
        first = tm.attend(*given, mask)
    leaves = three(x.requires_grad_() for x in given)
    tm.attend(*leaves, mask).sum().backward()
    assert torch.equal(first, tm.attend(*given, mask))
    assert leaves[0].grad is not None


def test_the_tensors_given_are_not_changed() -> None:
    given = qkv()
    given[2][0, 0, 4] = torch.nan
    copies = [x.clone() for x in given]
    for backend in ("sdpa", "block_sparse", "reference"):
        tm.attend(*given, tm.causal, backend=backend)
    for x, copy in zip(given, copies, strict=True):
        assert torch.equal(x.nan_to_num(9), copy.nan_to_num(9))


def test_a_mask_tensor_changed_afterwards_is_another_mask() -> None:
    q, k, v = qkv(y=4)
    mask = torch.ones(5, 5, dtype=torch.bool)
    first = tm.attend(q, k, v, mask)
    mask.tril_()
    assert_same(tm.attend(q, k, v, mask), scaled_dot_product_attention(q, k, v, is_causal=True))
    assert not torch.equal(first, tm.attend(q, k, v, mask))


# -- alignment ---------------------------------------------------------------------------------------------------------


def test_fewer_queries_than_keys_warn_if_the_mask_looks_back() -> None:
    given = qkv(q=1, k=100)
    for mask in (tm.causal, tm.window(3) | tm.prefix(2), tm.per_head([tm.causal] * 4)):
        for _ in range(2):  # every time, not only when the plan is made
            with pytest.warns(tm.ConventionWarning, match=r"`\.at\(q_start=99\)`"):
                tm.attend(*given, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask in (tm.causal.at(q_start=99), tm.local(3), tm.everything, tm.prefix(3)):
            tm.attend(*given, mask)
        tm.attend(*qkv(q=7, k=5), tm.causal)
        tm.attend(*qkv(), tm.causal)


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse", "reference"])
def test_rows_asked_one_by_one_are_the_rows_of_the_whole(backend: str) -> None:
    q, k, v = qkv(q=13, k=13, dtype=torch.float64)
    mask = tm.causal & (tm.window(3) | tm.prefix(2))
    bias = tm.alibi(torch.tensor([0.5, 0.1, 0.2, 0.3], dtype=torch.float64))
    whole = tm.attend(q, k, v, mask, bias=bias, backend=backend)
    for i in range(13):
        row = tm.attend(
            q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], mask.at(q_start=i), bias=bias, backend=backend
        )
        torch.testing.assert_close(row, whole[:, :, i : i + 1], rtol=1e-12, atol=1e-12)


# -- mistakes ----------------------------------------------------------------------------------------------------------

Q, K, V = qkv()
LONG = torch.zeros(2, 4, 5, 5)

MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "not tensors": (
        ([[1.0]], K, V),
        {},
        TypeError,
        "q must be a tensor [batch, heads, length, head size], got list [[1.0]]",
    ),
    "no heads": (
        (Q[:, 0], K, V),
        {},
        ValueError,
        "got float32 [2, 5, 8] on cpu: likely without its head axis. For one head use `q.unsqueeze(1)`",
    ),
    "no batch": ((Q, K[0, 0], V), {}, ValueError, "likely without its batch axis, `k.unsqueeze(0)`"),
    "five axes": ((Q[None], K, V), {}, ValueError, "got float32 [1, 2, 4, 5, 8] on cpu"),
    "sparse": ((Q.to_sparse(), K, V), {}, ValueError, "must be a dense tensor"),
    "token ids": ((Q.long(), K, V), {}, TypeError, "likely token ids that were not embedded"),
    "complex": ((Q + 0j, K + 0j, V + 0j), {}, TypeError, "complex numbers are not supported"),
    "mixed dtypes": (
        (Q, K.double(), V),
        {},
        TypeError,
        "got torch.float32, torch.float64 and torch.float32: likely a cache or a projection",
    ),
    "mixed devices": ((Q, K.to("meta"), V), {}, ValueError, "must be on one device, got cpu, meta and cpu"),
    "batches": (
        (Q, K[:1], V[:1]),
        {},
        ValueError,
        "batch sizes 2, 1 and 1 differ; to share keys among samples use `k.expand(2, -1, -1, -1)`",
    ),
    "head sizes": ((Q, K[..., :7], V), {}, ValueError, "q's head size 8 is not k's 7"),
    "heads of v": ((Q, K, V[:, :1]), {}, ValueError, "k has 2 heads and v 1"),
    "lengths of v": ((Q, K, V[:, :, :3]), {}, ValueError, "k has 5 keys and v 3"),
    "head multiples": ((Q[:, :3], K, V), {}, ValueError, "3 query heads are no multiple of 2 key heads"),
    "layout": (
        (torch.zeros(1, 7, 4, 8), torch.zeros(1, 5, 4, 8), torch.zeros(1, 5, 4, 8)),
        {},
        ValueError,
        "likely the layout is [batch, length, heads, head size]: use `.transpose(1, 2)`",
    ),
    "no head size": ((Q[..., :0], K[..., :0], V), {}, ValueError, "heads and head sizes must be at least 1"),
    "float mask": (
        (Q, K, V, torch.zeros(5, 5)),
        {},
        tm.MaskError,
        "use `from_additive(mask)`; other numbers are a bias",
    ),
    "int mask": ((Q, K, V, torch.ones(2, 5, dtype=torch.int64)), {}, tm.MaskError, "use `from_huggingface_2d(mask)`"),
    "padding": (
        (Q, K, V, torch.ones(2, 5, dtype=torch.bool)),
        {},
        tm.MaskError,
        "likely key padding (True = real token), which is `keys(mask)`",
    ),
    "one row": ((Q, K, V, torch.ones(1, 5, dtype=torch.bool)), {}, tm.MaskError, "`keys(mask)`"),
    "3-D mask": (
        (Q, K, V, torch.ones(4, 5, 5, dtype=torch.bool)),
        {},
        tm.MaskError,
        '`dense(mask, axes="bqk")` (4 samples) or `dense(mask, axes="hqk")` (4 heads)',
    ),
    "transposed mask": (
        (Q[:, :, :3], K, V, torch.ones(5, 3, dtype=torch.bool)),
        {},
        tm.MaskError,
        "likely transposed, `mask.mT`",
    ),
    "mask for heads": (
        (Q, K, V, torch.ones(4, 4, dtype=torch.bool)),
        {},
        tm.MaskError,
        "likely q is [batch, length, heads, head size]",
    ),
    "4-D mask": (
        (Q, K, V, torch.ones(3, 1, 5, 5, dtype=torch.bool)),
        {},
        tm.MaskError,
        "a bool mask is [q, k] = [5, 5] or [b, h, q, k] = [2, 4, 5, 5]",
    ),
    "text": ((Q, K, V, "causl"), {}, tm.MaskError, "unknown name 'causl', did you mean 'causal'?\n  causl\n  ^^^^^"),
    "masks of heads": (
        (Q, K, V, [tm.causal, tm.window(3)]),
        {},
        tm.MaskError,
        "one mask for each head is `per_head([...])`",
    ),
    "number": ((Q, K, V, 256), {}, tm.MaskError, "a number alone is no rule, a window of 256 keys is `window(256)`"),
    "flag": ((Q, K, V, True), {}, tm.MaskError, "is_causal=True is written `causal`"),
    "function": ((Q, K, V, tm.window), {}, tm.MaskError, "wrap a function of (b, h, q, k) in `predicate`"),
    "list": ((Q, K, V, [[True]]), {}, tm.MaskError, "lists and arrays of booleans are `dense(...)`"),
    "mask too short": (
        (Q, K, V, tm.keys(torch.ones(3, dtype=torch.bool))),
        {},
        tm.MaskError,
        "(the call has 2 samples, 4 heads, 5 queries and 5 keys)",
    ),
    "mask for other samples": (
        (Q, K, V, tm.padding(lengths=[1, 2, 3])),
        {},
        tm.MaskError,
        "3 samples, but was asked about 2",
    ),
    "dropout": (
        (Q, K, V),
        {"dropout": 1.0},
        ValueError,
        "dropout must be in [0, 1), the share of weights to drop, got 1.0",
    ),
    "dropout percent": ((Q, K, V), {"dropout": 10}, ValueError, "did you mean 0.1?"),
    "scale": ((Q, K, V), {"scale": float("nan")}, ValueError, "scale must be a finite number, got float nan"),
    "scale tensor": (
        (Q, K, V),
        {"scale": torch.ones(())},
        TypeError,
        "scale must be a number, got float32 [] on cpu: take `.item()`",
    ),
    "tiny softcap": ((Q, K, V), {"softcap": 1e-50}, ValueError, "softcap must be above 0, and 1.2e-38 at least"),
    "endless scale": ((Q, K, V), {"scale": 10**400}, ValueError, "scale must be a finite number"),
    "softcap": ((Q, K, V), {"softcap": 0.0}, ValueError, "softcap must be above 0, got 0.0; None means none"),
    "sinks": ((Q, K, V), {"sink_logits": torch.zeros(2)}, ValueError, "[query heads] = [4], got float32 [2] on cpu"),
    "sinks elsewhere": (
        (Q, K, V),
        {"sink_logits": torch.zeros(4, device="meta")},
        ValueError,
        "sink_logits are on meta, but q is on cpu",
    ),
    "bias shape": (
        (Q, K, V),
        {"bias": torch.zeros(3, 5, 5)},
        ValueError,
        "bias must broadcast to [b, h, q, k] = [2, 4, 5, 5], got float32 [3, 5, 5]",
    ),
    "bias bool": ((Q, K, V), {"bias": torch.ones(5, 5, dtype=torch.bool)}, TypeError, "a bool tensor is a mask"),
    "bias int": ((Q, K, V), {"bias": torch.ones(5, 5, dtype=torch.int64)}, TypeError, "bias must be floats"),
    "bias list": ((Q, K, V), {"bias": [1.0]}, TypeError, "`alibi(...)`, `relative(...)`"),
    "bias elsewhere": (
        (Q, K, V),
        {"bias": torch.zeros(5, device="meta")},
        ValueError,
        "bias is on meta, but q is on cpu",
    ),
    "bias heads": ((Q, K, V), {"bias": tm.alibi(torch.ones(3))}, ValueError, "holds numbers for 3 heads, but q has 4"),
    "meta mask": (
        (Q, K, V, torch.ones(5, 5, dtype=torch.bool, device="meta")),
        {},
        tm.MaskError,
        "the mask is a meta tensor (bool [5, 5] on meta), which has no values",
    ),
    "dropout None": ((Q, K, V), {"dropout": None}, ValueError, "dropout must be a finite number, got NoneType None"),
    "dropout text": ((Q, K, V), {"dropout": ""}, ValueError, "dropout must be a finite number, got str ''"),
    "dropout list": ((Q, K, V), {"dropout": []}, ValueError, "dropout must be a finite number, got list []"),
    "dropout tensor": ((Q, K, V), {"dropout": torch.zeros(())}, TypeError, "dropout must be a number, got float32 []"),
    "dropout flag": ((Q, K, V), {"dropout": False}, ValueError, "dropout must be a finite number, got bool False"),
    "lse flag": ((Q, K, V), {"return_lse": "no"}, TypeError, "return_lse must be True or False, got str 'no'"),
    "weights flag": ((Q, K, V), {"return_weights": 1}, TypeError, "return_weights must be True or False, got int 1"),
    "backend list": (
        (Q, K, V),
        {"backend": ["sdpa"]},
        TypeError,
        f"backend must be None or one of {', '.join(tm.backends())}, got list ['sdpa']",
    ),
    "backend": (
        (Q, K, V),
        {"backend": "sdap"},
        tm.PlanError,
        f"there is no backend 'sdap', did you mean 'sdpa'? (known: {', '.join(tm.backends())})",
    ),
    "backend flash": (
        (Q, K, V),
        {"backend": "flash"},
        tm.PlanError,
        "there is no backend 'flash': FlashAttention's way to compute is `native` on the CPU, and one of the kernels "
        f"of `sdpa` on CUDA (known: {', '.join(tm.backends())})",
    ),
    "backend math": ((Q, K, V), {"backend": "math"}, tm.PlanError, "in chunks of rows, are `reference`"),
    "backend of torch": ((Q, K, V), {"backend": "flex_attention"}, tm.PlanError, "FlexAttention is `flex`"),
    "backend auto": ((Q, K, V), {"backend": "auto"}, tm.PlanError, "leave `backend` out, and the plan chooses"),
    "backend lacks": (
        (Q, K, V),
        {"backend": "sdpa", "return_weights": True},
        tm.PlanError,
        "sdpa: return_weights: the kernel never holds the weights\nbackend='reference' can",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    """What was given, what was expected, and the likely cause; and the warning of alignment does not come before it."""
    given, keywords, kind, words = MISTAKES[name]
    with pytest.raises(kind, match=re.escape(words)):
        tm.attend(*given, **keywords)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    q = torch.nested.nested_tensor([torch.zeros(2, 3, 8), torch.zeros(5, 3, 8)], layout=layout)
    with pytest.raises(TypeError, match="q is a nested tensor: pad the sequences"):
        tm.attend(q, q, q)


def test_one_is_singular() -> None:
    with pytest.raises(tm.MaskError, match=r"the call has 1 sample, 1 head, 1 query and 1 key\)"):
        tm.attend(*qkv(b=1, h=1, y=1, q=1, k=1), tm.padding(lengths=[1, 2, 3]))
    with pytest.warns(tm.ConventionWarning, match=r"^1 query and 3 keys .* If this query is the last position,"):
        tm.attend(*qkv(q=1, k=3), tm.causal)
    with pytest.warns(tm.ConventionWarning, match=r"^2 queries and 3 keys .*: it does not see the last key\. If these"):
        tm.attend(*qkv(q=2, k=3), tm.causal)


def test_weights_that_fit_in_no_memory_are_refused() -> None:
    q = torch.zeros(1, 64, 1 << 14, 1).expand(1, 64, 1 << 14, 1)
    with pytest.raises(ValueError, match=r"64 GiB.*mask\.at\(q_start=a\)"):
        tm.attend(q, q, q, tm.causal, return_weights=True)


def test_mistakes_leave_no_plan_behind() -> None:
    CACHE.clear()
    for name in ("backend", "backend lacks", "mask too short"):
        given, keywords, kind, _ = MISTAKES[name]
        with pytest.raises(kind):
            tm.attend(*given, **keywords)
    assert CACHE.info().entries == 0


def test_a_tensor_that_sees_the_future_only_is_called_upside_down() -> None:
    q = torch.randn(2, 3, 5, 7)
    late = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with pytest.warns(tm.ConventionWarning, match=r"5 x 5 lets every query see later keys only.*`~mask`"):
        out = tm.attend(q, q, q, late)
    assert not out[:, :, -1].any()  # it does what it was told: the last row sees nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tm.attend(q, q, q, ~late)
        tm.attend(q, q, q, torch.zeros(5, 5, dtype=torch.bool))
        tm.attend(q, q, q, tm.from_torch_mha(late))


def test_right_padding_of_queries_and_keys_alike_is_told_where_they_are_two_sequences() -> None:
    q, k = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 20, 8)
    both = tm.padding(lengths=[5, 3])
    with pytest.warns(tm.ConventionWarning, match=r'hides keys 5 to 19 from every query.*on="keys"'):
        tm.attend(q, k, k, both)
    with pytest.warns(tm.ConventionWarning, match=r"lets queries 5 to 19 see nothing"):
        tm.attend(k, q, q, both)
    assert "hides keys 5 to 19" in tm.plan(both & tm.everything, 5, 20).warning
    for mask in (tm.padding(lengths=[5, 3], on="keys"), tm.padding(lengths=[20, 12]), both.at(q_start=15)):
        tm.attend(q, k, k, mask)
    tm.attend(q, q, q, both)
