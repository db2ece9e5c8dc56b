"""A forward has its own context: those inside of it, beside it and behind it neither read it nor take it away."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import model_of, tokens
from truemask.interop.huggingface.forward_context import CONTEXT, ForwardContext
from truemask.interop.use import enable, use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

MASK = tm.causal & (tm.window(4) | tm.prefix(1))
STARTS = torch.tensor([[4], [0]])


def padded() -> dict[str, Tensor]:
    """A batch whose padding is told by `position_ids` and a 4-D mask together: without the first nobody knows it.

    The mask wants its gradient, so every layer reads it anew.
    """
    real = torch.arange(12) >= STARTS
    mask = tm.causal.to_dense(12) & real[:, None, None]
    return {
        "input_ids": tokens(2, 12),
        "attention_mask": torch.where(mask, 0.0, torch.finfo(torch.float32).min).requires_grad_(),
        "position_ids": (real.long().cumsum(1) - 1).clamp(min=0),
    }


def logits(model: Any) -> Tensor:
    return model(**padded(), use_cache=False).logits[torch.arange(12) >= STARTS]


@contextmanager
def inside(model: Any, call: Callable[[], object]) -> Iterator[None]:
    """Before its second layer the model runs something else, once."""

    def once(*_: object) -> None:
        hook.remove()
        call()

    hook = model.model.layers[1].register_forward_pre_hook(once)
    try:
        yield
    finally:
        hook.remove()


def running() -> ForwardContext | None:
    context = CONTEXT.get()
    return context if context is not None and context.running else None


def expected(model: Any) -> Tensor:
    with use(model, MASK):
        return logits(model)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_model_inside_another_one_leaves_it_its_positions(name: str) -> None:
    model, other = model_of("llama"), model_of(name)
    with torch.no_grad():
        want, wanted = expected(model), other(tokens(1, 5)).logits
        with use(model, MASK), use(other), inside(model, lambda: assert_same(other(tokens(1, 5)).logits, wanted)):
            assert_same(logits(model), want)
    assert running() is None


def test_a_model_may_run_itself_inside() -> None:
    model = model_of("llama")
    with torch.no_grad(), use(model, MASK):
        want = logits(model)
        with inside(model, lambda: model(tokens(1, 5))):
            assert_same(logits(model), want)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_ends_a_forward_is_not_read_by_the_next(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    model, other = model_of("llama"), model_of("qwen3")
    with torch.no_grad():
        want = expected(model)
        with enable_of(model), enable_of(other):
            plain = other(tokens()).logits
            with inside(model, fail), pytest.raises(error):
                logits(model)
            if error is ValueError:  # torch calls no hook behind an interrupt
                assert running() is None
            assert_same(other(tokens()).logits, plain)
            part = model.model(tokens(), use_cache=False).last_hidden_state  # no part of the forward that failed
            assert_same(model.lm_head(part), model(tokens(), use_cache=False).logits)
            assert_same(logits(model), want)
            assert running() is None


@contextmanager
def enable_of(model: Any) -> Iterator[None]:
    enabled = enable(model, MASK)
    try:
        yield
    finally:
        enabled.undo()


def test_tasks_and_threads_have_their_own() -> None:
    model = model_of("llama")
    with torch.no_grad(), use(model, MASK):
        want, bare = logits(model), model(tokens(1, 5)).logits

        async def both() -> tuple[Tensor, Tensor]:
            return await asyncio.gather(
                asyncio.to_thread(lambda: torch.no_grad()(logits)(model)),
                asyncio.to_thread(lambda: torch.no_grad()(model)(tokens(1, 5)).logits),
            )

        for _ in range(3):
            padded_logits, bare_logits = asyncio.run(both())
            assert_same(padded_logits, want)
            assert_same(bare_logits, bare)
        with ThreadPoolExecutor(1) as pool:  # a forward in a thread that another forward waits for

            def elsewhere() -> None:
                found = pool.submit(copy_context().run, torch.no_grad()(model), tokens(1, 5)).result().logits
                assert_same(found, bare)

            with inside(model, elsewhere):
                assert_same(logits(model), want)


def test_an_interrupted_forward_is_not_around_a_deeper_call() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    model = model_of("llama")
    restarting, straight = torch.arange(12)[None] % 6, torch.arange(12)[None]

    def part(depth: int) -> Tensor:
        """The model's part, called by so many functions."""
        if depth:
            return part(depth - 1)
        return model.model(tokens(2, 12), position_ids=straight, use_cache=False).last_hidden_state

    with torch.no_grad(), use(model, MASK):
        want = part(0)
        for depth in (0, 1, 2, 12):
            with inside(model, interrupt), pytest.raises(KeyboardInterrupt):
                model(tokens(2, 12), position_ids=restarting, use_cache=False)
            assert_same(part(depth), want)
            assert running() is None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_runs_inside_its_model(compiled: bool) -> None:
    model, wholes = model_of("llama"), []

    @torch.compiler.disable
    def note() -> None:
        context = CONTEXT.get()
        assert context is not None
        assert context.runs(model.model)
        wholes.append(context.whole.runs(model))

    with torch.no_grad(), use(model, MASK):
        run = torch.compile(model, backend="eager") if compiled else model
        for _ in range(3):
            with inside(model, note):
                run(tokens(2, 12), use_cache=False)
        assert wholes == [True] * 3
        assert running() is None


def test_positions_of_a_forward_are_gone_with_the_next() -> None:
    """Without the cyclic collector, which may come late: nothing that a forward made refers to itself."""
    model = model_of("llama")
    with torch.no_grad(), use(model, MASK), without_collector():
        model(tokens(2, 12), use_cache=False)
        positions: list[weakref.ref[Tensor]] = []
        for _ in range(3):
            position_ids = torch.arange(12)[None]
            positions.append(weakref.ref(position_ids))
            model(tokens(2, 12), position_ids=position_ids, use_cache=False)
            del position_ids
            assert [position() is not None for position in positions].count(True) <= 1
        model(tokens(2, 12), use_cache=False)
        assert all(position() is None for position in positions)


@contextmanager
def without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_model_is_not_kept_by_its_last_forward() -> None:
    model = model_of("llama")
    with torch.no_grad(), use(model, MASK):
        logits(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
