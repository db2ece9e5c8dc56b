"""Layers of one forward that ask the same: the call is read once, and anew wherever something differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import tokens
from truemask.attention.call import AttendArgs, read_call
from truemask.attention.run import Ready
from truemask.backends.reference import Reference
from truemask.interop.use import use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

MASK = tm.causal & (tm.window(4) | tm.prefix(2))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=4, attn_implementation="sdpa", **sizes)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every call that is made ready."""
    calls: list[object] = []
    before = Ready.of

    def of(call: Any) -> Ready | None:
        calls.append(before(call))
        return calls[-1]  # pyright: ignore[reportReturnType]

    monkeypatch.setattr(Ready, "of", of)
    return calls


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(), **more).logits


def layers_of(model: Any) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def test_layers_that_ask_the_same_read_one_call(model: Any, made: list[object]) -> None:
    with use(model, MASK):
        logits(model)
        assert len(made) == 1
        logits(model)
        assert len(made) == 2  # a forward of its own: what its rows are is asked again


def test_masks_of_layers_are_kept_apart(model: Any, made: list[object]) -> None:
    masks = {0: MASK, 1: tm.causal & tm.window(2), 3: tm.causal & tm.window(2)}
    with use(model, layers=masks):
        got = logits(model)
    assert len(made) == 4  # layers 1 and 3 were given two expressions
    with use(model, layers=masks), tm.attention_backend("reference"):
        assert_same(got, logits(model))
    assert not torch.equal(got, logits(model))


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_is_kept_where_gradients_may_be_asked(model: Any, made: list[object], rows: int) -> None:
    with use(model, MASK):
        model(tokens()[:, :rows]).logits.sum().backward()
    assert not made
    assert all(layer.q_proj.weight.grad is not None for layer in layers_of(model))


def wants_weights(model: Any) -> None:
    layer = layers_of(model)[2]
    layer.register_forward_pre_hook(
        lambda _, args, named: (args, named | {"output_attentions": True}), with_kwargs=True
    )


CHANGES: dict[str, Callable[[Any], None]] = {
    "another scale": lambda model: setattr(layers_of(model)[2], "scaling", 0.9),
    "the weights are asked for": wants_weights,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_differs_reads_its_own(model: Any, change: str) -> None:
    CHANGES[change](model)
    with use(model, MASK):
        got = logits(model)
    dense = MASK.to_dense(tokens().shape[1])
    with use(model, tm.dense(dense)), tm.attention_backend("reference"):
        assert_same(got, logits(model))


class Around:
    """Hooks that run one layer within a context."""

    def __init__(self, layer: nn.Module, make: Callable[[], Any]) -> None:
        self.make = make
        layer.register_forward_pre_hook(self.enter)
        layer.register_forward_hook(self.leave)

    def enter(self, *_: object) -> None:
        self.context = self.make()
        self.context.__enter__()

    def leave(self, *_: object) -> None:
        self.context.__exit__(None, None, None)


def test_a_layer_in_other_surroundings_reads_its_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is named around it, autocast, another number of threads."""
    runs: list[torch.dtype] = []
    before = Reference.run

    def run(self: Any, lowered: Any, inputs: Any, job: Any) -> Any:
        runs.append(inputs.q.dtype)
        return before(self, lowered, inputs, job)

    monkeypatch.setattr(Reference, "run", run)
    layers = layers_of(model)
    Around(layers[1], lambda: tm.attention_backend("reference"))
    with use(model, MASK):
        expected = logits(model)
    assert runs == [torch.float32]
    Around(layers[2], lambda: torch.autocast("cpu", torch.bfloat16))
    with use(model, MASK):
        assert 1e-4 < (logits(model) - expected).abs().max() < 0.5


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_readiness_follows_surroundings(threads: None) -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8)
    ready = Ready.of(read_call(q, k, k, MASK.at(q_start=8)))
    assert ready is not None
    assert ready.takes(q, k, k)
    assert torch.equal(ready.run(q, k, k), tm.attend(q, k, k, MASK.at(q_start=8)))
    assert not ready.takes(q, k[:, :, :8], k[:, :, :8])
    assert not ready.takes(q.double(), k.double(), k.double())
    assert not ready.takes(q.clone().requires_grad_(), k, k)
    assert not ready.takes(nn.Parameter(q, requires_grad=False), k, k)
    with tm.attention_backend("reference"):
        assert not ready.takes(q, k, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ready.takes(q, k, k)
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert not ready.takes(q, k, k)


@pytest.mark.parametrize(
    "more",
    [{"bias": tm.alibi(2)}, {"dropout": 0.1}, {"sink_logits": torch.zeros(2)}],
    ids=lambda more: next(iter(more)),
)
def test_calls_that_are_not_the_same_each_time_are_not_made_ready(more: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 5, 8)
    assert Ready.of(read_call(q, q, q, MASK, AttendArgs(**more))) is None
    assert Ready.of(read_call(q, q, q, tm.predicate(lambda b, h, q, k: q >= k))) is None
