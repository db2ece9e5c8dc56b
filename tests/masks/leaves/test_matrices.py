"""Dense masks that are new in every call: what is looked at is bounded, and nothing of their meaning is lost by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from tests.attention.planning.test_plan import random_cells
from tests.support.equality import assert_same
from tests.support.strategies import Drawn, expressions
from truemask.attention.planning.cache import CACHE
from truemask.backends.native import backend as native
from truemask.backends.native.library import missing
from truemask.diagnosis import convention_warnings as slips
from truemask.geometry.edges import Edges
from truemask.geometry.ranges import Areas
from truemask.geometry.slabs.slabs import Region
from truemask.geometry.tiles.tile_map import TileMap
from truemask.masks.core import queries
from truemask.masks.core.data import STRIDE_WORDS, Data
from truemask.masks.core.exact_form import exact_slabs
from truemask.masks.leaves import tile_sample as sampled
from truemask.masks.leaves.matrices import Dense

N = 769  # so many queries and keys are sampled
PATTERNS = {
    "causal and window": tm.causal & tm.window(100),
    "documents": tm.causal.packed([300, 169, 300]),
    "blocks": tm.blocks(64, back=1),
    "dilated": tm.dilated(3),
}


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    CACHE.clear()
    yield
    CACHE.clear()


def fresh(seed: int = 0, n: int = N) -> torch.Tensor:
    return random_cells(n, seed)[0, 0].clone()


# -- what is looked at -------------------------------------------------------------------------------------------------


class Looked:
    """Counts the cells that are read, whoever reads them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cells = 0
        for where, name in READERS:
            monkeypatch.setattr(where, name, self.counting(getattr(where, name)))

    def counting(self, reader: Any) -> Any:
        def counted(*given: Any, **keywords: Any) -> Any:
            found = reader(*given, **keywords)
            arrays = [x for x in (found, *given) if isinstance(x, (np.ndarray, torch.Tensor))]
            self.cells += max((int(np.prod(x.shape)) for x in arrays), default=0)
            return found

        return counted


READERS = (
    (Dense, "_truth"),
    (TileMap, "_cells"),
    (queries, "_planes"),
    (Edges, "of"),
    (Areas, "__init__"),
    (slips, "_sees_only_later"),
)


def test_a_choice_looks_at_a_sample_of_a_random_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 2048
    mask, looked = tm.dense(fresh(n=n)), Looked(monkeypatch)
    monkeypatch.setattr(slips, "_sees_only_later", lambda cells: not cells[0, 0, 0, 0])  # reads rows until one says no
    tm.plan(mask, n)
    assert sampled.TILES * sampled.SIDE**2 <= looked.cells <= n * n // 8


