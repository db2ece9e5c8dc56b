"""x-transformers' models under a mask give what the dense mask gives, registers, memory and padding beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.equality import assert_same
from tests.support.huggingface_models import asks_beyond_the_window
from tests.support.x_transformers_models import (
    HEADS,
    LENGTH,
    MASKS,
    SIZE,
    behind,
    cells,
    model,
    run,
    same,
    stack,
    tokens,
)
from truemask.interop.use import use
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, local, window
from truemask.masks.leaves.per_token import prefix
from truemask.masks.leaves.predicate import predicate

# -- under a mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_flash": True},
        {"attn_kv_heads": 2},
        {"attn_one_kv_head": True, "alibi_pos_bias": True},
        {"kind": "Encoder", "rotary_pos_emb": True},
        {"attn_max_attend_past": 6, "attn_head_learned_sink": True},
        {"attn_softclamp_logits": True},
        {"attn_post_talking_heads": True},
        {"attn_sparse_topk": 2},
        {"attn_sigmoid": True},
        {"attn_selective": True},
        {"attn_use_cope": True},
        {"attn_cog_signed": True},
        {"residual_attn": True},
        {"attn_softclamp_logits": True, "rel_pos_bias": True},
    ],
    ids=str,
)
@asks_beyond_the_window
def test_a_mask_gives_what_the_dense_mask_gives(options: dict[str, Any], mask: Mask) -> None:
    net = model(**options)
    expected = run(net, tokens(), attn_mask=cells(mask).expand(HEADS, -1, -1))
    with use(net, mask):
        same(run(net, tokens(), attn_mask=None), expected)


def test_a_mask_over_custom_weights_is_dense_there() -> None:
    """Hidden scores are the lowest number, which a function that is no softmax may turn to anything."""
    net = model(attn_custom_attn_fn=lambda scores: scores.clamp(min=-1e4).exp())
    expected = net(tokens(), attn_mask=cells(window(4)))
    with use(net, window(4)):
        assert_same(net(tokens()), expected)


def test_padding_and_a_mask_are_both_kept() -> None:
    net = model("Encoder")
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])
    expected = run(net, tokens(), mask=real, attn_mask=cells(local(2)))
    with use(net, local(2)):
        ours = run(net, tokens(), mask=real)
    same((ours[0][real], ours[1]), (expected[0][real], expected[1]))


def test_replace_lets_the_mask_alone_decide() -> None:
    net, free = model(attn_max_attend_past=3), model("Encoder")
    free.load_state_dict(net.state_dict())
    expected = run(free, tokens(), attn_mask=cells(local(3)))
    with use(net, local(3), replace=True):
        same(run(net, tokens(), mask=torch.ones(2, LENGTH, dtype=torch.bool)), expected)


def test_rows_that_see_nothing_are_zeros_and_do_not_leak() -> None:
    """x-transformers returns an average of the future there."""
    past = predicate(lambda b, h, q, k: k < q)
    settings: list[dict[str, Any]] = [{}, {"attn_flash": True}, {"attn_post_talking_heads": True}]
    for options in settings:
        core = next(m for m in model(**options).modules() if type(m).__name__ == "Attention")
        x = torch.randn(1, LENGTH, HEADS * SIZE, requires_grad=True)
        with use(core, past):
            out = core(x)
            assert torch.equal(out[0, 0], torch.zeros(HEADS * SIZE))
            (gradient,) = torch.autograd.grad(out[0, :5].sum(), x)
        assert not gradient[0, 5:].any()
        assert gradient[0, :4].any()


def test_what_is_hidden_cannot_leak_by_nan() -> None:
    core = next(m for m in model().modules() if type(m).__name__ == "Attention")
    x = torch.randn(1, LENGTH, HEADS * SIZE)
    bad = x.clone()
    bad[0, 2] = float("nan")
    with use(core, window(3)):
        assert torch.equal(core(bad)[0, 5:], core(x)[0, 5:])


def test_layers_are_chosen_by_index() -> None:
    net = model(depth=3)
    blocks = [m for m in net.modules() if type(m).__name__ == "Attention"]
    with use(net, window(2), layers=[0, 2]):
        assert all("forward" in vars(block) for block in blocks)
        chosen = net(tokens())
    with use(net, layers={0: window(2), 2: window(2)}):
        assert torch.equal(net(tokens()), chosen)
    assert not torch.equal(net(tokens()), chosen)
    with use(net, window(2), layers={1: causal}):
        assert torch.equal(net(tokens()), chosen)


# -- registers and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
@pytest.mark.parametrize(
    "wrap", [{"num_memory_tokens": 3}, {"use_cls_token": True, "num_cls_tokens": 2}, {"num_memory_tokens": 1}], ids=str
)
def test_registers_are_seen_by_all_and_not_counted(kind: str, wrap: dict[str, Any]) -> None:
    net = model(kind, wrap)
    front = wrap.get("num_memory_tokens", 0) + wrap.get("num_cls_tokens", 0)
    mask = window(4) | (prefix(1) & causal)
    expected = run(net, tokens(), attn_mask=behind(mask, front))
    with use(net, mask):
        same(run(net, tokens()), expected)


def test_prepended_embeddings_are_not_counted() -> None:
    net = model()
    image = torch.randn(2, 5, HEADS * SIZE)
    mask = window(4) | (prefix(1) & causal)
    expected = run(net, tokens(), prepend_embeds=image, attn_mask=behind(mask, 5))
    with use(net, mask):
        same(run(net, tokens(), prepend_embeds=image), expected)
        alone = run(net, tokens())
    same(alone, run(net, tokens(), attn_mask=cells(mask)))


def test_memory_keys_are_seen_by_all() -> None:
    net = model(attn_num_mem_kv=3, attn_flash=True)
    allowed = torch.cat((torch.ones(LENGTH, 3, dtype=torch.bool), window(4).to_dense(LENGTH)[0, 0]), -1)
    expected = run(net, tokens(), attn_mask=allowed)
    with use(net, window(4)):
        same(run(net, tokens()), expected)


def test_additional_keys_are_seen_by_all() -> None:
    net = stack(depth=1).eval()
    x, more = torch.randn(2, LENGTH, HEADS * SIZE), torch.randn(2, 2, HEADS, 4, SIZE)
    allowed = torch.cat((torch.ones(LENGTH, 4, dtype=torch.bool), window(3).to_dense(LENGTH)[0, 0]), -1)
    expected = net(x, self_attn_additional_kv=[tuple(more)], attn_mask=allowed)
    with use(net, window(3)):
        assert_same(net(x, self_attn_additional_kv=[tuple(more)]), expected)


def test_recurrence_memory_is_earlier_keys() -> None:
    """Two segments, the first remembered, under a window: as one sequence whose first half is not recomputed."""
    net = model(wrap={"max_mem_len": 32, "use_abs_pos_emb": False}, depth=1, rotary_pos_emb=True)
    whole = tokens(length=12)
    for mask in (everything, window(4), window(3) | (prefix(2) & causal)):
        with use(net, mask):
            once = net(whole)
            _, mems = net(whole[:, :7], return_mems=True)
            again = net(whole[:, 7:], mems=mems)
        assert_same(again, once[:, 7:])


# -- what a mask cannot hold, and what it says itself ------------------------------------------------------------------


@pytest.mark.parametrize("replace", [False, True])
def test_a_mask_that_says_where_samples_begin_is_not_moved_once_more(replace: bool, calls: list[Mask]) -> None:
    starts = torch.tensor([3, 0])
    own = (causal & (window(4) | prefix(1))).padded(starts.tolist())
    net = model()
    expected = net(tokens(), attn_mask=own.to_dense(LENGTH, batch=2).expand(-1, HEADS, -1, -1), seq_start_pos=starts)
    with use(net, own, replace=replace):
        found = net(tokens(), seq_start_pos=starts)
    assert all(mask in (own, causal & own) for mask in calls)
    for sample, start in enumerate(starts.tolist()):
        assert_same(found[sample, start:], expected[sample, start:])
