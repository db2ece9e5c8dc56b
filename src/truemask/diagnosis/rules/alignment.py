"""Findings about where rows and keys are placed against each other: top left, bottom right, a diagonal that is off."""

from __future__ import annotations

from collections.abc import Iterator

from truemask.common.finding import Finding
from truemask.common.formatting import counted
from truemask.diagnosis.convention_warnings import one_axis, top_left
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.rules.context import Subject
from truemask.masks.core.mask import Mask
from truemask.masks.structure.order import is_order
from truemask.masks.structure.placement import offset

MOST_AHEAD = 3  # keys by which a diagonal is likely off, rather than meant to be there


def alignment(x: Subject) -> Iterator[Finding]:
    """Fewer queries than keys without `at`, whether it is an expression or cells; more queries than keys."""
    said = top_left(x.mask, x.q_len, x.kv_len)
    if said:
        yield Finding("top-left", "warning", quoted(x.mask), said, str(x.mask.at(q_start=x.kv_len - x.q_len)))
    if said := one_axis(x.mask, x.q_len, x.kv_len):
        yield Finding("one-axis", "warning", quoted(x.mask), said, 'padding(lengths=..., on="keys")')
    rule, diagonal = _diagonal(x)
    start = x.kv_len - x.q_len
    if rule is None:
        return
    if diagonal == 0 and start > 0:
        message = (
            f"it looks back from the top left, like `torch.tril(..., diagonal=0)`: {counted(x.q_len, 'query')}, "
            f"{counted(x.kv_len, 'key')}, and none sees the last {start}. If the queries are the last positions, as in "
            f"decoding, it is diagonal={start}"
        )
        yield Finding("top-left", "warning", quoted(x.mask), message, str(rule.at(q_start=start)))
    if diagonal == start < 0:
        message = f"it is aligned at the bottom right: the first {counted(-start, 'query')} see nothing"
        yield Finding("right-aligned", "warning", quoted(x.mask), message, f"{rule}, if both count from the same start")


def diagonal_off(x: Subject) -> Iterator[Finding]:
    """Cells that look back, and one key ahead: the `diagonal=` of `torch.tril` and `triu` is one too many."""
    rule, diagonal = _diagonal(x)
    meant = max(0, x.kv_len - x.q_len)
    if rule is None or x.causal is False or not 0 < diagonal - meant <= MOST_AHEAD:
        return
    ahead = diagonal - meant
    message = (
        f"every query sees the next {'key' if ahead == 1 else f'{ahead} keys'} too, as of "
        f"`torch.tril(..., diagonal={diagonal})`: diagonal={meant} is causal (if it is meant, say `causal=False` here)"
    )
    yield Finding("diagonal-off", "warning", quoted(x.mask), message, str(rule.at(q_start=meant) if meant else rule))


def _diagonal(x: Subject) -> tuple[Mask | None, int]:
    """The rule of cells that look back, `causal` or `window(n)`, and by how much their diagonal lies to the right."""
    if x.name is None:
        return None, 0
    rule, q_start, k_start = offset(x.name)
    return (rule, q_start - k_start) if is_order(rule) else (None, 0)


PLACING_RULES = (alignment, diagonal_off)
