"""Whether what was drawn has the distribution that it should have: Pearson's chi-square test."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_EXPECTED = 5.0  # of a cell; rarer ones are counted together, as the test asks for
SIGMAS = 4.0  # beyond the mean: by chance once in some thousand draws, and seeds make it the same each time


def assert_drawn_from(counts: Tensor, shares: Tensor) -> None:
    """`counts` [c] of draws fit the probabilities `shares` [c] of the cells."""
    assert counts.shape == shares.shape
    expected, counts = shares.double() * counts.sum(), counts.double()
    rare = expected < LEAST_EXPECTED
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    assert bool((counts[expected == 0] == 0).all()), "something was drawn that cannot be"
    chi_square = float(((counts - expected).square() / expected.clamp(min=1e-9)).sum())
    freedom = len(counts) - 1
    assert freedom > 2, "too few cells, or too few draws, to tell anything"
    bound = freedom + SIGMAS * (2 * freedom) ** 0.5
    assert chi_square < bound, f"chi-square {chi_square:.1f} of {freedom} degrees of freedom, above {bound:.1f}"
