"""How masks come to be: by kind, with a ticket, or, while `torch.compile` traces, as a note of what was asked for.

A ticket is a mask as a tensor, so that it can enter a compiled graph without becoming a constant of it.

`torch.compile` compares what it treats as a constant, and compiles again when it changed. A tensor it takes as given.
So every mask has a ticket, a tensor that holds a number, and whoever meets the ticket at run time gets the mask back.
A ticket that a graph keeps for its backward keeps the mask too: the tensor's memory is an `Owner`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.real_tensors import is_diverted, is_late, is_real, ordinary_tensors, trusted
from truemask.errors import MaskError
from truemask.masks.core.value import Value

KINDS: dict[str, type[Any]] = {}  # every kind of mask by its name
NOTES: list[type[Any]] = []  # the class of notes (traced.py)


def build(kind: str, *args: Any) -> Any:
    """What an operator or a re-indexing method makes."""
    if torch.compiler.is_dynamo_compiling():
        return NOTES[0](f"_{kind}", args)
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


# -- tickets -----------------------------------------------------------------------------------------------------------


class Owner(bytearray):
    """The memory of one ticket: its number, and who it stands for."""

    __slots__ = ("__weakref__", "mask", "twin")
    mask: ref[Value]
    twin: Value | None  # made when the ticket is first shown; holding `mask` itself would be a cycle through a tensor


OWNERS: WeakValueDictionary[int, Owner] = WeakValueDictionary()
NUMBERS = itertools.count(1)


def names_of(mask: Value) -> dict[str, Any]:
    """What a graph may call the mask: a new ticket, int64 `[1]` on the CPU, and its number as text."""
    number = next(NUMBERS)
    return {"ticket": _ticket_for(mask, number), "number": str(number)}


def _ticket_for(mask: Value, number: int) -> Tensor:
    owner = Owner(number.to_bytes(8, sys.byteorder))
    owner.mask, owner.twin = ref(mask), None
    OWNERS[number] = owner
    if torch.is_inference_mode_enabled() or is_diverted():
        with torch.inference_mode(False), ordinary_tensors():
            return torch.frombuffer(owner, dtype=torch.int64)
    return torch.frombuffer(owner, dtype=torch.int64)


def mask_of(ticket: Tensor | str) -> Any:
    """The mask of a ticket, or of its number, or one equal to it."""
    owner = OWNERS[int(ticket)]
    if owner.twin is None:
        mask = owner.mask()
        assert mask is not None, "a ticket lives in its mask, and was shown before it could outlive it"
        owner.twin = twin(mask)
    return owner.twin


def twin(mask: Value) -> Value:
    """An equal mask that shares all data but is another object, without a ticket."""
    new = object.__new__(type(mask))
    vars(new).update({name: part for name, part in vars(mask).items() if name not in ("ticket", "number")})
    return new


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
