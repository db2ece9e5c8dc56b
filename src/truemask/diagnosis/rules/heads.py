"""Findings of single heads: what is wrong with one of them is told of it, and not lost in the sum over all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from truemask.common.finding import Finding
from truemask.common.formatting import counted, ranges
from truemask.diagnosis.rules.context import Subject
from truemask.masks.structure.parts import of_head

MOST_HEADS = 64  # different ones that are looked at one by one

Rule = Callable[[Subject], Iterator[Finding]]


def of_heads(x: Subject, rules: Sequence[Rule]) -> Iterator[Finding]:
    """What the rules find, with the heads that it is true of where it is not true of all."""
    groups = _groups(x)
    if not 1 < len(groups) <= MOST_HEADS:
        yield from (finding for rule in rules for finding in rule(x))
        return
    everywhere = sum(len(heads) for heads in groups)
    for rule in rules:
        found: dict[Finding, list[int]] = {}
        for heads in groups:
            for finding in rule(replace(x, mask=of_head(x.mask, heads[0]), among=x.mask)):
                found.setdefault(finding, []).extend(heads)
        for finding, heads in found.items():
            yield finding if len(heads) == everywhere else replace(finding, where=f"{named(heads)}, {finding.where}")


def named(heads: Sequence[int]) -> str:
    """Heads by their numbers.

    >>> named([2]), named([0, 1, 5])
    ('head 2', '3 heads (0-1, 5)')
    """
    if len(heads) == 1:
        return f"head {heads[0]}"
    return f"{counted(len(heads), 'head')} ({ranges(np.array(sorted(heads)))})"


def _groups(x: Subject) -> list[list[int]]:
    """The heads that share a mask, in order."""
    count = x.mask.head_count or x.heads or 1
    samples = x.mask.batch_size or x.batch or 1
    groups: dict[Hashable, list[int]] = {}
    for h in range(count):
        alike = tuple(x.mask._distinct_key(b, h) for b in range(samples))
        groups.setdefault(alike, []).append(h)
    return list(groups.values())
