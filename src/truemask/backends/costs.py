"""What the backends cost, in one table of measured constants; `benchmarks/costs.py` measures and prints it.

Measured on one core of an AMD EPYC (Zen 3, AVX2), torch 2.13.0 CPU, as the least processor time of several runs, rates
doubled: the predicted seconds are those of two such cores. Rates: b 1, h 4, d 64, n 512, no mask. Calls: b 1, h 4, d
32, n 16 under a window, with the plan cached. Half-precision dtypes run in fp32 there. They rank backends, and say
roughly how long.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from truemask.backends.base import Request


class Rates(NamedTuple):
    """Useful arithmetic a second in fp32 and the seconds that any call takes, forward and backward."""

    forward: float
    backward: float
    call: float
    call_backward: float


SDPA = Rates(104e9, 93e9, 70e-6, 215e-6)
REFERENCE = Rates(36e9, 31e9, 490e-6, 950e-6)
DOUBLES = 2.6  # how much longer fp64 takes
JOIN_RATE = 3.7e9  # bytes a second, of all its copies, at which a bias becomes dense and meets its mask
BACKWARD_PRODUCTS = 2.5  # five products of the forward's size in the backward, against two


def seconds(rates: Rates, request: Request, cells: float) -> float:
    """Predicted seconds for so many scores: two products of the head sizes, and in training five more."""
    work = 2 * cells * (request.head_dim + request.value_dim) * (DOUBLES if request.dtype == torch.float64 else 1)
    forward = rates.call + work / rates.forward
    backward = rates.call_backward + BACKWARD_PRODUCTS * work / rates.backward
    return forward + backward if request.grad else forward


def memory(nbytes: float) -> str:
    """Bytes as people read them.

    >>> memory(196), memory(1936), memory(70000), memory(1 << 28)
    ('196 B', '1.9 KiB', '68 KiB', '256 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1000 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.1f} {unit}" if nbytes < 10 and unit != "B" else f"{nbytes:.0f} {unit}"
