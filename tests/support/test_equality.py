"""The helpers that say "equal" fail where two computations really differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.equality import ROUNDINGS, TIE, assert_same, assert_tokens_equal_up_to_tie

STEP_BITS = ROUNDINGS * torch.finfo(torch.float32).eps
LOGITS = torch.tensor([[[8.0, 1.0, 2.0], [1.0, 8.0, 2.0], [0.0, 1.0, 8.0]]])  # the best tokens are 0, 1, 2
TOKENS = LOGITS.argmax(-1)


def tied(step: int, gap: float) -> Tensor:
    """The logits with token 0 at `step` behind the best by `gap`."""
    logits = LOGITS.clone()
    logits[0, step, 0] = 8.0 - gap
    return logits


def test_what_is_the_same_is_measured_by_the_largest_number() -> None:
    expected = torch.tensor([1000.0, 0.0])
    assert_same(expected + 500 * STEP_BITS, expected)
    with pytest.raises(AssertionError, match="out of the documents: Tensor-likes are not close"):
        assert_same(expected + 2000 * STEP_BITS, expected, name="out of the documents")
    with pytest.raises(AssertionError):
        assert_same(torch.tensor([1e-3]), torch.tensor([0.0]))
    assert_same(torch.tensor([1e-5]), torch.tensor([0.0]), scale=1.0)


def test_a_bound_follows_the_dtype() -> None:
    one = torch.ones(1)
    assert_same(one * (1 + 0.9 * STEP_BITS), one)
    with pytest.raises(AssertionError):
        assert_same(one.double() * (1 + 0.9 * STEP_BITS), one.double())
    with pytest.raises(AssertionError, match=r"no tolerance is told here for torch\.bfloat16"):
        assert_same(one.bfloat16(), one.bfloat16())


def test_nothing_finite_has_no_room() -> None:
    assert_same(torch.zeros(0), torch.zeros(0))
    assert_same(torch.tensor([float("inf")]), torch.tensor([float("inf")]))
    with pytest.raises(AssertionError):
        assert_same(torch.tensor([1.0]), torch.tensor([float("inf")]))


def test_equal_tokens_ask_for_no_logits() -> None:
    def never(row: int, step: int) -> Tensor:
        raise AssertionError("asked for logits of equal tokens")

    assert_tokens_equal_up_to_tie(TOKENS, TOKENS.clone(), never)


@pytest.mark.parametrize("swapped", [False, True])
def test_rows_may_part_at_a_tie(swapped: bool) -> None:
    """And nothing behind it is compared."""
    parted = [torch.tensor([[0, 0, 0]]), TOKENS]
    found, expected = reversed(parted) if swapped else parted
    near = tied(1, 0.5 * TIE * 8 * STEP_BITS)
    assert_tokens_equal_up_to_tie(found, expected, near)
    assert_tokens_equal_up_to_tie(found, expected, lambda row, step: near[row, step])
    with pytest.raises(AssertionError, match="row 0 parts at step 1: token"):
        assert_tokens_equal_up_to_tie(found, expected, tied(1, 2 * TIE * 8 * STEP_BITS))


def test_a_tie_later_excuses_nothing_before_it() -> None:
    with pytest.raises(AssertionError, match="row 0 parts at step 0: token 1 against 0"):
        assert_tokens_equal_up_to_tie(torch.tensor([[1, 0, 2]]), TOKENS, tied(1, 0.0))


def test_both_tokens_must_be_among_the_best() -> None:
    """Two logits tie, but what was chosen is a third."""
    with pytest.raises(AssertionError, match="token 2 against 1"):
        assert_tokens_equal_up_to_tie(torch.tensor([[0, 2, 2]]), TOKENS, tied(1, 0.0))


def test_other_lengths_are_not_equal() -> None:
    with pytest.raises(AssertionError, match=r"tokens \[1, 2\] against \[1, 3\]"):
        assert_tokens_equal_up_to_tie(TOKENS[:, :2], TOKENS, LOGITS)


def test_each_row_parts_for_itself() -> None:
    logits = torch.cat((tied(1, 0.0), LOGITS))
    expected = torch.cat((TOKENS, TOKENS))
    assert_tokens_equal_up_to_tie(torch.tensor([[0, 0, 0], [0, 1, 2]]), expected, logits)
    with pytest.raises(AssertionError, match="row 1 parts at step 1"):
        assert_tokens_equal_up_to_tie(torch.tensor([[0, 1, 2], [0, 0, 0]]), expected, logits)
