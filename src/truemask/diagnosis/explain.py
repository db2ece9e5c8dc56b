"""`explain`: whether a query may attend to a key, and the fewest parts of the expression that decide it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from truemask.common.arguments import whole
from truemask.common.formatting import shortened
from truemask.diagnosis.leaf_reasons import because
from truemask.errors import MaskError
from truemask.masks.compose.boolean import And, Minus, Not, Or, Xor
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import PerHead, PerSample, Select
from truemask.masks.compose.reindex import At, Take, Transposed
from truemask.masks.core.mask import Mask
from truemask.masks.core.queries import sees
from truemask.masks.core.segments import Segments
from truemask.masks.core.value import ANY
from truemask.masks.core.verdict import Cell
from truemask.masks.formats.as_mask import expression
from truemask.masks.leaves.per_token import number_for

WIDEST = 100  # characters of an expression that stand in one line
MOST_WAYS = 16  # ways to decide a part that are kept while more are looked at


@dataclass(frozen=True)
class Reason:
    """A part of the expression that decides a cell: what it says, of which cell of its own, and why."""

    mask: Mask
    allows: bool
    cell: Cell  # as the part counts: where rows were re-indexed, its own positions
    why: str
    span: tuple[int, int]  # where it stands in the text of the whole


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; true or false like the cell, and printable."""

    mask: Mask
    cell: Cell
    allowed: bool
    reasons: tuple[Reason, ...]
    notes: tuple[str, ...]  # how positions are counted on the way to the parts

    def __bool__(self) -> bool:
        return self.allowed

    def __str__(self) -> str:
        b, h, q, k = self.cell
        where = [f"{name} {i}" for name, i, own in self._axes(b, h) if own != 1]
        head = f"query {q} {'may' if self.allowed else 'may not'} attend to key {k}"
        lines = [head + (f" in {', '.join(where)}" if where else ""), *self._underlined()]
        said = dict.fromkeys(map(self._line, self.reasons))  # a part that stands twice says it once
        return "\n".join([*lines, *(f"  {note}" for note in self.notes), *said])

    __repr__ = __str__

    def _line(self, reason: Reason) -> str:
        return f"  {shortened(self.mask.text[slice(*reason.span)])}: {reason.why}"

    def _axes(self, b: int, h: int) -> list[tuple[str, int, int]]:
        return [("sample", b, self.mask.batch_size), ("head", h, self.mask.head_count)]

    def _underlined(self) -> list[str]:
        """The expression, and marks under the parts that decide; in lines of bounded width."""
        text = self.mask.text
        marks = [" "] * len(text)
        for reason in self.reasons:
            marks[slice(*reason.span)] = "^" * (reason.span[1] - reason.span[0])
        under = "".join(marks)
        lines: list[str] = []
        for start in range(0, len(text), WIDEST):
            lines += [text[start : start + WIDEST], under[start : start + WIDEST].rstrip()]
        return [line for line in lines if line]


def explain(mask: Mask | str, q: int, k: int, *, sample: int = 0, head: int = 0) -> Explanation:
    """Whether query `q` may attend to key `k`, and why: the smallest set of parts of the expression that decides it.

    True of a conjunction takes all its terms, false one of them (the one that needs fewest parts), and the other way
    round for `|`. A part that stands in several places is marked where it counts, and is one; that `a | ~a` holds
    whatever `a` says is not used. Positions are logical ones, as the mask counts them (law 2 in docs/conventions.md).

    Args:
        mask: any mask, or its text.
        q: the query's position, and `k` the key's, 0-based.
        sample: which sample, and `head` which query head, where the mask varies over them.

    Raises:
        MaskError: no such cell.

    >>> from truemask.masks.leaves.per_token import prefix
    >>> from truemask.masks.leaves.bands import causal, window
    >>> explain(causal & (window(4) | prefix(2)), 9, 3)
    query 9 may not attend to key 3
    causal & (window(4) | prefix(2))
              ^^^^^^^^^   ^^^^^^^^^
      window(4): key 3 is 6 positions before query 9, and the window reaches 3 back
      prefix(2): key 3 is not among the first 2 keys
    >>> bool(explain(causal & (window(4) | prefix(2)), 9, 1))
    True
    """
    mask = expression("explain: mask", mask)
    cell = Cell(whole(sample, "sample"), whole(head, "head"), whole(q, "q"), whole(k, "k"))
    for name, place, own in (("sample", cell.sample, mask.batch_size), ("head", cell.head, mask.head_count)):
        if own not in (1, ANY) and place >= own:
            raise MaskError(f"explain: {name} {place} is out of range, the mask `{mask}` holds {own}")
    mask.check(cell.query + 1, cell.key + 1)
    allowed, ways = _decide(mask, cell, 0)
    return Explanation(mask, cell, allowed, ways[0].reasons, tuple(dict.fromkeys(ways[0].notes)))


