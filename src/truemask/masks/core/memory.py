"""What a mask takes in memory: its data, and the tables, exact forms and copies on devices that it remembers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from truemask.common.memory import Memory, arrays_in, memory_of
from truemask.masks.core.value import Value


def mask_memory(mask: Value, counted: Value | None = None) -> Memory:
    """The memory of all arrays that a mask and its parts hold now, without those of the part `counted`.

    What single numbers take, and what a user's function reads, is not counted.
    """
    memory: Memory = {}
    visited = {id(counted)}
    stack: list[Any] = [mask]
    while stack:
        one = stack.pop()
        if id(one) not in visited:
            visited.add(id(one))
            memory.update(memory_of(_arrays_of(one)))
            stack += [*one.children, *(renewed for renewed in [vars(one).get("_current")] if renewed is not None)]
    return memory


def _arrays_of(mask: Value) -> Iterator[Tensor | np.ndarray]:
    """The arrays of a mask without those of its parts: what it holds stands in its `__dict__`."""
    attributes = dict(vars(mask))  # in one step: another thread may be remembering something
    copies = attributes.pop("_bound", {})
    yield from arrays_in(attributes.values())
    yield from arrays_in([vars(copy)["_bound_tables"] for copy in list(copies.values())])
