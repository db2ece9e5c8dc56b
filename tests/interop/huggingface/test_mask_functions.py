"""transformers' mask functions as expressions: each lets through what transformers' own dense mask lets through."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from truemask.errors import MaskError
from truemask.interop.huggingface.mask_functions import Packing, lift

utils = pytest.importorskip(
    "transformers.masking_utils", reason="transformers is not installed (the extra `models` has it)"
)

N, WINDOW, CHUNK = 13, 4, 5
LEFT_PADS = torch.tensor([0, 3])
GROUPS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -2, -1, 2, 2, 2], [0] * 5 + [-1] * 8])
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 9, [0] * 6 + [1] * 2 + [2] * 5])
RESTARTING = torch.tensor([[*range(4), *range(9)], [*range(6), *range(2), *range(5)]])
CONTINUED = RESTARTING + torch.tensor([[2], [7]])
FLAGS = torch.tensor([[True] * N, [False] * 3 + [True] * 7 + [False] * 3])


def parity(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q + k + b) % 2 == 0


def packed(inside: Callable[..., Any], positions: Tensor) -> Callable[..., Any]:
    return utils.packed_sequence_compatibility_function(inside, positions, DOCUMENTS)


FUNCTIONS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "causal": (utils.causal_mask_function, "causal"),
    "bidirectional": (utils.bidirectional_mask_function, "everything"),
    "sliding": (utils.sliding_window_causal_mask_function(WINDOW), "window(4)"),
    "sliding overlay": (utils.sliding_window_overlay(WINDOW), None),
    "sliding by nothing": (utils.sliding_window_causal_mask_function(0), None),
    "sliding overlay of nothing": (utils.sliding_window_overlay(0), "~causal"),
    "sliding into the future": (utils.sliding_window_overlay(-2), None),
    "nobody near": (utils.sliding_window_bidirectional_overlay(-1), "nothing"),
    "sliding, both ways": (utils.sliding_window_bidirectional_mask_function(WINDOW), "local(4)"),
    "chunked": (utils.chunked_causal_mask_function(CHUNK, torch.zeros(2, dtype=int)), "blocks(5) & causal"),
    "chunked behind pads": (utils.chunked_causal_mask_function(CHUNK, LEFT_PADS), None),
    "groups": (utils.or_masks(utils.causal_mask_function, utils.blockwise_overlay(GROUPS)), None),
    "padding": (utils.and_masks(utils.causal_mask_function, utils.padding_mask_function(FLAGS)), None),
    "packed": (packed(utils.causal_mask_function, RESTARTING), "causal.packed([[4, 9, 0], [6, 2, 5]])"),
    "packed sliding": (packed(utils.sliding_window_causal_mask_function(WINDOW), RESTARTING), None),
    "packed, not from 0": (packed(utils.causal_mask_function, CONTINUED), None),
    "packed groups": (
        utils.or_masks(packed(utils.causal_mask_function, RESTARTING), utils.blockwise_overlay(GROUPS)),
        None,
    ),
    "offsets": (
        utils.add_offsets_to_mask_function(utils.causal_mask_function, 3, 1),
        "causal.at(q_start=3, k_start=1)",
    ),
    "remapped": (utils.remap_positions_for_packed_sequence(utils.causal_mask_function, RESTARTING), None),
    "unknown": (utils.and_masks(utils.causal_mask_function, parity), "causal & predicate(parity)"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_lifted_function_means_what_transformers_makes_of_it(name: str) -> None:
    function, text = FUNCTIONS[name]
    expected = utils.sdpa_mask(2, N, N, mask_function=function, allow_is_causal_skip=False)
    found = lift(function).mask
    assert torch.equal(found.to_dense(N, N, batch=2, heads=1).expand_as(expected), expected)
    assert text is None or found.text == text


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("unknown", "remapped")])
def test_what_transformers_composes_is_known_exactly(name: str) -> None:
    found = lift(FUNCTIONS[name][0]).mask
    assert "predicate" not in found.text
    assert found.to_slabs(N, N, batch=2, heads=1) is not None


def test_a_function_of_single_cells_is_asked_cell_by_cell() -> None:
    labels = torch.tensor([0, 0, 1, 1, 0, 2, 2, 2, 1, 1, 0, 0, 0])

    def same_label(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert q.ndim == 0  # the shape that vmap shows
        return labels[q] == labels[k]

    function = utils.or_masks(utils.causal_mask_function, same_label)
    expected = utils.sdpa_mask(1, N, N, mask_function=function, allow_is_causal_skip=False, use_vmap=True)
    found = lift(function, cell_by_cell=True).mask
    assert torch.equal(found.to_dense(N, batch=1, heads=1), expected)
    assert "same_label" in found.text


def test_a_function_that_only_bears_a_known_name_is_asked() -> None:
    @functools.wraps(utils.causal_mask_function)
    def mine(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return utils.causal_mask_function(b, h, q, k) & (k != 3)

    expected = utils.sdpa_mask(1, N, N, mask_function=mine, allow_is_causal_skip=False)
    assert torch.equal(lift(mine).mask.to_dense(N, batch=1, heads=1), expected)


def test_what_is_met_on_the_way() -> None:
    assert lift(utils.sliding_window_causal_mask_function(3)).looks_back
    assert not lift(utils.sliding_window_bidirectional_mask_function(3)).looks_back
    found = lift(FUNCTIONS["packed"][0])
    assert found.looks_back
    assert isinstance(found.packing, Packing)
    assert found.packing.of(tm.prefix(2)) == tm.prefix(2).packed([[4, 9, 0], [6, 2, 5]])
    assert lift(parity).packing is None


def test_samples_that_are_alike_share_one_mask() -> None:
    rows = RESTARTING[:1].expand(2, -1)
    function = utils.packed_sequence_compatibility_function(
        utils.causal_mask_function, rows, DOCUMENTS[:1].expand(2, -1)
    )
    assert lift(function).mask == tm.causal.packed([4, 9])


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(MaskError, match="takes \\(b, h, q, k\\), got int 3"):
        lift(3)  # pyright: ignore[reportArgumentType]
