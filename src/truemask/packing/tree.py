"""`pack_tree`: each prompt once, its completions beside each other, in rows of one length.

Shapes: r rows, n tokens of a row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.formatting import counted, describe
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import from_text, not_a_mask
from truemask.masks.leaves.tree import tree
from truemask.packing.best_fit import best_fit
from truemask.packing.pack import check_rows, ramp, token
from truemask.packing.samples import Arrays, read_field


@dataclass(frozen=True, eq=False, repr=False)
class PackedTrees:
    """What `pack_tree` returns.

    tokens      int64 `[r, n]`; a row's free tail holds `pad`
    labels      int64 `[r, n]`: the tokens of completions, `ignore_index` elsewhere. Not shifted, and what predicts a
                token is not always the place before it: compare them with `predictions(logits)`
    positions   int64 `[r, n]`, counted along each path from `first_position` on: a completion goes on where its prompt
                ends
    previous    int64 `[r, n]`: the place in the row whose logits predict this token; -1 where a path begins
    mask        `tree(parents, lengths=...)`: a token reads its own path, and the free tail nothing else. With a mask of
                yours, `& mask.take(q=p, k=p)`, where p are the positions on the paths, from 0
    pieces      int64 `[m, 6]`: prompt, completion (-1: the prompt itself), parent piece, row, start and tokens, in
                their order
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    previous: Tensor
    mask: Mask
    pieces: Tensor
    ignore_index: int = -100

    @property
    def fill(self) -> float:
        """The share of the rows' tokens that are no padding, up to 1."""
        return int(self.pieces[:, 5].sum()) / self.tokens.numel()

    @property
    def saved(self) -> float:
        """The share of tokens that need not be computed, compared with each path in a row of its own."""
        _, completion, parent, _, _, size = self.pieces.T.tolist()
        paths: list[int] = []
        for above, tokens in zip(parent, size, strict=True):
            paths.append(tokens + (paths[above] if above >= 0 else 0))
        inner = set(parent)
        alone = sum(n for i, n in enumerate(paths) if i not in inner and completion[i] >= 0)
        return max(0.0, 1 - sum(size) / alone) if alone else 0.0

    def predictions(self, logits: Tensor) -> Tensor:
        """The logits that predict each token, `[r, n, v]` to `[r, n, v]`, in the places of `labels`.

        The loss is `cross_entropy(trees.predictions(logits).flatten(0, 1), trees.labels.flatten())`.
        """
        check_rows("predictions", logits, self.tokens, logits=True)
        place = self.previous.clamp(min=0).to(logits.device)
        return logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """The log-probability of each token given its path, `[r, n, v]` to `[r, n]`; 0 where a path begins.

        In at least fp32, and without moving logits as `predictions` does. `unpack` gives those of each completion.
        """
        check_rows("log_probabilities", logits, self.tokens, logits=True)
        device = logits.device
        place, tokens = self.previous.clamp(min=0).to(device), self.tokens.to(device)
        exact = torch.promote_types(logits.dtype, torch.float32)
        row = torch.arange(len(tokens), device=device)[:, None]
        target_logits = logits[row, place, tokens].to(exact)  # r n
        total = logits.to(exact).logsumexp(-1).gather(1, place)  # r n
        return (target_logits - total).masked_fill(self.previous.to(device) < 0, 0.0)

    def unpack(self, outputs: Tensor) -> list[list[Tensor]]:
        """What belongs to each completion, `[r, n, ...]` to `[prompt][completion]` of `[tokens, ...]`."""
        parts = self._parts("unpack", outputs)
        by_prompt: list[list[Tensor]] = [[] for _ in range(int(self.pieces[-1, 0]) + 1)]
        for (prompt, completion), part in zip(self.pieces[:, :2].tolist(), parts, strict=True):
            if completion >= 0:
                by_prompt[prompt].append(part)
        return by_prompt

    def unpack_prompts(self, outputs: Tensor) -> list[Tensor]:
        """What belongs to each prompt, `[r, n, ...]` to a list of `[tokens, ...]`."""
        parts = self._parts("unpack_prompts", outputs)
        return [part for completion, part in zip(self.pieces[:, 1].tolist(), parts, strict=True) if completion < 0]

    def _parts(self, caller: str, outputs: Tensor) -> tuple[Tensor, ...]:
        check_rows(caller, outputs, self.tokens)
        row, start, size = self.pieces.numpy().T[3:]
        order = np.repeat(row * self.tokens.shape[1] + start, size) + ramp(size)
        return outputs.flatten(0, 1)[torch.from_numpy(order).to(outputs.device)].split(size.tolist())

    def __repr__(self) -> str:
        (rows, length), completions = self.tokens.shape, int((self.pieces[:, 1] >= 0).sum())
        prompts, answers = counted(len(self.pieces) - completions, "prompt"), counted(completions, "completion")
        return (
            f"<PackedTrees: {prompts} with {answers} in {counted(rows, 'row')} of {length}, {self.fill:.1%} full, "
            f"{self.saved:.1%} of the tokens saved>"
        )


