"""Calls that are legal, do what they say, and were probably not meant: told by a plan's warning and by `diagnose`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from truemask.errors import counted
from truemask.masks.core import Mask
from truemask.masks.matrices import Dense

REINDEXING = ("at", "take", "packed", "padded", "prepended", "transposed")
LOOKING_BACK = ("causal", "window")
ROWS = 64  # of a tensor, looked at together


def top_left(mask: Mask, q_len: int, kv_len: int) -> str:
    """What to say of a mask that looks back, asked about fewer queries than keys without `at`; or nothing."""
    if not 0 < q_len < kv_len or mask.kind in REINDEXING:  # the short ways out, for decoding
        return ""
    kinds = {part.kind for part in mask.walk()}
    if kinds.intersection(REINDEXING) or not kinds.intersection(LOOKING_BACK):
        return ""
    start = kv_len - q_len
    unseen = "the last key" if start == 1 else f"any of the last {start} keys"
    this = "this query is the last position" if q_len == 1 else f"these queries are the last {q_len} positions"
    return (
        f"{counted(q_len, 'query')} and {counted(kv_len, 'key')} under `{mask}`, whose first query is position 0: "
        f"it does not see {unseen}. If {this}, as in decoding, "
        f"the mask is `.at(q_start={start})`"
    )


def upside_down(mask: Mask, q_len: int, kv_len: int) -> str:
    """What to say of a square tensor whose queries see later keys and nothing else; or nothing."""
    if not isinstance(mask, Dense) or not 3 < q_len == kv_len:  # smaller ones may be so by chance
        return ""
    if not _sees_only_later(mask.tensor.array[:, :, :q_len, :kv_len]):
        return ""
    return (
        f"this mask of {q_len} x {kv_len} lets every query see later keys only, neither itself nor the past: it is "
        "likely upside down. Here True means may attend; if True meant masked out, it is `~mask`"
    )


def _sees_only_later(cells: NDArray[np.bool_]) -> bool:
    """Whether no query of square `cells [b, h, q, k]` sees its own key or an earlier one, but some sees a later one.

    Most tensors are refuted by their first rows.
    """
    size = cells.shape[-1]
    for row in range(0, size, ROWS):
        last = min(row + ROWS, size)
        past = np.tri(last - row, last, row, dtype=bool)
        if (cells[:, :, row:last, :last] & past).any():
            return False
    return bool(cells.any())
