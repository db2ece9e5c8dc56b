"""`explain`: whether a query may attend to a key, and the fewest parts of the expression that decide it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from truemask.common.arguments import whole
from truemask.common.formatting import shortened
from truemask.diagnosis.leaf_reasons import because
from truemask.errors import MaskError
from truemask.masks.compose.boolean import And, Minus, Not, Or, Xor
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import Select
from truemask.masks.compose.reindex import At, Take, Transposed
from truemask.masks.core.mask import Mask
from truemask.masks.core.queries import sees
from truemask.masks.core.value import ANY
from truemask.masks.core.verdict import Cell
from truemask.masks.formats.as_mask import expression
from truemask.masks.structure.documents import labels_at
from truemask.masks.structure.groups import CONSTANTS, LEAVES, PER_AXIS
from truemask.masks.structure.open_functions import open_function, register
from truemask.masks.structure.placement import Step, step_into

LINE_WIDTH = 100  # characters of an expression that stand in one line
MAX_PATHS = 16  # paths to decide a part that are kept while more are looked at


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
        where = [f"{name} {i}" for name, i, count in self._axes(b, h) if count != 1]
        head = f"query {q} {'may' if self.allowed else 'may not'} attend to key {k}"
        lines = [head + (f" in {', '.join(where)}" if where else ""), *self._underlined()]
        reasons = dict.fromkeys(map(self._line, self.reasons))  # a part that stands twice says it once
        return "\n".join([*lines, *(f"  {note}" for note in self.notes), *reasons])

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
        for start in range(0, len(text), LINE_WIDTH):
            lines += [text[start : start + LINE_WIDTH], under[start : start + LINE_WIDTH].rstrip()]
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
    for name, place, count in (("sample", cell.sample, mask.batch_size), ("head", cell.head, mask.head_count)):
        if count not in (1, ANY) and place >= count:
            raise MaskError(f"explain: {name} {place} is out of range, the mask `{mask}` holds {count}")
    mask.check(cell.query + 1, cell.key + 1)
    allowed, paths = decide(mask, cell, 0)
    return Explanation(mask, cell, allowed, paths[0].reasons, tuple(dict.fromkeys(paths[0].notes)))


class Path(NamedTuple):
    """Parts that decide a cell together, and notes about the positions that they are asked about."""

    reasons: tuple[Reason, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many parts they are; one that stands in several places counts once."""
        return len({(reason.mask, reason.cell) for reason in self.reasons})


Decision = tuple[bool, list[Path]]  # the value of a part, and the paths to decide it, the shortest first


@open_function
def decide(mask: Mask, cell: Cell, start: int) -> Decision:
    """The value of a part whose text begins at `start`, and what decides it."""
    raise NotImplementedError


@register(decide, *CONSTANTS, *LEAVES)
def _word(mask: Mask, cell: Cell, start: int) -> Decision:
    return _own(mask, cell, start, 0, sees(mask, *cell))


@register(decide, And)
def _and(mask: And, cell: Cell, start: int) -> Decision:
    return _combined(_decide_parts(mask, cell, start), alone=False)


@register(decide, Or)
def _or(mask: Or, cell: Cell, start: int) -> Decision:
    return _combined(_decide_parts(mask, cell, start), alone=True)


@register(decide, Xor)
def _xor(mask: Xor, cell: Cell, start: int) -> Decision:
    parts = _decide_parts(mask, cell, start)
    return sum(allowed for allowed, _ in parts) % 2 == 1, _together(parts)


@register(decide, Minus, Not)
def _without(mask: Minus | Not, cell: Cell, start: int) -> Decision:
    *parts, (allowed, paths) = _decide_parts(mask, cell, start)
    return _combined([*parts, (not allowed, paths)], alone=False)


@register(decide, *PER_AXIS)
def _of_axis(mask: Mask, cell: Cell, start: int) -> Decision:
    return _decide_part(mask, _step(mask, cell), start)


@register(decide, At, Take)
def _reindexed(mask: Mask, cell: Cell, start: int) -> Decision:
    step = _step(mask, cell)
    return _noted(_stands(cell, step.cell), _decide_part(mask, step, start))


@register(decide, Select)
def _selected(mask: Select, cell: Cell, start: int) -> Decision:
    step = _step(mask, cell)
    note = f"`select`: it is sample {step.cell.sample}, head {step.cell.head} of the mask"
    return _noted(note, _decide_part(mask, step, start))