def pack_tree(
    prompts: Iterable[Any],
    completions: Iterable[Iterable[Any]],
    length: int | None = None,
    *,
    mask: Mask | str | None = None,
    pad: int = 0,
    ignore_index: int = -100,
    first_position: int = 0,
) -> PackedTrees:
    """Each prompt once, followed by its completions, which read the prompt and themselves but not each other.

    What a model makes of a completion, its loss and its gradients are those of the prompt and that completion alone,
    if it is given `positions` and `mask`; the prompt is computed once. For reinforcement learning with many completions
    of a prompt (GRPO, best of n), and for ranking.

    Args:
        prompts: token ids `[n]` as lists, arrays or tensors.
        completions: for each prompt a list of such sequences; it may be empty. One that goes on in several ways is
            `{"tokens": [...], "completions": [...]}`, to any depth; results list them depth first.
        length: tokens of a row, into which prompts with all their completions are put by best fit. None: one row
            that holds everything.
        mask: what a token reads of its own path, such as `window(512)`, at positions counted along the path. None: all
            of it so far. Nobody reads ahead, whatever the mask says.
        pad: the token in the free tail of a row.
        ignore_index: the label of what is no completion.
        first_position: what `positions` count from: 0, or where a model's position embeddings begin, which is
            `padding_idx + 1` (usually 2) for RoBERTa, XLM-R, ESM and MPNet. The mask counts from 0 whatever this is.

    Raises:
        ValueError, TypeError: what cannot be packed, and why.

    >>> trees = pack_tree([[1, 2]], [[[3, 4], [5]]])
    >>> trees
    <PackedTrees: 1 prompt with 2 completions in 1 row of 5, 100.0% full, 28.6% of the tokens saved>
    >>> trees.tokens.tolist(), trees.positions.tolist(), trees.previous.tolist()
    ([[1, 2, 3, 4, 5]], [[0, 1, 2, 3, 2]], [[-1, 0, 1, 2, 1]])
    >>> trees.mask.to_dense(5)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    >>> trees.unpack(trees.tokens)
    [[tensor([3, 4]), tensor([5])]]
    >>> from truemask.masks.leaves.bands import window
    >>> near = pack_tree([[1, 2]], [[[3, 4], [5]]], mask=window(2), first_position=2)
    >>> near.positions.tolist(), near.mask.to_dense(5)[0, 0].int().tolist()[-1]
    ([[2, 3, 4, 5, 4]], [0, 1, 0, 0, 1])
    """
    pad, ignore_index = token("pad", pad), token("ignore_index", ignore_index)
    first_place = whole(first_position, "first_position")
    mask = from_text(mask)
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(not_a_mask("pack_tree: mask is an expression, such as `window(512)`, or its text", mask))
    nodes, arrays = _read(prompts, completions)
    nodes, length = _in_rows(nodes, None if length is None else whole(length, "length", 1))
    trees = _lay_out(arrays, nodes, length, pad, ignore_index)
    path = trees.positions
    path_mask = trees.mask if mask is None else trees.mask & mask.take(q=path, k=path)
    return replace(trees, mask=path_mask, positions=path + first_place)


def _in_rows(nodes: np.ndarray, length: int | None) -> tuple[np.ndarray, int]:
    """Prompt, completion, parent, row, start and tokens of every node, `[6, m]`, by best fit; and the rows' length."""
    prompt, completion, parent, size = nodes
    totals = np.bincount(prompt, size).astype(np.int64)
    length = int(totals.sum()) if length is None else length
    if totals.max() > length:
        worst = int(totals.argmax())
        branches = counted(int((prompt == worst).sum()) - 1, "completion")
        raise ValueError(
            f"pack_tree: prompt {worst} and its {branches} have {totals[worst]} tokens, which do not fit in a row of "
            f"length={length}: pass a larger length, or give the prompt twice, each time with some of its completions"
        )
    row, first = best_fit(totals, length)
    before = np.cumsum(size) - size
    start = first[prompt] + before - before[completion < 0][prompt]
    return np.stack((prompt, completion, parent, row[prompt], start, size)), length


