"""What is diagnosed: a mask, the lengths, what it is meant to be, and the questions that several rules ask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from truemask.masks.core import Mask
from truemask.masks.labels import Documents
from truemask.masks.positional import causal
from truemask.masks.verdict import Cell


@dataclass(frozen=True)
class Subject:
    """A mask at some sizes, and what is claimed of it."""

    mask: Mask
    q_len: int
    kv_len: int
    batch: int | None
    heads: int | None
    causal: bool | None
    documents: Mask | None

    @property
    def sizes(self) -> dict[str, int | None]:
        """Samples and heads, as questions take them."""
        return {"batch": self.batch, "heads": self.heads}

    def pairs(self, mask: Mask) -> int:
        """How many pairs a mask lets through, over all samples and heads that differ."""
        return int(mask.count(self.q_len, self.kv_len, **self._of(mask)).sum())

    def first(self, mask: Mask) -> Cell | None:
        """A pair that a mask lets through."""
        return mask._first(*mask._sizes(self.q_len, self.kv_len, *self._of(mask).values()))  # pyright: ignore

    def _of(self, mask: Mask) -> dict[str, int | None]:
        """The sizes, where the mask does not hold its own."""
        own = {"batch": mask.batch_size, "heads": mask.head_count}
        return {name: size if own[name] == 0 else None for name, size in self.sizes.items()}

    def means_the_same(self, other: Mask) -> bool:
        return bool(self.mask.equivalent(other, self.q_len, self.kv_len, **self._of(self.mask ^ other)))

    @cached_property
    def kinds(self) -> set[str]:
        return {part.kind for part in self.mask.walk()}

    @cached_property
    def future(self) -> Mask:
        """What it lets through of later keys; rows are positions, however they are packed."""
        return self.mask - causal

    @cached_property
    def total(self) -> int:
        return self.pairs(self.mask)

    @cached_property
    def in_future(self) -> int:
        return self.pairs(self.future)

    @property
    def one_axis(self) -> bool:
        """Whether query i and key i are the same token."""
        return self.q_len == self.kv_len and not self.kinds & {"at", "take", "transposed"}

    def claimed_documents(self) -> Iterator[tuple[Mask, bool]]:
        """Documents that must not mix, and whether the caller says so."""
        if self.documents is not None:
            yield self.documents, True
            return
        yield from ((part, False) for part in self.mask.walk() if isinstance(part, Documents))


def at_cell(cell: Cell, mask: Mask) -> str:
    """A cell in words, with sample and head where the mask varies.

    >>> at_cell(Cell(0, 0, 3, 4), causal)
    'query 3 and key 4'
    """
    axes = (("sample", cell.sample, mask.batch_size), ("head", cell.head, mask.head_count))
    where = "".join(f" in {name} {place}" for name, place, own in axes if own != 1)
    return f"query {cell.query} and key {cell.key}{where}"
