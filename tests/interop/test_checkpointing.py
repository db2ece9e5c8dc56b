"""Layers that `backward` recomputes (gradient checkpointing) run under the mask of their forward, wherever that is."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint as composable
from torch.utils.checkpoint import checkpoint

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import SMALL, TOKENS, model_of, tokens
from truemask.errors import MaskError
from truemask.interop.checkpointing import CHECKPOINT_FRAMES
from truemask.interop.huggingface.configs import ACCOUNTS
from truemask.interop.huggingface.layers import MARK
from truemask.interop.use import enable, use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

MASK, OTHER = tm.local(2), tm.local(5)
PADDED = (torch.arange(TOKENS) < torch.tensor([[17], [TOKENS]])).long()
WHOLE = torch.randn(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3))


def clip() -> Any:
    """A model that passes no mask to its layers."""
    torch.manual_seed(0)
    sizes = {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8)
    return transformers.CLIPVisionModel(config)


def pixels(model: Any) -> Tensor:
    return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))).last_hidden_state


def without_mask(model: Any) -> Tensor:
    return model(tokens(), use_cache=False).logits


def with_flags(model: Any) -> Tensor:
    return model(tokens(), attention_mask=PADDED, use_cache=False).logits


def with_tensor(model: Any) -> Tensor:
    return model(tokens(), attention_mask=WHOLE > -0.5, use_cache=False).logits


def with_bias(model: Any) -> Tensor:
    return model(tokens(), attention_mask=WHOLE.clone(), use_cache=False).logits


def seen_three_times(model: Any) -> Tensor:
    return model(tokens(), attention_mask=PADDED).last_hidden_state


def albert() -> Any:
    """A model that runs one layer several times."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=3, vocab_size=61, num_hidden_groups=1)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return transformers.AlbertModel(config)


def translated(model: Any) -> Tensor:
    given = {"input_ids": tokens(), "attention_mask": PADDED, "decoder_input_ids": tokens(2, 7, seed=5)}
    return model(**given, use_cache=False).logits


Case = tuple[Callable[[], Any], Callable[[Any], Tensor], dict[str, Any]]
llama = partial(model_of, "llama")
CASES: dict[str, Case] = {
    "no mask passed": (clip, pixels, {}),
    "no mask given": (llama, without_mask, {}),
    "flags": (llama, with_flags, {}),
    "tensor": (llama, with_tensor, {}),
    "bias": (llama, with_bias, {}),
    "cross-attention": (partial(model_of, "bart"), translated, {"layers": ["decoder", "cross_attention"]}),
}


def made(make: Callable[[], Any], reentrant: bool | None) -> Any:
    """A model in training, whose layers are recomputed unless `reentrant` is None."""
    model = make().train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
    return model


