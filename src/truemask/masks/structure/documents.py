"""Open functions about what shares a row: documents, groups, paths of a tree, and who says which there are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from truemask.masks.compose.boolean import And, Minus, Not, Or, Xor
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import Select
from truemask.masks.core.data import Data
from truemask.masks.core.mask import Mask
from truemask.masks.core.verdict import Cell
from truemask.masks.leaves.documents import Documents, Same
from truemask.masks.leaves.patterns import Random
from truemask.masks.leaves.per_token import Padding
from truemask.masks.leaves.tree import Tree
from truemask.masks.structure.groups import (
    BACKWARD,
    BOOLEAN,
    CELLS,
    CONSTANTS,
    DISTANCES,
    FLAGS,
    LABELS,
    PER_AXIS,
    PLACES,
    REINDEXED,
)
from truemask.masks.structure.open_functions import answer, open_function, register


@open_function
def lists_documents(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, says which documents there are and what belongs to each.

    For models: rows of a mask that does are packed, and the mask is about them as they lie.
    """
    raise NotImplementedError


answer(lists_documents, True, Packed, Documents, Tree)
answer(lists_documents, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Padded, Prepended)
answer(lists_documents, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, Same, *CELLS)


@open_function
def may_separate_documents(mask: Mask) -> bool:
    """Whether the mask itself, its parts aside, may be what keeps documents apart; False is a proof.

    For the warning that documents of a packed row see each other.
    """
    raise NotImplementedError


answer(may_separate_documents, True, Packed, *LABELS, Tree, *CELLS)
answer(may_separate_documents, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Padded, Prepended)
answer(may_separate_documents, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS)


@open_function
def is_documents_only(mask: Mask) -> bool:
    """Whether the mask says of a row nothing else than which tokens are of one document.

    For findings: such documents are a claim about the whole expression, and positions do not restart in them.
    """
    raise NotImplementedError


answer(is_documents_only, True, Documents)
answer(is_documents_only, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Packed, Padded, Prepended)
answer(is_documents_only, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, Same, Tree, *CELLS)


@open_function
def lengths_of_documents(mask: Mask) -> Data | None:
    """Tokens of each document of a mask that `is_documents_only`, where they lie one after the other in order.

    None of any other mask, of documents in another order, and where queries and keys have documents of their own.

    >>> from truemask.masks.leaves.documents import documents
    >>> lengths_of_documents(documents([2, 3])), lengths_of_documents(documents(ids=[0, 1, 0]))
    (Data([2, 3]), None)
    """
    raise NotImplementedError


answer(lengths_of_documents, None, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Packed, Padded, Prepended)
answer(lengths_of_documents, None, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, Same, Tree, *CELLS)


@register(lengths_of_documents, Documents)
def _in_order(mask: Documents) -> Data | None:
    lengths, kv_lengths = mask._shown  # pyright: ignore[reportPrivateUsage]
    return lengths if mask._numbered and kv_lengths is None else None  # pyright: ignore[reportPrivateUsage]


@open_function
def restarts_positions(mask: Mask) -> bool:
    """Whether the parts of the mask count positions from the start of each document.

    For findings about words that count from the start of the row: within such a mask they count as is meant.
    """
    raise NotImplementedError


answer(restarts_positions, True, Packed)
answer(restarts_positions, False, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Padded, Prepended)
answer(restarts_positions, False, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, *CELLS)


@open_function
def packed_like(mask: Mask, plain: Mask) -> Mask | None:
    """`plain` inside the documents that the mask packs, or one of the terms of which it is the AND; None if none does.

    For a model's own rule, which counts positions inside of documents like the mask that it stands beside.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> packed_like(causal.packed([2, 3]) & window(4), window(2))
    window(2).packed([2, 3])
    """
    raise NotImplementedError


answer(packed_like, None, *CONSTANTS, Or, Xor, Minus, Not, *PER_AXIS, Select, *REINDEXED, Padded, Prepended)
answer(packed_like, None, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, *CELLS)


@register(packed_like, Packed)
def _in_its_documents(mask: Packed, plain: Mask) -> Mask:
    return replace(mask, base=plain)


@register(packed_like, And)
def _in_those_of_a_term(mask: And, plain: Mask) -> Mask | None:
    return next((packed for term in mask.terms if (packed := packed_like(term, plain)) is not None), None)


@open_function
def labels_at(mask: Mask, cell: Cell) -> tuple[int, int] | None:
    """The documents or groups of the query and of the key of a cell; None of a mask that gives tokens no label.

    For explanations, which name them.
    """
    raise NotImplementedError


answer(labels_at, None, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Padded, Prepended)
answer(labels_at, None, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, Tree, *CELLS)


@register(labels_at, *LABELS)
def _labels(mask: Documents | Same, cell: Cell) -> tuple[int, int]:
    q, k = mask._sides  # pyright: ignore[reportPrivateUsage]
    return entry(q.each, cell.sample, cell.query), entry(k.each, cell.sample, cell.key)


@register(labels_at, Packed)
def _documents(mask: Packed, cell: Cell) -> tuple[int, int]:
    q, k = mask._sides  # pyright: ignore[reportPrivateUsage]
    return entry(q.document, cell.sample, cell.query), entry(k.document, cell.sample, cell.key)


def entry(table: Tensor, sample: int, place: int) -> int:
    """A number of a table `[n]` or `[b, n]`, whose last row stands for the samples beyond."""
    row = table if table.ndim == 1 else table[min(sample, len(table) - 1)]
    return int(row[place])


@open_function
def depths(mask: Mask) -> Tensor | None:
    """How many tokens stand before each on its own path, int64 `[n]` or `[b, n]`; None of masks without branches.

    For whoever counts positions beside a tree, whose rows are none.

    >>> from truemask.masks.leaves.tree import tree
    >>> depths(tree([-1, 0, 0], lengths=[2, 1, 2])).tolist()
    [0, 1, 2, 2, 3]
    """
    raise NotImplementedError


answer(depths, None, *CONSTANTS, *BOOLEAN, *PER_AXIS, Select, *REINDEXED, Packed, Padded, Prepended)
answer(depths, None, *BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, *CELLS)


@register(depths, Tree)
def _on_paths(mask: Tree) -> Tensor:
    parents = np.atleast_2d(mask.parents.array)
    rows: list[np.ndarray] = []
    for b, (sizes, *_) in enumerate(mask._nodes):  # pyright: ignore[reportPrivateUsage]
        parent = parents[min(b, len(parents) - 1)]
        start, above = np.zeros(len(parent), np.int64), parent
        while (above >= 0).any():  # one step nearer to the roots each time
            start += np.where(above >= 0, sizes[above], 0)
            above = np.where(above >= 0, parent[above], -1)
        rows.append(np.repeat(start - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum()))
    return torch.from_numpy(rows[0] if len(rows) == 1 else np.stack(rows))
