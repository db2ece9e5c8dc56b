"""Intervals for other kernels: what is exported is the mask, cell by cell, by the other library's own definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import truemask as tm
from tests.support import descriptions
from tests.support.strategies import LEAVES, Drawn, expressions
from truemask.masks.foreign.varlen import FlashMask, Varlen

Cells = NDArray[np.bool_]
SLABBED = tuple(name for name in LEAVES if name != "predicate")


def seen_by_varlen(x: Varlen) -> Cells:
    """The cells of FlashAttention's variable-length kernel: lines aligned at the last query and key of a document."""
    totals_q, totals_k = (side.tolist() for side in (x.cu_seqlens_q, x.cu_seqlens_k))
    out = np.zeros((totals_q[-1], totals_k[-1]), bool)
    left, right = x.window_size
    for a, b, c, d in zip(totals_q, totals_q[1:], totals_k, totals_k[1:], strict=False):
        i, j = np.arange(b - a)[:, None] + (d - c) - (b - a), np.arange(d - c)
        out[a:b, c:d] = (j >= i - left if left >= 0 else True) & (j <= i + right if right >= 0 else True)
    return out


def seen_by_flashmask(x: FlashMask) -> Cells:
    """The cells of FlashMask: `[b, h, q, k]`."""
    b, h, n, bounds = x.startend_row_indices.shape
    out = np.ones((b, h, n, n), bool)
    for s, t, k in np.ndindex(b, h, n):
        column = x.startend_row_indices[s, t, k].tolist()
        ends = bounds == (2 if x.causal else 4)
        out[s, t, column[0] : column[1] if ends else n, k] = False
        if x.causal:
            out[s, t, :k, k] = False
        else:
            out[s, t, column[2] if ends else 0 : column[3] if ends else column[1], k] = False
    return out


def flat(cells: Cells) -> Cells:
    """Samples one behind the other, `[b, q, k]` to `[b * q, b * k]`."""
    b, q, k = cells.shape
    out = np.zeros((b * q, b * k), bool)
    for n, part in enumerate(cells):
        out[n * q : (n + 1) * q, n * k : (n + 1) * k] = part
    return out


# -- FlashAttention ----------------------------------------------------------------------------------------------------

EXACT: dict[str, tuple[tm.Mask, tuple[int, ...], list[list[int]], tuple[int, int]]] = {
    "causal": (tm.causal, (5,), [[0, 5], [0, 5]], (-1, 0)),
    "window": (tm.window(3), (7,), [[0, 7], [0, 7]], (2, 0)),
    "window of one": (tm.window(1), (7,), [[0, 7], [0, 7]], (0, 0)),
    "local": (tm.local(2), (7,), [[0, 7], [0, 7]], (2, 2)),
    "transposed": (tm.causal.T, (7,), [[0, 7], [0, 7]], (0, -1)),
    "everything": (tm.everything, (3, 5), [[0, 3], [0, 5]], (-1, -1)),
    "nothing": (tm.nothing, (3, 5), [[0, 3, 3], [0, 0, 5]], (-1, -1)),
    "top left": (tm.causal, (5, 7), [[0, 5, 5], [0, 5, 7]], (-1, 0)),
    "decoding": (tm.causal.at(q_start=11), (2,), [[0, 2], [0, 13]], (-1, 0)),
    "decoding in a window": (tm.window(3).at(q_start=11), (2,), [[0, 0, 2], [0, 9, 13]], (2, 0)),
    "strictly before": (tm.causal.at(k_start=1), (5, 5), [[0, 1, 5, 5], [0, 0, 4, 5]], (-1, 0)),
    "packed": (tm.causal.packed([2, 0, 5]), (7,), [[0, 2, 7], [0, 2, 7]], (-1, 0)),
    "documents of one token": (tm.causal.packed([3, 1, 1, 2]), (7,), [[0, 3, 4, 5, 7], [0, 3, 4, 5, 7]], (-1, 0)),
    "packed window": (tm.window(3).packed([2, 5, 3]), (10,), [[0, 2, 7, 10], [0, 2, 7, 10]], (2, 0)),
    "packed context": (
        tm.documents([3, 0, 4], kv_lengths=[2, 3, 5]),
        (7,),
        [[0, 3, 3, 7], [0, 2, 5, 10]],
        (-1, -1),
    ),
    "chunks": (tm.causal & tm.blocks(3), (7,), [[0, 3, 6, 7], [0, 3, 6, 7]], (-1, 0)),
    "padded": (tm.causal.padded([2, 0]), (5,), [[0, 2, 2, 5, 10], [0, 0, 2, 5, 10]], (-1, 0)),
    "no queries": (tm.causal, (0, 5), [[0, 0], [0, 5]], (-1, -1)),
    "no keys": (tm.causal, (5, 0), [[0, 5], [0, 0]], (-1, -1)),
}


