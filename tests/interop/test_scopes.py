"""A `tm.use` holds in its own thread and context; all others get what the model gives by itself."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import model_of, tokens
from truemask.interop.huggingface.configs import ACCOUNTS
from truemask.interop.huggingface.layers import MARK
from truemask.interop.use import enable, use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")
X: Any = pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `peers` has it)")

MASK, OTHER = tm.window(3), tm.window(4)
PADDED = (torch.arange(23) >= torch.tensor([[6], [0]])).long()
Run = Callable[[Any], Tensor]


def plain(model: Any) -> Tensor:
    found = model(tokens())
    return getattr(found, "logits", getattr(found, "last_hidden_state", found))


def padded(model: Any) -> Tensor:
    places = (PADDED.cumsum(1) - 1).clamp(min=0)
    return model(tokens(), attention_mask=PADDED, position_ids=places).logits[PADDED == 1]


def continued(model: Any) -> Tensor:
    return model.generate(tokens(), attention_mask=PADDED, max_new_tokens=4, do_sample=False).float()


def x_model() -> Any:
    torch.manual_seed(0)
    stack = X.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, attn_max_attend_past=8)
    return X.TransformerWrapper(num_tokens=61, max_seq_len=64, attn_layers=stack, num_memory_tokens=2).eval()


def of(name: str, attention: str) -> Callable[[], Any]:
    return lambda: model_of(name, attention)


CASES: dict[str, tuple[Callable[[], Any], Run]] = {
    "sdpa": (of("llama", "sdpa"), plain),
    "eager": (of("llama", "eager"), plain),
    "padded, sdpa": (of("llama", "sdpa"), padded),
    "padded, eager": (of("llama", "eager"), padded),
    "generate": (of("llama", "sdpa"), continued),
    "windows": (of("mistral", "sdpa"), padded),
    "soft cap": (of("gemma2", "eager"), padded),
    "sinks": (of("gpt_oss", "eager"), padded),
    "one function of its own": (of("gpt2", "eager"), padded),
    "x-transformers": (x_model, plain),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Run]:
    make, run = CASES[request.param]
    return make().requires_grad_(False), run


def elsewhere(function: Callable[[], Any]) -> Any:
    """What a function gives in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def under(model: Any, run: Run, mask: tm.Mask | None = MASK) -> Tensor:
    with use(model, mask):
        return run(model)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_each_thread_runs_what_it_asked_for(case: tuple[Any, Run]) -> None:
    model, run = case
    own, first, second = run(model), under(model, run), under(model, run, OTHER)
    with use(model, MASK):
        assert torch.equal(elsewhere(lambda: run(model)), own)
        assert torch.equal(elsewhere(lambda: under(model, run, OTHER)), second)
        assert torch.equal(run(model), first)
    assert torch.equal(run(model), own)


