"""Rows of packed documents: what a training step sees.

Documents are laid end to end in an order drawn anew for each epoch, and the line is cut every `length` tokens. A row
therefore has no padding, and its `lengths` say how many tokens of each document it holds. The label of a token is the
next one of its own document, or `BOUNDARY` at the document's end: no label comes from another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truemask.train.config import BOUNDARY, TrainError
from truemask.train.corpus import Document


@dataclass(frozen=True)
class Batch:
    """`ids` and `labels`, int64 `[b, n]`, and for each row the lengths of its documents, which sum to n."""

    ids: Tensor
    labels: Tensor
    lengths: list[list[int]]


class Rows:
    """An endless, reproducible stream of batches; `state` and `restore` are its whole memory."""

    def __init__(self, documents: Sequence[Document], length: int, batch: int, seed: int) -> None:
        self._documents, self._length, self._batch, self._seed = documents, length, batch, seed
        self._start(epoch=0, row=0)

    @property
    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "row": self._row}

    def restore(self, state: dict[str, Any]) -> None:
        self._start(epoch=int(state["epoch"]), row=int(state["row"]))

    def next(self) -> Batch:
        """The next `batch` rows; an epoch's last rows that do not fill a batch are left out."""
        if self._row + self._batch > len(self._order):
            self._start(epoch=self._epoch + 1, row=0)
        row_numbers = self._order[self._row : self._row + self._batch]
        self._row += self._batch
        return cut_rows(self._line, row_numbers, self._length)

    def _start(self, epoch: int, row: int) -> None:
        draw = np.random.default_rng([self._seed, epoch])
        order = draw.permutation(len(self._documents))
        self._line = lay_out([self._documents[i] for i in order])
        self._order = draw.permutation((len(self._line) - 1) // self._length)
        self._epoch, self._row = epoch, row


def lay_out(documents: Sequence[Document]) -> np.ndarray:
    """The documents end to end, and the mark that ends the last one."""
    return np.concatenate([*(document.tokens for document in documents), np.array([BOUNDARY], np.uint16)])


def cut_rows(line: np.ndarray, rows: np.ndarray, length: int) -> Batch:
    """The given rows of a line cut every `length` tokens."""
    at = rows[:, None] * length + np.arange(length)
    ids, labels = line[at].astype(np.int64), line[at + 1].astype(np.int64)
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), [document_lengths(row) for row in ids])


def document_lengths(row: np.ndarray) -> list[int]:
    """How many tokens of each document a row holds; the first may have begun in another row.

    >>> document_lengths(np.array([7, 7, 256, 7, 256]))
    [2, 2, 1]
    """
    starts = np.flatnonzero(row[1:] == BOUNDARY) + 1
    return np.diff(np.concatenate(([0], starts, [len(row)]))).tolist()


def held_out_rows(documents: Sequence[Document], length: int, count: int) -> Batch:
    """At most `count` rows, spread evenly over the held-out documents in the order of their names."""
    line = lay_out(documents)
    available = (len(line) - 1) // length
    if available == 0:
        raise TrainError(
            f"the held-out files hold {len(line) - 1} tokens, fewer than one row of {length}; give more text, a larger "
            f"share to hold out or a smaller --length"
        )
    row_numbers = np.unique(np.linspace(0, available - 1, min(count, available)).round().astype(np.int64))
    return cut_rows(line, row_numbers, length)
