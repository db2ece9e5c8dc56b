"""The self-test of `truemask doctor`: every backend against the reference, in a few seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.attention.attend import attend
from truemask.backends.registry import backends
from truemask.errors import PlanError
from truemask.masks.core.mask import Mask
from truemask.masks.formats.parse import parse

MASK = "(causal & (window(48) | prefix(3))).packed([70, 90, 33]) - queries({dead})"
LENGTH, DEAD_ROW, KEPT_ROWS = 193, 100, 160  # rows: all, one that sees nothing, those of the first two documents
TOLERANCE = 1e-4
UNTRIED = {"flex": "not tried: it compiles for half a minute (`truemask doctor --gpu` tries it on a GPU)"}


class Outcome(NamedTuple):
    """What a backend did: whether it is as it should be, and in words."""

    backend: str
    good: bool
    text: str


def self_test() -> Iterator[Outcome]:
    """Forward and backward under a mask with packed documents, a dead row and a NaN behind the mask."""
    mask = example()
    expected = _run(mask, "reference")
    for name in backends():
        if name in UNTRIED:
            yield Outcome(name, True, UNTRIED[name])
            continue
        try:
            results = _run(mask, name)
        except PlanError as error:
            yield Outcome(name, True, f"cannot: {str(error).splitlines()[1].strip()}")
            continue
        except Exception as error:  # a self-test tells what went wrong, whatever it is
            yield Outcome(name, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        yield _compared(name, results, expected)


def example() -> Mask:
    """The mask of the self-test."""
    return parse(MASK.format(dead=[place == DEAD_ROW for place in range(LENGTH)]))


def _compared(name: str, results: list[Tensor], expected: list[Tensor]) -> Outcome:
    clean = [tensor.isfinite().all() for tensor in results]
    if not all(clean):
        return Outcome(name, False, "a NaN that the mask hides has leaked")
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, expected, strict=True))
    dead = float(results[0][:, :, DEAD_ROW].abs().max())
    good = error < TOLERANCE and dead == 0
    return Outcome(name, good, f"{'agrees' if good else 'DIFFERS'}: error {error:.1e}, dead rows {dead:g}")


def _run(mask: Mask, backend: str) -> list[Tensor]:
    """Output and gradients; the last document's value is NaN, and the loss asks the others only."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, LENGTH, 32, generator=generator) for heads in (4, 2, 2))
    v[:, :, -1] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(q, k, v, mask, backend=backend)[:, :, :KEPT_ROWS]
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    return [out.detach(), *(gradient[:, :, :KEPT_ROWS] for gradient in gradients)]
