"""The law of tiles: EMPTY and FULL are proofs, MIXED promises nothing; refined, the map is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import truemask as tm
from tests.support import descriptions
from tests.support.strategies import LEAVES, Drawn, Reach, expressions
from tests.support.work import work_of
from truemask.geometry.tiles.tile_map import Rectangles, TileMap

EMPTY, MIXED, FULL = 0, 1, 2
blocks = st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)))


def cells_of(drawn: Drawn) -> np.ndarray:
    """The oracle's picture, bool `[batch, heads, q, k]`."""
    r = drawn.reach
    return descriptions.dense(drawn.description, r.q, r.k, r.batch, r.heads)


def tiles_of(drawn: Drawn, block: int | tuple[int, int]) -> TileMap:
    r = drawn.reach
    return drawn.mask.tiles(r.q, r.k, block=block, batch=r.batch, heads=r.heads)


def state_of(part: np.ndarray) -> int:
    return int(part.any()) + int(part.all()) if part.size else EMPTY


def exact_states(cells: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    b, h, q, k = cells.shape
    out = np.zeros((b, h, -(-q // block[0]), -(-k // block[1])), int)
    for s, t, i, j in np.ndindex(*out.shape):
        out[s, t, i, j] = state_of(cells[s, t, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]])
    return out


@given(expressions())
def test_truth_is_what_the_oracle_says(drawn: Drawn) -> None:
    r, cells = drawn.reach, cells_of(drawn)
    found = drawn.mask.to_dense(r.q, r.k, batch=r.batch, heads=r.heads).numpy()
    assert np.array_equal(np.broadcast_to(found, cells.shape), cells)


@pytest.mark.parametrize("leaf", LEAVES)
@given(data=st.data())
def test_each_leaf_alone(leaf: str, data: st.DataObject) -> None:
    drawn = data.draw(expressions(depth=1, leaves=[leaf]))
    cells, block = cells_of(drawn), data.draw(blocks)
    found = tiles_of(drawn, block)
    exact = exact_states(cells, found.block)
    state = np.broadcast_to(found.state, exact.shape)
    assert ((state == exact) | (state == MIXED)).all()
    refined = np.broadcast_to(found.refine().state, exact.shape)
    assert np.array_equal(refined, exact)


@given(expressions(), st.data())
def test_no_rectangle_breaks_a_promise(drawn: Drawn, data: st.DataObject) -> None:
    r, cells = drawn.reach, cells_of(drawn)

    def stretch(length: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(0, length - 1), st.integers(1, length)).map(
            lambda x: (x[0], min(length, x[0] + x[1]))
        )

    one = st.tuples(st.integers(0, r.batch - 1), st.integers(0, r.heads - 1), stretch(r.q), stretch(r.k))
    drawn_ones = data.draw(st.lists(one, min_size=1, max_size=9))
    columns = np.array([(b, h, *q, *k) for b, h, q, k in drawn_ones], np.int64).T
    found = np.broadcast_to(drawn.mask.tile(Rectangles(*columns)), len(drawn_ones))
    for state, (b, h, (q0, q1), (k0, k1)) in zip(found, drawn_ones, strict=True):
        assert state in (MIXED, state_of(cells[b, h, q0:q1, k0:k1]))


@given(expressions(), blocks)
def test_tile_maps_are_sound_and_refine_to_the_truth(drawn: Drawn, block: int | tuple[int, int]) -> None:
    found = tiles_of(drawn, block)
    assert found.block == (block if isinstance(block, tuple) else (block, block))
    exact = exact_states(cells_of(drawn), found.block)
    state = np.broadcast_to(found.state, exact.shape)
    assert ((state == exact) | (state == MIXED)).all()
    refined = found.refine()
    assert np.array_equal(np.broadcast_to(refined.state, exact.shape), exact)
    assert refined.unsure == 0
    assert 0 <= found.unsure <= found.counts.mixed
    if found.unsure == 0:
        assert np.array_equal(state, exact)


@given(expressions(), blocks)
def test_counts_and_rows_agree_with_the_state(drawn: Drawn, block: int | tuple[int, int]) -> None:
    found = tiles_of(drawn, block)
    for tiles in (found, found.refine()):
        state = tiles.state
        assert state.shape == tiles.shape
        assert state.dtype == np.int8
        assert tuple(tiles.counts) == tuple(int((state == value).sum()) for value in (EMPTY, MIXED, FULL))
        for b, h, i in np.ndindex(*tiles.shape[:3]):
            row = np.zeros(tiles.shape[3], int)
            ends = [0]
            for start, stop, value in tiles.rows[b, h, i]:
                assert ends[-1] <= start < stop
                assert value in (MIXED, FULL)
                row[start:stop] = value
                ends.append(stop)
            assert np.array_equal(row, state[b, h, i])


@given(expressions())
def test_counting_is_exact(drawn: Drawn) -> None:
    r, cells = drawn.reach, cells_of(drawn)
    asked = {"q_len": r.q, "kv_len": r.k, "batch": r.batch, "heads": r.heads}
    mask = drawn.mask
    counted = mask.count(**asked)
    assert counted.dtype == torch.int64
    assert np.array_equal(np.broadcast_to(counted.numpy(), cells.shape[:2]), cells.sum((2, 3)))
    assert mask.density(**asked) == pytest.approx(cells.mean())
    assert np.array_equal(np.broadcast_to(mask.dead_queries(**asked).numpy(), cells.shape[:3]), ~cells.any(3))
    dead_keys = np.broadcast_to(mask.dead_keys(**asked).numpy(), (r.batch, r.heads, r.k))
    assert np.array_equal(dead_keys, ~cells.any(2))


@given(expressions())
def test_a_mask_said_not_to_vary_with_the_query_does_not(drawn: Drawn) -> None:
    cells = cells_of(drawn)
    if not drawn.mask.varies_with_query:
        assert (cells == cells[:, :, :1]).all()


def test_a_ragged_last_tile_that_is_all_true_is_full() -> None:
    tiles = tm.everything.tiles(131, 67, block=(64, 32))
    assert tiles.shape == (1, 1, 3, 3)
    assert tiles.counts == (0, 0, 9)
    last = tm.prefix(67).tiles(5, 67, block=64)
    assert last.rows[0, 0, 0] == [(0, 2, FULL)]
    assert tm.documents([64, 3]).tiles(67, block=64).state.tolist() == [[[[FULL, EMPTY], [EMPTY, FULL]]]]


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_zero_lengths(sizes: tuple[int, int]) -> None:
    for mask in (tm.causal, tm.everything, ~tm.window(3), tm.prefix([1, 2]), tm.causal.at(q_start=3)):
        tiles = mask.tiles(*sizes, block=4)
        assert tiles.counts == (0, 0, 0)
        assert tiles.refine().state.size == 0
        assert mask.to_dense(*sizes).numel() == 0
        assert mask.count(*sizes).tolist() == [[0]] * mask.batch_size
        assert mask.density(*sizes) == 0.0
        assert mask.dead_queries(*sizes).all()
        assert mask.dead_keys(*sizes).all()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 70), blocks)
def test_bands_are_exact_without_evaluating(q_len: int, kv_len: int, size: int, block: int | tuple[int, int]) -> None:
    for mask in (tm.causal, tm.window(size), tm.local(size), tm.blocks(size, back=1), tm.prefix(size)):
        tiles = mask.tiles(q_len, kv_len, block=block)
        assert tiles.unsure == 0
        assert np.array_equal(tiles.state, tiles.refine().state)


def test_a_long_mask_costs_its_tiles_and_not_its_cells() -> None:
    n, size = 1 << 17, 128
    found, calls, peak_bytes = work_of(lambda: tm.window(4 * size).tiles(n, block=size))
    rows = n // size
    assert found.counts.full == 3 * rows - 6  # the diagonal and one tile four to the left are cut, three are whole
    assert found.counts.mixed == 2 * rows - 4
    assert calls < 5_000
    assert peak_bytes < 10e6
    assert found.rows[0, 0, 1000] == [(996, 997, MIXED), (997, 1000, FULL), (1000, 1001, MIXED)]


@given(st.data())
def test_rates_between_zero_and_one_stay_sound_in_long_tiles(data: st.DataObject) -> None:
    reach = Reach(37, 41)
    drawn = data.draw(expressions(depth=2, leaves=["random", "global_tokens", "same"], reach=reach))
    tiles = tiles_of(drawn, data.draw(st.integers(5, 23)))
    exact = exact_states(cells_of(drawn), tiles.block)
    assert ((tiles.state == exact) | (tiles.state == MIXED)).all()


def test_rows_can_be_walked_and_refuse_what_is_not_there() -> None:
    tiles = tm.causal.tiles(8, block=2)
    assert list(tiles.rows) == [tiles.rows[0, 0, i] for i in range(4)]
    assert tiles.rows[-1] == tiles.rows[3] == [(0, 3, 2), (3, 4, 1)]
    with pytest.raises(IndexError, match="out of range"):
        tiles.rows[4]
    with pytest.raises(IndexError, match=r"rows\[b, h, i\]"):
        tm.per_head([tm.causal, tm.window(2)]).tiles(8, block=2).rows[0]


def test_a_user_can_ask_about_rectangles() -> None:
    mask = tm.causal & tm.window(3)
    rectangles = tm.Rectangles.of(q=([0, 3, 9], [3, 4, 12]), k=([3, 1, 0], [5, 4, 2]))
    assert mask.tile(rectangles).tolist() == [0, 2, 0]
    assert tm.per_head([tm.causal, tm.nothing]).tile(tm.Rectangles.of((5, 6), (0, 3), h=[0, 1])).tolist() == [2, 0]
    with pytest.raises(ValueError, match="larger stop"):
        tm.Rectangles.of(q=(3, 3), k=(0, 1))
