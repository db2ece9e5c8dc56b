"""Consecutive segments of a row, such as packed documents: where each begins and ends, and whose a position is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from truemask.common.memory import HoldsArrays
from truemask.common.real_tensors import remembered
from truemask.errors import MaskError
from truemask.masks.core.data import MAX_TOKENS, Data, integers
from truemask.masks.core.lookup import low_high


class Segments(HoldsArrays):
    """Lengths of consecutive segments, `[m]` or `[b, m]`, as tables of positions."""

    def __init__(self, lengths: Data) -> None:
        self.lengths = np.atleast_2d(lengths.array)
        self.ends = self.lengths.cumsum(1)
        self.starts = self.ends - self.lengths
        self._flat = lengths.tensor.ndim == 1

    @remembered
    def _document(self) -> np.ndarray:
        segments = np.arange(self.lengths.shape[1])
        return np.stack([np.repeat(segments, row) for row in self.lengths])

    @property
    def document(self) -> Tensor:
        """The segment of every position, `[n]` or `[b, n]`."""
        return torch.from_numpy(self._document[0] if self._flat else self._document)

    @remembered
    def offset(self) -> Tensor:
        """Every position counted from the start of its segment."""
        offset = np.arange(self._document.shape[1]) - np.take_along_axis(self.starts, self._document, 1)
        return torch.from_numpy(offset[0] if self._flat else offset)

    def between(self, b: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last segment of positions `[lo, hi)`."""
        b = np.minimum(b, len(self._document) - 1)
        return self._document[b, lo], self._document[b, hi - 1]

    def row(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each segment of a sample begins and ends."""
        b = min(b, len(self.starts) - 1)
        return self.starts[b], self.ends[b]

    def span(self, b: np.ndarray, segment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a segment begins and ends."""
        b = np.minimum(b, len(self.starts) - 1)
        return self.starts[b, segment], self.ends[b, segment]


def document_lengths(lengths: object, kv_lengths: object) -> tuple[Data, Data | None]:
    """Checked lengths of documents for queries and, if they differ, for keys."""
    q = _lengths(lengths, "lengths")
    if kv_lengths is None:
        return q, None
    k = _lengths(kv_lengths, "kv_lengths")
    if q.tensor.shape[-1] != k.tensor.shape[-1]:
        raise MaskError(
            f"lengths has {q.tensor.shape[-1]} documents and kv_lengths {k.tensor.shape[-1]}: the i-th ones belong "
            "together, so both need the same number (0 is a document without tokens)"
        )
    return q, k


def _lengths(value: object, name: str) -> Data:
    if isinstance(value, (list, tuple)) and any(hasattr(row, "__len__") for row in value):
        rows = [integers(row, name, (1,), "[m] or [b, m]").tensor for row in value]
        value = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # documents without tokens change nothing
    data = integers(value, name, shape="[m] or [b, m]")
    if data.tensor.numel() == 0 or low_high(data)[0] < 0:
        raise MaskError(f"{name} are tokens per document, 0 or more and at least one document: got {data.text}")
    totals = data.tensor.sum(-1)
    if low_high(data)[1] > MAX_TOKENS or int(totals.sum()) > MAX_TOKENS:
        raise MaskError(f"{name} may add up to at most {MAX_TOKENS} tokens over all samples, got {data.text}")
    if totals.ndim and len(set(totals.tolist())) > 1:
        raise MaskError(
            f"{name} of the samples must add up to the same row length, got {totals.tolist()}: "
            "count the padding of a shorter row as a last document"
        )
    return data
