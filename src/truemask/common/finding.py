"""What a check found: one finding, and all of them as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import overload

SEVERITIES = ("note", "warning", "error")  # the mildest first


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: a short name for it, the same in every release: `dead-queries`, `leak`, ...
        severity: `error` (it cannot be right), `warning` (probably not meant), `note` (worth knowing).
        where: which rows, keys or parts of the expression.
        message: what it is, in a sentence.
        fix: what to write instead; empty where there is nothing to do.
    """

    code: str
    severity: str
    where: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.severity} [{self.code}] {self.where}: {self.message}"]
        return "\n".join([*lines, *([f"    fix: {self.fix}"] if self.fix else [])])


class Findings(Sequence[Finding]):
    """Findings, the gravest first; prints as a list, and is empty if there is nothing to say."""

    def __init__(self, found: Iterable[Finding] = ()) -> None:
        self._found = tuple(sorted(found, key=lambda one: -SEVERITIES.index(one.severity)))

    @overload
    def __getitem__(self, place: int) -> Finding: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Finding]: ...

    def __getitem__(self, place: int | slice) -> Finding | Sequence[Finding]:
        return self._found[place]

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found)

    @property
    def codes(self) -> list[str]:
        """The codes, in order."""
        return [one.code for one in self]

    @property
    def worst(self) -> str:
        """The gravest severity; empty without findings."""
        return self._found[0].severity if self._found else ""

    @property
    def ok(self) -> bool:
        """Whether nothing is worse than a note."""
        return self.worst in ("", "note")

    def to_dicts(self) -> list[dict[str, str]]:
        """As plain dictionaries, for JSON."""
        return [asdict(one) for one in self]

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing found"

    __repr__ = __str__
