"""Masks of trees: drafts of speculative decoding, and prompts with several completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from truemask.common.real_tensors import remembered
from truemask.errors import MaskError
from truemask.geometry.logic import States, tri_state
from truemask.geometry.ranges import RangeTable
from truemask.geometry.slabs.algebra import pieces
from truemask.geometry.slabs.slabs import Region, Slabs, affordable
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.data import MAX_TOKENS, Data, integers
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.lookup import look_up, rows_of
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import call
from truemask.masks.core.value import Written
from truemask.masks.leaves.per_token import beyond


@dataclass(frozen=True, eq=False, repr=False)
class Tree(Mask):
    """k is q or an ancestor of q."""

    parents: Data
    lengths: Data | None
    kind: ClassVar[str] = "tree"

    @remembered
    def batch_size(self) -> int:
        return max(rows_of(self.parents), 1 if self.lengths is None else rows_of(self.lengths))

    @remembered
    def _nodes(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each sample: tokens of each node, and where its subtree begins and ends in depth-first order."""
        parents = np.atleast_2d(self.parents.array)
        lengths = np.ones_like(parents) if self.lengths is None else np.atleast_2d(self.lengths.array)
        pairs = zip(*np.broadcast_arrays(parents, lengths), strict=True)
        return [(sizes, *node_spans(up, sizes)) for up, sizes in pairs]

    @remembered
    def _spans(self) -> tuple[Tensor, Tensor]:
        """The same for each token: its subtree is the rest of its node and what hangs on that."""
        firsts = [np.repeat(first - np.cumsum(n) + n, n) + np.arange(n.sum()) for n, first, _ in self._nodes]
        stops = [np.repeat(stop, n) for n, _, stop in self._nodes]
        first, stop = (torch.from_numpy(np.stack(side)) for side in (firsts, stops))
        return (first, stop) if self.batch_size > 1 else (first[0], stop[0])

    @remembered
    def _ranges(self) -> tuple[RangeTable, RangeTable]:
        first, stop = (RangeTable(np.atleast_2d(side.numpy())) for side in self._spans)
        return first, stop

    def _tables(self) -> dict[str, Tensor]:
        return {"first": self._spans[0], "stop": self._spans[1]}

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        first, stop = self.table("first"), self.table("stop")
        row = look_up(first, b, q)
        return (look_up(first, b, k) <= row) & (row < look_up(stop, b, k))

    def _tile(self, r: Rectangles) -> States:
        first, stop = self._ranges
        q_low, q_high = first.between(r.b, r.q0, r.q1)
        k_low, k_high = first.between(r.b, r.k0, r.k1)
        stop_low, stop_high = stop.between(r.b, r.k0, r.k1)
        return tri_state((stop_high <= q_low) | (k_low > q_high), (k_high <= q_low) & (q_high < stop_low))

    def _slabs(self, r: Region) -> Slabs:
        """Each node's rows see the runs of its ancestors, and its own tokens up to the row."""
        parents = np.atleast_2d(self.parents.array)
        parents, sizes = parents[min(r.b, len(parents) - 1)], self._nodes[min(r.b, len(self._nodes) - 1)][0]
        stop = np.cumsum(sizes)
        node, lo, hi = ancestor_runs(parents, stop - sizes, stop)
        q0, q1, start, end = (
            np.concatenate(x)
            for x in (
                (stop - sizes, (stop - sizes)[node]),
                (stop, stop[node]),
                (stop - sizes, lo),
                (np.ones_like(stop), hi),
            )
        )
        moves = (np.arange(len(end)) < len(stop)).astype(np.int64)
        return pieces(r.q0, r.q1, q0, q1, start, end, 0, moves)

    def _check(self, q_stop: int, k_stop: int) -> None:
        beyond(self, int(self._nodes[0][0].sum()), max(q_stop, k_stop), "positions")

    def _write(self) -> Written:
        return call("tree", self.parents, lengths=self.lengths)