@pytest.mark.parametrize("name", EXACT)
def test_documents_with_one_band(name: str) -> None:
    mask, sizes, totals, band = EXACT[name]
    found = tm.to_varlen(mask, *sizes)
    assert [found.cu_seqlens_q.tolist(), found.cu_seqlens_k.tolist()] == totals
    assert found.cu_seqlens_q.dtype == found.cu_seqlens_k.dtype == torch.int32
    assert found.window_size == band
    assert found.causal == (band[1] == 0)
    assert found.max_seqlen_q == max(np.diff(totals[0]), default=0)
    assert found.max_seqlen_k == max(np.diff(totals[1]), default=0)
    assert np.array_equal(seen_by_varlen(found), flat(mask.to_dense(*sizes)[:, 0].numpy()))


def test_samples_stand_one_behind_the_other() -> None:
    found = tm.to_varlen(tm.causal, 3, batch=2, heads=5)
    assert found.cu_seqlens_q.tolist() == [0, 3, 6]
    ones = tm.to_varlen(tm.window(1), 3, batch=2)
    assert ones.cu_seqlens_q.tolist() == [0, 3, 6]


def test_what_is_no_band_names_a_cell() -> None:
    mask = tm.causal & (tm.window(3) | tm.prefix(1))
    with pytest.raises(tm.MaskError) as caught:
        tm.to_varlen(mask, 9)
    assert str(caught.value) == (
        f"to_varlen: `{mask}` is not documents with one band: query 4 may not see key 1, unlike in the nearest mask "
        "that is. Export its cells with to_torch_sdpa, or its tiles with mask.to_block_mask"
    )
    later = tm.per_sample([tm.causal, tm.causal & tm.prefix(3)])
    with pytest.raises(tm.MaskError, match=r"query \d of sample 1 may (not )?see key \d"):
        tm.to_varlen(later, 5)
    with pytest.raises(tm.MaskError, match=r"varies over heads.*mask.select\(heads=\[i\]\)"):
        tm.to_varlen(tm.per_head([tm.causal, tm.window(2)]), 5)
    with pytest.raises(tm.MaskError, match="no exact form"):
        tm.to_varlen(tm.predicate(descriptions.formula).select([0], [0]), 5)


@given(expressions(leaves=SLABBED))
def test_whatever_is_exported_is_the_mask(drawn: Drawn) -> None:
    r = drawn.reach
    cells = descriptions.dense(drawn.description, r.q, r.k, r.batch, r.heads)
    try:
        found = tm.to_varlen(drawn.mask, r.q, r.k, batch=r.batch, heads=r.heads)
    except tm.MaskError:
        return
    assert np.array_equal(seen_by_varlen(found), flat(cells[:, 0]))


lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5)
sides = st.integers(-1, 4)


@given(lengths, sides, sides, st.booleans(), st.booleans())
def test_there_and_back_again(documents: list[Any], left: int, right: int, causal: bool, square: bool) -> None:
    q, k = np.array(documents).T
    k = q if square else k
    q_totals, k_totals = (torch.from_numpy(np.append(0, np.cumsum(x))).int() for x in (q, k))
    given = Varlen(q_totals, k_totals, int(q.max()), int(k.max()), causal, (left, 0 if causal else right))
    cells = seen_by_varlen(given)
    mask = tm.from_varlen(q_totals, None if square else k_totals, causal=causal, window_size=(left, right))
    assert np.array_equal(mask.to_dense(*cells.shape)[0, 0].numpy(), cells)
    assert np.array_equal(seen_by_varlen(tm.to_varlen(mask, *cells.shape)), cells)


def test_from_varlen_reads_as_one_would_write_it() -> None:
    q, k = torch.tensor([0, 3, 7]), torch.tensor([0, 5, 9])
    assert str(tm.from_varlen(q, causal=True)) == "causal.packed([3, 4])"
    assert str(tm.from_varlen(q, causal=True, window_size=(2, 2))) == "window(3).packed([3, 4])"
    assert str(tm.from_varlen(q, window_size=(2, 2))) == "local(2).packed([3, 4])"
    assert str(tm.from_varlen(q, k)) == "documents([3, 4], kv_lengths=[5, 4])"
    assert str(tm.from_varlen([0, 3, 7], [0, 5, 11], causal=True)) == (
        "causal.at(q_start=2).packed([3, 4], kv_lengths=[5, 6])"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 3],), "from 0 on"),
        (([0, 3, 2],), "never fall"),
        (([0],), "running totals"),
        (([0.0, 3.0],), "whole numbers"),
        (([0, 3], [0, 3, 4]), "1 documents of queries and 2 of keys"),
    ],
    ids=str,
)
def test_from_varlen_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(tm.MaskError, match=message):
        tm.from_varlen(*arguments)
    with pytest.raises(tm.MaskError, match="-1 for no limit"):
        tm.from_varlen([0, 3], window_size=(-2, 0))


