"""Masks that hold data over both axes: dense tensors, block patterns, trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from truemask.common.real_tensors import remembered
from truemask.errors import MaskError, describe
from truemask.geometry.logic import MIXED, States, three
from truemask.geometry.ranges import Areas, RangeTable
from truemask.geometry.slabs.algebra import pieces
from truemask.geometry.slabs.slabs import Flags, NoExactFormError, Region, Slabs, affordable, from_cells
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.data import LONGEST, Data, flags, integers, whole
from truemask.masks.core.deferred import recorded
from truemask.masks.core.lookup import look_up, pick, rows_of, within
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import call
from truemask.masks.core.value import Written
from truemask.masks.leaves.per_token import beyond
from truemask.masks.leaves.tile_sample import SAMPLED_FROM, Sample, runs_are_few, sample_of

LARGEST_READ = 1 << 28  # cells of a dense tensor that are looked through for its runs
FEW_CELLS = 1 << 16  # up to which every exact form is worth having
GRAINS = 16  # cells of a larger tensor for each of its sums, which are eight bytes


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """`tensor[b, h, q, k]`, with size 1 where it does not vary."""

    tensor: Data
    kind: ClassVar[str] = "dense"

    @property
    def batch_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tensor.tensor.shape[0]

    @property
    def head_count(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tensor.tensor.shape[1]

    @remembered
    def _areas(self) -> Areas:
        return Areas(self.tensor.array, max(FEW_CELLS, self.tensor.array.size // GRAINS))

    @remembered
    def sample(self) -> Sample | None:
        """What a few tiles of a large tensor show; None of a small one, which is looked at whole."""
        cells = self.tensor.array
        return None if cells.size < SAMPLED_FROM else sample_of(cells)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table = self.table("tensor")
        b, h, q, k = (within(i, n) if n > 1 else i * 0 for i, n in zip((b, h, q, k), table.shape, strict=True))
        return pick(table, b, h, q, k)

    def _tile(self, r: Rectangles) -> States:
        if self.sample is not None and not self.sample.shows_tiles:
            return np.full(np.broadcast_shapes(*(side.shape for side in (r.b, r.h, r.q0, r.k0))), MIXED)
        seen, area = self._areas.covering(r.b, r.h, r.q0, r.q1, r.k0, r.k1)
        return three(seen == 0, seen == area)

    def _slabs(self, r: Region) -> Slabs:
        cells = self._plane(r)
        if cells.size > LARGEST_READ:
            raise NoExactFormError(f"{cells.size} cells are more than are read for this")
        if cells.size > FEW_CELLS and not self._has_runs(cells):
            raise NoExactFormError(f"{cells.size} cells without a pattern take less room than their runs")
        return from_cells(np.arange(r.q0, r.q1 + 1), np.arange(r.k0, r.k1 + 1), cells)

    def _has_runs(self, cells: Flags) -> bool:
        """Whether the runs of a part of the tensor take less room than its cells, the sample asked first."""
        return (self.sample is None or self.sample.shows_runs) and runs_are_few(cells)

    @property
    def holds_cells(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    def _plane(self, r: Region) -> Flags:
        b, h = self._variant(r.b, r.h)
        return self.tensor.array[b, h, r.q0 : r.q1, r.k0 : r.k1]

    def _variant(self, b: int, h: int) -> tuple[int, int]:
        return min(b, self.batch_size - 1), min(h, self.head_count - 1)

    def _check(self, q_stop: int, k_stop: int) -> None:
        beyond(self, self.tensor.tensor.shape[2], q_stop, "queries")
        beyond(self, self.tensor.tensor.shape[3], k_stop, "keys")

    @property
    def has_text(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tensor.complete

    def _write(self) -> Written:
        return call("dense", self.tensor)


AXES = {"qk": 2, "bqk": 3, "hqk": 3, "bhqk": 4}


@recorded
def dense(tensor: object, axes: str | None = None) -> Mask:
    """A boolean tensor as a mask, True = may attend: `[q, k]`, or `[b, h, q, k]` with size 1 where it does not vary.

    A 3-D tensor must say what its first axis is: `axes="bqk"` or `axes="hqk"`. The tensor is copied. A tensor of
    numbers is an error that names the importer for it (law 1 in docs/conventions.md).

    >>> dense([[True, False], [True, True]])[1, 0]
    True
    """
    held = flags(tensor, "dense(tensor)", (2, 3, 4), "[q, k] or [b, h, q, k]")
    data = held.tensor
    if axes is not None and axes not in AXES:
        raise MaskError(f"dense(axes=...) is one of {', '.join(map(repr, AXES))}, got {describe(axes)}")
    if axes is not None and AXES[axes] != data.ndim:
        raise MaskError(f"dense(axes={axes!r}) needs {AXES[axes]} dimensions, got {describe(data)}")
    if data.ndim == 3 and axes is None:
        n = data.shape[0]
        raise MaskError(
            f"dense(tensor) got {describe(data)}, which can be read two ways: axes='bqk' ({n} samples, heads alike) or "
            f"axes='hqk' ({n} heads, samples alike; x-transformers' reading). Say which"
        )
    shape = {2: (1, 1), 3: (1, data.shape[0]) if axes == "hqk" else (data.shape[0], 1)}.get(data.ndim, data.shape[:2])
    if 0 in shape:
        raise MaskError(f"dense(tensor) needs at least one sample and one head, got {describe(data)}")
    return Dense(held.reshaped(*shape, *data.shape[-2:]))


@dataclass(frozen=True, eq=False, repr=False)
class BlockPattern(Mask):
    """`matrix[h, q // size, k // size]`."""

    matrix: Data
    size: int
    kind: ClassVar[str] = "block_pattern"
    _numbers: ClassVar[tuple[str, ...]] = ("size",)

    @property
    def head_count(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.matrix.tensor.shape[0] if self.matrix.tensor.ndim == 3 else 1

    @remembered
    def _areas(self) -> Areas:
        return Areas(self.matrix.array.reshape(1, self.head_count, *self.matrix.array.shape[-2:]))

    def _tables(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix.tensor.reshape(self.head_count, *self.matrix.tensor.shape[-2:])}

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table = self.table("matrix")
        row, column = (within(i // self.size, n) for i, n in zip((q, k), table.shape[1:], strict=True))
        heads = table.shape[0]
        return pick(table, within(h, heads), row, column) if heads > 1 else pick(table[0], row, column)

    def _tile(self, r: Rectangles) -> States:
        n = self.size
        seen, area = self._areas.covering(r.b * 0, r.h, r.q0 // n, (r.q1 - 1) // n + 1, r.k0 // n, (r.k1 - 1) // n + 1)
        return three(seen == 0, seen == area)

    def _slabs(self, r: Region) -> Slabs:
        n = self.size
        table = self.matrix.array.reshape(self.head_count, *self.matrix.array.shape[-2:])[self._variant(r.b, r.h)]
        row, column = (np.arange(first // n, (stop - 1) // n + 1) for first, stop in ((r.q0, r.q1), (r.k0, r.k1)))
        rows, edges = np.append(np.maximum(row * n, r.q0), r.q1), np.append(column, column[-1] + 1) * n
        return from_cells(rows, edges, table[row[0] : row[-1] + 1, column[0] : column[-1] + 1])

    def _variant(self, b: int, h: int) -> int:
        return min(h, self.head_count - 1)

    def _check(self, q_stop: int, k_stop: int) -> None:
        rows, columns = self.matrix.tensor.shape[-2:]
        beyond(self, rows * self.size, q_stop, "queries")
        beyond(self, columns * self.size, k_stop, "keys")

    def _write(self) -> Written:
        return call("block_pattern", self.matrix, self.size)


@recorded
def block_pattern(matrix: object, size: int) -> Mask:
    """Any pattern of blocks: `matrix[q // size, k // size]`, bool `[rows, columns]` or `[h, rows, columns]`.

    >>> block_pattern([[True, False], [True, True]], 2).to_dense(4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    data = flags(matrix, "block_pattern(matrix)", (2, 3), "[rows, columns] or [h, rows, columns]")
    if data.tensor.numel() == 0:
        raise MaskError(f"block_pattern(matrix) needs at least one block, got {describe(data.tensor)}")
    return BlockPattern(data, whole(size, "block_pattern(size)", 1))


@dataclass(frozen=True, eq=False, repr=False)
class Tree(Mask):
    """k is q or an ancestor of q."""

    parents: Data
    lengths: Data | None
    kind: ClassVar[str] = "tree"

    @property
    def batch_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(rows_of(self.parents), 1 if self.lengths is None else rows_of(self.lengths))

    @remembered
    def _nodes(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each sample: tokens of each node, and where its subtree begins and ends in depth-first order."""
        parents = np.atleast_2d(self.parents.array)
        lengths = np.ones_like(parents) if self.lengths is None else np.atleast_2d(self.lengths.array)
        pairs = zip(*np.broadcast_arrays(parents, lengths), strict=True)
        return [(own, *node_spans(up, own)) for up, own in pairs]

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
        return three((stop_high <= q_low) | (k_low > q_high), (k_high <= q_low) & (q_high < stop_low))

    def _slabs(self, r: Region) -> Slabs:
        """Each node's rows see the runs of its ancestors, and its own tokens up to the row."""
        parents = np.atleast_2d(self.parents.array)
        parents, own = parents[min(r.b, len(parents) - 1)], self._nodes[min(r.b, len(self._nodes) - 1)][0]
        stop = np.cumsum(own)
        node, lo, hi = ancestor_runs(parents, stop - own, stop)
        q0, q1, start, end = (
            np.concatenate(x)
            for x in ((stop - own, (stop - own)[node]), (stop, stop[node]), (stop - own, lo), (np.ones_like(stop), hi))
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
    found: dict[int, list[tuple[int, int]]] = {-1: []}  # of a node and its ancestors
    total = 0
    for leaf in range(len(up)):
        path = [leaf]
        while up[path[-1]] not in found:
            path.append(up[path[-1]])
        for node in reversed(path):
            runs = found[up[node]]
            joins = bool(runs) and runs[-1][1] == first[node]
            found[node] = [*runs[:-1], (runs[-1][0], last[node])] if joins else [*runs, (first[node], last[node])]
            total += len(runs)
            affordable(total)
    sizes = [len(found[parent]) for parent in up]
    runs = np.array([run for parent in up for run in found[parent]], np.int64).reshape(-1, 2)
    return np.repeat(np.arange(len(up)), sizes), runs[:, 0], runs[:, 1]


def node_spans(parents: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the subtree of every node begins and ends, in tokens and depth-first order."""
    count = len(parents)
    children: list[list[int]] = [[] for _ in range(count + 1)]  # the last entry is the forest's root
    for node, parent in enumerate(parents.tolist()):
        children[parent if parent >= 0 else count].append(node)
    first, stop = np.zeros(count, np.int64), np.zeros(count, np.int64)
    clock, seen, stack = 0, 0, [(node, False) for node in reversed(children[count])]
    while stack:
        node, done = stack.pop()
        if done:
            stop[node] = clock
            continue
        first[node], clock, seen = clock, clock + int(lengths[node]), seen + 1
        stack.append((node, True))
        stack.extend((child, False) for child in reversed(children[node]))
    if seen < count:
        raise MaskError(f"tree(parents): {count - seen} nodes are their own ancestors, so they hang on no root (-1)")
    return first, stop


@recorded
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
    if sizes is not None and (int(sizes.tensor.max()) > LONGEST or int(sizes.tensor.sum()) > LONGEST):
        raise MaskError(f"tree(lengths=...) may add up to at most {LONGEST} tokens over all samples, got {sizes.text}")
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
