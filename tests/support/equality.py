"""What "equal" means between two computations of the same numbers (the end of section 1 of the laws).

Two kernels, or a batch and its samples alone, add the same numbers in another order. What that may change is counted in
roundings of the dtype at the largest number compared, so that a bound holds on every instruction set.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDINGS = 1024  # at the largest number: 1.2e-4 of it in fp32, 2.3e-13 in fp64
TIE = 10  # two logits tie where they lie nearer than this many times what `assert_same` lets pass


def tolerance(expected: Tensor, scale: float | None = None) -> float:
    """How far a number may lie from the expected one; `scale` is the size of what it was computed from.

    Without a scale it is the largest finite number of `expected`. Halves are refused: what they lose is a matter of the
    backend, which says it itself.
    """
    assert expected.dtype in (torch.float32, torch.float64), f"no tolerance is told here for {expected.dtype}"
    if scale is None:
        finite = expected.detach()[expected.detach().isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
    return ROUNDINGS * torch.finfo(expected.dtype).eps * scale


def assert_same(found: Tensor, expected: Tensor, *, scale: float | None = None, name: str = "") -> None:
    """Equal up to rounding; `scale` where what is left is small beside what was added (a gradient that cancels)."""
    message = (lambda words: f"{name}: {words}") if name else None
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance(expected, scale), msg=message)


def assert_tokens_equal_up_to_tie(
    found: Tensor, expected: Tensor, logits: Tensor | Callable[[int, int], Tensor]
) -> None:
    """Greedy tokens `[b, n]` of two computations: a row may part only where both tokens are as good as the best.

    `logits` are those that one of the two chose from: `[b, n, v]`, or a function of row and step that gives `[v]` and
    is asked only where a row parts. Behind a tie the two have read different tokens, and nothing more is compared.
    """
    assert found.shape == expected.shape, f"tokens {list(found.shape)} against {list(expected.shape)}"
    for row, (ours, theirs) in enumerate(zip(found.tolist(), expected.tolist(), strict=True)):
        step = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        if step is None:
            continue
        choices = logits[row, step] if isinstance(logits, Tensor) else logits(row, step)
        behind = float(choices.max() - choices[[ours[step], theirs[step]]].min())
        assert behind <= TIE * tolerance(choices), (
            f"row {row} parts at step {step}: token {ours[step]} against {theirs[step]}, one of them {behind:.3g} "
            f"behind the best logit, where {TIE * tolerance(choices):.3g} would be a tie"
        )
