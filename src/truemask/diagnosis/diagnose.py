"""`diagnose`: what is likely wrong with a mask at given lengths, without a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.finding import Finding, Findings
from truemask.diagnosis.leaf_reasons import quoted
from truemask.diagnosis.rules.alignment import ALIGNMENT_RULES
from truemask.diagnosis.rules.context import RuleContext
from truemask.diagnosis.rules.expression import EXPRESSION_RULES, known_by_name
from truemask.diagnosis.rules.heads import of_heads
from truemask.diagnosis.rules.misreadings import MISREADING_RULES
from truemask.diagnosis.rules.visibility import VISIBILITY_RULES
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import expression
from truemask.masks.leaves.documents import documents as documents_of
from truemask.masks.leaves.matrices import dense
from truemask.masks.structure.data import cells_held


def diagnose(
    mask: Mask | Tensor | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    causal: bool | None = None,
    documents: object = None,
) -> Findings:
    """What is likely wrong with a mask: queries that see nothing, a visible future, documents that mix, and so on.

    Nothing is evaluated cell by cell where the mask has an exact form. The codes are listed in docs/diagnosis.md.

    Args:
        mask: an expression, its text, or a bool tensor `[q, k]` or `[b, h, q, k]`, True = may attend.
        q_len: queries; `kv_len` keys (default: as many as positions have passed).
        batch: samples, and `heads`, where the mask varies over them without holding a number of them.
        causal: what it is meant to be: True makes a visible future an error, False leaves it alone; None asks the
            expression, which claims it where it says `causal` or `window`.
        documents: lengths of packed documents `[m]`, or one list for each sample, that must not mix; None asks the
            expression.

    Returns:
        Findings, the gravest first; empty if there is nothing to say.

    >>> from truemask.masks.leaves.per_token import prefix
    >>> from truemask.masks.leaves.bands import causal, window
    >>> diagnose(window(8) & window(64), 32)
    note [long-window] `window(64)`: the window is longer than what there is to see: it means `causal` here
        fix: window(8) & causal
    >>> print(diagnose(causal | prefix(4), 32, causal=True)[0].message)
    6 pairs see the future, first query 0 and key 1
    """
    mask = dense(mask) if isinstance(mask, Tensor) else expression("diagnose: mask", mask)
    q_len = whole(q_len, "q_len", 1)
    findings = list(_rows_as_squares(mask, q_len))
    if findings:
        return Findings(findings)
    kv_len = mask.kv_len_for(q_len) if kv_len is None else whole(kv_len, "kv_len", 1)
    mask.check(q_len, kv_len, batch=batch, heads=heads)
    separate = None if documents is None else documents_of(documents)
    context = RuleContext(mask, q_len, kv_len, batch, heads, causal, separate)
    wording = (finding for rule in (*EXPRESSION_RULES, *MISREADING_RULES) for finding in rule(context))
    names = list(known_by_name(context)) or of_heads(context, [known_by_name])
    # among equally grave ones: how it is written, then what follows from it
    return Findings([*wording, *names, *of_heads(context, [*VISIBILITY_RULES, *ALIGNMENT_RULES])])


def _rows_as_squares(mask: Mask, q_len: int) -> Iterator[Finding]:
    """Tensors of one row, which answer for one query and are asked about more."""
    for leaf in mask.walk():
        held = cells_held(leaf)
        if held is not None and held.tensor.shape[2] == 1 < q_len:
            shape = list(held.tensor.shape)
            yield Finding(
                "row-as-square",
                "error",
                quoted(leaf),
                f"the tensor {shape} holds one row of keys, and is asked about {q_len} queries",
                "keys(flags) is key padding, the same for every query",
            )
