"""Rows pack documents without padding; labels stay inside their document; the stream goes on from its state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truemask.train.baselines import measure_baselines
from truemask.train.config import BOUNDARY, NUM_TOKENS, TrainConfig, TrainError
from truemask.train.corpus import Document, read_corpus
from truemask.train.rows import Rows, cut_rows, document_lengths, held_out_rows, lay_out

texts = st.lists(st.binary(min_size=1, max_size=23), min_size=1, max_size=13)


def documents(contents: list[bytes]) -> list[Document]:
    return [Document(str(i), np.array([BOUNDARY, *content], dtype=np.uint16)) for i, content in enumerate(contents)]


@given(texts, st.integers(1, 11))
def test_rows_hold_the_line_once_and_label_it_with_its_successor(contents: list[bytes], length: int) -> None:
    line = lay_out(documents(contents))
    count = (len(line) - 1) // length
    batch = cut_rows(line, np.arange(count), length)
    flat = torch.from_numpy(line.astype(np.int64))
    assert torch.equal(batch.ids.flatten(), flat[: count * length])
    assert torch.equal(batch.labels.flatten(), flat[1 : count * length + 1])


@given(texts, st.integers(1, 11))
def test_no_label_comes_from_another_document(contents: list[bytes], length: int) -> None:
    """Within a row, the label of a document's last token is the mark that ends it, whatever document comes next."""
    line = lay_out(documents(contents))
    batch = cut_rows(line, np.arange((len(line) - 1) // length), length)
    for row, labels, lengths in zip(batch.ids, batch.labels, batch.lengths, strict=True):
        assert sum(lengths) == length
        ends = np.cumsum(lengths)
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            assert torch.equal(labels[start : stop - 1], row[start + 1 : stop])
            assert not (row[start + 1 : stop] == BOUNDARY).any()
        assert (labels[ends[:-1] - 1] == BOUNDARY).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7))
def test_lengths_count_the_documents_of_a_row(lengths: list[int]) -> None:
    row = np.concatenate([[BOUNDARY] + [7] * (n - 1) for n in lengths])
    assert document_lengths(row) == lengths


NOISE = [bytes(np.random.default_rng(i).integers(256, size=53 + i, dtype=np.uint8)) for i in range(11)]


def test_an_epoch_sees_every_row_once_and_the_next_one_another_order() -> None:
    packed = documents(NOISE)
    rows = Rows(packed, 13, 3, seed=5)
    seen = [rows.next() for _ in range((len(lay_out(packed)) - 1) // 13 // 3)]
    assert rows.state == {"epoch": 0, "row": 3 * len(seen)}
    assert len({tuple(ids.tolist()) for batch in seen for ids in batch.ids}) == 3 * len(seen)
    assert not torch.equal(rows.next().ids, seen[0].ids)
    assert rows.state == {"epoch": 1, "row": 3}


def test_the_stream_goes_on_from_its_state() -> None:
    one, other = (Rows(documents(NOISE), 13, 3, seed=5) for _ in range(2))
    for _ in range(11):
        one.next()
    other.restore(one.state)
    for _ in range(23):
        assert torch.equal(one.next().ids, other.next().ids)
    assert one.state["epoch"] > 0


def test_held_out_rows_are_spread_and_the_same_every_time(config: TrainConfig) -> None:
    held_out = read_corpus(config).held_out
    few, all_rows = held_out_rows(held_out, 31, 3), held_out_rows(held_out, 31, 10**6)
    assert torch.equal(few.ids[[0, -1]], all_rows.ids[[0, -1]])
    assert len(all_rows.ids) == (sum(len(d.tokens) for d in held_out)) // 31
    with pytest.raises(TrainError, match="fewer than one row of 10007"):
        held_out_rows(held_out, 10007, 3)


def test_baselines_are_the_entropies_of_counting() -> None:
    """Text that repeats `ab`: every byte is known from the one before, and worth one bit alone."""
    train = documents([b"ab" * 5000])
    held_out = cut_rows(lay_out(documents([b"ab" * 50])), np.arange(10), 10)
    base = measure_baselines(train, held_out)
    assert base.unigram == pytest.approx(1, abs=0.08)
    assert base.bigram < 0.01


def test_a_bigram_never_seen_costs_but_is_not_impossible() -> None:
    base = measure_baselines(documents([b"ab" * 500]), cut_rows(lay_out(documents([b"zq" * 9])), np.arange(1), 18))
    assert math.isfinite(base.bigram)
    assert base.bigram > math.log2(NUM_TOKENS)
