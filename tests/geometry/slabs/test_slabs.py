"""The exact form against dense arrays: every operation on random slabs, what must hold of the result, and its size."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import truemask as tm
from truemask.geometry.slabs import algebra as overlay
from truemask.geometry.slabs import measure
from truemask.geometry.slabs import normal_form as forms
from truemask.geometry.slabs.algebra import all_of, any_of, cropped, odd_of, pieces, transposed, unmerged_odd
from truemask.geometry.slabs.normal_form import NormalForm, intersection, parity
from truemask.geometry.slabs.slabs import (
    FAR,
    MAX_ENDS,
    NoExactFormError,
    Slabs,
    bands,
    blank,
    for_rows,
    stacked,
    tidy,
)

Cells = NDArray[np.bool_]
MILLION = 1 << 20
numbers = st.integers


class Pair(NamedTuple):
    """Slabs, and the cells that they must be."""

    slabs: Slabs
    cells: Cells


def cells_of(x: Slabs, width: int, left: int = 0) -> Cells:
    """The cells of keys `[left, left + width)`, read off row by row; fails where a run is empty or not apart."""
    first, stop = int(x.rows[0]), int(x.rows[-1])
    out = np.zeros((stop - first, width), bool)
    assert (np.diff(x.rows) > 0).all() or first == stop
    assert x.starts[0] == 0
    assert x.starts[-1] == x.ends.shape[1] == x.slopes.shape[1]
    assert np.isin(x.slopes, (0, 1)).all()
    for slab, row in enumerate(x.rows[:-1]):
        for q in range(row, x.rows[slab + 1]):
            before = -8 * FAR
            for run in range(x.starts[slab], x.starts[slab + 1]):
                lo, hi = (x.ends[:, run] + x.slopes[:, run] * q).tolist()
                assert before < lo < hi, f"run {run} of row {q} is [{lo}, {hi}) behind {before}"
                before = hi
                out[q - first, max(0, lo - left) : max(0, hi - left)] = True
    return out


@st.composite
def some(draw: st.DrawFn, height: int, width: int, first: int = 0) -> Pair:
    """The union of a few random pieces, some of them empty, crossing or beyond the edges."""
    side = height + width
    piece = st.tuples(
        numbers(first - 2, first + height),
        numbers(1, height + 2),
        numbers(-side, side),
        numbers(-3, side),
        numbers(0, 1),
        numbers(0, 1),
    )
    drawn = draw(st.lists(piece, max_size=5))
    q, k = np.arange(first, first + height)[:, None], np.arange(width)
    cells = np.zeros((height, width), bool)
    for q0, tall, lo, wide, s, t in drawn:
        cells |= (q >= q0) & (q < q0 + tall) & (k >= lo + s * q) & (k < lo + wide + t * q)
    q0, tall, lo, wide, s, t = np.array(drawn, np.int64).reshape(-1, 6).T
    return Pair(pieces(first, first + height, q0, q0 + tall, lo, lo + wide, s, t), cells)


@st.composite
def several(draw: st.DrawFn, count: int = 3) -> list[Pair]:
    height, width, first = draw(numbers(1, 13)), draw(numbers(1, 11)), draw(numbers(0, 3))
    return [draw(some(height, width, first)) for _ in range(count)]


def check(found: Slabs, cells: Cells, left: int = 0) -> None:
    assert np.array_equal(cells_of(found, cells.shape[1], left), cells)


@given(several(1))
def test_pieces_are_their_union(x: list[Pair]) -> None:
    check(*x[0])


@given(several())
def test_the_algebra_is_that_of_cells(x: list[Pair]) -> None:
    (a, b, c), (p, q, r) = zip(*x, strict=True)
    check(all_of([a, b, c]), p & q & r)
    check(all_of([a], but=[b, c]), p & ~q & ~r)
    check(all_of([a, b], but=[c]), p & q & ~r)
    check(any_of([a, b, c]), p | q | r)
    check(odd_of([a, b, c]), p ^ q ^ r)


@given(several(2))
def test_what_is_in_no_part_is_the_complement(x: list[Pair]) -> None:
    (a, b), (p, q) = zip(*x, strict=True)
    complement = all_of([], but=[a])
    check(complement, ~p)
    check(all_of([], but=[complement]), p)
    check(all_of([], but=[a, b]), ~(p | q))


@given(several())
def test_chunks_and_single_steps_give_the_same(x: list[Pair]) -> None:
    (a, b, c), (p, q, r) = zip(*x, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlay, "CHUNK", 2)
        patch.setattr(forms, "RUNS_AT_ONCE", 3)
        check(all_of([a, b], but=[c]), p & q & ~r)
        check(intersection([NormalForm(a), NormalForm(b), NormalForm(c, True)], {}).canonical, p & q & ~r)
        check(intersection([NormalForm(a, True), NormalForm(b, True), NormalForm(c, True)], {}).canonical, ~(p | q | r))
        check(parity([NormalForm(a), NormalForm(b), NormalForm(c)], {}).canonical, p ^ q ^ r)


@given(several(2), st.lists(st.booleans(), min_size=2, max_size=2))
def test_forms_are_one_for_all_spellings(x: list[Pair], negated: list[bool]) -> None:
    a, b = (NormalForm(pair.slabs, no) for pair, no in zip(x, negated, strict=True))
    p, q = (pair.cells ^ no for pair, no in zip(x, negated, strict=True))
    known: dict[object, NormalForm] = {}
    check(intersection([a, b], known).canonical, p & q)
    check((~intersection([~a, ~b], known)).canonical, p | q)
    check(parity([a, b], known).canonical, p ^ q)
    check(intersection([a, b, ~a], known).canonical, p & False)
    check(parity([a, b, a], known).canonical, q)
    assert intersection([b, a], known) == intersection([a, b, a], known)
    assert parity([~b, a], known) == parity([~a, b], known) == ~parity([a, b], known)


@given(several(2), st.data())
def test_rough_slabs_count_and_settle(x: list[Pair], data: st.DataObject) -> None:
    (a, b), (p, q) = zip(*x, strict=True)
    start, stop = sorted(data.draw(st.tuples(numbers(0, p.shape[1]), numbers(0, p.shape[1]))))
    found, cells = unmerged_odd([a, b]).clipped(start, stop), (p ^ q) & within(p.shape[1], start, stop)
    assert measure.pairs(found) == cells.sum()
    check(found.canonical, cells)
    first = np.add(np.argwhere(cells)[:1], (int(a.rows[0]), 0))
    assert measure.first_cell(found) == (tuple(first[0].tolist()) if len(first) else None)
    assert measure.first_cell(unmerged_odd([a, a.between(int(a.rows[0]), int(a.rows[-1]))])) is None


@given(several(1), st.data())
def test_transposed_is_the_transpose(x: list[Pair], data: st.DataObject) -> None:
    ((slabs, cells),) = x
    top, width = int(slabs.rows[0]), cells.shape[1]
    start = data.draw(numbers(0, width - 1))
    stop = data.draw(numbers(start + 1, width))
    turned = transposed(slabs, start, stop)
    assert (int(turned.rows[0]), int(turned.rows[-1])) == (start, stop)
    check(turned, cells[:, start:stop].T, left=top)
    check(transposed(turned, top, top + len(cells)), np.where(within(width, start, stop), cells, False))


def within(size: int, start: int, stop: int) -> Cells:
    return (np.arange(size) >= start) & (np.arange(size) < stop)


@given(several(1), st.data())
def test_parts_of_rows_and_keys(x: list[Pair], data: st.DataObject) -> None:
    ((slabs, cells),) = x
    top, (height, width) = int(slabs.rows[0]), cells.shape
    keys = sorted(data.draw(st.tuples(numbers(-2, width + 2), numbers(-2, width + 2))))
    check(cropped(slabs, *keys), cells & within(width, *keys))
    rows = sorted(data.draw(st.tuples(numbers(-2, height + 2), numbers(-2, height + 2))))
    check(for_rows(slabs, top + rows[0], top + rows[1]), cells & within(height, *rows)[:, None])
    first, stop = max(rows[0], 0), min(rows[1], height)
    if first < stop:
        check(slabs.between(top + first, top + stop), cells[first:stop])


@given(several(1), numbers(-7, 7), numbers(-7, 7))
def test_moved_is_the_same_picture_elsewhere(x: list[Pair], down: int, right: int) -> None:
    ((slabs, cells),) = x
    there = slabs.moved(down, right)
    assert there.rows.tolist() == (slabs.rows + down).tolist()
    check(there, cells, left=right)


@given(several(1), numbers(0, 12))
def test_stacked_parts_are_the_whole_again(x: list[Pair], cut: int) -> None:
    ((slabs, cells),) = x
    top, stop = int(slabs.rows[0]), int(slabs.rows[-1])
    middle = top + cut % (stop - top)
    parts = [slabs.between(a, b) for a, b in ((top, middle), (middle, stop)) if a < b]
    whole = stacked(parts)
    check(whole, cells)
    assert len(whole.sizes) <= len(slabs.sizes)


@given(several(1))
def test_rows_given_one_by_one_become_few_slabs(x: list[Pair]) -> None:
    ((slabs, cells),) = x
    runs = [np.flatnonzero(np.diff(np.pad(row, 1).view(np.int8))).reshape(-1, 2) for row in cells]
    ends = np.concatenate(runs).T.astype(np.int64)
    rows = np.arange(len(cells) + 1) + int(slabs.rows[0])
    found = tidy(rows, np.array([len(run) for run in runs]), ends, np.zeros_like(ends))
    check(found, cells)
    assert len(found.sizes) <= 2 * len(cropped(slabs, 0, cells.shape[1]).sizes)  # pairs of rows alone are ambiguous


@given(several(1), numbers(1, 5), numbers(1, 5))
def test_what_slabs_answer_is_what_cells_say(x: list[Pair], high: int, wide: int) -> None:
    ((slabs, cells),) = x
    height, width = cells.shape
    slabs = cropped(slabs.moved(-int(slabs.rows[0]), 0), 0, width)
    assert measure.pairs(slabs) == cells.sum()
    assert np.array_equal(measure.live_rows(slabs), cells.any(1))
    assert np.array_equal(measure.seen_keys(slabs, width), cells.any(0))
    first = np.argwhere(cells)[:1].tolist()
    assert measure.first_cell(slabs) == (tuple(first[0]) if first else None)
    starts, runs = measure.tile_runs(slabs, width, (high, wide))
    state = np.zeros((-(-height // high), -(-width // wide)), int)
    for i, j in np.ndindex(*state.shape):
        tile = cells[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
        state[i, j] = int(tile.any()) + int(tile.all())
    for i, row in enumerate(state):
        edges = np.flatnonzero(np.diff(np.pad(row, 1)))
        expected = [[a, b, row[a]] for a, b in pairwise(edges) if row[a]]
        assert runs[starts[i] : starts[i + 1]].tolist() == expected


def test_counts_beyond_64_bits_are_exact() -> None:
    n = 1 << 39
    assert measure.pairs(bands(0, n, 0, 0, n, 0)) == n * n
    assert measure.pairs(bands(0, n, 0, 0, 1, 1)) == n * (n + 1) // 2


def test_rows_alone_take_the_lines_of_their_neighbours() -> None:
    causal = bands(0, 7, 0, 0, 1, 1)
    assert len(any_of([causal, bands(0, 7, 0, 0, 1, 0)]).sizes) == 1
    parts = [causal.between(0, 1), causal.between(1, 2), causal.between(2, 7)]
    assert stacked(parts).slopes.tolist() == [[0], [1]]
    assert len(stacked([blank(0, 3), blank(3, 5)]).sizes) == 1


# -- size: it follows the documents and blocks, not the length ---------------------------------------------------------

DOCUMENTS = [23 + 7 * (i % 13) for i in range(1000)]
SIZES = {
    "everything": (tm.everything, MILLION, 1),
    "nothing": (tm.nothing, MILLION, 1),
    "causal": (tm.causal, MILLION, 1),
    "window": (tm.causal & tm.window(512), MILLION, 2),
    "sinks": (tm.causal & (tm.window(512) | tm.prefix(4)), MILLION, 3),
    "local": (tm.local(97), MILLION, 3),
    "blocks of one": (tm.blocks(1), MILLION, 1),
    "blocks": (tm.blocks(MILLION // 64, back=1), MILLION, 64),
    "strided in one slab": (tm.strided(1024), MILLION, 1),
    "twice not": (~~tm.causal & ~(~tm.window(512)), MILLION, 2),
    "transposed twice": ((tm.window(512).T & tm.everything).T, MILLION, 2),
    "prefix LM": (tm.causal | tm.prefix(1000), MILLION, 2),
    "documents": (tm.documents(DOCUMENTS), sum(DOCUMENTS), 1000),
    "packed": (tm.causal.packed(DOCUMENTS), sum(DOCUMENTS), 1000),
    "packed window": (tm.window(17).packed(DOCUMENTS), sum(DOCUMENTS), 2000),
    "documents, causal": (tm.causal & tm.documents(DOCUMENTS), sum(DOCUMENTS), 1000),
    "chunks": (tm.causal & tm.blocks(1024), MILLION, 1024),
    "padded": (tm.causal.padded([1000]), MILLION, 2),
    "registers": (tm.causal.prepended(q=4, k=4), MILLION, 2),
    "global": (tm.window(512) | tm.global_tokens([0, 70000]), MILLION, 8),
    "decoding": (tm.window(512).at(q_start=MILLION - 1), 1, 1),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_exact_form_is_small(name: str) -> None:
    mask, q_len, most = SIZES[name]
    slabs = mask.to_slabs(q_len)
    assert len(slabs.q_start) <= most
    assert bool((slabs.q_start < slabs.q_stop).all())


def test_a_form_of_too_many_runs_is_refused_before_it_is_made() -> None:
    with pytest.raises(NoExactFormError, match=str(MAX_ENDS + 1)):
        bands(0, 1, np.arange(MAX_ENDS + 1), 0, np.arange(MAX_ENDS + 1), 0)
    with pytest.raises(NoExactFormError):
        pieces(
            0, MAX_ENDS, np.arange(MAX_ENDS), np.full(MAX_ENDS, MAX_ENDS), np.arange(MAX_ENDS), np.arange(MAX_ENDS) + 1
        )