class Pause(nn.Module):
    """A part of a model at which a thread waits until another one has done something."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.waits, self.done = part, threading.Event(), threading.Event()
        self.whose: threading.Thread | None = None

    def forward(self, *args: Any, **named: Any) -> Any:
        if threading.current_thread() is self.whose:
            self.waits.set()
            assert self.done.wait(60)
        return self.part(*args, **named)


def paused(model: Any) -> Pause:
    """Between the layers of a model, where its mask is made already."""
    layers = model.model.layers if hasattr(model, "model") else model.attn_layers.layers
    if hasattr(model, "model"):
        layers[1].mlp = pause = Pause(layers[1].mlp)
    else:
        layers[1][1] = pause = Pause(layers[1][1])
    return pause


@pytest.mark.parametrize("uses", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "padded, sdpa", "padded, eager", "x-transformers"])
def test_a_forward_goes_on_while_others_come_and_go(name: str, uses: bool) -> None:
    """A block that begins, or ends, while another thread is in the middle of a forward changes nothing there."""
    make, run = CASES[name]
    model = make().requires_grad_(False)
    pause = paused(model)
    want = under(model, run) if uses else run(model)
    for before, meanwhile in ((ExitStack.close, None), (None, ExitStack.close)):
        stack, found = ExitStack(), []

        def work(found: list[Tensor] = found) -> None:
            found.append(under(model, run) if uses else run(model))

        if before is None:
            stack.enter_context(use(model, OTHER))  # it ends while the other one runs
        pause.waits.clear()
        pause.done.clear()
        pause.whose = threading.Thread(target=work)
        pause.whose.start()
        assert pause.waits.wait(60)
        if meanwhile is None:
            stack.enter_context(use(model, OTHER))  # it begins
        else:
            meanwhile(stack)
        pause.done.set()
        pause.whose.join()
        stack.close()
        assert torch.equal(found[0], want)


def test_blocks_end_in_any_order_and_in_any_thread(case: tuple[Any, Run]) -> None:
    model, run = case
    own, first, second = run(model), under(model, run), under(model, run, OTHER)
    one, two = use(model, MASK), use(model, OTHER)
    one.__enter__()
    elsewhere(two.__enter__)  # a use of that thread, which is over; nobody else has it
    assert torch.equal(run(model), first)
    elsewhere(one.undo)  # its end is its end, wherever it is said
    assert torch.equal(run(model), own)
    with use(model, OTHER):
        two.undo()
        assert torch.equal(run(model), second)
    assert torch.equal(run(model), own)


def test_an_error_ends_the_block_of_its_thread_alone(case: tuple[Any, Run]) -> None:
    model, run = case
    first = under(model, run)

    def failing() -> None:
        with use(model, OTHER):
            run(model)
            raise ZeroDivisionError

    with use(model, MASK):
        with pytest.raises(ZeroDivisionError):
            elsewhere(failing)
        assert torch.equal(run(model), first)


def test_enable_holds_everywhere_and_a_block_counts_inside(case: tuple[Any, Run]) -> None:
    model, run = case
    own, first, second = run(model), under(model, run), under(model, run, OTHER)
    enabled = enable(model, MASK)
    assert torch.equal(elsewhere(lambda: run(model)), first)
    assert torch.equal(elsewhere(lambda: under(model, run, OTHER)), second)
    with use(model, OTHER):
        assert torch.equal(elsewhere(lambda: run(model)), first)
        again = elsewhere(lambda: enable(model))
        assert torch.equal(run(model), second)
    enabled.undo()
    assert_same(run(model), own)
    again.undo()
    assert torch.equal(run(model), own)


def test_many_threads_with_masks_of_their_own_leave_nothing_behind(case: tuple[Any, Run]) -> None:
    model, run = case
    names, known = [set(vars(part)) for part in model.modules()], len(ACCOUNTS)
    masks = [None, MASK, OTHER, tm.window(2), OTHER & tm.dilated(2), OTHER - tm.window(2), tm.window(5)]
    alone = [run(model), *(under(model, run, mask) for mask in masks)]

    def request(place: int) -> Tensor:
        return run(model) if place == 0 else under(model, run, masks[place - 1])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(request, [*range(8)] * 3))
    for place, each in enumerate(found):
        assert torch.equal(each, alone[place % 8])
    gc.collect()
    assert len(ACCOUNTS) == known
    assert [set(vars(part)) for part in model.modules()] == names
    assert not [
        part for part in model.modules() if MARK in vars(part) or part._forward_pre_hooks or part._forward_hooks
    ]


# -- other contexts ----------------------------------------------------------------------------------------------------


def test_tasks_have_uses_of_their_own(case: tuple[Any, Run]) -> None:
    model, run = case
    own, first, second = run(model), under(model, run), under(model, run, OTHER)

    async def request(mask: tm.Mask) -> Tensor:
        with use(model, mask):
            await asyncio.sleep(0)
            found = run(model)
            await asyncio.sleep(0)
            assert torch.equal(found, run(model))
            return found

    async def asking_for_nothing() -> Tensor:
        await asyncio.sleep(0)
        return run(model)

    async def all_of_them() -> tuple[Tensor, ...]:
        return await asyncio.gather(request(MASK), request(OTHER), asking_for_nothing())

    for found, want in zip(asyncio.run(all_of_them()), (first, second, own), strict=True):
        assert torch.equal(found, want)


def test_what_begins_inside_a_block_has_its_use(case: tuple[Any, Run]) -> None:
    """A task, and whatever runs in a copy of the context, as long as the block lasts."""
    model, run = case
    own, first = run(model), under(model, run)

    async def tasks() -> Tensor:
        with use(model, MASK):
            return await asyncio.create_task(asyncio.to_thread(run, model))

    assert torch.equal(asyncio.run(tasks()), first)
    with use(model, MASK):
        context = contextvars.copy_context()
        assert torch.equal(elsewhere(lambda: context.run(run, model)), first)
    assert torch.equal(context.run(run, model), own)


class Rows(torch.utils.data.Dataset[Tensor]):
    """Batches that a model makes."""

    def __init__(self, model: Any, run: Run) -> None:
        self.model, self.run = model, run

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> Tensor:
        return self.run(self.model)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["padded, sdpa", "x-transformers"])
def test_workers_of_a_loader_have_the_use_of_the_block(name: str, workers: int) -> None:
    """They are processes that the block makes; and a block in a worker is the worker's."""
    make, run = CASES[name]
    model = make().requires_grad_(False)
    own, first = run(model), under(model, run)
    with use(model, MASK):
        for found in loaded(Rows(model, run), workers):
            assert_same(found, first)
    for found in loaded(Rows(model, lambda model: under(model, run)), workers):
        assert_same(found, first)
        assert torch.equal(run(model), own)


