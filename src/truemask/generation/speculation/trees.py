"""Drafts: guessed continuations of a sample as a tree, and those of a batch side by side.

Shapes: b samples, n nodes, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Draft:
    """Guesses behind one token, which is node 0: chosen, but not read yet. Children of a node are different tokens.

    `drawn` has, for a node whose children were drawn, the probabilities [v] that they were drawn from, one after the
    other without putting back. Children of other nodes were picked, whatever the way.

    >>> draft = Draft([7])
    >>> draft.add_path([1, 2]), draft.add_path([1, 3])
    (2, 3)
    >>> draft.tokens, draft.parents, draft.depths
    ([7, 1, 2, 3], [-1, 0, 1, 1], [0, 1, 2, 2])
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    drawn: dict[int, Tensor] = field(default_factory=dict)

    def add(self, parent: int, token: int) -> int:
        """The child of a node that has this token: a new one, or the one that there is."""
        known = self.child(parent, token)
        if known is not None:
            return known
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    def add_path(self, tokens: Sequence[int], most: int | None = None) -> int:
        """Tokens that follow each other, from node 0 on, while there are fewer than `most` nodes; the last node."""
        node = 0
        for token in tokens:
            if most is not None and len(self.tokens) >= most and self.child(node, token) is None:
                break
            node = self.add(node, token)
        return node

    def children(self, node: int) -> list[int]:
        """The nodes behind a node, in the order in which they came."""
        return [other for other, parent in enumerate(self.parents) if parent == node]

    def child(self, node: int, token: int) -> int | None:
        """The node behind a node that has this token."""
        return next((other for other in self.children(node) if self.tokens[other] == token), None)


class Nodes(NamedTuple):
    """Drafts of a batch, filled up to the same number of nodes: tokens, parents and depths, int64 [b, n].

    A node that fills up is a root of its own (parent -1), so that nobody reads it.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor


def side_by_side(drafts: Sequence[Draft]) -> Nodes:
    """The nodes of a batch.

    >>> side_by_side([Draft([5, 6], [-1, 0], [0, 1]), Draft([7])]).parents.tolist()
    [[-1, 0], [-1, -1]]
    """
    most = max(len(draft.tokens) for draft in drafts)
    return Nodes(
        torch.tensor([_filled(draft.tokens, most, draft.tokens[0]) for draft in drafts]),
        torch.tensor([_filled(draft.parents, most, -1) for draft in drafts]),
        torch.tensor([_filled(draft.depths, most, 0) for draft in drafts]),
    )


def chains(rows: Sequence[Sequence[int]]) -> Nodes:
    """Tokens that follow each other, of each sample its own number, perhaps none."""
    most = max(len(row) for row in rows)
    ahead = [list(range(len(row))) for row in rows]
    return Nodes(
        torch.tensor([_filled(row, most, 0) for row in rows]),
        torch.tensor([_filled([at - 1 for at in row], most, -1) for row in ahead]),
        torch.tensor([_filled(row, most, 0) for row in ahead]),
    )


def _filled(row: Sequence[int], length: int, value: int) -> list[int]:
    return [*row, *[value] * (length - len(row))]
