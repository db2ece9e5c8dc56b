"""The rule of registers, rows beside the tokens of a text, and of memories, keys beside them.

**A register reads a token only if every query that reads registers may read it**, so it never carries to a query what
the mask hides. Every query reads registers, with one exception: where registers read tokens, a query that is padding
may read none of these tokens, so it reads no register. Memories are read by all.
"""

from __future__ import annotations

import torch

from truemask.masks.compose.boolean import everything, nothing
from truemask.masks.core.mask import Mask
from truemask.masks.structure.padding import real_queries, seen_by_all


def with_registers(mask: Mask, registers: int, memories: int = 0, *, behind: int | None = None) -> Mask:
    """The mask of tokens among registers, which stand before them, or `behind` so many; `memories` before all.

    >>> from truemask.masks.leaves.per_token import keys
    >>> with_registers(keys([True, False]), 1).to_dense(3)[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 0]]
    """
    if not registers and not memories:
        return mask
    seen, real = seen_by_all(mask), real_queries(mask)
    whole = mask.prepended(q=registers, k=registers + memories, seen=seen)
    if registers and seen != nothing and real != everything:
        whole = whole & real.prepended(q=registers, k=memories)  # padding reads no register
    if behind is None:
        return whole
    order = torch.cat((torch.arange(registers, registers + behind), torch.arange(registers)))
    return whole.take(q=order, k=order)