def ancestor_runs(parents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[Ints, Ints, Ints]:
    """The runs of tokens of every node's ancestors: node, start and stop of each; neighbours are one run."""
    up, first, last = parents.tolist(), starts.tolist(), stops.tolist()
    runs_by_node: dict[int, list[tuple[int, int]]] = {-1: []}  # of a node and its ancestors
    total = 0
    for leaf in range(len(up)):
        path = [leaf]
        while up[path[-1]] not in runs_by_node:
            path.append(up[path[-1]])
        for node in reversed(path):
            runs = runs_by_node[up[node]]
            joins = bool(runs) and runs[-1][1] == first[node]
            runs_by_node[node] = (
                [*runs[:-1], (runs[-1][0], last[node])] if joins else [*runs, (first[node], last[node])]
            )
            total += len(runs)
            affordable(total)
    sizes = [len(runs_by_node[parent]) for parent in up]
    runs = np.array([run for parent in up for run in runs_by_node[parent]], np.int64).reshape(-1, 2)
    return np.repeat(np.arange(len(up)), sizes), runs[:, 0], runs[:, 1]


def node_spans(parents: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the subtree of every node begins and ends, in tokens and depth-first order."""
    count = len(parents)
    children: list[list[int]] = [[] for _ in range(count + 1)]  # the last entry is the forest's root
    for node, parent in enumerate(parents.tolist()):
        children[parent if parent >= 0 else count].append(node)
    first, stop = np.zeros(count, np.int64), np.zeros(count, np.int64)
    clock, reached, stack = 0, 0, [(node, False) for node in reversed(children[count])]
    while stack:
        node, done = stack.pop()
        if done:
            stop[node] = clock
            continue
        first[node], clock, reached = clock, clock + int(lengths[node]), reached + 1
        stack.append((node, True))
        stack.extend((child, False) for child in reversed(children[node]))
    if reached < count:
        raise MaskError(f"tree(parents): {count - reached} nodes are their own ancestors, so they hang on no root (-1)")
    return first, stop


@deferrable
def tree(parents: object, lengths: object = None) -> Mask:
    """k is q or an ancestor of q: speculative drafts, or shared prefixes.

    `parents[i]` is the parent of node i, -1 for a root; `[n]` or `[b, n]`. With `lengths` each node is a segment of
    that many tokens, causal inside, and its children go on from its end: one prompt with many completions in one row.

    >>> tree([-1, 0, 0]).to_dense(3)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    >>> tree([-1, 0, 0], lengths=[2, 1, 2]).to_dense(5)[0, 0, 3:].int().tolist()  # the second completion
    [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    """
    data = integers(parents, "tree(parents)")
    nodes = data.tensor.shape[-1]
    if nodes == 0 or int(data.tensor.min()) < -1 or int(data.tensor.max()) >= nodes:
        raise MaskError(f"tree(parents) are indices of nodes, or -1 for a root: {nodes} nodes, got {data.text}")
    sizes = None if lengths is None else integers(lengths, "tree(lengths=...)")
    if sizes is not None and (sizes.tensor.shape[-1] != nodes or int(sizes.tensor.min()) < 0):
        raise MaskError(f"tree(lengths=...) are the tokens of each of the {nodes} nodes, 0 or more; got {sizes.text}")
    if sizes is not None and (int(sizes.tensor.max()) > MAX_TOKENS or int(sizes.tensor.sum()) > MAX_TOKENS):
        raise MaskError(
            f"tree(lengths=...) may add up to at most {MAX_TOKENS} tokens over all samples, got {sizes.text}"
        )
    if sizes is not None and rows_of(data) > 1 < rows_of(sizes) != rows_of(data):
        raise MaskError(f"tree: parents speak of {rows_of(data)} samples and lengths of {rows_of(sizes)}")
    totals = {1} if sizes is None else set(torch.atleast_2d(sizes.tensor).sum(-1).tolist())
    if len(totals) > 1 or totals == {0}:
        raise MaskError(
            f"tree(lengths=...) must add up to the same number of tokens in each sample, got {sorted(totals)}"
        )
    mask = Tree(data, sizes)
    _ = mask._nodes  # a cycle is an error here, not later
    return mask