@register(decide, Transposed)
def _transposed(mask: Transposed, cell: Cell, start: int) -> Decision:
    note = f"`.T`: query {cell.query} and key {cell.key} change places"
    return _noted(note, _decide_part(mask, _step(mask, cell), start))


@register(decide, Packed)
def _packed(mask: Packed, cell: Cell, start: int) -> Decision:
    step, (document, _) = _step(mask, cell), labels_at(mask, cell) or (0, 0)
    note = f"in document {document} {_stands(cell, step.cell)}"
    return _inside(mask, cell, start, ".packed(", step, note)


@register(decide, Padded)
def _padded(mask: Padded, cell: Cell, start: int) -> Decision:
    step = _step(mask, cell)
    note = f"sample {cell.sample} begins at {cell.query - step.cell.query}: {_stands(cell, step.cell)}"
    return _inside(mask, cell, start, ".padded(", step, note)


@register(decide, Prepended)
def _prepended(mask: Prepended, cell: Cell, start: int) -> Decision:
    step = _step(mask, cell)
    if step.part is None:
        return _own(mask, cell, start, _tail(mask, ".prepended("), allowed=True)
    note = f"behind {mask.q} extra rows and {mask.k} extra keys {_stands(cell, step.cell)}"
    if cell.query < mask.q:
        note = f"query {cell.query} is an extra row, which sees `seen`"
    return _noted(note, _decide_part(mask, step, start))


def _step(mask: Mask, cell: Cell) -> Step:
    step = step_into(mask, cell)
    assert step is not None, "only masks that ask one part about a cell are asked here"
    return step


def _decide_part(mask: Mask, step: Step, start: int) -> Decision:
    """What the part says that a cell leads to."""
    place = step.part or 0
    return decide(mask.children[place], step.cell, start + _starts(mask)[place])


def _decide_parts(mask: Mask, cell: Cell, start: int) -> list[Decision]:
    """What all parts say of the same cell."""
    return [decide(child, cell, start + after) for child, after in zip(mask.children, _starts(mask), strict=True)]


def _noted(note: str, decision: Decision) -> Decision:
    allowed, paths = decision
    return allowed, [Path(path.reasons, (note, *path.notes)) for path in paths]


def _own(mask: Mask, cell: Cell, start: int, after: int, allowed: bool) -> Decision:
    """What a part says itself, marked from `after` on in its text."""
    span = (start + after, start + len(mask.text))
    return allowed, [Path((Reason(mask, allowed, cell, because(mask, allowed, cell), span),))]


def _combined(parts: Sequence[Decision], *, alone: bool) -> Decision:
    """The parts under an operator of which one part decides the value `alone`, and all together the other one."""
    deciding = [path for allowed, paths in parts if allowed == alone for path in paths]
    return (alone, _shortest(deciding)) if deciding else (not alone, _together(parts))


def _inside(mask: Mask, cell: Cell, start: int, name: str, step: Step, note: str) -> Decision:
    """Documents and padded samples: what lies outside is decided here, and what lies inside by both."""
    tail = _tail(mask, name)
    if step.part is None:
        return _own(mask, cell, start, tail, allowed=False)
    decision = _noted(note, _decide_part(mask, step, start))
    return (True, _together([decision, _own(mask, cell, start, tail, allowed=True)])) if decision[0] else decision


def _together(parts: Sequence[Decision]) -> list[Path]:
    """The paths to decide all parts."""
    combined = [Path(())]
    for _, paths in parts:
        combined = _shortest(Path((*a.reasons, *b.reasons), (*a.notes, *b.notes)) for a, b in product(combined, paths))
    return combined


def _shortest(paths: Iterable[Path]) -> list[Path]:
    """Some of them, the shortest first: a longer one may share leaves with other parts, and be the shortest there."""
    return sorted(paths, key=lambda path: path.size)[:MAX_PATHS]


def _stands(cell: Cell, there: Cell) -> str:
    return f"query {cell.query} stands at position {there.query}, key {cell.key} at position {there.key}"


def _tail(mask: Mask, name: str) -> int:
    """Where the method that makes the mask stands in its text, behind the part that it is of."""
    return mask.text.index(name, _starts(mask)[0] + len(mask.children[0].text))


def _starts(mask: Mask) -> list[int]:
    """Where the texts of the parts begin in the text of a mask: they stand there in order."""
    starts: list[int] = []
    after = 0
    for child in mask.children:
        starts.append(mask.text.index(child.text, after))
        after = starts[-1] + len(child.text)
    return starts
