"""How messages write things: values, counts, ranges, seconds, bytes, percentages, and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np
import torch


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


def duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> duration(0.0000421), duration(0.0123), duration(4.56)
    ('42 us', '12 ms', '4.6 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def memory(nbytes: float) -> str:
    """Bytes as people read them.

    >>> memory(196), memory(1936), memory(70000), memory(1 << 28)
    ('196 B', '1.9 KiB', '68 KiB', '256 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1000 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.1f} {unit}" if nbytes < 10 and unit != "B" else f"{nbytes:.0f} {unit}"


def percent(pairs: float, cells: float) -> str:
    """A share as text, never rounded to 0 or 100 when it is not; 0 % of nothing.

    >>> percent(3, 8), percent(1, 10**6), percent(10**6 - 1, 10**6), percent(2, 2)
    ('37.5 %', 'under 0.1 %', 'over 99.9 %', '100 %')
    """
    share = 100 * pairs / cells if cells else 0.0
    if 0 < share < 0.1:
        return "under 0.1 %"
    return "over 99.9 %" if 99.9 < share < 100 else f"{share:.3g} %"


def ranges(positions: np.ndarray, most: int = 6) -> str:
    """Increasing positions as text.

    >>> ranges(np.array([0, 1, 2, 7, 9, 10]))
    '0-2, 7, 9-10'
    """
    parts = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    texts = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts[:most]]
    return ", ".join(texts) + (f", and {len(parts) - most} more runs" if len(parts) > most else "")


def shortened(text: str, most: int = 60) -> str:
    """A text cut to what fits into a sentence.

    >>> shortened("keys([True, True, True])", 12)
    'keys([Tru...'
    """
    return text if len(text) <= most else f"{text[: most - 3]}..."
