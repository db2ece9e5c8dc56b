"""Calls that are legal, do what they say, and were probably not meant: told by a plan's warning and by `diagnose`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from truemask.common.formatting import counted
from truemask.masks.core.data import Data
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.matrices import Dense
from truemask.masks.leaves.per_token import Padding

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


def one_axis(mask: Mask, q_len: int, kv_len: int) -> str:
    """What to say of right padding that counts queries and keys alike, where there are not as many; or nothing."""
    if q_len == kv_len or min(q_len, kv_len) < 2 or mask.kind in REINDEXING:  # decoding has one query
        return ""
    parts = list(mask.walk())
    paddings = [part for part in parts if isinstance(part, Padding) and part.on == "both" and part.lengths is not None]
    if not paddings or any(part.kind in REINDEXING for part in parts):
        return ""
    lengths = paddings[0].lengths
    longest = int(lengths.tensor.max()) if isinstance(lengths, Data) else int(lengths or 0)
    if longest > min(q_len, kv_len):
        return ""
    hidden = f"hides keys {longest} to {kv_len - 1} from every query"
    if q_len > kv_len:
        hidden = f"lets queries {longest} to {q_len - 1} see nothing"
    return (
        f"`{paddings[0]}` is about queries and keys alike, and with {counted(q_len, 'query')} and "
        f"{counted(kv_len, 'key')} it {hidden}. Where they are two sequences, as in cross-attention, say whose lengths "
        'they are: `padding(lengths=..., on="keys")`, or on="queries"'
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
