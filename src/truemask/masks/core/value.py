"""A mask as a value: what it is made of, equality and hashing, pickling, and its text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from truemask.common.real_tensors import is_late, remembered
from truemask.errors import MaskError
from truemask.masks.core.data import Data
from truemask.masks.core.queries import ANY

if TYPE_CHECKING:
    from typing_extensions import Self

DEEPEST = 200  # nesting of an expression: far more than anyone writes, far less than Python's own limit

Written = tuple[str, int]


class Value(ABC):
    """A frozen dataclass whose fields are numbers, data, and other values of its kind."""

    kind: ClassVar[str] = ""
    batch_size: Any
    head_count: Any

    @abstractmethod
    def _write(self) -> Written:
        """The text of this expression and how tightly it binds."""

    @property
    def parts(self) -> dict[str, Any]:
        """The fields that the expression is made of, by name."""
        return {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}

    @remembered
    def _child_fields(self) -> tuple[str, ...]:
        return tuple(name for name, part in self.parts.items() if _holds_masks(part))

    @remembered
    def children(self) -> tuple[Any, ...]:
        """The masks that this one is made of."""
        values = (getattr(self, name) for name in self._child_fields)
        return tuple(m for value in values for m in ((value,) if isinstance(value, Value) else value))

    @remembered
    def functions(self) -> tuple[Any, ...]:
        """The functions of the caller among its parts: what `predicate` made."""
        return tuple(fn for child in self.children for fn in child.functions)

    @remembered
    def holds_cells(self) -> bool:
        """Whether some part is a tensor of cells."""
        return any(child.holds_cells for child in self.children)

    @remembered
    def depth(self) -> int:
        """How deeply the expression is nested; a leaf has depth 1."""
        return 1 + max((child.depth for child in self.children), default=0)

    def walk(self) -> Iterator[Any]:
        """This mask and all those below it, outermost first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def __post_init__(self) -> None:
        if self.depth > DEEPEST:
            raise MaskError(
                f"this expression is nested more than {DEEPEST} deep: combine masks of one kind flatly instead"
            )
        _ = self.batch_size, self.head_count  # parts that hold data for different numbers of samples are an error here

    @property
    def is_late(self) -> bool:
        """Whether some of its data or numbers come in with each call of a graph that is being recorded."""
        own = any(part.late if isinstance(part, Data) else is_late(part) for part in self.parts.values())
        return own or any(child.is_late for child in self.children)

    def twin(self) -> Self:
        """An equal mask that shares all data but is another object."""
        new = object.__new__(type(self))
        vars(new).update({name: part for name, part in vars(self).items() if name not in ("ticket", "number")})
        return new

    @remembered
    def _key(self) -> tuple[object, ...]:
        return (self.kind, *self.parts.values())

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Value) or self.kind != other.kind:
            return self is other
        if self.is_late or other.is_late:  # which have no hash
            return self.is_late and other.is_late and self._key == other._key
        return hash(self) == hash(other) and self._key == other._key

    def __hash__(self) -> int:
        if "_hash" not in vars(self):
            vars(self)["_hash"] = hash(self._key)
        return vars(self)["_hash"]

    def __getstate__(self) -> dict[str, object]:
        return self.parts

    @remembered
    def text(self) -> str:
        """The expression as text; `tm.parse` reads it back if `has_text`."""
        return self._write()[0]

    @remembered
    def has_text(self) -> bool:
        """Whether the text is complete: no data too large to write, no function."""
        own = all(part.complete for part in self.parts.values() if isinstance(part, Data))
        return own and all(child.has_text for child in self.children)

    def __repr__(self) -> str:
        return self.text


def _holds_masks(value: object) -> bool:
    return isinstance(value, Value) or (isinstance(value, tuple) and bool(value) and isinstance(value[0], Value))


def joined(axis: str, masks: Iterable[Value], sizes: Iterable[int]) -> int:
    """The common size of an axis: 1 gives way to any, ANY to a number, and two numbers must agree."""
    pairs = list(zip(sizes, masks, strict=True))
    known = [(size, mask) for size, mask in pairs if size > 1]
    if not known:
        return ANY if any(size == ANY for size, _ in pairs) else 1
    a, first = known[0]
    for b, second in known[1:]:
        if a == b:
            continue
        if first is second:
            raise MaskError(f"the parts of `{first}` hold data for {a} and for {b} {axis}: they must agree")
        raise MaskError(f"cannot combine `{first}`, which holds data for {a} {axis}, with `{second}`, which has {b}")
    return a
