"""Which cells dropout keeps: one rule for every backend, forward and backward."""

from __future__ import annotations

from torch import Tensor

from truemask.masks.hashing import hash32, threshold


def kept(seed: int, rate: float, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Whether dropout at `rate` keeps the cells (sample b, head h, row q, column k): bool, broadcast from int64.

    A cell is dropped iff `hash32(hash32(seed, b, h, q), k) < rate * 2**32`: a row's words are hashed once, and only
    the outer hash is worked out for every cell. Integers only, so every backend and device drops the same cells.

    >>> import torch
    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> kept(7, 0.5, zero, zero, zero, torch.arange(8)).int().tolist()
    [1, 1, 1, 0, 0, 0, 0, 1]
    """
    return hash32(hash32(seed, b, h, q), k) >= threshold(rate)
