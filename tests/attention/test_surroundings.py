"""What a call of `attend` may stand inside of: autocast, `torch.func`, checkpoints, tensors that change afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import truemask as tm
from tests.support.equality import assert_same
from truemask.attention.planning.cache import CACHE

N = 300
DOCUMENTS = tm.causal & tm.documents([100, 57, 143])
MASKS = {
    "window": tm.causal & tm.window(37),
    "documents": DOCUMENTS,
    "keys": tm.keys(torch.arange(N) % 5 != 1) & tm.causal,
    "dense": tm.dense(torch.arange(N)[:, None] % 7 != torch.arange(N) % 3),
    "per head": tm.per_head([tm.causal, tm.window(4)]),
}
OPTIONS = {"plain": {}, "softcap": {"softcap": 5.0}, "dropout": {"dropout": 0.5}}


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, N, 8, generator=generator).requires_grad_() for _ in range(3))
    return q, k, v


# -- strides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["native", "block_sparse", "reference", None])
@pytest.mark.parametrize("form", [lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, -1)[..., ::2]])
def test_gaps_in_the_last_axis(
    form: Callable[[Tensor], Tensor], backend: str | None, options: dict[str, float]
) -> None:
    """A last axis with gaps gives what its copy gives, and so does a gradient that is one number everywhere."""
    found = []
    for made in (form, lambda x: x):
        leaves = tensors()
        torch.manual_seed(7)
        out = tm.attend(*map(made, leaves), DOCUMENTS, backend=backend, **options)
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert_same(a, b)


# -- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["native", "block_sparse", "reference"])
def test_autocast_is_a_cast_of_the_inputs(backend: str, options: dict[str, float]) -> None:
    """Nothing inside is rounded again, whether the backward runs under autocast or not."""
    found = []
    for inside in (False, True):
        leaves = tensors()
        halves = [x.bfloat16() for x in leaves]
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            out = tm.attend(*leaves, DOCUMENTS, backend=backend, **options)
            if inside:
                grads = torch.autograd.grad(out.sum(), leaves)
        if not inside:
            torch.manual_seed(7)
            out = tm.attend(*halves, DOCUMENTS, backend=backend, **options)
            grads = torch.autograd.grad(out.sum(), leaves)
        found.append([out, *grads])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_autocast_unites_dtypes() -> None:
    """Norms leave q and k in fp32 beside a v in bf16: autocast takes that, as torch's own function does."""
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = tm.attend(q, k, v.bfloat16(), DOCUMENTS)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, tm.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), DOCUMENTS))
    with pytest.raises(TypeError, match="one dtype"):
        tm.attend(q, k, v.bfloat16(), DOCUMENTS)


# -- torch.func --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in `jvp`
@pytest.mark.parametrize("name", MASKS)
def test_functional_gradients(name: str) -> None:
    """`torch.func.grad`, `jvp` and `vmap` of `grad` at a length where plans look at tiles; nothing is left behind."""
    CACHE.clear()
    mask, (q, k, v) = MASKS[name], (x.detach() for x in tensors())

    def total(x: Tensor) -> Tensor:
        return tm.attend(x, k, v, mask).sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(tm.attend(leaf, k, v, mask, backend="reference").sum(), leaf)
    assert_same(torch.func.grad(total)(q), expected)
    along = torch.func.jvp(total, (q,), (torch.ones_like(q),))[1]
    assert_same(along, expected.sum(), scale=float(expected.abs().sum()))
    both = torch.vmap(torch.func.grad(total))(torch.stack([q, q]))
    assert_same(both[1], expected)
    plain = tm.attend(q, k, v, mask)
    assert_same(plain, tm.attend(q, k, v, mask, backend="reference"))


