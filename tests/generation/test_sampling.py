"""Filters keep exactly the tokens that they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from truemask.generation.sampling import Sampler, keep_min_p, keep_top_k, keep_top_p

PROBABILITIES = torch.tensor([[0.05, 0.5, 0.2, 0.15, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
LOGITS = PROBABILITIES.log() + 3.0


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_top_k_keeps_the_k_best() -> None:
    assert kept(keep_top_k(LOGITS, 2))[0] == [1, 2]
    assert [len(row) for row in kept(keep_top_k(LOGITS, 2))] == [2, 2]
    assert kept(keep_top_k(LOGITS, 99)) == [list(range(5))] * 2


@pytest.mark.parametrize(
    ("p", "expected"), [(0.1, [1]), (0.49, [1]), (0.51, [1, 2]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_best_that_first_reach_p(p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(LOGITS, p))[0] == expected
    assert kept(keep_top_p(LOGITS, 1e-12))[0] == [1]


def test_min_p_is_relative_to_the_best() -> None:
    assert kept(keep_min_p(LOGITS, 0.25)) == [[1, 2, 3], [0, 1, 2, 3, 4]]
    assert kept(keep_min_p(LOGITS, 0.0)) == [list(range(5))] * 2


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.4}, {"temperature": 0.0}])
def test_only_kept_tokens_are_drawn(options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler(**options)  # pyright: ignore[reportArgumentType]
    drawn = {int(sampler(LOGITS[:1], generator)) for _ in range(200)}
    assert drawn == ({1} if options == {"temperature": 0.0} else {1, 2})


def test_samples_follow_the_models_distribution_at_temperature_1() -> None:
    many = Sampler()(LOGITS[:1].expand(20011, -1), torch.Generator().manual_seed(3))
    shares = many.bincount(minlength=5) / len(many)
    torch.testing.assert_close(shares.double(), PROBABILITIES[0], rtol=0, atol=0.015)


def test_temperature_sharpens_and_flattens() -> None:
    cold, hot = (
        Sampler(temperature=t)(LOGITS[:1].expand(5003, -1), torch.Generator().manual_seed(3)).eq(1).double().mean()
        for t in (0.25, 4.0)
    )
    assert cold > 0.95
    assert hot < 0.35


def test_a_function_filters_first() -> None:
    def forbid_the_best(logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(1), -math.inf)

    assert Sampler(temperature=0.0, filter_logits_fn=forbid_the_best)(LOGITS[:1]).tolist() == [2]


def test_half_precision_logits_are_sampled_in_single() -> None:
    assert Sampler(top_p=0.5)(LOGITS.bfloat16(), torch.Generator().manual_seed(0)).shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; it counts tokens"),
        ({"top_p": 0.0}, r"top_p is 0.0; it is a share of probability, in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
    ],
)
def test_impossible_filters_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "1"}, "temperature is str '1'; expected a number"),
        ({"top_k": 2.5}, "top_k is float 2.5; expected a whole number or None"),
        ({"filter_logits_fn": "top_k"}, "filter_logits_fn is str 'top_k'; expected a function .*pass top_k=..."),
        ({"filter_logits_fn": "top_a"}, "pass top_k=..."),
        ({"filter_logits_fn": 3}, r"filter_logits_fn is int 3; expected a function of logits \(b, v\) to logits$"),
    ],
)
def test_filters_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Sampler(**options)