@pytest.mark.parametrize("name", ["random", *PATTERNS])
@pytest.mark.parametrize("backend", ["native", "sdpa", "block_sparse"])
def test_a_call_goes_over_its_cells_a_few_times(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and missing():
        pytest.skip(missing())
    tensor = fresh() if name == "random" else PATTERNS[name].to_dense(N)[0, 0]
    q, looked = torch.randn(1, 1, N, 8), Looked(monkeypatch)
    tm.attend(q, q, q, tensor, backend=backend)
    assert looked.cells <= 12 * N * N


def test_a_sample_is_the_same_everywhere_and_says_what_it_saw() -> None:
    assert sampled.sample_of(np.tri(1024, dtype=bool)[None, None]) == (64, 63, True)
    seen = sampled.sample_of(fresh().numpy()[None, None])
    assert (seen.tiles, seen.alike, seen.shows_runs) == (64, 0, False)
    for mask in PATTERNS.values():
        assert sampled.sample_of(mask.to_dense(N).numpy()).shows_runs


def test_tensors_that_are_patterns_keep_their_exact_form() -> None:
    for mask in PATTERNS.values():
        dense = tm.dense(mask.to_dense(N))
        assert exact_slabs(dense, 0, 0, N, N) is not None
        assert dense.tiles(N).counts == mask.tiles(N).counts


def test_random_tiles_between_empty_ones_are_found() -> None:
    n = 768
    cells = torch.zeros(n, n, dtype=torch.bool)
    cells[:128, :256] = fresh()[:128, :256]
    cells[256:, 512:] = fresh()[:512, :256]
    mixed = 1 * 2 + 4 * 2  # tiles of 128 x 128
    assert tm.dense(cells).tiles(n).counts == (6 * 6 - mixed, mixed, 0)


def test_a_plan_says_that_it_looked_at_a_sample() -> None:
    said = "looked at a sample of 64 tiles of 64 x 64: no structure, so all count as mixed"
    plan = tm.plan(tm.dense(fresh()), N)
    assert said in str(plan)
    assert said in plan.explain()
    assert said in str(tm.plan(tm.causal & tm.dense(fresh()), N))
    assert said not in str(tm.plan(tm.dense(PATTERNS["blocks"].to_dense(N)), N))
    q = torch.randn(1, 1, N, 8)
    CACHE.clear()
    tm.attend(q, q, q, fresh())
    assert said in str(tm.plan(q, q, q, fresh()))
    assert CACHE.info()[:3] == (1, 1, 1)  # the plan that ran is the one that is shown


# -- what it means -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "sdpa", "block_sparse", "reference", None])
def test_a_sampled_mask_is_run_as_it_is(backend: str | None) -> None:
    if backend == "native" and missing():
        pytest.skip(missing())
    cells = fresh(1)
    cells[[0, 5, N - 1]] = False
    cells[:, 7] = False
    q, k, v = (torch.randn(1, 2, N, 8, requires_grad=True) for _ in range(3))
    expected = scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=cells).nan_to_num()
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    with torch.no_grad():
        k[:, :, 7], v[:, :, 7] = torch.nan, torch.inf
    out = tm.attend(q, k, v, cells, backend=backend)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not out[:, :, [0, 5, N - 1]].any()
    for mine, theirs in ((out, expected), *zip(found, wanted, strict=True)):
        assert_same(mine, theirs.float())


def test_samples_heads_and_combinations_of_sampled_masks() -> None:
    n = 301
    cells = random_cells(n, 2).expand(2, 3, n, n).clone()
    cells[1] = ~cells[1]
    cells[:, 2] = cells[:, 2].mT
    dense, plain = tm.dense(cells), torch.ones(n, n, dtype=torch.bool)
    low = plain.tril()
    expected = {
        dense & tm.causal: cells & low,
        tm.causal - dense: low & ~cells,
        dense ^ tm.causal: cells ^ low,
        ~dense | tm.prefix(3): ~cells | (torch.arange(n) < 3),
        dense.T: cells.mT,
        dense.select(samples=[1, 0], heads=[2, 0]): cells[[1, 0]][:, [2, 0]],
        tm.per_head([dense.select(heads=[0]), tm.causal]): torch.stack([cells[:, 0], low.expand(2, n, n)], 1),
    }
    for mask, wanted in expected.items():
        batch, heads = wanted.shape[:2]
        assert mask.holds_cells
        assert torch.equal(mask.to_dense(n, batch=batch, heads=heads).expand(wanted.shape), wanted)
        assert torch.equal(mask.count(n, batch=batch, heads=heads).expand(batch, heads), wanted.sum((2, 3)))
        tiles = mask.tiles(n, block=(64, 40), batch=batch, heads=heads)
        assert torch.equal(torch.from_numpy(tiles.dense()).expand(wanted.shape), wanted)
    later = dense.at(q_start=50, k_start=20)
    assert torch.equal(later.to_dense(n - 50, n - 20), cells[:, :, 50:, 20:])


@given(expressions(), st.data())
def test_regions_are_what_cells_say(drawn: Drawn, data: st.DataObject) -> None:
    r = drawn.reach
    b, h = data.draw(st.integers(0, r.batch - 1)), data.draw(st.integers(0, r.heads - 1))
    q0, k0 = (data.draw(st.integers(0, size - 1)) for size in (r.q, r.k))
    q1, k1 = data.draw(st.integers(q0 + 1, r.q)), data.draw(st.integers(k0 + 1, r.k))
    cells = drawn.mask._cells(np.array(b), np.array(h), np.arange(q0, q1)[:, None], np.arange(k0, k1))
    assert np.array_equal(drawn.mask._plane(Region(b, h, q0, q1, k0, k1)), cells)


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_kernel_takes_an_eighth_of_what_a_mask_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MAX_WORD_BYTES", 20_000)  # tiles at the edges are stored whole
    held, made = tm.dense(fresh()), tm.predicate(lambda b, h, q, k: (q * q + k * k) % 7 < 3)
    assert not tm.plan(held, N).objections["native"]
    assert "cells in tiles that differ" in tm.plan(made, N).objections["native"][0]


