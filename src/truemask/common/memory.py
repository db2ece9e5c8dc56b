"""Bytes of arrays: what somebody holds, each piece of memory once, however many views of it there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

Memory = dict[tuple[int, int], int]  # bytes of the memory at an address, by that and its size


class HoldsArrays:
    """Whose fields are arrays, or hold some."""

    __slots__ = ()

    def arrays(self) -> Iterator[Tensor | np.ndarray]:
        """Every array that it holds now, some perhaps twice."""
        values = list(vars(self).values())  # in one step: another thread may be remembering something
        return arrays_in(value for value in values if value is not self)


def arrays_in(values: Iterable[object]) -> Iterator[Tensor | np.ndarray]:
    """The arrays among values, and those in tuples, lists, dicts and tables."""
    for value in values:
        if isinstance(value, (Tensor, np.ndarray)):
            yield value
        elif isinstance(value, HoldsArrays):
            yield from value.arrays()
        elif isinstance(value, (tuple, list)):
            yield from arrays_in(value)
        elif isinstance(value, dict):
            yield from arrays_in(list(value.values()))


def memory_of(arrays: Iterable[Tensor | np.ndarray]) -> Memory:
    """The memory that arrays are part of; single numbers in tensors are not counted.

    >>> numbers = np.zeros(10)
    >>> sum(memory_of([numbers, numbers[:5], numbers[5:]]).values())
    80
    """
    pieces = [piece for array in arrays if (piece := _piece_of(array)) is not None]
    return {piece: piece[1] for piece in pieces}


def _piece_of(array: Tensor | np.ndarray) -> tuple[int, int] | None:
    """The address and the bytes of the memory that an array is part of; None for a single number."""
    root: Any = array
    while isinstance(root, np.ndarray) and isinstance(root.base, (np.ndarray, Tensor)):
        root = root.base
    if isinstance(root, np.ndarray):
        return root.__array_interface__["data"][0], root.nbytes
    if root.numel() < 2:
        return None
    storage = root.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
