"""Packed for models whose positions do not start at 0, documents are as alone; masks count along a tree's paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.equality import assert_same

FIRST = 2  # padding_idx + 1
GIVEN = [[8, 9, 10, 11], [5, 6, 7], [12, 13]]
OWN = {"XLMRoberta": {}, "Roberta": {}, "Esm": {"mask_token_id": 98}, "MPNet": {}}


def model(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    words = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": FIRST - 1}
    config = getattr(transformers, f"{family}Config")(**sizes, **words, initializer_range=0.3, **OWN[family])
    return getattr(transformers, f"{family}Model")(config).eval()


def run(net: Any, family: str, rows: Any, mask: tm.Mask) -> Tensor:
    """The hidden states of packed rows; MPNet computes attention itself and takes floats `[b, 1, q, k]`."""
    if family != "MPNet":
        with tm.use(net, mask):
            return net(rows["input_ids"], position_ids=rows["position_ids"]).last_hidden_state
    count, length = rows["input_ids"].shape
    cells = tm.to_additive(mask, length, batch=count)
    return net(rows["input_ids"], attention_mask=cells, position_ids=rows["position_ids"]).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("length", [None, 7])
def test_documents_are_what_they_are_alone(family: str, length: int | None) -> None:
    net = model(family)
    packed = tm.pack(GIVEN, length, first_position=FIRST)
    batch = tm.PackCollator(length, mask=tm.everything, first_position=FIRST)([{"input_ids": own} for own in GIVEN])
    assert torch.equal(batch["position_ids"], packed.positions)
    found = packed.unpack(run(net, family, batch, batch["mask"]))
    for got, own in zip(found, GIVEN, strict=True):
        assert_same(got, net(torch.tensor([own])).last_hidden_state[0])


@torch.no_grad()
@pytest.mark.parametrize("window", [None, tm.window(3)])
def test_completions_are_what_they_are_alone(window: tm.Mask | None) -> None:
    net, prompt, completions = model("Roberta"), [8, 9, 10], [[11, 12], [13], [14, 15, 16]]
    trees = tm.pack_tree([prompt], [completions], mask=window, first_position=FIRST)
    with tm.use(net, trees.mask):
        states = net(trees.tokens, position_ids=trees.positions).last_hidden_state
    with tm.use(net, tm.causal if window is None else window):
        for got, own in zip(trees.unpack(states)[0], completions, strict=True):
            alone = net(torch.tensor([prompt + own])).last_hidden_state[0, len(prompt) :]
            assert_same(got, alone)


def test_positions_start_where_they_are_told_to_and_masks_do_not() -> None:
    plain, moved = tm.pack(GIVEN, 7), tm.pack(GIVEN, 7, first_position=5)
    assert torch.equal(moved.positions, plain.positions + 5)
    assert moved.lengths == plain.lengths
    assert torch.equal(moved.labels, plain.labels)
    tree, mask = ([[1, 2], [3]], [[[4, 5, 6], [7]], [[8]]]), tm.window(2) | tm.prefix(1)
    first, second = tm.pack_tree(*tree, 7, mask=mask), tm.pack_tree(*tree, 7, mask=mask, first_position=5)
    assert torch.equal(second.positions, first.positions + 5)
    assert second.mask == first.mask


def test_a_mask_on_a_tree_counts_along_each_path() -> None:
    trees = tm.pack_tree([[1] * 3, [2]], [[[3] * 4, [4] * 2], [[5] * 3]], 12, mask=tm.window(2) | tm.prefix(1))
    plain = tm.pack_tree([[1] * 3, [2]], [[[3] * 4, [4] * 2], [[5] * 3]], 12)
    rows = len(plain.tokens)
    below, p = plain.mask.to_dense(12, batch=rows)[:, 0], plain.positions
    near = (p[:, :, None] - p[:, None, :] < 2) | (p[:, None, :] < 1)
    assert torch.equal(trees.mask.to_dense(12, batch=rows)[:, 0], below & near)
    assert torch.equal(trees.tokens, plain.tokens)


WRONG: list[Any] = [-1, 0.5, True, None, "2", 1 << 40]


@pytest.mark.parametrize("first", WRONG, ids=repr)
def test_what_is_no_first_position_is_refused(first: Any) -> None:
    message = "first_position must be"
    for call in (
        lambda: tm.pack(GIVEN, 7, first_position=first),
        lambda: tm.PackCollator(7, first_position=first),
        lambda: tm.pack_tree([[1]], [[[2]]], first_position=first),
    ):
        with pytest.raises(tm.MaskError, match=message):
            call()


def test_a_tensor_is_no_mask_of_a_tree_and_a_short_mask_is_told() -> None:
    with pytest.raises(TypeError, match="pack_tree: mask is an expression"):
        tm.pack_tree([[1]], [[[2]]], mask=torch.ones(2, 2, dtype=torch.bool))  # pyright: ignore[reportArgumentType]
    with pytest.raises(tm.MaskError, match="5"):
        tm.pack_tree([[1] * 5], [[[2]]], mask=tm.keys([True] * 5))