# -- what happens between forward and backward -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "block_sparse", "sdpa"])
def test_a_changed_bias_is_noticed(backend: str) -> None:
    """Gradients of a forward whose bias is no more would be wrong: torch says so, as it does for q, k and v."""
    q, k, v = tensors()
    slopes = torch.tensor([0.5, 0.25])
    for bias, changed in ((torch.randn(1, 2, N, N),) * 2, (tm.alibi(slopes), slopes)):
        out = tm.attend(q, k, v, tm.causal & tm.window(64), bias=bias, backend=backend)
        with torch.no_grad():
            (changed if isinstance(bias, Tensor) else bias.parameters[0]).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize(
    ("backend", "softcap"),
    [
        ("native", 5.0),
        ("sdpa", None),
        ("block_sparse", None),
        ("block_sparse", 5.0),
        ("reference", None),
        ("reference", 5.0),
    ],
)
def test_a_checkpoint_frees_what_it_computes_again(backend: str, softcap: float | None) -> None:
    """Nothing but autograd's own savings holds q, k and v, which a checkpoint gives up."""
    x = torch.randn(1, 2, N, 8, requires_grad=True)
    seen: list[weakref.ref[Tensor]] = []

    def layer(x: Tensor) -> Tensor:
        q = x * 2
        seen.append(weakref.ref(q))
        return tm.attend(q, q + 1, q - 1, DOCUMENTS, backend=backend, softcap=softcap)

    out = checkpoint(layer, x, use_reentrant=False)
    gc.collect()
    assert seen[0]() is None
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_of_decoding_does_not_convert_the_cache(dtype: torch.dtype) -> None:
    """Under a window, bytes allocated in a step follow the window and not the cache, whatever dtype and head sizes."""
    n = 1 << 16
    q, k, v = torch.randn(1, 1, 1, 64), torch.randn(1, 1, n, 64), torch.randn(1, 1, n, 128)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    mask = (tm.causal & tm.window(64)).at(q_start=n - 1)

    def step() -> Tensor:
        return tm.attend(q, k, v, mask, backend="block_sparse")

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        out = step()
    assert sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages()) < 1 << 20
    expected = tm.attend(q, k, v, mask, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0.0, atol=4 * torch.finfo(dtype).eps * float(expected.abs().max()))


# -- data that is not there --------------------------------------------------------------------------------------------

FLAGS = torch.arange(6).view(2, 3) % 4 != 1
MAPPED: dict[str, Callable[[Tensor], tm.Mask]] = {
    "keys": tm.keys,
    "dense": lambda x: tm.dense(x.expand(3, 3)),
    "documents": lambda x: tm.documents(ids=x.long()),
    "padding": lambda x: tm.padding(lengths=x.long()),
    "packed": lambda x: tm.causal.packed(x.long()),
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_over_the_data_of_a_mask_is_refused(name: str) -> None:
    q = torch.randn(2, 3, 1, 3, 8)
    with pytest.raises(tm.PlanError, match=r"vmap maps over the data of a mask.*as the samples of one call"):
        torch.vmap(lambda q, x: tm.attend(q, q, q, MAPPED[name](x)))(q, FLAGS)


NOBODY: dict[str, Callable[[], tm.Mask]] = {
    "keys": lambda: tm.keys(torch.ones(0, 3).bool()),
    "queries": lambda: tm.queries(torch.ones(0, 3).bool()),
    "documents": lambda: tm.documents(ids=torch.ones(0, 3).long()),
    "same": lambda: tm.same(torch.ones(0, 3).long()),
    "packed": lambda: tm.causal.packed(torch.ones(0, 3).long()),
    "take": lambda: tm.causal.take(q=torch.ones(0, 3).long()),
    "tree": lambda: tm.tree(torch.ones(0, 3).long()),
    "dense": lambda: tm.dense(torch.ones(0, 1, 3, 3).bool()),
    "padding": lambda: tm.padding(lengths=[]),
    "hugging face's": lambda: tm.from_huggingface_2d(torch.ones(0, 3).long()),
}


@pytest.mark.parametrize("name", NOBODY)
def test_data_of_no_sample_is_refused_and_an_empty_batch_runs_without(name: str) -> None:
    with pytest.raises(tm.MaskError, match=r"no sample|at least one sample"):
        NOBODY[name]()
    q = torch.randn(0, 2, 3, 8)
    for mask in (tm.causal, torch.ones(0, 1, 3, 3).bool(), tm.keys(FLAGS).select(samples=[])):
        assert tm.attend(q, q, q, mask).shape == q.shape
    with pytest.raises(tm.MaskError, match="holds data for 3"):
        tm.attend(*[torch.randn(0, 2, 4, 8)] * 3, tm.keys(FLAGS).select(samples=[]))


def test_a_block_mask_on_meta_has_shapes_and_leaves_nothing_behind() -> None:
    mask = tm.causal & tm.keys(torch.arange(256) % 3 != 1)
    blocks, real = (mask.to_block_mask(256, device=device) for device in ("meta", "cpu"))
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks"):
        assert getattr(blocks, name).is_meta
        assert getattr(blocks, name).shape == getattr(real, name).shape
    index = torch.zeros(1, dtype=torch.int64, device="meta")
    assert blocks.mask_mod(index, index, index, index).is_meta
    q = torch.randn(1, 1, 256, 8)
    assert tm.attend(q, q, q, mask).isfinite().all()
    assert set(vars(mask)["_bound"]) == {"cpu"}


def test_a_mask_of_meta_tensors_is_refused() -> None:
    with pytest.raises(tm.MaskError, match="a meta tensor has none"):
        tm.keys(torch.ones(3, device="meta").bool())
