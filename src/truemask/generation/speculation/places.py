"""Where the keys of each sample lie: samples that accept different numbers of guesses have read different numbers.

The memory of a batch is one block, so all samples' new keys begin behind the sample that has most. Between what a
sample has and that place is a *gap*, which the next accepted keys fill.

    sample 0   k k k k k k k | n n n n       k kept, in the order of their positions
    sample 1   k k k k k . . | n n n n       . gap, read by nobody
                             stop            n the nodes of a draft

What a row may see is then two masks: the caller's at the positions of rows and keys, and a `tree` in which the kept
keys of a sample are the root, the gap is a root of its own, and the nodes hang on the first and on each other.

Shapes: b samples, n nodes, s places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truemask.generation.speculation.trees import Nodes
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.tree import tree


class Places:
    """Which token lies where, for `batch` samples that have read `width` tokens each, of `tokens` in all.

    >>> places = Places(2, 3, 9)
    >>> nodes = Nodes(*torch.tensor([[[5, 6, 6]] * 2, [[-1, 0, 0]] * 2, [[0, 1, 1]] * 2]))
    >>> places.positions_of(nodes)[0].tolist()
    [3, 4, 4]
    >>> places.accept([[0, 2], [0]])  # sample, from where, to where
    [(0, [5], [4])]
    >>> places.read, places.stop, places.positions.tolist()
    ([5, 4], 5, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]])
    """

    def __init__(self, batch: int, width: int, tokens: int) -> None:
        self.positions = torch.arange(width).repeat(batch, 1)  # b s; 0 in gaps
        self.kept = [width] * batch
        self.tokens = tokens
        self.read = [width] * batch  # tokens, those included that were forgotten since

    @property
    def stop(self) -> int:
        """Where the next keys begin."""
        return max(self.kept, default=0)

    def positions_of(self, nodes: Nodes) -> Tensor:
        """Positions of the nodes, int64 [b, n]; a node that fills up has one of some token."""
        return (torch.tensor(self.read)[:, None] + nodes.depths).clamp(max=self.tokens - 1)

    def mask(self, mask: Mask, nodes: Nodes, *, rows: int = 0, keys: int = 0, first: int = 0) -> Mask:
        """A mask of all tokens, for the rows of the nodes and all keys: those that lie here, and the nodes'.

        `rows` and `keys` stand before the tokens of `mask`, seen by all (registers and memories). The result's rows
        begin at row `first`; those before say nothing.
        """
        batch, new = nodes.tokens.shape
        at = self.positions_of(nodes)
        q = torch.cat((torch.zeros(batch, first, dtype=torch.int64), at + rows), dim=1)
        before = torch.arange(keys).expand(batch, -1)
        k = torch.cat((before, self.positions[:, : self.stop] + keys, at + keys), dim=1)
        kept = torch.tensor(self.kept)[:, None]
        parents = torch.cat((torch.full((batch, 2), -1), torch.where(nodes.depths > 0, nodes.parents + 2, -1)), dim=1)
        parents[:, 2][nodes.parents[:, 0] < 0] = 0
        lengths = torch.cat((kept + keys, self.stop - kept, torch.ones(batch, new, dtype=torch.int64)), dim=1)
        branches = tree(_alike(parents), lengths=_alike(lengths)).at(q_start=keys + self.stop)
        if first:
            branches = branches.prepended(q=first)  # whose rows count no positions: those of `mask` are the only ones
        return mask.take(q=_alike(q), k=_alike(k)) & branches

    def accept(self, paths: Sequence[Sequence[int]]) -> list[tuple[int, list[int], list[int]]]:
        """Keep these nodes of each sample; what must move for it: sample, places, places to go to."""
        stop, moves = self.stop, []
        room = max((kept + len(path) for kept, path in zip(self.kept, paths, strict=True)), default=0)
        self.positions = torch.nn.functional.pad(self.positions[:, :stop], (0, max(0, room - stop)))
        for sample, path in enumerate(paths):
            first, stands = self.kept[sample], [stop + node for node in path]
            goes = list(range(first, first + len(path)))
            self.positions[sample, first : first + len(path)] = torch.arange(len(path)) + self.read[sample]
            self.kept[sample] += len(path)
            self.read[sample] += len(path)
            apart = [(a, b) for a, b in zip(stands, goes, strict=True) if a != b]
            if apart:
                moves.append((sample, [a for a, _ in apart], [b for _, b in apart]))
        return moves

    def rewind(self, read: Sequence[int]) -> None:
        """Forget of each sample all tokens but the first `read`."""
        for sample, count in enumerate(read):
            lost = int((self.positions[sample, : self.kept[sample]] >= count).sum())
            self.kept[sample] -= lost
            self.positions[sample, self.kept[sample] :] = 0
            self.read[sample] = min(self.read[sample], count)

    def keep(self, which: Sequence[Tensor]) -> None:
        """Keep these of the places of each sample, at the front, in this order."""
        rows = [self.positions[sample, places] for sample, places in enumerate(which)]
        self.kept = [len(row) for row in rows]
        self.positions = torch.stack([torch.nn.functional.pad(row, (0, self.stop - len(row))) for row in rows])

    def select(self, samples: Sequence[int]) -> None:
        """Go on with these samples; one may come several times."""
        self.positions = self.positions[list(samples)]
        self.kept = [self.kept[sample] for sample in samples]
        self.read = [self.read[sample] for sample in samples]


def _alike(rows: Tensor) -> Tensor:
    """[b, n], or [n] where all samples have the same: such a mask is cheaper."""
    return rows[0] if bool((rows == rows[:1]).all()) else rows
