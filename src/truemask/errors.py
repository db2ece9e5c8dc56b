"""What goes wrong, in one place: the errors, the warning, and how a message describes what it was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch


class TruemaskError(Exception):
    """The base of every error that this library raises on purpose."""


class MaskError(TruemaskError, ValueError):
    """A mask that cannot mean what was asked: a bad argument, a wrong shape, or a question beyond its data."""


class PlanError(TruemaskError, ValueError):
    """No backend can run the call; the message lists the reasons of every one of them."""


class ConventionWarning(UserWarning):
    """The call is legal and does what it says, and what it says is probably not what was meant."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, or nothing.

    >>> suggest("windw", ["window", "causal"])
    ", did you mean 'window'?"
    >>> suggest("xyzzy", ["window", "causal"])
    ''
    """
    near = difflib.get_close_matches(name[:60], list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def counted(number: int, what: str) -> str:
    """A number of things, in the singular for one.

    >>> counted(1, "query"), counted(2, "query"), counted(0, "key head")
    ('1 query', '2 queries', '0 key heads')
    """
    many = f"{what[:-1]}ies" if what.endswith("y") and what[-2] not in "aeiou" else f"{what}s"
    return f"{number} {what if number == 1 else many}"


def describe(value: object) -> str:
    """How messages show a value: dtype, shape and device of a tensor, otherwise the type and a short repr.

    >>> describe(torch.zeros(2, 3))
    'float32 [2, 3] on cpu'
    """
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an int of more than 4300 digits
        return f"{type(value).__name__} with a number too long to print"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
