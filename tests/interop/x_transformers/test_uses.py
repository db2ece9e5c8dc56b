"""A use of an x-transformers model: nested, copied, pickled, compiled, ended by an error, shared by threads."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.equality import assert_same
from tests.support.huggingface_models import asks_beyond_the_window
from tests.support.x_transformers_models import (
    HEADS,
    LENGTH,
    MASKS,
    SIZE,
    WORDS,
    cells,
    model,
    run,
    same,
    stack,
    tokens,
)
from truemask.errors import MaskError
from truemask.interop.use import use
from truemask.interop.x_transformers import switch
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.patterns import dilated
from truemask.masks.leaves.per_token import keys, prefix

# -- the use itself ----------------------------------------------------------------------------------------------------


def test_attention_maps_are_there_when_asked_for() -> None:
    net = model()
    expected, maps = net(tokens(), return_attn=True, attn_mask=cells(window(3)))
    with use(net, window(3)):
        out, ours = net(tokens(), return_attn=True)
        assert_same(out, expected)
        for mine, theirs in zip(ours, maps, strict=True):
            assert_same(mine, theirs)
    loss = net(tokens(), return_attn_z_loss=True)[1].attn_z_loss
    with use(net):
        ours = net(tokens(), return_attn_z_loss=True)[1].attn_z_loss
        assert_same(ours, loss)
        ours.backward()
    assert next(m for m in net.modules() if type(m).__name__ == "Attention").to_q.weight.grad.any()


def test_of_nested_uses_the_inner_one_counts_alone() -> None:
    net = model()
    plain, narrow, sparse = (
        net(tokens()),
        net(tokens(), attn_mask=cells(window(4))),
        net(tokens(), attn_mask=cells(MASKS["dilated"])),
    )
    with use(net, window(4)):
        with use(net, dilated(2)):
            assert_same(net(tokens()), sparse)
        assert_same(net(tokens()), narrow)
    assert torch.equal(net(tokens()), plain)
    first, second = use(net, window(4)), use(net, dilated(2))
    first.__enter__(), second.__enter__()
    first.undo()
    assert_same(net(tokens()), sparse)
    second.undo()
    second.undo()
    assert torch.equal(net(tokens()), plain)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    net = model(attn_max_attend_past=5)
    plain, before = net(tokens()), [dict(vars(m)) for m in net.modules()]
    with pytest.raises(IndexError), use(net, window(2)):
        net(tokens() + WORDS)
    with pytest.raises(MaskError), use(net, keys([True] * 3)):
        net(tokens())
    assert [set(vars(m)) for m in net.modules()] == [set(names) for names in before]
    assert torch.equal(net(tokens()), plain)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in net.modules())


def test_a_use_that_cannot_begin_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MaskError("no wrapper")

    monkeypatch.setattr(switch, "_watch", fail)
    net = model()
    plain, names = net(tokens()), [set(vars(m)) for m in net.modules()]
    with pytest.raises(MaskError, match="no wrapper") as raised:
        use(net, window(2)).__enter__()
    assert [set(vars(m)) for m in net.modules()] == names
    assert torch.equal(net(tokens()), plain)
    assert raised.tb is not None  # the error lived till here, with all that its traceback remembers


def test_copies_and_state_dicts() -> None:
    net = model(wrap={"num_memory_tokens": 2})
    names = list(net.state_dict())
    plain = net(tokens())
    with use(net, window(3)):
        masked = net(tokens())
        twin = copy.deepcopy(net)
        assert list(net.state_dict()) == names
        net.load_state_dict(twin.state_dict())
        assert torch.equal(twin(tokens()), masked)
        with torch.no_grad():
            twin.attn_layers.layers[0][1].to_v.weight.zero_()
        assert torch.equal(net(tokens()), masked)
        assert not torch.equal(twin(tokens()), masked)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(tokens()), plain)
    with use(twin, window(3)):
        assert torch.equal(twin(tokens()), masked)
    assert torch.equal(net(tokens()), plain)


def test_a_pickled_model_in_use_stays_in_use() -> None:
    net = stack().eval()
    x = torch.randn(1, LENGTH, HEADS * SIZE)
    with use(net, window(3)):
        masked, file = net(x), io.BytesIO()
        torch.save(net, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(loaded(x), masked)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where dynamo looks at what is no leaf
def test_compiled_models() -> None:
    net = model(depth=1)
    compiled: Any = torch.compile(net, backend="eager")
    plain = net(tokens())
    assert_same(compiled(tokens()), plain)
    for mask in (window(3), dilated(2)):
        expected = net(tokens(), attn_mask=cells(mask & causal))
        with use(compiled, mask):
            assert_same(compiled(tokens()), expected)
    assert_same(compiled(tokens()), plain)


def test_dropout_in_training() -> None:
    net = model(attn_dropout=0.5).train()
    with use(net, window(3)):
        torch.manual_seed(0)
        first, second = net(tokens()), net(tokens())
        torch.manual_seed(0)
        assert torch.equal(net(tokens()), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = model(attn_flash=True).to(dtype)
    expected = net(tokens(), attn_mask=cells(window(4)))
    exact = model(attn_flash=True).double()(tokens(), attn_mask=cells(window(4)))
    with use(net, window(4)):
        ours = net(tokens())
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 1.5 * (expected - exact).abs().max() + 1e-12


def test_a_dense_mask_of_each_sample() -> None:
    net = model(attn_kv_heads=2)
    allowed = torch.rand(2, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    expected = run(net, tokens(), attn_mask=allowed)
    with use(net, dense(allowed)):
        same(run(net, tokens()), expected)


# -- threads -----------------------------------------------------------------------------------------------------------


def windows(net: nn.Module) -> list[int | None]:
    return [m.max_attend_past for m in net.modules() if type(m).__name__ == "Attention"]  # pyright: ignore


@pytest.mark.parametrize("mask", [None, window(3) | prefix(1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"attn_flash": True, "attn_max_attend_past": (2, 6)},
        {"attn_max_attend_past": 4, "attn_post_talking_heads": True},
        {"wrap": {"num_memory_tokens": 2}},
    ],
    ids=str,
)
@asks_beyond_the_window
def test_threads_share_a_model(options: dict[str, Any], mask: Mask | None) -> None:
    """Each gets what it gets alone, whatever the others run meanwhile: other lengths, other paddings, no use at all."""
    net = model(**options)
    given = [(tokens(length=5 + i, seed=i), torch.tensor([i % 3, 0])) for i in range(6)]

    def out(place: int) -> Tensor:
        with torch.no_grad():
            return net(given[place][0], seq_start_pos=given[place][1])

    def inside(place: int) -> Tensor:
        if place % 2:
            return out(place)
        with use(net, mask):
            return out(place)

    before, plain = windows(net), out(0)
    alone = [inside(place) for place in range(6)]
    with use(net, mask), ThreadPoolExecutor(4) as pool:
        together = list(pool.map(inside, [*range(6)] * 20))
    for place, found in enumerate(together):
        assert_same(found, alone[place % 6])
    assert windows(net) == before
    assert torch.equal(out(0), plain)


def test_a_copy_gets_its_window_back_when_the_use_ends() -> None:
    net = model(attn_max_attend_past=4)
    plain = net(tokens())
    with use(net, window(3)):
        net(tokens())
        twin = copy.deepcopy(net)
    for _ in range(2):
        assert torch.equal(twin(tokens()), plain)
        assert windows(twin) == [4, 4]
        with use(twin, window(3)):
            twin(tokens())
        assert torch.equal(net(tokens()), plain)


def test_checkpointed_layers_are_recomputed_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where autograd's own thread does it: no stack runs there that could say what the input was."""
    net = model(wrap={"num_memory_tokens": 2})
    weights = torch.randn(2, LENGTH, WORDS, generator=torch.Generator().manual_seed(5))
    with use(net, window(3)), monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        expected = run(net, tokens())
        for layer in net.attn_layers.layers:
            patch.setattr(layer[1], "forward", partial(checkpoint, layer[1].forward, use_reentrant=False))
        net.zero_grad()
        out = net(tokens())
        pool.submit((out * weights).sum().backward).result()
        same((out.detach(), [p.grad for p in net.parameters() if p.grad is not None]), expected)