# -- the pieces --------------------------------------------------------------------------------------------------------


def cells_of(draw: st.DataObject, *sizes: int) -> NDArray[np.bool_]:
    seed, rate = draw.draw(st.integers(0, 1000)), draw.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return np.random.default_rng(seed).random(sizes) < rate


@given(st.data(), st.integers(1, 9), st.integers(1, 37))
def test_edges(data: st.DataObject, height: int, width: int) -> None:
    cells = cells_of(data, height, width)
    steps = np.diff(np.pad(cells, ((0, 0), (1, 1))).astype(int), axis=1) != 0
    row, column = np.nonzero(steps)
    edges = Edges.of(cells)
    found = edges.places()
    assert np.array_equal(found[0], row)
    assert np.array_equal(found[1], column)
    assert edges.count == len(row)
    beside = np.pad(steps[:-1, :-1], ((0, 0), (1, 0)))
    assert edges.lines == (steps[1:] & ~steps[:-1] & ~beside).sum()


@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 64))
def test_areas(data: st.DataObject, height: int, width: int, most: int) -> None:
    cells = cells_of(data, 2, 3, height, width)
    areas = Areas(cells, most)
    q0, k0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    q1, k1 = data.draw(st.integers(q0 + 1, height)), data.draw(st.integers(k0 + 1, width))
    g = areas.grain
    whole = cells[1, 2, q0 // g * g : -(-q1 // g) * g, k0 // g * g : -(-k1 // g) * g]
    found = areas.covering(*(np.array(x) for x in (1, 2, q0, q1, k0, k1)))
    assert found == (whole.sum(), whole.size)


def test_data_with_one_fingerprint_are_told_apart_by_their_bytes() -> None:
    words = torch.arange(3 * STRIDE_WORDS).view(3, STRIDE_WORDS)
    first, second = Data(words), Data(words[[1, 0, 2]])
    assert first.fingerprint == second.fingerprint
    assert first != second
    assert len({first, second, Data(words.clone())}) == 2
    assert Data(words.bool()) != Data(words > 0).reshaped(STRIDE_WORDS, 3)
    assert Data(words[0]) != Data(words[0].double())


def test_masks_of_one_fingerprint_have_plans_of_their_own() -> None:
    cells = torch.zeros(2 * STRIDE_WORDS, 8, dtype=torch.bool)
    cells[:STRIDE_WORDS, 0], cells[STRIDE_WORDS:, 1] = True, True
    other = cells.roll(STRIDE_WORDS, 0)
    assert hash(tm.dense(cells)) == hash(tm.dense(other))
    q, k = torch.randn(1, 1, 2 * STRIDE_WORDS, 8), torch.randn(1, 1, 8, 8)
    first, second = (tm.attend(q, k, k, mask)[0, 0, :STRIDE_WORDS] for mask in (cells, other))
    torch.testing.assert_close(first, k[0, 0, :1].expand(STRIDE_WORDS, 8))
    torch.testing.assert_close(second, k[0, 0, 1:2].expand(STRIDE_WORDS, 8))


def test_a_tensor_changed_after_the_call_changes_nothing_that_is_kept() -> None:
    cells, q = fresh(3), torch.randn(1, 1, N, 8)
    before, mask = tm.attend(q, q, q, cells), tm.dense(cells)
    seen = hash(mask)
    cells.logical_not_()
    assert torch.equal(tm.attend(q, q, q, mask), before)
    assert hash(tm.dense(~cells)) == seen
    assert not torch.equal(tm.attend(q, q, q, cells), before)
    copied = mask.to_dense(N)
    copied.logical_not_()
    assert torch.equal(tm.attend(q, q, q, mask), before)
