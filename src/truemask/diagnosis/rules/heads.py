"""Findings of single heads: what is wrong with one of them is told of it, and not lost in the sum over all."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from truemask.common.finding import Finding
from truemask.common.formatting import counted, ranges
from truemask.diagnosis.rules.context import Rule, RuleContext
from truemask.masks.structure.parts import of_head

MAX_HEADS = 64  # different ones that are looked at one by one


def of_heads(context: RuleContext, rules: Sequence[Rule]) -> Iterator[Finding]:
    """What the rules find, with the heads that it is true of where it is not true of all."""
    groups = _groups(context)
    if not 1 < len(groups) <= MAX_HEADS:
        yield from (finding for rule in rules for finding in rule(context))
        return
    everywhere = sum(len(heads) for heads in groups)
    for rule in rules:
        findings: dict[Finding, list[int]] = {}
        for heads in groups:
            for finding in rule(replace(context, mask=of_head(context.mask, heads[0]), among=context.mask)):
                findings.setdefault(finding, []).extend(heads)
        for finding, heads in findings.items():
            yield finding if len(heads) == everywhere else replace(finding, where=f"{named(heads)}, {finding.where}")


def named(heads: Sequence[int]) -> str:
    """Heads by their numbers.

    >>> named([2]), named([0, 1, 5])
    ('head 2', '3 heads (0-1, 5)')
    """
    if len(heads) == 1:
        return f"head {heads[0]}"
    return f"{counted(len(heads), 'head')} ({ranges(np.array(sorted(heads)))})"


def _groups(context: RuleContext) -> list[list[int]]:
    """The heads that share a mask, in order."""
    count = context.mask.head_count or context.heads or 1
    samples = context.mask.batch_size or context.batch or 1
    groups: dict[Hashable, list[int]] = {}
    for h in range(count):
        alike = tuple(context.mask._distinct_key(b, h) for b in range(samples))
        groups.setdefault(alike, []).append(h)
    return list(groups.values())
