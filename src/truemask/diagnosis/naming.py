"""What may be claimed of the name of some cells: a tensor has it at its own size, a function is asked elsewhere too."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from truemask.common.formatting import shortened
from truemask.diagnosis.recognise import recognise
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.core.value import ANY
from truemask.masks.structure.data import is_function, names_tokens

FAR_LENGTHS = (1_009, 100_003)  # lengths at which every function is asked too
PROBED_ROWS = 64  # that are looked at there
MAX_SQUARE_LENGTH = 520  # the longest text that is looked at cell by cell
MAX_PROBED_CELLS = 1 << 20  # of each sample and head
ONLY_DATA = "that is data of these tokens, and no rule for others"


@dataclass(frozen=True)
class Name:
    """An expression that is equal to some cells, and how far that was seen to hold.

    Attributes:
        mask: the expression.
        lengths: the other lengths at which both were asked and agree; empty for tensors, which have one size.
        elsewhere: why nothing is claimed of other lengths; empty where the name is a rule without data.
        differs: whether the cells are known to be others there, so that the name must not take their place.
    """

    mask: Mask
    lengths: tuple[int, ...] = ()
    elsewhere: str = ""
    differs: bool = False

    @property
    def is_rule(self) -> bool:
        """Whether it may be written instead at any length."""
        return not self.elsewhere

    def words(self) -> str:
        """The sentence of a finding."""
        text = shortened(str(self.mask), 200)
        if not self.is_rule:
            return f"its cells here are `{text}`; {self.elsewhere}"
        if self.lengths:
            numbers = ", ".join(f"{n:,}" for n in self.lengths)
            return f"it is `{text}`, also at the other lengths that were tried ({numbers}); that costs nothing to build"
        return f"its cells are `{text}`, a rule without a size, which costs nothing to build"


def name_of(part: Mask, q_len: int, kv_len: int, *, batch: int | None = None, heads: int | None = None) -> Name | None:
    """The name of a tensor or a function at these sizes, if there is one.

    >>> from truemask.masks.leaves.predicate import predicate
    >>> third = name_of(predicate(lambda b, h, q, k: k % 3 == 0), 30, 30)
    >>> third.mask, third.is_rule
    (strided(3).at(k_start=2), True)
    """
    if is_function(part):
        return _of_function(part, q_len, kv_len, batch, heads)
    mask = recognise(part, q_len, kv_len, batch=batch, heads=heads)
    if mask is None:
        return None
    return Name(mask, elsewhere=ONLY_DATA if holds_data(mask) else "")


def holds_data(mask: Mask) -> bool:
    """Whether an expression speaks of certain tokens or samples: flags, lengths, labels, cells."""
    return mask.batch_size != 1 or any(map(names_tokens, mask.walk()))


def _of_function(part: Mask, q_len: int, kv_len: int, batch: int | None, heads: int | None) -> Name | None:
    """A name that the function has everywhere, or else the one of its cells here."""
    lengths = other_lengths(max(q_len, kv_len))
    sizes = {"batch": batch, "heads": heads}
    squares = [(n, n) for n in lengths if max(q_len, kv_len) < n <= MAX_SQUARE_LENGTH]
    candidates = dict.fromkeys(_name_at(part, *size, **sizes) for size in (*squares, (q_len, kv_len)))
    best: Name | None = None
    for name in candidates:
        if name is None or not _equal(part, name, q_len, kv_len, sizes):
            continue
        differences = [_difference(part, name, n, **sizes) for n in lengths]
        why = next((why for why, _ in differences if why), "")
        best = Name(name, () if why else lengths, why, any(differs for _, differs in differences))
        if best.is_rule:
            return best
    return best


def _equal(part: Mask, name: Mask, q_len: int, kv_len: int, sizes: dict[str, int | None]) -> bool:
    both = part ^ name
    held = {"batch": both.batch_size, "heads": both.head_count}
    free = {axis: size if held[axis] == ANY else None for axis, size in sizes.items()}
    return bool(part.equivalent(name, q_len, kv_len, **free))


def _name_at(part: Mask, q_len: int, kv_len: int, **sizes: int | None) -> Mask | None:
    """The name at some lengths; None if there is none, or the function does not answer there."""
    try:
        return recognise(part, q_len, kv_len, **sizes)
    except Exception:  # a user's function may raise anything
        return None


def _difference(part: Mask, name: Mask, n: int, **sizes: int | None) -> tuple[str, bool]:
    """Why nothing is claimed at `n` tokens (empty if the rows looked at agree), and whether it is that cells differ."""
    try:
        name.check(n, n)
    except MaskError:
        return ONLY_DATA, False
    cells = _cells(n, part, sizes)
    try:
        answers = part.truth(*cells)
    except Exception as error:  # a user's function may raise anything
        return f"at {n:,} the function does not answer ({type(error).__name__}), as if it read data", False
    different = answers ^ name.truth(*cells)
    if not bool(different.any()):
        return "", False
    _, _, row, key = different.nonzero()[0].tolist()
    return f"at {n:,} tokens they are not, first query {int(cells[2].flatten()[row])} and key {key}", True


def _cells(n: int, part: Mask, sizes: dict[str, int | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some rows from the first to the last, and all keys."""
    count = max(2, min(n, PROBED_ROWS, MAX_PROBED_CELLS // n))
    rows = torch.linspace(0, n - 1, count, dtype=torch.float64).long()
    axes = zip((part.batch_size, part.head_count), sizes.values(), strict=True)
    b, h = (torch.arange(size or 1 if held == ANY else held) for held, size in axes)
    return b.view(-1, 1, 1, 1), h.view(1, -1, 1, 1), rows.view(1, 1, -1, 1), torch.arange(n).view(1, 1, 1, -1)


def other_lengths(n: int) -> tuple[int, ...]:
    """Lengths beside `n`: a shorter one, and longer ones that are prime.

    >>> other_lengths(30)
    (15, 61, 127, 1009, 100003)
    """
    longer = (next_prime(2 * n), next_prime(4 * n))
    return (*((n // 2,) if n > 1 else ()), *longer, *(far for far in FAR_LENGTHS if far > longer[-1]))


def next_prime(n: int) -> int:
    """The first prime after `n`."""
    n += 1
    while n < 2 or any(n % d == 0 for d in range(2, isqrt(n) + 1)):
        n += 1
    return n
