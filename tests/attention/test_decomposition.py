"""Graphs that run elsewhere: `torch.export` in both modes, `torch.jit.trace`, `make_fx`, ONNX. They are plain torch."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import truemask as tm
from tests.support.cases import CASES
from tests.support.equality import assert_same
from truemask.attention.call import AttendArgs
from truemask.attention.decomposition import attend_plain

MASK = tm.causal & (tm.window(4) | tm.prefix(2))
ANY: Any = Dim.AUTO
MODES = {"strict": True, "not strict": False}


@pytest.fixture(autouse=True)
def _own_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Call(nn.Module):
    """A function of tensors as a module, which is what exporters take, with those that it calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        self.called = nn.ModuleList(x for x in cells if isinstance(x, nn.Module))

    def forward(self, *given: Tensor) -> Any:
        return self.function(*given)


def exported(function: Callable[..., Any], *given: Tensor, strict: bool = False) -> Callable[..., Any]:
    """The function as an exported program, for every length of every axis that it can have."""
    shapes = (tuple(dict.fromkeys(range(x.ndim), ANY) for x in given),)
    return export(Call(function), given, dynamic_shapes=shapes, strict=strict).module()


def traced(function: Callable[..., Any], *given: Tensor) -> Callable[..., Any]:
    """The function as `torch.jit.trace` writes it down, where a warning says that the trace holds a size fast."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(Call(function), given)  # pyright: ignore[reportReturnType]


WAYS: dict[str, Callable[..., Callable[..., Any]]] = {
    "not strict": exported,
    "strict": lambda function, *given: exported(function, *given, strict=True),
    "jit.trace": traced,
}


# -- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", MODES.values(), ids=MODES)
def test_both_modes_export_all_lengths_and_leave_the_mask_as_it_was(strict: bool) -> None:
    mask = tm.causal & (tm.window(4) | tm.prefix(2))  # which nobody has asked before
    q = torch.randn(1, 2, 8, 8)
    shapes: Any = (({2: Dim("n", min=1, max=1024)},),)
    program = export(Call(lambda x: tm.attend(x, x, x, mask)), (q,), dynamic_shapes=shapes, strict=strict).module()
    for n in (1, 2, 3, 7, 64, 1024):
        x = torch.randn(1, 2, n, 8)
        assert_same(program(x), tm.attend(x, x, x, mask))
    static = export(Call(lambda x: tm.attend(x, x, x, mask)), (q,), strict=strict).module()
    assert_same(static(q), tm.attend(q, q, q, mask))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_window_offset_and_prefix_of_a_size_follow_it(way: Callable[..., Callable[..., Tensor]]) -> None:
    """What is worked out from the sizes of a call is worked out in every call."""

    def call(q: Tensor, k: Tensor) -> Tensor:
        new, total = q.shape[2], k.shape[2]
        mask = tm.window(total - 1).at(q_start=total - new) & (tm.causal.at(q_start=total - new) | tm.prefix(new))
        return tm.attend(q, k, k, mask)

    found = way(call, torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8))  # the offset is 0 only while this is recorded
    for new, total in ((4, 4), (3, 7), (2, 19)):
        q, k = torch.randn(2, 2, new, 8), torch.randn(2, 2, total, 8)
        if way is exported or way is WAYS["strict"]:
            q = torch.randn(2, 2, total, 8)  # torch takes the two lengths for one
        assert_same(found(q, k), call(q, k))


# -- masks -------------------------------------------------------------------------------------------------------------


def call_of(case: Any, mask: tm.Mask) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Attention under the mask, and tensors of the case's sizes."""
    shapes = (case.q_len, 8), (case.kv_len, 8), (case.kv_len, 5)
    q, k, v = (torch.randn(case.batch, case.heads, *shape) for shape in shapes)
    return lambda q, k, v: tm.attend(q, k, v, mask), (q, k, v)


@pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")
def test_plain_torch_agrees_for_every_mask_of_the_catalogue() -> None:
    everything = AttendArgs(return_lse=True, return_weights=True)
    for case in CASES:
        mask = case.make()
        _, given = call_of(case, mask)
        out, lse, weights = tm.attend(*given, mask, return_lse=True, return_weights=True, backend="reference")
        for got, want in zip(attend_plain(*given, mask, everything), (out, lse, weights), strict=True):
            assert_same(got, want)
        assert_same(attend_plain(*given, mask, AttendArgs()).out, out)


KINDS = {type(case.make()).kind: case for case in CASES}


@pytest.mark.filterwarnings("ignore::truemask.ConventionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask_exports_and_its_object_goes_on(kind: str) -> None:
    mask = KINDS[kind].make()
    call, given = call_of(KINDS[kind], mask)
    want = tm.attend(*given, mask, backend="reference")
    assert_same(export(Call(call), given).module()(*given), want)
    assert_same(call(*given), want)
    assert (
        mask.count(KINDS[kind].q_len, KINDS[kind].kv_len, batch=given[0].shape[0], heads=given[0].shape[1]).sum() >= 0
    )


LATE: dict[str, tuple[Callable[[Tensor], Any], Callable[[int], Tensor]]] = {
    "keys": (lambda x: tm.causal & tm.keys(x), lambda n: torch.rand(2, n) < 0.7),
    "queries": (tm.queries, lambda n: torch.rand(2, n) < 0.7),
    "dense": (tm.dense, lambda n: torch.rand(n, n) < 0.7),
    "a tensor": (lambda x: x, lambda n: torch.rand(2, 1, n, n) < 0.7),
    "documents": (lambda x: tm.causal & tm.documents(ids=x), lambda n: torch.randint(3, (2, n))),
    "same": (lambda x: tm.causal | tm.same(x), lambda n: torch.randint(-1, 3, (2, n))),
    "lengths": (lambda x: tm.padding(lengths=x), lambda n: torch.randint(0, n + 1, (2,))),
    "starts": (lambda x: (tm.causal & tm.window(3)).padded(x), lambda n: torch.randint(0, n, (2,))),
    "prefix": (lambda x: tm.causal | tm.prefix(x), lambda n: torch.randint(0, n, (2,))),
    "positions": (lambda x: tm.causal.take(q=x), lambda n: torch.randint(0, n, (2, n))),
    "hugging face's": (lambda x: tm.causal & tm.from_huggingface_2d(x), lambda n: (torch.rand(2, n) < 0.7).long()),
    "additive": (tm.from_additive, lambda n: torch.where(torch.rand(n, n) < 0.7, 0, -torch.inf)),
}


WAYS_OF_DATA = [(name, way) for name in LATE for way in WAYS if way != "strict" or name in ("keys", "starts")]


@pytest.mark.parametrize(("name", "way"), WAYS_OF_DATA)
def test_data_comes_in_with_each_call(name: str, way: str) -> None:
    """Padding, documents and labels are arguments of the program, of other values and lengths in every call."""
    make, data = LATE[name]

    def call(q: Tensor, x: Tensor) -> Tensor:
        return tm.attend(q, q, q, make(x))

    torch.manual_seed(3)
    found = WAYS[way](call, torch.randn(2, 2, 13, 8), data(13))
    for n in (13, 5, 29):
        q, x = torch.randn(2, 2, n, 8), data(n)
        assert_same(found(q, x), call(q, x))


UNKNOWN: dict[str, Callable[[Tensor], tm.Mask]] = {
    "packed": tm.causal.packed,
    "documents": tm.documents,
    "tree": lambda x: tm.tree(x - 3),
    "global": tm.global_tokens,
}


@pytest.mark.parametrize("way", ["not strict", "jit.trace"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_masks_that_must_know_their_data_say_so(name: str, way: str) -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(
        tm.MaskError, match=r"comes in with each call of the graph that is recorded.*make the mask before"
    ):
        WAYS[way](lambda q, x: tm.attend(q, q, q, UNKNOWN[name](x)), q, torch.tensor([2, 3]))


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [WAYS["not strict"], WAYS["jit.trace"]], ids=["not strict", "jit.trace"])
def test_every_option_is_honoured(way: Callable[..., Callable[..., Any]]) -> None:
    """Shared key heads, a bias object, sinks, a soft cap, dropout; out, lse and weights."""

    def call(q: Tensor, k: Tensor, slopes: Tensor, sinks: Tensor) -> Any:
        options: dict[str, Any] = {"bias": tm.alibi(slopes), "sink_logits": sinks, "softcap": 3.0, "scale": 0.3}
        return tm.attend(q, k, k, MASK, dropout=0.3, return_lse=True, return_weights=True, **options)

    others = torch.rand(4), torch.zeros(4)
    found = traced_or_made(way, call, (torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), *others))
    for n in (7, 11):
        given = (torch.randn(2, 4, n, 8), torch.randn(2, 2, n, 8), *others)
        results = []
        for function in (found, call):
            torch.manual_seed(5)
            results.append(function(*given))
        for got, want in zip(*results, strict=True):
            assert_same(got, want)


def traced_or_made(way: Callable[..., Any], call: Callable[..., Any], given: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The graph; a trace with dropout is not compared with itself, since each run drops other cells."""
    if way is not traced:
        return way(call, *given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Call(call), given, check_trace=False)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("strict", MODES.values(), ids=MODES)
def test_a_bias_tensor_and_half_precision(strict: bool) -> None:
    def call(q: Tensor, bias: Tensor) -> Tensor:
        return tm.attend(q, q, q, MASK, bias=bias)

    q, bias = torch.randn(1, 2, 7, 8).bfloat16(), torch.randn(1, 2, 7, 7)
    program = export(Call(call), (q, bias), strict=strict).module()
    torch.testing.assert_close(program(q, bias), call(q, bias), atol=2e-2, rtol=2e-2)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    def call(q: Tensor) -> Tensor:
        return tm.attend(q, q, q, tm.causal - tm.local(0))

    q = torch.randn(1, 2, 7, 8, requires_grad=True)
    program = exported(call, q)
    out = program(q)
    assert not out[:, :, 0].any()
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    (want,) = torch.autograd.grad(call(q).square().sum(), q)
    assert_same(grad, want)


def test_mistakes_are_told_while_exporting() -> None:
    q = torch.randn(1, 2, 5, 8)
    short = tm.keys(torch.ones(3).bool())
    for call, words in (
        (lambda q: tm.attend(q, q, q, short), "holds data for 3 keys"),
        (lambda q: tm.attend(q, q, q, backend="sdap"), "did you mean 'sdpa'"),
    ):
        with pytest.raises(tm.TruemaskError, match=words):
            export(Call(call), (q,))


# -- afterwards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", MODES.values(), ids=MODES)
def test_a_program_exported_without_gradients_trains(strict: bool) -> None:
    program = export(Call(lambda q: tm.attend(q, q, q, MASK)), (torch.randn(1, 2, 8, 8),), strict=strict).module()
    grads = []
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    for function in (program, lambda q: tm.attend(q, q, q, MASK)):
        grads += torch.autograd.grad(function(x).square().sum(), x)
    assert_same(*grads)


def test_an_exported_program_needs_no_truemask(tmp_path: Path) -> None:
    """It runs in a process in which this library is not to be had."""
    q = torch.randn(1, 2, 9, 8)
    mask = tm.causal.packed([4, 5]) & tm.random(0.7, seed=3)
    torch.export.save(export(Call(lambda q: tm.attend(q, q, q, mask)), (q,)), tmp_path / "program.pt2")
    torch.save((q, tm.attend(q, q, q, mask)), tmp_path / "case.pt")
    program = f"""
import sys, torch
sys.modules["truemask"] = None
q, want = torch.load({str(tmp_path / "case.pt")!r})
torch.testing.assert_close(torch.export.load({str(tmp_path / "program.pt2")!r}).module()(q), want)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_fx_and_fake_tensors() -> None:
    def call(q: Tensor) -> Tensor:
        return tm.attend(q, q, q, MASK)

    q = torch.randn(1, 2, 7, 8)
    for mode in ("real", "fake", "symbolic"):
        assert_same(make_fx(call, tracing_mode=mode)(q)(q), call(q))
    with FakeTensorMode():
        assert tm.attend(*[torch.randn(2, 4, n, 8) for n in (5, 7, 7)], tm.window(3)).shape == (2, 4, 5, 8)
    assert_same(call(q), tm.attend(q, q, q, MASK, backend="reference"))


@pytest.mark.filterwarnings("ignore")
def test_onnx_runs_at_another_length(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the exporter to ONNX needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="what is exported to ONNX runs in onnxruntime")
    torch.onnx.export(
        Call(lambda q, x: tm.attend(q, q, q, MASK & tm.keys(x))),
        (torch.randn(2, 2, 7, 8), torch.rand(2, 7) < 0.7),
        tmp_path / "graph.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes=(({2: ANY}, {1: ANY}),),
    )
    session = runtime.InferenceSession(tmp_path / "graph.onnx")
    for n in (7, 19):
        q, x = torch.randn(2, 2, n, 8), torch.rand(2, n) < 0.7
        named = dict(zip([node.name for node in session.get_inputs()], (q.numpy(), x.numpy()), strict=True))
        assert_same(torch.from_numpy(session.run(None, named)[0]), tm.attend(q, q, q, MASK & tm.keys(x)))


# -- models ------------------------------------------------------------------------------------------------------------


def attention(**asked: Any) -> Callable[..., Tensor]:
    torch.manual_seed(0)
    net = tm.nn.MultiheadAttention(16, 2, batch_first=True, **asked.pop("made", {})).eval()

    def call(x: Tensor, padded: Tensor) -> Tensor:
        out, weights = net(x, x, x, key_padding_mask=padded, **asked)
        return out if weights is None else torch.cat((out.flatten(), weights.flatten()))

    return call


ATTENTIONS: dict[str, dict[str, Any]] = {
    "an expression": {"mask": MASK, "need_weights": False},
    "weights": {"is_causal": True},
    "keys of its own": {"is_causal": True, "made": {"add_bias_kv": True, "add_zero_attn": True}},
}


@pytest.mark.parametrize(("name", "way"), [(n, w) for n in ATTENTIONS for w in WAYS if w != "strict" or n == "weights"])
def test_multihead_attention_exports(name: str, way: str) -> None:
    call = attention(**ATTENTIONS[name])
    found = WAYS[way](call, torch.randn(2, 7, 16), torch.rand(2, 7) < 0.3)
    for n in (7, 11):
        given = torch.randn(2, n, 16), torch.rand(2, n) < 0.3
        assert_same(found(*given), call(*given))


def test_multihead_attention_compiles_after_it_was_exported() -> None:
    call = attention(mask=MASK)
    given = torch.randn(2, 7, 16), torch.rand(2, 7) < 0.3
    exported(call, *given)
    traced(call, *given)
    assert_same(torch.compile(call, backend="eager", fullgraph=True)(*given), call(*given))


LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[[Tensor], Any], Callable[[int], Tensor]]] = {
    "padding": (tm.Encoder, lambda x: x, lambda n: torch.rand(2, n) < 0.7),
    "left padding": (tm.Decoder, lambda x: tm.window(4).padded(x), lambda n: torch.tensor([0, n // 2])),
    "a window": (tm.Decoder, lambda x: tm.window(3), lambda n: torch.zeros(n)),
}


@pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n in LAYERS for w in WAYS if w != "strict" or n == "left padding"]
)
def test_layers_export(name: str, way: str) -> None:
    """With rotary positions, which follow the mask's, memories, and padding that comes with each call."""
    torch.manual_seed(0)
    kind, make, data = LAYERS[name]
    net = kind(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, attn_num_mem_kv=2).eval()

    def call(x: Tensor, about: Tensor) -> Tensor:
        return net(x, mask=make(about))

    found = WAYS[way](call, torch.randn(2, 7, 16), data(7))
    for n in (7, 11):
        given = torch.randn(2, n, 16), data(n)
        assert_same(found(*given), call(*given))
