"""Findings about where rows and keys are placed against each other: top left, bottom right, a diagonal that is off."""

from __future__ import annotations

from collections.abc import Iterator

from truemask.common.finding import Finding
from truemask.common.formatting import counted
from truemask.diagnosis.convention_warnings import one_axis, top_left
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.rules.context import RuleContext
from truemask.masks.core.mask import Mask
from truemask.masks.structure.order import is_order
from truemask.masks.structure.placement import offset

MAX_KEYS_AHEAD = 3  # keys by which a diagonal is likely off, rather than meant to be there


def alignment(context: RuleContext) -> Iterator[Finding]:
    """Fewer queries than keys without `at`, whether it is an expression or cells; more queries than keys."""
    message = top_left(context.mask, context.q_len, context.kv_len)
    if message:
        yield Finding(
            "top-left",
            "warning",
            quoted(context.mask),
            message,
            str(context.mask.at(q_start=context.kv_len - context.q_len)),
        )
    if message := one_axis(context.mask, context.q_len, context.kv_len):
        yield Finding("one-axis", "warning", quoted(context.mask), message, 'padding(lengths=..., on="keys")')
    rule, diagonal = _diagonal(context)
    start = context.kv_len - context.q_len
    if rule is None:
        return
    if diagonal == 0 and start > 0:
        message = (
            f"it looks back from the top left, like `torch.tril(..., diagonal=0)`: {counted(context.q_len, 'query')}, "
            f"{counted(context.kv_len, 'key')}, and none sees the last {start}. If the queries are the last "
            f"positions, as in decoding, it is diagonal={start}"
        )
        yield Finding("top-left", "warning", quoted(context.mask), message, str(rule.at(q_start=start)))
    if diagonal == start < 0:
        message = f"it is aligned at the bottom right: the first {counted(-start, 'query')} see nothing"
        yield Finding(
            "right-aligned", "warning", quoted(context.mask), message, f"{rule}, if both count from the same start"
        )


def diagonal_off(context: RuleContext) -> Iterator[Finding]:
    """Cells that look back, and one key ahead: the `diagonal=` of `torch.tril` and `triu` is one too many."""
    rule, diagonal = _diagonal(context)
    meant = max(0, context.kv_len - context.q_len)
    if rule is None or context.causal is False or not 0 < diagonal - meant <= MAX_KEYS_AHEAD:
        return
    ahead = diagonal - meant
    message = (
        f"every query sees the next {'key' if ahead == 1 else f'{ahead} keys'} too, as of "
        f"`torch.tril(..., diagonal={diagonal})`: diagonal={meant} is causal (if it is meant, say `causal=False` here)"
    )
    yield Finding(
        "diagonal-off", "warning", quoted(context.mask), message, str(rule.at(q_start=meant) if meant else rule)
    )


def _diagonal(context: RuleContext) -> tuple[Mask | None, int]:
    """The rule of cells that look back, `causal` or `window(n)`, and by how much their diagonal lies to the right."""
    if context.name is None:
        return None, 0
    rule, q_start, k_start = offset(context.name)
    return (rule, q_start - k_start) if is_order(rule) else (None, 0)


ALIGNMENT_RULES = (alignment, diagonal_off)
