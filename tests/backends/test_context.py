"""One block names the backend of every call inside of it; `use` and `enable` name that of their layers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from truemask.errors import PlanError


def penalty(model: Any, x: Tensor) -> Tensor:
    """What needs a second derivative: the gradient of a squared gradient."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


def ran(call: Any) -> str:
    """The backend that a call runs on, by whether it can be derived twice: only "reference" can."""
    x = torch.randn(1, 2, 6, 8)
    try:
        penalty(call, x)
    except PlanError as error:
        return str(error).split("'")[1]
    return "reference"


def attend(x: Tensor, **options: Any) -> Tensor:
    return tm.attend(x, x, x, tm.window(3), **options)


def test_a_block_names_the_backend_of_calls_that_name_none() -> None:
    with tm.attention_backend("reference"):
        assert ran(attend) == "reference"
        assert ran(lambda x: attend(x, backend="sdpa")) == "sdpa"
        with tm.attention_backend("sdpa"):
            assert ran(attend) == "sdpa"
            with tm.attention_backend(None):
                assert tm.plan(tm.window(3), 6).backend == chosen
        assert ran(attend) == "reference"
    assert ran(attend) != "reference"


chosen = tm.plan(tm.window(3), 6).backend


def test_the_plan_says_what_a_block_names() -> None:
    for q_len in (6, 200):  # choices for few queries are kept for other calls
        with tm.attention_backend("sdpa"):
            assert tm.plan(tm.window(3), q_len).backend == "sdpa"
            assert tm.plan(tm.window(3), q_len, backend="reference").backend == "reference"
        with tm.attention_backend("reference"):
            assert tm.plan(*[torch.randn(1, 2, q_len, 8)] * 3, tm.window(3)).backend == "reference"
        assert tm.plan(tm.window(3), q_len).backend == tm.plan(tm.window(3), q_len, backend=None).backend


def test_what_a_block_names_and_cannot_run_is_refused() -> None:
    x = torch.randn(1, 2, 6, 8)
    with tm.attention_backend("sdpa"), pytest.raises(PlanError, match="soft cap"):
        attend(x, softcap=3.0)
    with pytest.raises(PlanError, match="did you mean 'reference'"):
        tm.attention_backend("referense")
    with pytest.raises(TypeError, match="backend must be None or one of"):
        tm.attention_backend(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("flash", [False, True])
def test_the_advice_of_a_models_error_can_be_followed(flash: bool) -> None:
    model, x = tm.Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, attn_flash=flash), torch.randn(1, 6, 32)
    with pytest.raises(PlanError, match=r'with tm.attention_backend\("reference"\)'):
        penalty(model, x)
    with tm.attention_backend("reference"):
        found = penalty(model.double(), x.double())
    step = torch.zeros_like(x.double())
    step[0, 2, 3] = 1e-5
    assert_slope(model, x.double(), step, found)


def assert_slope(model: Any, x: Tensor, step: Tensor, found: Tensor) -> None:
    """The derivative of the squared gradient along one step, by differences; fp64, central, so about 1e-5 exact."""

    def squared(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(model(at).square().sum(), at)[0].square().sum()

    slope = (squared(x + step) - squared(x - step)) / (2 * step.max())
    torch.testing.assert_close((found * step).sum() / step.max(), slope, rtol=1e-4, atol=1e-6)


def test_a_compiled_function_runs_on_what_is_named_where_it_is_called() -> None:
    x = torch.randn(1, 2, 6, 8)
    compiled = torch.compile(lambda q: attend(q, dropout=0.5), backend="eager", fullgraph=True)
    compiled(x)
    with tm.attention_backend("sdpa"), pytest.raises(PlanError, match="dropout"):
        compiled(x)  # the same graph
    model = torch.compile(tm.Decoder(dim=32, depth=1, heads=2, attn_dim_head=16), backend="eager", fullgraph=True)
    model(torch.randn(1, 6, 32))
    with tm.attention_backend("flex"), pytest.raises(PlanError, match="flex"):
        model(torch.randn(1, 6, 32).requires_grad_())


def test_a_block_holds_in_its_own_thread() -> None:
    found: list[str] = []
    with tm.attention_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(tm.plan(tm.window(3), 6).backend))
        thread.start()
        thread.join()
    assert found == [chosen]


def test_use_and_enable_name_the_backend_of_their_layers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")
    from tests.support.huggingface_models import model_of

    model, x = model_of("llama").double(), torch.randn(1, 6, 32, dtype=torch.float64)

    def run(at: Tensor) -> Tensor:
        return model(inputs_embeds=at).logits

    with tm.use(model), pytest.raises(PlanError, match=r"tm\.attention_backend"):
        penalty(run, x)
    with tm.use(model, backend="reference"):
        expected = penalty(run, x)
    on = tm.enable(model, tm.everything, backend="reference")
    with tm.attention_backend("sdpa"):
        torch.testing.assert_close(penalty(run, x), expected)
    on.undo()
    with tm.use(model), tm.attention_backend("reference"):
        torch.testing.assert_close(penalty(run, x), expected)
    with pytest.raises(PlanError, match=r"there is no backend 'flesh'"):
        tm.use(model, backend="flesh")


def test_use_names_the_backend_of_x_transformers_layers() -> None:
    x_transformers = pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `peers`)")
    layers, x = x_transformers.Decoder(dim=32, depth=1, heads=2, attn_dim_head=16), torch.randn(1, 6, 32)
    with tm.use(layers, tm.window(3)), pytest.raises(PlanError, match=r"tm\.attention_backend"):
        penalty(layers, x)
    with tm.use(layers, tm.window(3), backend="reference"):
        penalty(layers, x)
    talking = x_transformers.Decoder(dim=32, depth=1, heads=2, attn_pre_talking_heads=True)
    with tm.use(talking, backend="reference"), pytest.raises(PlanError, match="on x-transformers' own path"):
        talking(x)
