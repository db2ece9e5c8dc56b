"""What a function reads besides its arguments, and whether it has changed since: tensors by their versions.

Plans keep what a `predicate` said. So the state of what it reads is part of what the mask is: a tensor that was
written to, or a name that was bound to another one, makes it another mask, which is asked anew.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truemask.common.real_tensors import is_real
from truemask.masks.core.mask import Mask

MAX_OBJECTS = 10_000  # that are looked through
MAX_COMPARED_BYTES = 1 << 20  # of an array without versions, whose numbers are compared
UNCHANGING = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
OPAQUE = (ModuleType, type, BuiltinFunctionType)
LIBRARIES = ("torch", "numpy", "truemask")  # whose functions read nothing of the caller's but what they close over


class State:
    """What a function reads, and a key that is equal only while none of it has changed."""

    def __init__(self, fn: Any) -> None:
        self.things: list[Any] = []  # kept, so that no other object gets their ids
        self.key: tuple[Hashable, ...] = tuple(self._keys(fn))

    def _keys(self, fn: Any) -> Iterator[Hashable]:
        visited: set[int] = set()
        stack = [fn]
        while stack and len(visited) < MAX_OBJECTS:
            one = stack.pop()
            if isinstance(one, UNCHANGING):
                yield type(one), one
            elif id(one) not in visited and not isinstance(one, OPAQUE):
                visited.add(id(one))
                self.things += () if isinstance(one, Tensor) and not is_real(one) else (one,)
                yield id(one), _version(one)
                stack.extend(_inside(one))


def _version(thing: Any) -> Hashable:
    """What changes when a tensor or an array is written to; of other things nothing."""
    if isinstance(thing, Tensor):
        return _contents(thing) if thing.is_inference() else thing._version
    return _contents(thing) if isinstance(thing, np.ndarray) else None


def _contents(thing: Any) -> Hashable:
    """The numbers of what has no version; of too many of them something that is equal to nothing."""
    if thing.nbytes > MAX_COMPARED_BYTES:
        return object()
    array = thing.detach().cpu().view(torch.uint8).numpy() if isinstance(thing, Tensor) and thing.ndim else thing
    return array.item() if isinstance(array, Tensor) else array.tobytes()


def _inside(thing: Any) -> Iterator[Any]:
    """What a function, a container or an object of the caller holds."""
    if isinstance(thing, Mask):
        yield from (one.fn for one in thing.functions)  # the rest of a mask never changes
    elif isinstance(thing, FunctionType):
        yield from (cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell))
        names = () if (thing.__module__ or "").partition(".")[0] in LIBRARIES else sorted(_names(thing.__code__))
        yield from (thing.__globals__[name] for name in names if name in thing.__globals__)
        yield from (thing.__defaults__, thing.__kwdefaults__)
    elif isinstance(thing, MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from thing
    elif isinstance(thing, Mapping):
        yield from thing.values()
    elif not isinstance(thing, (Tensor, np.ndarray)) and not type(thing).__module__.startswith("torch._"):
        yield from getattr(thing, "__dict__", {}).values()
        yield getattr(type(thing), "__call__", None)  # noqa: B004 - what runs, not whether it can


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a name that the function is made before
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> frozenset[str]:
    """The names that a function's code, and the functions inside it, may look up in its module."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return frozenset(code.co_names).union(*inner)
