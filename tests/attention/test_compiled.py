"""`attend` under `torch.compile(fullgraph=True)`: every kind of mask, and few compilations whatever changes.

Most of it runs with `backend="aot_eager"`, which traces, differentiates and partitions as `inductor` does but leaves
the code generation out.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import truemask as tm
from tests.support.cases import CASES, Case
from tests.support.equality import assert_same
from tests.support.oracle import Three, three
from truemask.attention import compiled as _compiled
from truemask.attention.call import AttendArgs
from truemask.attention.operator_args import OperatorArgs
from truemask.attention.planning.cache import CACHE
from truemask.masks.core.handles import HANDLES, mask_of

MASK = tm.causal & (tm.window(3) | tm.prefix(1))


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(fn: Callable[..., Any], backend: str = "aot_eager", **keywords: Any) -> tuple[Any, Any]:
    """The function compiled as one graph, and a counter of compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(fn, fullgraph=True, backend=counter, **keywords), counter


def qkv(q: int = 7, k: int | None = None, b: int = 2, h: int = 4, y: int = 2, grad: bool = False) -> Three:
    """Queries, keys and values with shared key heads and two head sizes."""
    torch.manual_seed(q)
    k = q if k is None else k
    shapes = (b, h, q, 11), (b, y, k, 11), (b, y, k, 5)
    return three(torch.randn(*shape, requires_grad=grad) for shape in shapes)


# -- every kind, from outside ------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return tm.attend(q, k, v, mask)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")
def test_every_mask_of_the_catalogue_forward_and_backward() -> None:
    """Of every kind, in every size, samples and heads; a kind is compiled once, or twice where 1 is a size."""
    fn, counter = compiled(attend, dynamic=True)

    def run(fn: Callable[..., Tensor], case: Case, mask: tm.Mask) -> tuple[Tensor, ...]:
        given = qkv(case.q_len, case.kv_len, case.batch, case.heads, case.heads, grad=True)
        out = fn(*given, mask)
        return out, *torch.autograd.grad(out.square().sum(), given)

    masks = [case.make() for case in CASES]
    with torch._dynamo.config.patch(recompile_limit=len(CASES)):
        for case, mask in zip(CASES, masks, strict=True):
            for got, want in zip(run(fn, case, mask), run(attend, case, mask), strict=True):
                assert_same(got, want, name=case.name)
    sorts = {(type(mask), case.batch == 1, case.heads == 1) for case, mask in zip(CASES, masks, strict=True)}
    assert counter.frame_count <= len(sorts) + 10


def test_masks_of_arguments_are_no_constants() -> None:
    """Another mask of the same kind, other data, another offset: the graph of the first serves all."""
    given = qkv(13, b=2)
    fn, counter = compiled(attend)
    for i in range(5):
        assert_same(fn(*given, tm.causal.at(q_start=i + 2)), attend(*given, tm.causal.at(q_start=i + 2)))
    assert counter.frame_count == 2  # offsets are numbers
    for lengths in ([5, 8], [1, 5, 7], [13]):
        assert_same(fn(*given, MASK.packed(lengths)), attend(*given, MASK.packed(lengths)))
    for _ in range(3):
        cells = torch.rand(13, 13) < 0.5
        assert_same(fn(*given, tm.dense(cells)), attend(*given, tm.dense(cells)))
        assert_same(fn(*given, cells), attend(*given, cells))
    assert counter.frame_count == 5  # packed, dense, a tensor


def test_masks_of_the_surroundings_and_of_modules() -> None:
    class Layer(nn.Module):
        def __init__(self, mask: tm.Mask) -> None:
            super().__init__()
            self.mask, self.project = mask, nn.Linear(11, 11)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tm.attend(self.project(q), k, v, self.mask) + tm.attend(q, k, v, MASK)

    torch.manual_seed(1)
    layer = Layer(tm.local(2))
    fn, counter = compiled(layer)
    for length in (7, 11, 13):
        assert_same(fn(*qkv(length)), layer(*qkv(length)))
    layer.mask = tm.local(3)
    assert_same(fn(*qkv(17)), layer(*qkv(17)))
    assert counter.frame_count == 2


