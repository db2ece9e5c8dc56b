"""What counting alone achieves: the unigram and bigram entropies of a text, in bits per byte.

Both are counted on the training documents and measured on the held-out rows, on the very labels that the model is
measured on, so the three numbers compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truemask.train.config import BOUNDARY, NUM_TOKENS
from truemask.train.corpus import Document
from truemask.train.rows import Batch, lay_out

SMOOTHING_COUNTS = 5.0  # how many observations the unigram's opinion is worth in the bigram


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the two counting models on the held-out rows."""

    unigram: float
    bigram: float


def measure_baselines(train: Sequence[Document], held_out: Batch) -> Baselines:
    """Count on `train`, measure on `held_out`; the bigram is smoothed with the unigram, the unigram with one each."""
    line = lay_out(train).astype(np.int64)
    pairs = np.bincount(line[:-1] * NUM_TOKENS + line[1:], minlength=NUM_TOKENS**2).reshape(NUM_TOKENS, NUM_TOKENS)
    single = pairs.sum(axis=0) + 1.0
    unigram = single / single.sum()
    bigram = (pairs + SMOOTHING_COUNTS * unigram) / (pairs.sum(axis=1, keepdims=True) + SMOOTHING_COUNTS)
    ids, labels = held_out.ids.numpy(), held_out.labels.numpy()
    count = byte_count(held_out)
    return Baselines(
        unigram=float(-np.log2(unigram[labels]).sum() / count),
        bigram=float(-np.log2(bigram[ids, labels]).sum() / count),
    )


def byte_count(batch: Batch) -> int:
    """How many labels are bytes: ends of documents are predicted too, and paid for by the bytes."""
    return int((batch.labels != BOUNDARY).sum())
