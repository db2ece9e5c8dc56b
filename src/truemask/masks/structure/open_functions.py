"""Open functions: questions about a mask that each kind answers for itself, without an answer by default.

A method of `Mask` could not be added by whoever needs another question, and a table of kinds outside of it is complete
by memory only: a new kind falls through it silently, and the answer is wrong rather than missing. So a question is a
function, each kind's answer is registered on it, and a kind that owes its answer is an error that says so. (lineax
does the same for its linear operators.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from truemask.common.formatting import describe
from truemask.masks.core.mask import Mask

if TYPE_CHECKING:
    from functools import _SingleDispatchCallable as Open  # pyright: ignore[reportPrivateUsage]

R = TypeVar("R")

OPEN_FUNCTIONS: list[Open[Any]] = []  # every one, for the test that each kind of mask answers each


def open_function(question: Callable[..., R]) -> Open[R]:
    """An open function with the name and docstring of `question`, whose own body never runs."""

    @functools.wraps(question)
    def unanswered(mask: object, *_: object, **__: object) -> R:
        name = question.__name__
        if not isinstance(mask, Mask):
            raise TypeError(f"{name} asks about a mask, got {describe(mask)}")
        kind = type(mask).__name__
        raise TypeError(
            f"`{name}` has no answer for the mask `{mask}`, whose kind is {kind}: every kind of mask answers every "
            f"open function. Register one beside the others in {question.__module__}: "
            f"`@register({name}, {kind})` above a function, or `answer({name}, value, {kind})`"
        )

    function = functools.singledispatch(unanswered)
    OPEN_FUNCTIONS.append(function)
    return function


def register(function: Open[R], *kinds: type[Mask]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """A decorator: what it is above answers `function` for these kinds of masks."""

    def registered(own: Callable[..., R]) -> Callable[..., R]:
        for kind in kinds:
            if kind in function.registry:
                raise TypeError(f"{kind.__name__} has an answer to `{function.__name__}` already")  # pyright: ignore
            function.register(kind, own)
        return own

    return registered


def answer(function: Open[R], value: R, *kinds: type[Mask]) -> None:
    """These kinds of masks answer `function` with `value`, whatever their parts are."""
    register(function, *kinds)(lambda *_, **__: value)
