"""What is diagnosed: a mask, the lengths, what it is meant to be, and the questions that several rules ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from truemask.common.finding import Finding
from truemask.diagnosis.recognise import recognise
from truemask.errors import MaskError
from truemask.masks.core.exact_form import exact_slabs
from truemask.masks.core.mask import Mask
from truemask.masks.core.queries import first, sizes_of
from truemask.masks.core.verdict import Cell
from truemask.masks.leaves.bands import causal, local
from truemask.masks.structure.data import is_opaque
from truemask.masks.structure.documents import is_documents_only
from truemask.masks.structure.placement import chooses_samples, parts_axes, reindexed_like

LONGER_FACTORS = (2, 50)  # times as long texts that are asked about
MAX_CELLS = 1 << 22  # of them, where cells have to be looked at


@dataclass(frozen=True)
class RuleContext:
    """A mask at some sizes, and what is claimed of it."""

    mask: Mask
    q_len: int
    kv_len: int
    batch: int | None
    heads: int | None
    causal: bool | None
    documents: Mask | None
    among: Mask | None = None  # the mask of all heads, if this is the one of a head

    @property
    def sizes(self) -> dict[str, int | None]:
        """Samples and heads, as questions take them."""
        return {"batch": self.batch, "heads": self.heads}

    def pairs(self, mask: Mask) -> int:
        """How many pairs a mask lets through, over all samples and heads that differ."""
        return int(mask.count(self.q_len, self.kv_len, **self._of(mask)).sum())

    def first(self, mask: Mask) -> Cell | None:
        """A pair that a mask lets through."""
        return first(mask, sizes_of(mask, self.q_len, self.kv_len, *self._of(mask).values()))

    def _of(self, mask: Mask) -> dict[str, int | None]:
        """The sizes, where the mask does not hold its own."""
        held = {"batch": mask.batch_size, "heads": mask.head_count}
        return {name: size if held[name] == 0 else None for name, size in self.sizes.items()}

    def means_the_same(self, other: Mask) -> bool:
        return bool(self.mask.equivalent(other, self.q_len, self.kv_len, **self._of(self.mask ^ other)))

    def means_the_same_longer(self, other: Mask) -> bool:
        """Whether that is so of longer texts too, as far as it can be seen; True if there is none to ask about."""
        for times in LONGER_FACTORS:
            q_len, kv_len = times * self.q_len + 1, times * self.kv_len + 1
            try:
                if q_len * kv_len > MAX_CELLS and exact_slabs(self.mask, 0, 0, q_len, kv_len) is None:
                    return True
                if not self.mask.equivalent(other, q_len, kv_len, **self._of(self.mask ^ other)):
                    return False
            except MaskError:  # it holds data for no more
                return True
        return True

    def any_part(self, question: Callable[[Mask], bool]) -> bool:
        """Whether the answer is true of the mask or of some part of it."""
        return any(map(question, self.mask.walk()))

    @property
    def counts_alike(self) -> bool:
        """Whether its parts count rows and keys from the same start."""
        return reindexed_like(self.mask, causal) is not None

    def here(self, plain: Mask) -> Mask:
        """`plain` for the mask's rows and keys; where its parts count them differently, both count from 0."""
        placed = reindexed_like(self.mask, plain)
        return plain if placed is None else placed

    @cached_property
    def name(self) -> Mask | None:
        """The expression that its cells are, where it is a tensor or a function."""
        if not is_opaque(self.mask):
            return None
        return recognise(self.mask, self.q_len, self.kv_len, **self.sizes)

    @cached_property
    def order(self) -> Mask:
        """`causal` for the mask's rows and keys."""
        return self.here(causal)

    @cached_property
    def future(self) -> Mask:
        """What it lets through of later keys."""
        return self.mask - self.order

    @cached_property
    def total(self) -> int:
        return self.pairs(self.mask)

    @cached_property
    def in_future(self) -> int:
        return self.pairs(self.future)

    @cached_property
    def on_diagonal(self) -> int:
        """Pairs of a query and the key at its own position."""
        return self.pairs(self.mask & self.here(local(0)))

    @property
    def one_axis(self) -> bool:
        """Whether query i and key i are the same token."""
        return self.q_len == self.kv_len and not self.any_part(parts_axes)

    def claimed_documents(self) -> Iterator[tuple[Mask, bool]]:
        """Documents that must not mix, for the mask's rows and keys, and whether the caller says so."""
        if self.documents is not None:
            # where it chooses samples, they were told of as they are now, not as the mask holds them
            yield self.documents if self.any_part(chooses_samples) else self.here(self.documents), True
            return
        yield from ((self.here(part), False) for part in self.mask.walk() if is_documents_only(part))


Rule = Callable[[RuleContext], Iterator[Finding]]


def at_cell(cell: Cell, mask: Mask) -> str:
    """A cell in words, with sample and head where the mask varies.

    >>> at_cell(Cell(0, 0, 3, 4), causal)
    'query 3 and key 4'
    """
    axes = (("sample", cell.sample, mask.batch_size), ("head", cell.head, mask.head_count))
    where = "".join(f" in {name} {place}" for name, place, count in axes if count != 1)
    return f"query {cell.query} and key {cell.key}{where}"