def loaded(rows: Rows, workers: int) -> DataLoader[Tensor]:
    context = "fork" if workers else None
    return DataLoader(rows, batch_size=None, num_workers=workers, multiprocessing_context=context)


def replicas_of(model: nn.Module, number: int) -> list[nn.Module]:
    """As `torch.nn.parallel.replicate` makes them for devices, of which there is none here."""
    modules = list(model.modules())
    copies = [{module: module._replicate_for_data_parallel() for module in modules} for _ in range(number)]
    for made in copies:
        for module, replica in made.items():
            for name, child in module._modules.items():
                if child is not None:
                    setattr(replica, name, made[child])
            for name, parameter in module._parameters.items():
                setattr(replica, name, parameter)
    return [made[model] for made in copies]


def test_replicas_run_under_the_use_of_the_thread_that_made_them(case: tuple[Any, Run]) -> None:
    """`DataParallel` makes them for each call, and runs each in a thread of its own."""
    model, run = case
    if run is continued:
        pytest.skip("the move is nobody's: DataParallel runs forwards, and `generate` is none")
    own, first = run(model), under(model, run)
    with use(model, MASK):
        replicas = replicas_of(model, 2)
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(run, replicas):
                assert torch.equal(found, first)
    with use(model, OTHER), ThreadPoolExecutor(2) as pool:
        replicas = pool.submit(replicas_of, model, 2).result()  # by a thread that asked for nothing
        for found in pool.map(run, replicas):
            assert torch.equal(found, own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padded, sdpa", "x-transformers"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where dynamo looks at what is no leaf
def test_compiled_models_keep_contexts_apart(name: str) -> None:
    make, run = CASES[name]
    model = make().requires_grad_(False)
    compiled: Any = torch.compile(model, backend="eager")
    own, first, second = run(model), under(model, run), under(model, run, OTHER)
    for _ in range(2):
        assert_same(run(compiled), own)
        with use(compiled, MASK):
            assert_same(run(compiled), first)
            assert_same(elsewhere(lambda: run(compiled)), own)
            assert_same(elsewhere(lambda: under(compiled, run, OTHER)), second)
            assert_same(run(compiled), first)
    torch.compiler.reset()


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_copy_made_elsewhere_runs_as_the_model_does_there(case: tuple[Any, Run]) -> None:
    model, run = case
    own = run(model)
    with use(model, MASK):
        twin = elsewhere(lambda: copy.deepcopy(model))
        assert_same(elsewhere(lambda: run(twin)), own)
    assert_same(run(twin), own)
