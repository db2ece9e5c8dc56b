"""How masks come to be: by kind, or, while `torch.compile` traces, as a text of what was asked for (deferred.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.real_tensors import is_diverted, is_late, is_real, ordinary_tensors, trusted
from truemask.errors import MaskError
from truemask.masks.core.kinds import KINDS
from truemask.masks.core.value import Value

_deferred: Callable[[str, Any], Any] | None = None  # what makes a deferred mask, for which `deferred.py` needs `Mask`


def register_deferred(deferred: Callable[[str, Any], Any]) -> None:
    """Say what makes a deferred mask, given the name of a builder and its arguments."""
    global _deferred
    _deferred = deferred


def build(kind: str, *args: Any) -> Any:
    """What an operator or a re-indexing method makes: the kinds are found by name, for they derive from `Mask`."""
    if _deferred is not None and torch.compiler.is_dynamo_compiling():
        return _deferred(f"_{kind}", args)
    return made_apart(KINDS[kind].make, args) if is_diverted() else KINDS[kind].make(*args)


def made_apart(make: Callable[..., Any], args: Any, keywords: dict[str, Any] | None = None) -> Any:
    """What is made of arguments that are all known is made of ordinary tensors, and no part of a recorded graph."""
    named = keywords or {}
    with ordinary_tensors() if is_known((args, named)) else trusted():
        return make(*args, **named)


def is_known(thing: Any) -> bool:
    """Whether tensors, sizes and masks in an argument are the same in every call of a graph that is recorded.

    Of a function nobody knows what it reads.
    """
    if isinstance(thing, Tensor):
        return is_real(thing)
    if isinstance(thing, Value):
        return not thing.is_late
    if isinstance(thing, (list, tuple)):
        return all(map(is_known, thing))
    return all(map(is_known, thing.values())) if isinstance(thing, dict) else not (is_late(thing) or callable(thing))


def operand(sign: str, value: object) -> Any:
    """`value` if it is a mask, or an error that says how to make one of it."""
    if isinstance(value, Value):
        return value
    way = "`everything` and `nothing` are the constants"
    if isinstance(value, str):
        way = f"text becomes a mask by `parse({value[:60]!r})`"
    elif isinstance(value, Tensor):
        way = "wrap a boolean tensor in `dense(tensor)`, key padding in `keys(flags)`"
    elif callable(value):
        way = "call it with its arguments first"
    raise MaskError(f"`{sign}` combines masks with masks, got {describe(value)}: {way}")