def gradients(model: Any) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def loss_of(out: Tensor) -> Tensor:
    """Something whose gradient no normalisation takes away."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return (out * weights).sum() / 10


def expected(case: Case, mask: tm.Mask | None = MASK, used: bool = True) -> Tensor:
    make, run, where = case
    model = made(make, None)
    if used:
        with use(model, mask, **(where if mask is not None else {})):
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
        loss.backward()


def in_a_nested_one(model: Any, run: Callable[[Any], Tensor], where: dict[str, Any]) -> None:
    with use(model, MASK, **where):
        loss = loss_of(run(model))
        with use(model):
            loss.backward()


def in_another_thread(model: Any, run: Callable[[Any], Tensor], where: dict[str, Any]) -> None:
    with use(model, MASK, **where), ThreadPoolExecutor(1) as pool:
        pool.submit(loss_of(run(model)).backward).result()


PLACES = {place.__name__: place for place in (inside, behind, in_another, in_a_nested_one, in_another_thread)}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_without_checkpointing(name: str, reentrant: bool) -> None:
    make, run, where = CASES[name]
    want = expected(CASES[name])
    for place in PLACES.values():
        model = made(make, reentrant)
        place(model, run, where)
        assert_same(gradients(model), want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["no mask passed", "flags"])
def test_what_ran_in_no_use_is_recomputed_in_none(name: str, reentrant: bool) -> None:
    make, run, where = CASES[name]
    want, model = expected(CASES[name], used=False), made(make, reentrant)
    loss = loss_of(run(model))
    with use(model, MASK, **where):
        loss.backward()
    assert_same(gradients(model), want)
    assert not torch.allclose(want, expected(CASES[name]), rtol=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["no mask passed", "flags", "tensor"])
def test_forwards_under_different_masks_share_one_backward(name: str, reentrant: bool) -> None:
    """And one that is not in use, and one more that waits with its graph: each keeps its own mask."""
    make, run, where = CASES[name]
    case = CASES[name]
    want = expected(case) + expected(case, OTHER) + expected(case, used=False)
    model = made(make, reentrant)
    with use(model, MASK, **where):
        first = loss_of(run(model))
    with use(model, OTHER, **where):
        second = loss_of(run(model))
    (first + second + loss_of(run(model))).backward(retain_graph=True)
    assert_same(gradients(model), want)
    if not reentrant:  # whose second pass torch adds to the first
        second.backward()
        assert_same(gradients(model), expected(case, OTHER))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_runs_several_times_is_recomputed_each_time(reentrant: bool) -> None:
    want = expected((albert, seen_three_times, {}))
    for place in PLACES.values():
        model = made(albert, None)
        for part in model.modules():
            if type(part).__name__ == "AlbertLayer":
                part.forward = partial(in_a_checkpoint, part.forward, reentrant)
        place(model, seen_three_times, {})
        assert_same(gradients(model), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_enabling_another_mask_changes_no_forward_that_was(reentrant: bool) -> None:
    model, want = made(clip, reentrant), expected(CASES["no mask passed"])
    first = enable(model, MASK)
    loss = loss_of(pixels(model))
    second = enable(model, OTHER)
    loss.backward()
    assert_same(gradients(model), want)
    loss = loss_of(pixels(model))
    second.undo()
    first.undo()
    loss.backward()
    assert_same(gradients(model), expected(CASES["no mask passed"], OTHER))


# -- whoever writes the checkpoint -------------------------------------------------------------------------------------


def around_all(model: Any, reentrant: bool) -> Tensor:
    bias = torch.zeros((), requires_grad=True)
    return checkpoint(lambda bias: pixels(model) + bias, bias, use_reentrant=reentrant)


def around_attention(model: Any, reentrant: bool) -> Tensor:
    for part in model.modules():
        if MARK in vars(part):
            own = type(part).forward
            part.forward = partial(in_a_checkpoint, partial(own, part), reentrant)
    try:
        return pixels(model)
    finally:
        for part in model.modules():
            vars(part).pop("forward", None)


def in_a_checkpoint(forward: Callable[..., Any], reentrant: bool, *given: Any, **named: Any) -> Any:
    hidden, *others = given or [named.pop("hidden_states")]
    return checkpoint(lambda hidden: forward(hidden, *others, **named), hidden, use_reentrant=reentrant)


def nested(model: Any, reentrant: bool) -> Tensor:
    bias = torch.zeros((), requires_grad=True)
    return checkpoint(lambda bias: around_all(model, reentrant) + bias, bias, use_reentrant=False)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("run", [around_all, around_attention, nested])
def test_checkpoints_that_users_write(run: Callable[..., Tensor], reentrant: bool) -> None:
    want = expected(CASES["no mask passed"])
    for place in PLACES.values():
        model = made(clip, None)
        place(model, partial(run, reentrant=reentrant), {})
        assert_same(gradients(model), want)


def test_checkpoints_that_hooks_make() -> None:
    """No function of torch stands on the stack while such a layer runs forward."""
    want = expected(CASES["no mask passed"])
    for place in PLACES.values():
        model = made(clip, None)
        for layer in model.modules():
            if type(layer).__name__ == "CLIPEncoderLayer":
                composable(layer)
        place(model, pixels, {})
        assert_same(gradients(model), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_inside_a_checkpoint_is_entered_again(reentrant: bool) -> None:
    model, bias = made(clip, None), torch.zeros((), requires_grad=True)

    def run(bias: Tensor) -> Tensor:
        with use(model, MASK):
            return pixels(model) + bias

    out = checkpoint(run, bias, use_reentrant=reentrant)
    loss_of(out).backward()
    assert_same(gradients(model), expected(CASES["no mask passed"]))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["no mask passed", "flags", "cross-attention"])
def test_several_uses_of_a_layer_in_one_checkpoint_are_recomputed_in_their_order(name: str, reentrant: bool) -> None:
    make, run, where = CASES[name]
    model, bias = made(make, None), torch.zeros((), requires_grad=True)

    def several(bias: Tensor) -> Tensor:
        with use(model, MASK, **where):
            first = run(model)
        with use(model, OTHER, **where):
            second = run(model)
        return first + second + run(model) + bias

    with use(model):
        loss = loss_of(checkpoint(several, bias, use_reentrant=reentrant))
    case = CASES[name]
    loss.backward()
    assert_same(gradients(model), expected(case) + expected(case, OTHER) + expected(case, None))


def test_a_function_that_runs_otherwise_when_recomputed_is_refused() -> None:
    model, bias, runs = made(clip, None), torch.zeros((), requires_grad=True), [2, 3]

    def unsteady(bias: Tensor) -> Tensor:
        masks = iter([MASK, OTHER, MASK][: runs.pop(0)])
        with use(model, next(masks)):
            out = pixels(model)
        for mask in masks:
            with use(model, mask):
                out = out + pixels(model)
        return out + bias

    loss = loss_of(checkpoint(unsteady, bias, use_reentrant=True))
    with pytest.raises(MaskError, match="ran a layer 2 times, and more often"):
        loss.backward()


class Recomputed(torch.autograd.Function):
    """Recomputes as torch does not know it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), grads)
        return None, x.grad


def test_what_others_recompute_is_told_by_the_block_or_refused() -> None:
    model, bias = made(clip, None), torch.zeros((), requires_grad=True)
    with use(model, MASK):
        out = Recomputed.apply(lambda bias: pixels(model) + bias, bias)
        loss_of(out).backward()
        assert_same(gradients(model), expected(CASES["no mask passed"]))
        loss = loss_of(Recomputed.apply(lambda bias: pixels(model) + bias, bias))
        with ThreadPoolExecutor(1) as pool, pytest.raises(MaskError, match=r"and not by torch\.utils\.checkpoint"):
            pool.submit(loss.backward).result()


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_the_model_is_given_back_with_the_last_graph() -> None:
    model = made(clip, False)
    before, named = pixels(model), model.config._attn_implementation
    loss = loss_of(before)
    for _ in range(3):
        with use(model, MASK):
            loss = loss_of(pixels(model))
        assert torch.equal(pixels(model), before)  # meanwhile it runs as it always did
        loss.backward()
    del loss
    gc.collect()
    assert model.config._attn_implementation == named
    assert not [
        name for part in model.modules() for name in vars(part) if name in (MARK, "_replicate_for_data_parallel")
    ]
    assert id(model.config) not in ACCOUNTS


def test_torch_calls_its_checkpoints_by_the_names_that_are_read() -> None:
    assert {code.co_name for code in CHECKPOINT_FRAMES} == {"forward", "backward", "checkpoint", "unpack_hook"}
