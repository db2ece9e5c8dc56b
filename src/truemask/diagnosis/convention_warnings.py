"""Calls that are legal, do what they say, and were probably not meant: told by a plan's warning and by `diagnose`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from truemask.common.formatting import counted
from truemask.masks.core.data import Data
from truemask.masks.core.mask import Mask
from truemask.masks.structure.data import cells_held
from truemask.masks.structure.order import names_order
from truemask.masks.structure.padding import padding_of_one_axis
from truemask.masks.structure.placement import moves_positions, swaps_axes

ROWS_AT_ONCE = 64  # of a tensor, looked at together


def top_left(mask: Mask, q_len: int, kv_len: int) -> str:
    """What to say of a mask that looks back, asked about fewer queries than keys without `at`; or nothing."""
    if not 0 < q_len < kv_len or _counts_elsewhere(mask):  # the short ways out, for decoding
        return ""
    if any(map(_counts_elsewhere, mask.walk())) or not names_order(mask):
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
    if q_len == kv_len or min(q_len, kv_len) < 2 or _counts_elsewhere(mask):  # decoding has one query
        return ""
    parts = list(mask.walk())
    paddings = [padding for part in parts if (padding := padding_of_one_axis(part)) is not None]
    if not paddings or any(map(_counts_elsewhere, parts)):
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


def _counts_elsewhere(mask: Mask) -> bool:
    """Whether the parts of a mask are asked about other rows and keys than the whole."""
    return moves_positions(mask) or swaps_axes(mask)


def upside_down(mask: Mask, q_len: int, kv_len: int) -> str:
    """What to say of a square tensor whose queries see later keys and nothing else; or nothing."""
    held = cells_held(mask)
    if held is None or not 3 < q_len == kv_len:  # smaller ones may be so by chance
        return ""
    if not _sees_only_later(held.array[:, :, :q_len, :kv_len]):
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
    for row in range(0, size, ROWS_AT_ONCE):
        last = min(row + ROWS_AT_ONCE, size)
        past = np.tri(last - row, last, row, dtype=bool)
        if (cells[:, :, row:last, :last] & past).any():
            return False
    return bool(cells.any())
