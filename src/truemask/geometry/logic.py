"""Kleene's strong three-valued logic over tiles: EMPTY and FULL are proofs, MIXED promises nothing.

The values are ordered EMPTY < MIXED < FULL, so that AND is the minimum, OR the maximum and NOT swaps the ends
(S. C. Kleene, Introduction to Metamathematics, 1952, section 64).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.int8]
Flags = NDArray[np.bool_]

EMPTY = np.int8(0)
MIXED = np.int8(1)
FULL = np.int8(2)


def tri_state(empty: Flags, full: Flags) -> States:
    """EMPTY where proven empty, FULL where proven full, MIXED elsewhere (the arrays broadcast).

    >>> tri_state(np.array([True, False, False]), np.array([False, False, True])).tolist()
    [0, 1, 2]
    """
    return np.where(empty, EMPTY, np.where(full, FULL, MIXED)).astype(np.int8)


def kleene_and(a: States, b: States) -> States:
    """EMPTY if either is, FULL if both are: the minimum."""
    return np.minimum(a, b)


def kleene_or(a: States, b: States) -> States:
    """FULL if either is, EMPTY if both are: the maximum."""
    return np.maximum(a, b)


def kleene_not(a: States) -> States:
    """EMPTY and FULL change places."""
    return (FULL - a).astype(np.int8)


def kleene_xor(a: States, b: States) -> States:
    """Decided only where both are decided."""
    undecided = (a == MIXED) | (b == MIXED)
    return np.where(undecided, MIXED, np.where(a == b, EMPTY, FULL)).astype(np.int8)
