"""The answer to "do these masks mean the same?": true, or false with a cell that shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """One (query, key) pair of one sample and head."""

    sample: int
    head: int
    query: int
    key: int


@dataclass(frozen=True, eq=False)
class Verdict:
    """True or false like the bool that it stands for; when false, `witness` is a cell that refutes it.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> verdict = window(8).equivalent(causal, 9)
    >>> bool(verdict), verdict.witness
    (False, Cell(sample=0, head=0, query=8, key=0))
    >>> verdict
    no: query 8 may see key 0 under `causal`, but not under `window(8)`
    """

    witness: Cell | None
    text: str = "yes"

    def __bool__(self) -> bool:
        return self.witness is None

    def __eq__(self, other: object) -> bool:
        return bool(self) == bool(other) if isinstance(other, (bool, Verdict)) else NotImplemented

    def __hash__(self) -> int:
        return hash(bool(self))

    def __repr__(self) -> str:
        return self.text