# -- changing lengths and offsets --------------------------------------------------------------------------------------


def test_lengths_compile_twice_once_as_they_are_and_once_for_all() -> None:
    fn, counter = compiled(lambda q, k, v: tm.attend(q, k, v, MASK))
    for length in (7, 11, 13, 17):
        assert_same(fn(*qkv(length)), attend(*qkv(length), MASK))
    assert counter.frame_count == 2


def test_decoding_compiles_twice_and_plans_once() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        return tm.attend(q, k, v, MASK.at(q_start=start))

    fn, counter = compiled(step)
    q, k, v = qkv(43)  # more than are used: a whole tensor has other strides than its parts
    whole = tm.attend(q, k, v, MASK)
    CACHE.clear()
    for i in range(2, 41):
        row = fn(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], i)
        assert_same(row, whole[:, :, i : i + 1])
    assert counter.frame_count == 2
    assert CACHE.info().misses == 1


INSIDE: dict[str, Callable[[int], Any]] = {
    "window": tm.window,
    "local": tm.local,
    "blocks": lambda n: tm.blocks(n, back=1),
    "dilated": tm.dilated,
    "strided": lambda n: tm.strided(n, last=1),
    "random": lambda n: tm.random(0.5, block=2, seed=n),
    "grid": lambda n: tm.grid(n, 7, radius=1),
    "prefix": lambda n: tm.prefix([n, 3]),
    "documents": lambda n: tm.documents([n, 13]),
    "documents by id": lambda n: tm.documents(ids=torch.arange(13) // n),
    "same": lambda n: tm.same(torch.arange(13) % n, none=1),
    "keys": lambda n: tm.keys(torch.arange(13) < n) & tm.queries(torch.arange(13) > 1),
    "padding": lambda n: tm.padding(lengths=[n, 5], on="keys"),
    "global": lambda n: tm.global_tokens([n, 2]),
    "tree": lambda n: tm.tree([-1, 0, 0, 1, 1, 2, 2, n - 1, 3, 4, 5, 6, 7]),
    "dense": lambda n: tm.dense(torch.ones(13, 13, dtype=torch.bool).tril(n)),
    "block pattern": lambda n: tm.block_pattern(torch.eye(7, dtype=torch.bool), n),
    "per head": lambda n: tm.per_head([tm.causal, tm.window(n), tm.local(2), tm.everything]),
    "per sample": lambda n: tm.per_sample([tm.nothing, tm.window(n)]),
    "packed": lambda n: tm.causal.packed([n, 13 - n]),
    "padded": lambda n: tm.causal.padded(torch.tensor([0, 2]) + n),
    "transposed": lambda n: tm.window(n).T,
    "taken": lambda n: tm.window(n).take(q=torch.arange(13).flip(0)),
    "selected": lambda n: tm.per_head([tm.causal, tm.window(n)]).select(heads=[0, 1, 0, 1]),
    "prepended": lambda n: tm.causal.prepended(n, 2),
    "operators": lambda n: (tm.causal - tm.window(n)) ^ (tm.prefix(2) | tm.local(n)).at(k_start=n) & MASK,
    "parsed": lambda n: tm.parse("causal & window(4)").at(n),
    "imported": lambda n: tm.from_huggingface_2d((torch.arange(13) < n).int().expand(2, 13)),
    "a tensor": lambda n: torch.ones(13, 13, dtype=torch.bool).tril(n),
    "nothing given": lambda n: None,
}


FAST = ("padded", "operators", "a tensor")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in INSIDE]
)
def test_masks_made_inside(name: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        return tm.attend(q, k, v, INSIDE[name](n))

    fn, counter = compiled(call)
    for n in (3, 4, 5, 6, 7):
        assert_same(fn(*qkv(13), n), call(*qkv(13), n))
    assert counter.frame_count <= 2


# -- every option ------------------------------------------------------------------------------------------------------


def everything_at_once(backend: str) -> None:
    """A bias, sinks, a soft cap, dropout; out, lse and weights; gradients of all that has one."""

    def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"bias": tm.alibi(slopes), "sink_logits": sinks, "softcap": 3.0, "scale": 0.3}
        return tm.attend(q, k, v, MASK, dropout=0.3, return_lse=True, return_weights=True, **options)

    def run(fn: Callable[..., tuple[Tensor, ...]], length: int) -> tuple[Tensor, ...]:
        given = (*qkv(length, grad=True), torch.rand(4).requires_grad_(), torch.zeros(4, requires_grad=True))
        torch.manual_seed(5)
        found = fn(*given)
        return *found, *torch.autograd.grad(sum(x.square().sum() for x in found), given)  # pyright: ignore

    fn, counter = compiled(call, backend)
    for length in (7, 11, 13):
        for got, want in zip(run(fn, length), run(call, length), strict=True):
            assert_same(got, want)
    assert counter.frame_count <= 2


