"""How expressions are written: calls, methods, and parentheses where they are needed."""

from __future__ import annotations

from truemask.masks.core.data import Data
from truemask.masks.core.mask import Mask
from truemask.masks.core.value import Written

# How tightly each form of text binds; Python's own order.
OR, XOR, AND, MINUS, NOT, ATOM = range(6)


def call(name: str, *args: object, **options: object) -> Written:
    """The text of a call of the language: `name(args, key=value)`; options that are None are left out."""
    parts = [_shown(a) for a in args] + [f"{key}={_shown(v)}" for key, v in options.items() if v is not None]
    return f"{name}({', '.join(parts)})", ATOM


def method(base: Mask, tail: str) -> Written:
    """The text of a method of the language: `base.tail`, with parentheses where they are needed."""
    return f"{within(base, ATOM)}.{tail}", ATOM


def within(mask: Mask, level: int) -> str:
    """The text of a part inside an operator of this level; mixed `-` always gets its parentheses."""
    text, own_level = mask._write()  # pyright: ignore[reportPrivateUsage]
    mixed = MINUS in (own_level, level) and own_level not in (NOT, ATOM)
    return f"({text})" if own_level < level or mixed else text


def _shown(value: object) -> str:
    return value.text if isinstance(value, Data) else str(value) if isinstance(value, Mask) else repr(value)