def _read(prompts: Iterable[Any], completions: Iterable[Any]) -> tuple[np.ndarray, Arrays]:
    """Prompt, completion, parent and tokens of every node, `[4, m]`, parents first; and the tokens themselves."""
    for name, value in (("prompts", prompts), ("completions", completions)):
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise TypeError(f"pack_tree: {name} are a list, got {describe(value)}")
    starts, groups = list(prompts), list(completions)
    if len(starts) != len(groups) or not starts:
        raise ValueError(
            f"pack_tree: {len(starts)} prompts and {len(groups)} lists of completions: each prompt needs a list of its "
            "own, [[first, second], ...], even for one completion or none"
        )
    roots = read_field("pack_tree", "prompt", starts, whole=True)
    nodes: list[tuple[int, int, int, int]] = []
    arrays: Arrays = []
    for prompt, (root, children) in enumerate(zip(roots, groups, strict=True)):
        if not len(root):
            raise ValueError(
                f"pack_tree: prompt {prompt} has no tokens, so nothing predicts its completions' first one"
            )
        below: list[Any] = []
        parents = [-1]
        _walk(f"prompt {prompt}", children, 0, below, parents)
        tree_tokens = [root, *read_field("pack_tree", f"prompt {prompt}, completion", below, whole=True)]
        base = len(nodes)
        for index, (array, parent) in enumerate(zip(tree_tokens, parents, strict=True)):
            nodes.append((prompt, index - 1, base + parent if index else -1, len(array)))
        arrays += tree_tokens
    return np.array(nodes, np.int64).T, arrays


def _walk(where: str, completions: Any, parent: int, sequences: list[Any], parents: list[int]) -> None:
    """Put completions, and theirs, behind each other, each with the index of its parent."""
    if isinstance(completions, (str, bytes, Mapping)) or not isinstance(completions, Iterable):
        raise TypeError(f"pack_tree: completions of {where} are a list of sequences, got {describe(completions)}")
    for completion in completions:
        nested = isinstance(completion, Mapping)
        if nested and set(completion) != {"tokens", "completions"}:
            raise ValueError(
                f"pack_tree: a completion of {where} that goes on is {{'tokens': ..., 'completions': [...]}}, got the "
                f"keys {sorted(completion)}"
            )
        sequences.append(completion["tokens"] if nested else completion)
        parents.append(parent)
        if nested:
            _walk(where, completion["completions"], len(sequences), sequences, parents)


def _lay_out(arrays: Arrays, nodes: np.ndarray, length: int, pad: int, ignore_index: int) -> PackedTrees:
    _, completion, parent, row, start, size = nodes.tolist()
    rows = max(row) + 1
    used = np.bincount(nodes[3], nodes[5], rows).astype(np.int64)
    positions = np.arange(length) - used[:, None]  # right in the tails
    tokens, labels = np.full((rows, length), pad, np.int64), np.full((rows, length), ignore_index, np.int64)
    previous = np.broadcast_to(np.arange(-1, length - 1), (rows, length)).copy()
    next_position, last_place = [0] * len(row), [-1] * len(row)  # behind each node, and where its path's last token is
    for i, array in enumerate(arrays):
        span = slice(start[i], start[i] + size[i])
        above = parent[i]
        position, place = (0, -1) if above < 0 else (next_position[above], last_place[above])
        tokens[row[i], span] = array
        labels[row[i], span] = ignore_index if completion[i] < 0 else array
        positions[row[i], span] = np.arange(position, position + size[i])
        previous[row[i], span][:1] = place
        next_position[i], last_place[i] = position + size[i], span.stop - 1 if size[i] else place
    free = used < length
    previous[free, used[free]] = -1  # the tail begins a path too
    return PackedTrees(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        previous=torch.from_numpy(previous),
        mask=_mask(nodes, length),
        pieces=torch.from_numpy(nodes.T.copy()),
        ignore_index=ignore_index,
    )


def _mask(nodes: np.ndarray, length: int) -> Mask:
    """The forest of each row; its free tail is a tree of its own, and rows with fewer nodes end with empty ones."""
    _, _, parent, row, start, size = nodes
    counts = np.bincount(row)
    order = np.lexsort((np.arange(len(row)), start, row))  # an empty node may lie anywhere: it has no token
    place = np.empty_like(order)
    place[order] = ramp(counts)
    parents = np.full((len(counts), counts.max() + 1), -1)
    lengths = np.zeros_like(parents)
    lengths[row, place] = size
    parents[row, place] = np.where(parent < 0, -1, place[parent])
    lengths[:, -1] = length - lengths.sum(1)
    return tree(parents, lengths=lengths)
