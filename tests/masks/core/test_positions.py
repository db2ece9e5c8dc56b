"""The logical positions of rows and keys, which rotary embeddings and biases ask for (law 2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import truemask as tm

PLAIN = [0, 1, 2, 3, 4]
CASES: dict[str, tuple[tm.Mask, Any, Any]] = {
    "no re-indexing": (tm.causal & tm.window(3), PLAIN, PLAIN),
    "at": (tm.causal.at(q_start=3, k_start=1), [3, 4, 5, 6, 7], [1, 2, 3, 4, 5]),
    "take": (tm.causal.take(q=[9, 8, 7, 6, 5], k=[0, 2, 4, 6, 8]), [9, 8, 7, 6, 5], [0, 2, 4, 6, 8]),
    "take rows only": (tm.causal.take(q=[9, 8, 7, 6, 5]), [9, 8, 7, 6, 5], PLAIN),
    "take per sample": (tm.causal.take(q=[PLAIN, [4, 3, 2, 1, 0]]), [PLAIN, [4, 3, 2, 1, 0]], PLAIN),
    "packed": (tm.causal.packed([2, 3]), [0, 1, 0, 1, 2], [0, 1, 0, 1, 2]),
    "packed per sample": (
        tm.causal.packed([[2, 3], [4, 1]]),
        [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]],
        [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]],
    ),
    "packed cross": (tm.everything.packed([2, 3], kv_lengths=[1, 4]), [0, 1, 0, 1, 2], [0, 0, 1, 2, 3]),
    "padded": (tm.causal.padded([0, 2]), [PLAIN, [0, 0, 0, 1, 2]], [PLAIN, [0, 0, 0, 1, 2]]),
    "at of packed": (tm.causal.packed([4, 6]).at(q_start=3), [3, 0, 1, 2, 3], [0, 1, 2, 3, 0]),
    "packed of at": (tm.causal.at(q_start=7).packed([2, 3]), [7, 8, 7, 8, 9], [0, 1, 0, 1, 2]),
    "and with keys": (tm.causal.packed([2, 3]) & tm.keys([True] * 5), [0, 1, 0, 1, 2], [0, 1, 0, 1, 2]),
    "two that agree": (tm.causal.packed([2, 3]) & ~tm.window(2).packed([2, 3]), [0, 1, 0, 1, 2], [0, 1, 0, 1, 2]),
    "per sample": (
        tm.per_sample([tm.causal.packed([2, 3]), tm.causal, tm.causal.packed([1, 4])]),
        [[0, 1, 0, 1, 2], PLAIN, [0, 0, 1, 2, 3]],
        [[0, 1, 0, 1, 2], PLAIN, [0, 0, 1, 2, 3]],
    ),
    "packed per sample, padded per sample": (
        tm.causal.packed([[2, 4], [1, 5]]).padded([0, 1]),
        [[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]],
        [[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]],
    ),
    "one padded sample, three beams": (
        tm.causal.padded([2]).select(samples=[0, 0, 0]),
        [[0, 0, 0, 1, 2]] * 3,
        [[0, 0, 0, 1, 2]] * 3,
    ),
    "select": (tm.causal.padded([0, 2, 1]).select(samples=[1, 0]), [[0, 0, 0, 1, 2], PLAIN], [[0, 0, 0, 1, 2], PLAIN]),
    "transposed": (tm.causal.at(q_start=3).T, PLAIN, [3, 4, 5, 6, 7]),
}


@pytest.mark.parametrize("name", CASES)
def test_positions(name: str) -> None:
    mask, q_expected, k_expected = CASES[name]
    q, k = mask.positions(5, 5)
    assert q.dtype == k.dtype == torch.int64
    assert q.tolist() == q_expected
    assert k.tolist() == k_expected


@given(st.data())
def test_a_chain_of_re_indexings_asks_its_base_at_the_positions(data: st.DataObject) -> None:
    mask, size = tm.causal ^ tm.dilated(3), 40
    base = mask
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            mask, size = mask.at(1, 2), size - 2
        else:
            size -= 5
            places = st.lists(st.integers(0, size - 1), min_size=size, max_size=size)
            mask = mask.take(q=data.draw(places), k=data.draw(places))
    q, k = mask.positions(7, 11)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.to_dense(7, 11)[0, 0], base.truth(zero, zero, q[:, None], k))


def test_positions_beyond_the_data_are_refused() -> None:
    with pytest.raises(tm.MaskError, match="5 queries in all, but was asked about 7"):
        tm.causal.packed([2, 3]).positions(7, 5)


def test_lengths_left_out() -> None:
    assert tm.causal.kv_len_for(5) == 5
    assert tm.causal.at(q_start=3).kv_len_for(2) == 5
    assert tm.causal.at(q_start=3, k_start=1).kv_len_for(2) == 4
    assert tm.causal.at(q_start=9).at(q_start=2).to_dense(1).shape == (1, 1, 1, 12)
    assert [side.tolist() for side in tm.causal.at(q_start=2).positions(1)] == [[2], [0, 1, 2]]


def test_parts_that_count_differently_are_an_error() -> None:
    mask = tm.causal.packed([2, 3]) | tm.causal.packed([3, 2])
    with pytest.raises(tm.MaskError, match=r"count positions differently.*pos="):
        mask.positions(5, 5)
