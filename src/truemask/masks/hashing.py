"""The counter-based hash behind `random` and dropout: integers only, the same bits everywhere.

`mix` is Thomas Mueller's 32-bit finaliser (multiplier 0x45d9f3b, which is below 2**27, so that the product of a 32-bit
word fits in a signed 64-bit integer on every device). `hash32` folds words into it one after the other; its known
answers stand in `docs/conventions.md`.
"""

from __future__ import annotations

from typing import Any

WORD = 0xFFFFFFFF
MULTIPLIER = 0x45D9F3B
START = 0x9E3779B9


def mix(x: Any) -> Any:
    """A bijection of 32-bit words (Python ints, int64 arrays or tensors) that changes about half the bits for one.

    >>> mix(1)
    824515495
    """
    x = (((x >> 16) ^ x) * MULTIPLIER) & WORD
    x = (((x >> 16) ^ x) * MULTIPLIER) & WORD
    return (x >> 16) ^ x


def hash32(*words: Any) -> Any:
    """A 32-bit hash of whole numbers (their lowest 32 bits count), for Python ints, arrays and tensors alike.

    Every word is folded in first to last, and all but the last once more in reverse, so that two rows of a mask
    (the same seed, another query) are not rearrangements of each other.

    >>> hash32(0, 1, 2)
    3736252967
    """
    state: Any = START
    for word in (*words, *reversed(words[:-1])):
        state = mix((state ^ word) & WORD)
    return state


def threshold(rate: float) -> int:
    """`hash32(...) < threshold(rate)` holds with probability `rate` (to 32 bits)."""
    return round(rate * (WORD + 1))