# -- FlashMask ---------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[tm.Mask, int, bool, int]] = {
    "causal": (tm.causal, 7, True, 1),
    "window": (tm.window(3), 7, True, 1),
    "packed": (tm.causal.packed([2, 5]), 7, True, 1),
    "nothing": (tm.nothing, 5, True, 1),
    "sinks": (tm.causal & (tm.window(3) | tm.prefix(2)), 11, True, 1),
    "prefix LM in documents": ((tm.causal | tm.prefix(2)).packed([3, 4]), 7, False, 2),
    "shared question": (tm.tree([-1, 0, 0], lengths=[3, 2, 4]), 9, True, 1),
    "a gap below": (tm.causal & ~(tm.window(5) - tm.window(2)), 11, True, 2),
    "everything": (tm.everything, 5, False, 2),
    "local": (tm.local(2), 7, False, 2),
    "documents": (tm.documents([2, 5]), 7, False, 2),
    "prefix LM": (tm.causal | tm.prefix(3), 7, False, 2),
    "global": (tm.local(1) | tm.global_tokens([0]), 7, False, 4),
    "padded": (tm.causal.padded([2, 0]), 5, True, 1),
    "heads": (tm.per_head([tm.causal, tm.local(1)]), 5, False, 2),
    "both": (tm.per_head([tm.causal, tm.window(2)]) & tm.prefix([2, 5, 3]), 5, True, 1),
    "none": (tm.causal, 0, True, 1),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns(name: str) -> None:
    mask, n, causal, bounds = COLUMNS[name]
    found = tm.to_flashmask(mask, n)
    dense = mask.to_dense(n).numpy()
    assert found.startend_row_indices.dtype == torch.int32
    assert found.startend_row_indices.shape == (*dense.shape[:2], n, bounds)
    assert found.causal == causal
    assert np.array_equal(seen_by_flashmask(found), dense)


def test_what_needs_more_intervals_names_the_first_key() -> None:
    with pytest.raises(tm.MaskError) as caught:
        tm.to_flashmask(tm.causal & tm.dilated(2), 7)
    assert str(caught.value) == (
        "to_flashmask: key 0 of `causal & dilated(2)` is hidden from the queries [1, 2) and [3, 4) and [5, 6) below "
        "the diagonal, and there is place for one interval. Export its cells with to_torch_sdpa, or its tiles with "
        "mask.to_block_mask"
    )
    with pytest.raises(tm.MaskError, match=r"key 2 of head 1 of .* \[0, 1\) and \[3, 4\) below|key \d of head 1"):
        tm.to_flashmask(tm.per_head([tm.causal, tm.queries([True, False] * 4)]), 8)
    with pytest.raises(tm.MaskError, match="no exact form"):
        tm.to_flashmask(tm.predicate(descriptions.formula).select([0], [0]), 5)


@given(expressions(leaves=SLABBED), st.integers(1, 9))
def test_columns_that_fit_are_the_mask_and_the_others_are_refused(drawn: Drawn, n: int) -> None:
    n = min(n, drawn.reach.q, drawn.reach.k)
    cells = descriptions.dense(drawn.description, n, n, drawn.reach.batch, drawn.reach.heads)
    below = np.tril(np.ones((n, n), bool))
    hidden = [~cells & side for side in (below, ~below)]
    begins = [(x & ~np.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]).sum(2) for x in hidden]
    fits = all((times <= 1).all() for times in begins)
    try:
        found = tm.to_flashmask(drawn.mask, n, batch=drawn.reach.batch, heads=drawn.reach.heads)
    except tm.MaskError:
        assert not fits
        return
    assert fits
    assert np.array_equal(np.broadcast_to(seen_by_flashmask(found), cells.shape), cells)


def test_a_million_keys() -> None:
    n = 1 << 20
    found = tm.to_flashmask(tm.causal & (tm.window(512) | tm.prefix(4)), n)
    assert found.startend_row_indices.shape == (1, 1, n, 1)
    assert found.startend_row_indices[0, 0, [3, 4, n - 1], 0].tolist() == [n, 516, n]
    lengths = [800] * 1000
    assert len(tm.to_varlen(tm.causal.packed(lengths), sum(lengths)).cu_seqlens_q) == 1001