class Way(NamedTuple):
    """Parts that decide a cell together, and notes about the positions that they are asked about."""

    reasons: tuple[Reason, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many parts they are; one that stands in several places counts once."""
        return len({(reason.mask, reason.cell) for reason in self.reasons})


Decision = tuple[bool, list[Way]]  # the value of a part, and the ways to decide it, the shortest first


def _decide(mask: Mask, cell: Cell, start: int) -> Decision:
    """The value of a part whose text begins at `start`, and what decides it."""
    match mask:
        case And() | Or() | Xor() | Minus() | Not():
            return _combined(mask, cell, start)
        case PerHead() | PerSample():
            place = min(cell.head if isinstance(mask, PerHead) else cell.sample, len(mask.masks) - 1)
            return _decide(mask.masks[place], cell, start + _starts(mask)[place])
        case At() | Take() | Select() | Transposed():
            there, note = _moved(mask, cell)
            return _noted(note, _decide(mask.base, there, start + _starts(mask)[0]))
        case Packed() | Padded() | Prepended():
            return _set_among_others(mask, cell, start)
        case _:
            return _own(mask, cell, start, 0)


def _noted(note: str, decision: Decision) -> Decision:
    allowed, ways = decision
    return allowed, [Way(way.reasons, (note, *way.notes)) for way in ways]


def _own(mask: Mask, cell: Cell, start: int, after: int, allowed: bool | None = None) -> Decision:
    """What a part says itself, marked from `after` on in its text."""
    seen = sees(mask, *cell) if allowed is None else allowed
    span = (start + after, start + len(mask.text))
    return seen, [Way((Reason(mask, seen, cell, because(mask, seen, cell), span),))]


def _combined(mask: And | Or | Xor | Minus | Not, cell: Cell, start: int) -> Decision:
    parts = [_decide(child, cell, start + at) for child, at in zip(mask.children, _starts(mask), strict=True)]
    if isinstance(mask, Xor):
        return sum(seen for seen, _ in parts) % 2 == 1, _together(parts)
    if isinstance(mask, (Not, Minus)):
        seen, ways = parts[-1]
        parts[-1] = (not seen, ways)
    alone = isinstance(mask, Or)  # the value that one part decides
    deciding = [way for seen, ways in parts if seen == alone for way in ways]
    return (alone, _shortest(deciding)) if deciding else (not alone, _together(parts))


def _together(parts: Sequence[Decision]) -> list[Way]:
    """The ways to decide all parts."""
    found = [Way(())]
    for _, ways in parts:
        found = _shortest(Way((*a.reasons, *b.reasons), (*a.notes, *b.notes)) for a, b in product(found, ways))
    return found


def _shortest(ways: Iterable[Way]) -> list[Way]:
    """Some of them, the shortest first: a longer one may share leaves with other parts, and be the shortest there."""
    return sorted(ways, key=lambda way: way.size)[:MOST_WAYS]


def _moved(mask: At | Take | Select | Transposed, cell: Cell) -> tuple[Cell, str]:
    """The cell that the base is asked about, and how to say so."""
    b, h, q, k = cell
    match mask:
        case At():
            there = cell._replace(query=q + mask.q_start, key=k + mask.k_start)
        case Take():
            row, column = (
                place if side is None else _entry(side.array, b, place) for side, place in ((mask.q, q), (mask.k, k))
            )
            there = cell._replace(query=row, key=column)
        case Select():
            b, h = mask._places(b, h)  # pyright: ignore[reportPrivateUsage]
            return cell._replace(sample=b, head=h), f"`select`: it is sample {b}, head {h} of the mask"
        case Transposed():
            return cell._replace(query=k, key=q), f"`.T`: query {q} and key {k} change places"
    return there, _stands(cell, there)


def _entry(table: np.ndarray, b: int, i: int) -> int:
    rows = np.atleast_2d(table)
    return int(rows[min(b, len(rows) - 1), i])


def _set_among_others(mask: Packed | Padded | Prepended, cell: Cell, start: int) -> Decision:
    """Documents, padded samples and what stands behind registers: what lies outside is decided here."""
    tail = mask.text.index(f".{mask.kind}(", _starts(mask)[0] + len(mask.base.text))
    match mask:
        case Packed():
            inside, there, note = _in_document(mask, cell)
        case Padded():
            first = number_for(mask.starts, cell.sample)
            inside = min(cell.query, cell.key) >= first
            there = cell._replace(query=cell.query - first, key=cell.key - first)
            note = f"sample {cell.sample} begins at {first}: {_stands(cell, there)}"
        case Prepended():
            return _behind(mask, cell, start, tail)
    if not inside:
        return _own(mask, cell, start, tail, allowed=False)
    found = _noted(note, _decide(mask.base, there, start + _starts(mask)[0]))
    return (True, _together([found, _own(mask, cell, start, tail, allowed=True)])) if found[0] else found


def _in_document(mask: Packed, cell: Cell) -> tuple[bool, Cell, str]:
    sides: tuple[Segments, Segments] = mask._sides  # pyright: ignore[reportPrivateUsage]
    (own, row), (other, column) = (
        (_entry(side.document.numpy(), cell.sample, place), _entry(side.offset.numpy(), cell.sample, place))
        for side, place in zip(sides, (cell.query, cell.key), strict=True)
    )
    there = cell._replace(query=row, key=column)
    return own == other, there, f"in document {own} {_stands(cell, there)}"


def _stands(cell: Cell, there: Cell) -> str:
    return f"query {cell.query} stands at position {there.query}, key {cell.key} at position {there.key}"


def _behind(mask: Prepended, cell: Cell, start: int, tail: int) -> Decision:
    if cell.key < mask.k:
        return _own(mask, cell, start, tail, allowed=True)
    there = cell._replace(query=max(cell.query - mask.q, 0), key=cell.key - mask.k)
    if cell.query < mask.q:
        note = f"query {cell.query} is an extra row, which sees `seen`"
        return _noted(note, _decide(mask.seen, there, start + _starts(mask)[1]))
    note = f"behind {mask.q} extra rows and {mask.k} extra keys {_stands(cell, there)}"
    return _noted(note, _decide(mask.base, there, start + _starts(mask)[0]))


def _starts(mask: Mask) -> list[int]:
    """Where the texts of the parts begin in the text of a mask: they stand there in order."""
    starts: list[int] = []
    after = 0
    for child in mask.children:
        starts.append(mask.text.index(child.text, after))
        after = starts[-1] + len(child.text)
    return starts
