"""What the backends cost, in one table of measured constants.

Measured with `benchmarks`-style loops on 2 cores of an AMD EPYC (Zen 3, AVX2 only), torch 2.13.0 CPU, b 1, h 8, d 64, n from 16 to
4096, best of five: rates are at n = 2048, the time of a call at n = 16. They rank backends; predicted seconds are those of that machine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from truemask.backends.base import Request


class Rates(NamedTuple):
    """Useful arithmetic a second in full-precision and half-precision dtypes, and the seconds that any call takes."""

    forward: float
    backward: float
    forward_half: float
    backward_half: float
    call: float


SDPA = Rates(100e9, 80e9, 80e9, 60e9, 40e-6)
REFERENCE = Rates(20e9, 20e9, 20e9, 20e9, 400e-6)
BACKWARD_PRODUCTS = 2.5  # five products of the forward's size in the backward, against two


def seconds(rates: Rates, request: Request, cells: float) -> float:
    """Predicted seconds for so many scores: two products of the head sizes, and in training five more."""
    work = 2 * cells * (request.head_dim + request.value_dim)
    half = request.dtype in (torch.bfloat16, torch.float16)
    double = 2 if request.dtype == torch.float64 else 1
    forward, backward = (rates.forward_half, rates.backward_half) if half else (rates.forward, rates.backward)
    total = rates.call + double * work / forward
    return total + rates.call + double * BACKWARD_PRODUCTS * work / backward if request.grad else total