def test_every_option_at_once() -> None:
    everything_at_once("aot_eager")


BIASES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda t: t[:, None, :7],
    "alibi": lambda t: tm.alibi(t[:, 0]),
    "relative": lambda t: tm.relative(t),
    "t5": lambda t: tm.relative(t[:, :8], max_distance=5),
    "past": lambda t: tm.relative(t, bidirectional=False),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_and_their_gradients(name: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return tm.attend(q, k, v, MASK, bias=BIASES[name](table))

    def run(fn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        given = qkv()
        table = torch.randn(4, 11, requires_grad=True)
        out = fn(*given, table)
        return out, torch.autograd.grad(out.square().sum(), table)[0]

    for got, want in zip(run(compiled(call)[0]), run(call), strict=True):
        assert_same(got, want)


def test_the_log_sum_exp_of_the_kernel_has_gradients() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = tm.attend(q, k, v, MASK, return_lse=True, backend="sdpa")
        return (out.square().sum() + lse.sin().sum()).double()

    fn, _ = compiled(call)
    (first, second) = (torch.autograd.grad(f(*(given := qkv(grad=True))), given) for f in (fn, call))
    for got, want in zip(first, second, strict=True):
        assert_same(got, want)


def test_autocast_inside_and_around() -> None:
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return tm.attend(q, k, v, MASK)

    want = inside(*qkv())
    assert torch.equal(compiled(inside)[0](*qkv()), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(attend)[0](*qkv(), MASK), want)


def test_dropout_repeats_with_the_seed_and_differs_without() -> None:
    fn, _ = compiled(lambda q, k, v: tm.attend(q, k, v, MASK, dropout=0.5))
    torch.manual_seed(3)
    first, second = fn(*qkv(19)), fn(*qkv(19))
    torch.manual_seed(19)  # what qkv leaves behind before it draws
    again = fn(*qkv(19))
    assert torch.equal(second, again)
    assert torch.equal(first, second)


def test_recomputed_in_the_backward() -> None:
    """Activation checkpointing asks for the mask again when its maker may have let it go."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: tm.Mask) -> Tensor:
        inner: Any = torch.utils.checkpoint.checkpoint(attend, q, k, v, mask, use_reentrant=False)
        return inner.square().sum()

    given, others = qkv(grad=True), qkv(grad=True)
    loss = compiled(call)[0](*given, tm.window(3).packed([3, 4]))
    gc.collect()
    loss.backward()
    attend(*others, tm.window(3).packed([3, 4])).square().sum().backward()
    for got, want in zip(given, others, strict=True):
        assert_same(got.grad, want.grad)


# -- the laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [torch.nan, torch.inf, 3e38], ids=str)
def test_what_is_masked_does_not_leak(planted: float) -> None:
    """Law 6, compiled: out, dq, dk and dv of everybody else are those without what was planted."""
    fn, _ = compiled(attend)
    mask = tm.keys(torch.arange(7) != 4) & tm.causal

    def run(value: float) -> tuple[Tensor, ...]:
        given = qkv(grad=True)
        with torch.no_grad():
            given[1][:, :, 4], given[2][:, :, 4] = value, value
        out = fn(*given, mask)
        return out, *torch.autograd.grad(out.square().sum(), given)

    for dirty, clean in zip(run(planted), run(0.0), strict=True):
        assert_same(dirty, clean)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    given = qkv(grad=True)
    out, lse = compiled(lambda q, k, v: tm.attend(q, k, v, tm.causal - tm.local(0), return_lse=True))[0](*given)
    assert not out[:, :, 0].any()
    assert (lse[:, :, 0] == -torch.inf).all()
    out.sum().backward()
    assert given[0].grad is not None
    assert not given[0].grad[:, :, 0].any()


# -- the operator ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
def test_the_operator_keeps_torchs_rules(grad: bool) -> None:
    q, k, v = qkv(grad=grad)
    sinks = torch.zeros(4, requires_grad=grad)
    beside = AttendArgs(sink_logits=sinks, return_lse=True)
    names = ("q k v sink_logits", "q k v bias") if grad else ("", "")
    op = OperatorArgs(q, k, v, "_at(M0, I0, I1)", [MASK.handle], [0, 0], [], "None", None, names[0], beside)
    torch.library.opcheck(_compiled.attend_op, op.flat)
    table = torch.randn(4, 13, requires_grad=grad)
    added, cells = AttendArgs(bias=table, return_lse=True), torch.ones(7, 7).bool()
    op = OperatorArgs(q, k, v, "T0", [cells], [], [], "relative(T0, {})", None, names[1], added)
    torch.library.opcheck(_compiled.attend_op, op.flat)
    assert all(a is b for a, b in zip(OperatorArgs.of(op.flat).flat, op.flat, strict=True))


# -- what a compiled function cannot do --------------------------------------------------------------------------------


def penalty(compiler: str | None, backend: str | None) -> Tensor:
    """The gradient of a gradient penalty."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2, 6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return tm.attend(x @ weight, x @ weight, x @ weight, tm.window(3), backend=backend).sum()

    fn = call if compiler is None else torch.compile(call, backend=compiler, fullgraph=True)
    (grad,) = torch.autograd.grad(fn(x), x, create_graph=True)
    ((grad.norm() - 1) ** 2).backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_second_derivatives_are_refused(compiler: str, backend: str | None) -> None:
    """As in eager code, where `reference` alone has them; what goes through aot_autograd is refused by torch itself."""
    first = r'no second derivative: leave the function uncompiled, and call attend\(..., backend="reference"\)'
    words = {"eager": first, "aot_eager": "double backward"}
    with pytest.raises((tm.PlanError, RuntimeError), match=words[compiler]):
        penalty(compiler, backend)
    assert penalty(None, "reference").abs().max() > 1


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda fn, x: torch.func.jvp(fn, (x,), (x,))[1],
    "grad": lambda fn, x: torch.func.grad(fn)(x),
    "vmap": lambda fn, x: torch.vmap(fn)(torch.stack([x, x])),
    "hessian": lambda fn, x: torch.func.hessian(fn)(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused(name: str) -> None:
    """A forward mode would take the operator for a constant, without a word."""

    def call(x: Tensor) -> Tensor:
        return tm.attend(x, x, x, tm.window(3), backend="reference").sin().sum()

    with pytest.raises(Exception, match=r"torch\.compile compiles has no rule for it; leave the function uncompiled"):
        compiled(lambda x: TRANSFORMS[name](call, x), "eager")[0](torch.randn(1, 2, 6, 8))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, when forward mode is first used
def test_forward_mode_around_is_refused() -> None:
    fn, _ = compiled(lambda x: tm.attend(x, x, x, tm.window(3)), "eager")
    x = torch.randn(1, 2, 6, 8)
    with forward_ad.dual_level(), pytest.raises(Exception, match=r"forward mode: .* has no rule"):
        fn(forward_ad.make_dual(x, x))
    assert_same(fn(x), tm.attend(x, x, x, tm.window(3)))


def test_a_graph_without_gradients_says_so() -> None:
    """The operator called as a graph has it that was traced where nothing wanted gradients."""
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    op = OperatorArgs(q, q, q, "M0", [MASK.handle], [], [], "None", None, "", AttendArgs())
    with pytest.raises(tm.PlanError, match="was traced where nothing wanted gradients"):
        torch.ops.truemask.attend(*op.flat)[0].sum().backward()


def test_a_higher_limit_takes_more_classes_of_masks() -> None:
    """A class of masks is compiled for the first length, for all others, for 0 and for 1; torch's limit is eight."""
    fn, counter = compiled(attend, "eager", recompile_limit=32)
    masks = tm.causal, tm.window(3) & tm.causal, tm.keys(torch.ones(9).bool())
    for length in (5, 7, 0, 1, 9):
        for mask in masks:
            assert_same(fn(*qkv(length), mask), attend(*qkv(length), mask))
    assert counter.frame_count <= 4 * len(masks)


def test_a_constant_bias_is_not_trained() -> None:
    """Compiled as in eager code: a backend without gradients of biases runs where nobody wants one."""
    x, bias = qkv(5, grad=True)[0], torch.randn(1, 1, 5, 5)

    def call(x: Tensor) -> Tensor:
        return tm.attend(x, x, x, tm.causal, bias=bias, backend="sdpa")

    (want,) = torch.autograd.grad(call(x).sin().sum(), x)
    (got,) = torch.autograd.grad(compiled(call)[0](x).sin().sum(), x)
    assert_same(got, want)


def test_handles_come_and_go_with_their_masks() -> None:
    mask = tm.window(23) & tm.causal
    handle, gone = mask.handle, ref(mask)
    assert mask_of(handle) == mask
    held = len(HANDLES)
    del mask
    assert gone() is None  # without the garbage collector
    assert mask_of(handle.view(1)) == tm.window(23) & tm.causal
    del handle
    assert len(HANDLES) < held


# -- mistakes ----------------------------------------------------------------------------------------------------------

Q, K, V = qkv(5)


class Own(tm.Bias):
    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def head_count(self) -> int:
        return 1

    def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).float()


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "no batch": (lambda: tm.attend(Q[0], K, V), r"likely without its head axis"),
    "lengths": (lambda: tm.attend(Q, K, V[:, :, :3]), "k has 5 keys and v 3"),
    "float mask": (lambda: tm.attend(Q, K, V, torch.zeros(5, 5)), r"use `from_additive\(mask\)`"),
    "mask of a wrong shape": (lambda: tm.attend(Q, K, V, torch.ones(2, 5).bool()), "likely key padding"),
    "text": (lambda: tm.attend(Q, K, V, "causl"), "unknown name 'causl', did you mean 'causal'"),
    "too short": (lambda: tm.attend(Q, K, V, tm.keys(torch.ones(3).bool())), "5 queries and 5 keys"),
    "dropout": (lambda: tm.attend(Q, K, V, dropout=10.0), r"did you mean 0\.1"),
    "backend": (lambda: tm.attend(Q, K, V, backend="sdap"), "did you mean 'sdpa'"),
    "lacking": (lambda: tm.attend(Q, K, V, backend="sdpa", return_weights=True), "backend='reference' can"),
    "bias": (lambda: tm.attend(Q, K, V, bias=torch.zeros(3, 5, 5)), "bias must broadcast"),
    "sinks": (lambda: tm.attend(Q, K, V, sink_logits=torch.zeros(3)), r"\[query heads\] = \[4\]"),
    "bias object": (lambda: tm.attend(Q, K, V, bias=Own()), "takes a bias as a tensor, alibi"),
    "predicate": (lambda: tm.attend(Q, K, V, tm.predicate(lambda b, h, q, k: k <= q)), "build it outside"),
    "a question": (lambda: tm.window(3).count(5), "ask it outside"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    call, words = MISTAKES[name]
    with pytest.raises(Exception, match=words):
        compiled(call)[0]()


def test_a_look_back_mask_that_is_misaligned_warns() -> None:
    given = qkv(1, 7)
    fn, _ = compiled(attend)
    with pytest.warns(tm.ConventionWarning, match=r"`\.at\(q_start=6\)`"):
        fn(*given, tm.causal)


# -- models ------------------------------------------------------------------------------------------------------------


def decoder(**keywords: Any) -> tm.Decoder:
    torch.manual_seed(0)
    return tm.Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, attn_flash=True, rotary_pos_emb=True, **keywords)


@pytest.mark.slow
def test_a_decoder_is_one_graph() -> None:
    """Another length and other documents in every step of training."""
    layers = decoder()
    fn, counter = compiled(layers)
    for length in (7, 11, 13):
        x, mask = torch.randn(2, length, 16), tm.window(5).packed([3, length - 3])
        losses = [f(x, mask=mask).square().sum() for f in (fn, layers)]
        grads = [torch.autograd.grad(loss, list(layers.parameters())) for loss in losses]
        largest = max(float(grad.abs().max()) for grad in grads[1])  # of a norm's output the squares hardly change
        for got, want in zip(*grads, strict=True):
            assert_same(got, want, scale=largest)
    assert counter.frame_count == 2


MODELS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "memories and padding": ({"attn_num_mem_kv": 3}, lambda n: {"mask": torch.arange(n).expand(2, n) < 5}),
    "a matrix": ({}, lambda n: {"attn_mask": torch.ones(n, n).bool().tril(2)}),
    "left padding": ({}, lambda n: {"mask": tm.window(5).padded([0, n - 3])}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_with_masks_of_tensors(name: str) -> None:
    keywords, masks = MODELS[name]
    layers = decoder(**keywords)
    net = tm.TransformerWrapper(num_tokens=11, max_seq_len=20, attn_layers=layers, num_memory_tokens=2)
    fn, counter = compiled(net)
    for n in (7, 11, 13):
        ids = torch.arange(2 * n).view(2, n) % 11
        assert_same(fn(ids, **masks(n)), net(ids, **masks(n)))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_a_model_decodes_with_its_cache() -> None:
    net = tm.TransformerWrapper(num_tokens=11, max_seq_len=50, attn_layers=decoder(), num_memory_tokens=2).eval()
    fn, counter = compiled(net)
    ids = torch.arange(2 * 11).view(2, 11) % 11
    caches = [tm.KVCache(net, batch=2, tokens=20) for _ in range(2)]
    with torch.no_grad():
        for first, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
            got, want = (f(ids[:, first:stop], cache=cache) for f, cache in zip((fn, net), caches, strict=True))
            assert_same(got, want)
            for cache in caches:
                cache.advance()
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_a_model_decodes_with_a_cache_that_its_mask_sizes(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truemask.generation.kv_cache.LEAST_ROOM", 2)
    net = tm.TransformerWrapper(num_tokens=11, max_seq_len=50, attn_layers=decoder(), num_memory_tokens=2).eval()
    fn, counter = compiled(net)
    ids, mask = torch.arange(2 * 40).view(2, 40) % 11, tm.causal & (tm.window(3) | tm.prefix(1))
    want, options, frames = net(ids, mask=mask), {"mask": mask} if given else {}, []
    with torch.no_grad():
        for _ in range(2):
            cache = tm.KVCache(net, batch=2, tokens=40, mask=mask)
            for first, stop in itertools.pairwise((0, 5, *range(6, 41))):
                assert_same(fn(ids[:, first:stop], cache=cache, **options), want[:, first:stop])
                cache.advance()
            assert len(cache.positions) < 10
            frames.append(counter.frame_count)
    assert frames[1] == frames[0] < 8  # a beginning, steps before and after keys move, each with a full memory or not


# -- inductor ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside of inductor
def test_inductor_trains_and_decodes() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_qkv, self.to_out = nn.Linear(24, 72), nn.Linear(24, 24)

        def forward(self, x: Tensor, mask: tm.Mask, start: int) -> Tensor:
            q, k, v = self.to_qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            out = tm.attend(torch.sin(q), torch.cos(k), v, mask.at(q_start=start) & tm.window(5))
            return x + self.to_out(out.transpose(1, 2).flatten(2)).relu()

    torch.manual_seed(0)
    layer = Layer()
    fn, counter = compiled(layer, "inductor")

    def run(fn: Callable[..., Tensor], length: int, start: int) -> tuple[Tensor, ...]:
        torch.manual_seed(length)
        x = torch.randn(2, length, 24, requires_grad=True)
        out = fn(x, MASK.packed([length + start, 1]), start)
        return out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))

    for length, start in ((11, 2), (13, 3), (17, 4), (19, 5)):
        for got, want in zip(run(fn, length, start), run(layer, length, start), strict=True):
            assert_same(got, want)
    assert counter.frame_count <= 2
