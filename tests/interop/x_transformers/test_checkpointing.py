"""x-transformers in use: layers that `backward` recomputes run under the mask and on the input of their forward."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import truemask as tm
from tests.support.equality import assert_same
from truemask.interop.use import enable, use

X: Any = pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `peers` has it)")

MASK, OTHER = tm.window(3), tm.window(2)
WORDS, LENGTH = 29, 13


def decoder(wrap: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    stack = X.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    return X.TransformerWrapper(num_tokens=WORDS, max_seq_len=64, attn_layers=stack, **(wrap or {}))


def translator() -> Any:
    torch.manual_seed(0)
    side = {"num_tokens": WORDS, "depth": 2, "heads": 4, "attn_dim_head": 8, "max_seq_len": 64}
    return X.XTransformer(dim=32, **{f"{name}_{k}": v for name in ("enc", "dec") for k, v in side.items()})


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(1, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def plainly(model: Any) -> Tensor:
    return model(tokens())


def left_padded(model: Any) -> Tensor:
    return model(tokens(), seq_start_pos=torch.tensor([3, 0]))[:, 3:]


def under_a_matrix(model: Any) -> Tensor:
    cells = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7
    return model(tokens(), attn_mask=cells | torch.eye(LENGTH, dtype=torch.bool))


def translated(model: Any) -> Tensor:
    real = torch.arange(LENGTH) < torch.tensor([[9], [LENGTH]])
    return model(tokens(), tokens(seed=2), mask=real)


Case = tuple[Callable[[], Any], Callable[[Any], Tensor], dict[str, Any]]
CASES: dict[str, Case] = {
    "plain": (decoder, plainly, {}),
    "flash": (partial(decoder, attn_flash=True), plainly, {}),
    "memory tokens": (partial(decoder, {"num_memory_tokens": 2}), plainly, {}),
    "left padding": (decoder, left_padded, {}),
    "matrix": (decoder, under_a_matrix, {}),
    "past": (partial(decoder, attn_max_attend_past=4), plainly, {}),
    "own path": (partial(decoder, attn_max_attend_past=4, attn_post_talking_heads=True), plainly, {}),
    "cross-attention": (translator, translated, {"layers": ["decoder", "cross_attention"]}),
}


def in_a_checkpoint(
    forward: Callable[..., Any], reentrant: bool, x: Tensor, *, context: Tensor | None = None, **named: Any
) -> Any:
    """A context must be an argument, or reentrant checkpoints lose it; einx does not bear that torch stops early."""

    def run(x: Tensor, context: Tensor | None) -> Any:
        return forward(x, **named) if context is None else forward(x, context=context, **named)

    return checkpoint(run, x, context, use_reentrant=reentrant, early_stop=False)


def stacks(model: Any) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, X.x_transformers.AttentionLayers)]


def blocks(model: Any) -> list[Any]:
    return [layer[1] for stack in stacks(model) for layer in stack.layers]


def of_layers(model: Any, reentrant: bool) -> None:
    """Checkpoints around the forwards of layers, made before the model is in use."""
    for block in blocks(model):
        block.forward = partial(in_a_checkpoint, block.forward, reentrant)


def of_stacks(model: Any, reentrant: bool) -> None:
    for stack in stacks(model):
        stack.forward = partial(in_a_checkpoint, stack.forward, reentrant)


def gradients(model: Any) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def loss_of(out: Tensor) -> Tensor:
    if out.ndim == 0:
        return out
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))).sum() / 10


def expected(case: Case, mask: tm.Mask = MASK, used: bool = True) -> Tensor:
    make, run, where = case
    model = make()
    if used:
        with use(model, mask, **where):
            loss_of(run(model)).backward()
    else:
        loss_of(run(model)).backward()
    return gradients(model)


# -- where `backward` may stand ----------------------------------------------------------------------------------------


def inside(model: Any, run: Callable[[Any], Tensor], where: dict[str, Any]) -> None:
    with use(model, MASK, **where):
        loss_of(run(model)).backward()


def behind(model: Any, run: Callable[[Any], Tensor], where: dict[str, Any]) -> None:
    with use(model, MASK, **where):
        loss = loss_of(run(model))
    loss.backward()


def in_another(model: Any, run: Callable[[Any], Tensor], where: dict[str, Any]) -> None:
    with use(model, MASK, **where):
        loss = loss_of(run(model))
    with use(model, OTHER, **where):
        run(model)
        loss.backward()


def in_another_thread(model: Any, run: Callable[[Any], Tensor], where: dict[str, Any]) -> None:
    with use(model, MASK, **where), ThreadPoolExecutor(1) as pool:
        pool.submit(loss_of(run(model)).backward).result()


PLACES = {place.__name__: place for place in (inside, behind, in_another, in_another_thread)}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("around", [of_layers, of_stacks])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_without_checkpointing(
    name: str, around: Callable[[Any, bool], None], reentrant: bool
) -> None:
    make, run, where = CASES[name]
    want = expected(CASES[name])
    for place in PLACES.values():
        model = make()
        around(model, reentrant)
        place(model, run, where)
        assert_same(gradients(model), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_made_inside_the_block(reentrant: bool) -> None:
    make, run, _ = CASES["past"]
    model = make()
    with use(model, MASK):
        of_layers(model, reentrant)
        loss = loss_of(run(model))
        for block in blocks(model):
            block.forward = block.forward.args[0]
    loss.backward()
    assert_same(gradients(model), expected(CASES["past"]))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["plain", "left padding", "past"])
def test_forwards_on_different_inputs_and_masks_share_one_backward(name: str, reentrant: bool) -> None:
    make, run, _ = CASES[name]
    case = CASES[name]
    model = make()
    of_layers(model, reentrant)
    loss = loss_of(run(model))
    with use(model, MASK):
        loss = loss + loss_of(run(model)) + loss_of(left_padded(model))
    with use(model, OTHER):
        loss = loss + loss_of(run(model))
        loss.backward()
    want = expected(case, used=False) + expected(case) + expected(case, OTHER) + expected((make, left_padded, {}))
    assert_same(gradients(model), want)


def test_what_ran_in_no_use_is_recomputed_in_none() -> None:
    make, run, _ = CASES["past"]
    model = make()
    of_layers(model, False)
    loss = loss_of(run(model))
    with use(model, MASK):
        loss.backward()
    assert_same(gradients(model), expected(CASES["past"], used=False))


def test_enabling_another_mask_changes_no_forward_that_was() -> None:
    make, run, _ = CASES["plain"]
    model = make()
    of_layers(model, True)
    enable(model, MASK)
    loss = loss_of(run(model))
    last = enable(model, OTHER)
    loss.backward()
    last.undo()
    assert_same(gradients(model), expected(CASES["plain"]))


def test_the_model_is_given_back_with_the_last_graph() -> None:
    make, run, _ = CASES["past"]
    model = make()
    before, names = run(model), [set(vars(part)) for part in model.modules()]
    loss = loss_of(before)
    for _ in range(3):
        with use(model, MASK):
            loss = loss_of(checkpoint(lambda _: run(model), before, use_reentrant=False))
        assert torch.equal(run(model), before)
        loss.backward()
    del loss
    gc.collect()
    assert [set(vars(part)) for part in model.modules()] == names


def test_replace_needs_a_forward_that_nobody_else_replaced() -> None:
    make, run, _ = CASES["past"]
    model = make()
    of_layers(model, False)
    with use(model, MASK, replace=True), pytest.raises(tm.MaskError, match="whose forward somebody else has replaced"):
        run(model)
