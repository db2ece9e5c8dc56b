"""What a mask knows of itself without being looked at cell by cell, against the oracle's cells: every question."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import truemask as tm
from tests.support import descriptions
from tests.support.cases import CASES, Case
from tests.support.strategies import FREE, LEAVES, Drawn, Reach, expressions
from tests.support.work import work_of
from truemask.geometry.tiles.tile_map import Rectangles
from truemask.masks.core import exact_form as exact
from truemask.masks.core import queries
from truemask.masks.core.slab_tensors import SlabTensors
from truemask.masks.core.verdict import Cell, Verdict

Cells = NDArray[np.bool_]
MILLION = 1 << 20
LEFT = tuple(name for name in LEAVES if name != "predicate")  # leaves that have an exact form at every small size


def picture(drawn: Drawn) -> Cells:
    r = drawn.reach
    return descriptions.dense(drawn.description, r.q, r.k, r.batch, r.heads)


def sizes_of(drawn: Drawn) -> dict[str, int]:
    r = drawn.reach
    return {"q_len": r.q, "kv_len": r.k, "batch": r.batch, "heads": r.heads}


def same_as(found: torch.Tensor, cells: Any) -> bool:
    return np.array_equal(np.broadcast_to(found.numpy(), cells.shape), cells)


def rebuilt(slabs: SlabTensors, q_len: int, kv_len: int) -> Cells:
    """The dense mask of `to_slabs()`, as its docstring says."""
    out = np.zeros((*slabs.variant.shape, q_len, kv_len), bool)
    k = np.arange(kv_len)
    for b, h in np.ndindex(*slabs.variant.shape):
        v = int(slabs.variant[b, h])
        for i in range(int(slabs.first[v]), int(slabs.first[v + 1])):
            for j in range(int(slabs.starts[i]), int(slabs.starts[i + 1])):
                for q in range(int(slabs.q_start[i]), int(slabs.q_stop[i])):
                    low, high = slabs.low[j] + slabs.low_slope[j] * q, slabs.high[j] + slabs.high_slope[j] * q
                    assert 0 <= low < high <= kv_len
                    out[b, h, q] |= (k >= int(low)) & (k < int(high))
    return out


# -- every question, of every mask -------------------------------------------------------------------------------------


def check_answers(mask: tm.Mask, cells: Cells, asked: dict[str, int]) -> None:
    counted = mask.count(**asked)
    assert counted.dtype == torch.int64
    assert same_as(counted, cells.sum((2, 3)))
    assert mask.density(**asked) == pytest.approx(cells.mean())
    assert same_as(mask.dead_queries(**asked), ~cells.any(3))
    assert same_as(mask.dead_keys(**asked), ~cells.any(2))
    for block in ((1, 1), (3, 2), (5, 7), (128, 128)):
        state = mask.tiles(**asked, block=block).refine().state
        b, h, rows, columns = np.broadcast_shapes(state.shape, (*cells.shape[:2], 1, 1))
        for i, j in np.ndindex(rows, columns):
            tile = cells[:, :, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            expected = tile.any((2, 3)).astype(int) + tile.all((2, 3))
            assert np.array_equal(np.broadcast_to(state, (b, h, rows, columns))[:, :, i, j], expected)


def check_slabs(mask: tm.Mask, cells: Cells, asked: dict[str, int]) -> None:
    found = rebuilt(mask.to_slabs(**asked), *cells.shape[2:])
    assert np.array_equal(np.broadcast_to(found, cells.shape), cells)
    tiles = mask.tiles(**asked, block=(3, 2))
    assert tiles.unsure == 0


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_mask_of_the_catalogue(case: Case) -> None:
    asked = {"q_len": case.q_len, "kv_len": case.kv_len, "batch": case.batch, "heads": case.heads}
    mask = case.make()
    check_answers(mask, case.cells, asked)
    below = np.tril(np.ones(case.cells.shape, bool))
    check_verdict(mask.equivalent(tm.causal, **asked), case.cells != below)
    check_verdict(tm.causal.equivalent(mask, **asked), case.cells != below)
    check_verdict(mask.implies(tm.causal, **asked), case.cells & ~below)
    check_verdict(tm.causal.implies(mask, **asked), below & ~case.cells)
    if not any(part.kind == "predicate" for part in mask.walk()):
        check_slabs(mask, case.cells, asked)


@given(expressions())
def test_every_question_of_any_expression(drawn: Drawn) -> None:
    check_answers(drawn.mask, picture(drawn), sizes_of(drawn))


@given(expressions(leaves=LEFT))
def test_slabs_rebuild_the_mask(drawn: Drawn) -> None:
    check_slabs(drawn.mask, picture(drawn), sizes_of(drawn))


@pytest.mark.parametrize("leaf", LEFT)
@given(data=st.data())
def test_slabs_of_each_leaf_where_rows_and_keys_begin_later(leaf: str, data: st.DataObject) -> None:
    """A region inside: nothing that stands before it may be needed, or seen."""
    drawn = data.draw(expressions(depth=1, leaves=[leaf], reach=Reach(17, 19)))
    q, k = data.draw(st.integers(0, 16)), data.draw(st.integers(0, 18))
    cells = picture(drawn)[:, :, q:, k:]
    asked = {"q_len": 17 - q, "kv_len": 19 - k}
    check_slabs(drawn.mask.at(q_start=q, k_start=k), cells, asked)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_of_nothing_everything_is_known(sizes: tuple[int, int]) -> None:
    for mask in (tm.causal, ~tm.window(3), tm.dilated(2), tm.predicate(descriptions.formula).select([0], [0])):
        slabs = mask.to_slabs(*sizes)
        assert slabs.low.numel() == 0
        assert mask.equivalent(tm.nothing, *sizes)
        assert mask.implies(tm.nothing, *sizes)
        assert mask.dead_keys(*sizes).shape == (1, 1, sizes[1])
    assert tm.causal.live_keys(0).shape == (1, 1, 0)


# -- comparing ---------------------------------------------------------------------------------------------------------


def check_verdict(verdict: Verdict, refuting: Cells) -> None:
    """True if no cell refutes it; else its witness is one that does."""
    assert bool(verdict) == (not refuting.any())
    if not verdict:
        assert verdict.witness is not None
        assert refuting[verdict.witness]
        assert f"query {verdict.witness.query} may see key {verdict.witness.key}" in repr(verdict)


@given(st.data())
def test_equivalent_and_implies_and_their_witnesses(data: st.DataObject) -> None:
    reach = Reach(*(data.draw(st.integers(1, n)) for n in (11, 13, 2, 3)))
    one, other = (data.draw(expressions(depth=3, reach=reach)) for _ in range(2))
    a, b = picture(one), picture(other)
    asked = sizes_of(one)
    check_verdict(one.mask.equivalent(other.mask, **asked), a != b)
    check_verdict(one.mask.implies(other.mask, **asked), a & ~b)
    check_verdict((one.mask & other.mask).implies(other.mask, **asked), np.zeros_like(a))
    both = (one.mask | other.mask) - (one.mask & other.mask)
    check_verdict((one.mask ^ other.mask).equivalent(both, **asked), np.zeros_like(a))


def test_a_verdict_says_which_mask_lets_the_witness_through() -> None:
    here, there = tm.causal & tm.prefix([1, 3]), tm.causal & tm.prefix(1)
    verdict = here.equivalent(there, 5)
    assert verdict.witness == Cell(1, 0, 1, 1)
    assert repr(verdict) == f"no: query 1 may see key 1 in sample 1 under `{here}`, but not under `{there}`"
    assert repr(there.equivalent(here, 5)) == repr(verdict)
    heads = tm.per_head([tm.causal, tm.window(2)])
    assert "in head 1" in repr(heads.equivalent(tm.causal, 4))
    assert repr(tm.predicate(descriptions.formula).implies(tm.nothing, 3, batch=2, heads=1)).startswith("no: query")


def test_a_verdict_is_the_bool_that_it_stands_for() -> None:
    yes, no = tm.window(5).implies(tm.causal, 9), tm.causal.implies(tm.window(5), 9)
    assert yes == True  # noqa: E712
    assert no == False  # noqa: E712
    assert yes != no
    assert yes == tm.causal.equivalent(tm.causal, 3)
    assert yes != "yes"
    assert hash(yes) == hash(True)
    assert {yes: 1}[tm.causal.equivalent(tm.causal, 2)] == 1
    assert (repr(yes), str(no)) == ("yes", "no: query 5 may see key 0 under `causal`, but not under `window(5)`")
    assert (yes.witness, no.witness) == (None, (0, 0, 5, 0))


# -- which keys a cache must keep --------------------------------------------------------------------------------------


def held(mask: tm.Mask, most: int) -> int:
    """For how many queries, up to `most`, a mask answers."""
    for stop in range(most, 0, -1):
        try:
            mask.check(stop, 0)
        except tm.MaskError:
            continue
        return stop
    return 0


@given(expressions(), st.data())
def test_live_keys_up_to_a_query(drawn: Drawn, data: st.DataObject) -> None:
    cells, r = picture(drawn), drawn.reach
    start = data.draw(st.integers(0, r.q))
    kept = drawn.mask.live_keys(start, r.k, q_stop=r.q, batch=r.batch, heads=r.heads)
    assert same_as(kept, cells[:, :, start:].any(2))


@given(expressions())
def test_the_last_query_of_each_key(drawn: Drawn) -> None:
    cells, r = picture(drawn), drawn.reach
    rows = np.where(cells, np.arange(r.q)[:, None], -1).max(axis=(0, 1, 2))
    found = queries.last_seen(drawn.mask, queries.sizes_of(drawn.mask, r.q, r.k, r.batch, r.heads), MILLION)
    assert found is not None
    assert found.tolist() == rows.tolist()


def test_the_last_query_of_each_key_by_tiles() -> None:
    mask = (tm.causal & tm.predicate(lambda b, h, q, k: (q * q + k) % 7 == 1)) | tm.blocks(100)
    sizes = queries.sizes_of(mask, 389, 401, None, None)
    rows = np.where(mask.to_dense(389, 401)[0, 0].numpy(), np.arange(389)[:, None], -1).max(axis=0)
    found = queries.last_seen(mask, sizes, MILLION)
    assert found is not None
    assert found.tolist() == rows.tolist()
    assert queries.last_seen(mask, sizes, 10) is None
    assert queries.last_seen(tm.causal, sizes, 10) is None


HORIZON = 211  # rows after which every mask drawn here has canonical


@pytest.mark.parametrize("leaf", LEAVES)
@given(data=st.data())
def test_live_keys_of_all_that_can_ever_come(leaf: str, data: st.DataObject) -> None:
    """One kind, under re-indexings: against the truth of every later row, up to where the data ends."""
    depth = data.draw(st.integers(1, 3))
    r = Reach(*(data.draw(st.integers(1, n)) for n in (9, 9, 2, 2)))
    drawn = data.draw(expressions(depth=depth, leaves=[leaf, "causal"], reach=r))
    start = data.draw(st.integers(0, r.q))
    mask, sizes = drawn.mask, {"batch": r.batch, "heads": r.heads}
    try:
        kept = mask.live_keys(start, r.k, **sizes)
    except tm.MaskError as error:
        assert "q_stop" in str(error)  # noqa: PT017
        assert {"random", "predicate", "transposed"} & {part.kind for part in mask.walk()}
        return
    stop = max(start, held(mask, HORIZON))
    assert same_as(kept, np.broadcast_to(kept.numpy(), (r.batch, r.heads, r.k)))
    q, k = torch.arange(start, stop)[:, None], torch.arange(r.k)
    b, h = (torch.arange(n) for n in (r.batch, r.heads))
    later = mask.truth(b[:, None, None, None], h[:, None, None], q, k).any(2).numpy()
    assert same_as(kept, later)


def test_live_keys_looks_at_rows_that_see_more_than_those_before() -> None:
    """Rows with data of their own never settle: the last one may see what none before did."""
    assert tm.queries([False, False, False, True]).live_keys(1).tolist() == [[[True]]]
    assert tm.documents(ids=[0, 1, 2, 0]).live_keys(2).tolist() == [[[True, False]]]
    assert tm.causal.take(q=[0, 0, 7]).live_keys(1, 3).tolist() == [[[True, True, True]]]
    assert tm.dense([[False, True], [True, False]]).live_keys(1, 2).tolist() == [[[True, False]]]
    assert tm.causal.packed([2, 3]).live_keys(3).tolist() == [[[False, False, True]]]


def test_live_keys_of_a_long_past() -> None:
    kept = (tm.causal & (tm.window(512) | tm.prefix(4))).live_keys(MILLION)[0, 0]
    assert kept.nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(MILLION - 511, MILLION)]
    assert int((tm.causal & tm.blocks(64)).live_keys(1000).sum()) == 1000 % 64
    assert int((tm.causal & tm.dilated(4)).live_keys(1001).sum()) == 1001
    with pytest.raises(tm.MaskError, match="q_stop="):
        (tm.causal & tm.random(0.5)).live_keys(7)


# -- variants are looked at once ---------------------------------------------------------------------------------------


def test_samples_and_heads_that_share_a_mask_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    find = exact.unmerged_slabs

    def watched(mask: tm.Mask, *place: int) -> Any:
        asked.append(place[:2])
        return find(mask, *place)

    monkeypatch.setattr(queries, "unmerged_slabs", watched)
    starts = [3, 0, 3, 3, 0]
    heads = [tm.causal, tm.window(2), tm.causal]
    flags = torch.tensor([[True, True, False], [True, False, True], [True, True, False]])
    varied = {
        "padded": (tm.causal.padded(starts), (5, 1), 2),
        "heads": (tm.per_head(heads), (1, 3), 2),
        "both": (tm.causal.padded(starts) & tm.per_head(heads), (5, 3), 4),
        "selected": (tm.causal.padded(starts).select(samples=[0, 2, 3, 0]), (4, 1), 1),
        "prefix": (tm.prefix([1, 2, 1]).at(k_start=1), (3, 1), 2),
        "flags": (tm.keys(flags) & tm.queries(flags), (3, 1), 2),
        "nested": (tm.keys(flags).select(samples=[2, 1, 0, 0]).packed([3]).prepended(k=2), (4, 1), 2),
        "dense": (tm.dense(flags[:, None].expand(3, 4, 3), axes="bqk"), (3, 1), 3),
        "take": (tm.causal.take(q=torch.tensor([[0, 1], [0, 1], [1, 1]])), (3, 1), 2),
    }
    for name, (mask, shape, times) in varied.items():
        asked.clear()
        found = mask.count(2, 2)
        assert (name, tuple(found.shape), len(asked)) == (name, shape, times)
        assert torch.equal(found, mask.to_dense(2, 2).sum((2, 3)))


# -- at the edges of 64 bits -------------------------------------------------------------------------------------------

FAR_OUT = 2**39 - 3


def test_far_positions_are_exact() -> None:
    far = {"q_start": FAR_OUT, "k_start": FAR_OUT}
    for mask in (tm.causal, tm.window(3), tm.local(2), tm.dilated(3), tm.strided(5, last=2), tm.blocks(7, back=1)):
        check_slabs(mask.at(**far), mask.at(**far).to_dense(11, 13).numpy(), {"q_len": 11, "kv_len": 13})
    assert tm.causal.at(q_start=FAR_OUT).count(5, 5).item() == 25
    assert tm.causal.at(k_start=FAR_OUT).count(5, 5).item() == 0
    assert tm.window(FAR_OUT).at(q_start=FAR_OUT).count(1, 7).item() == 6
    assert tm.everything.T.at(**far).prepended(q=2, k=2).count(5, 5).item() == 25
    assert (tm.causal & tm.random(0.5, seed=3)).at(**far).count(17).item() == int(
        (tm.causal & tm.random(0.5, seed=3)).at(**far).to_dense(17).sum()
    )


def test_products_of_large_numbers_do_not_overflow() -> None:
    half = 2**39
    later = tm.blocks(half, back=half).at(q_start=half)
    assert later.count(3, 3).item() == 9
    assert tm.blocks(half, ahead=half).at(k_start=half).count(3, 3).item() == 9
    with pytest.raises(tm.MaskError, match="more than int64 holds"):
        tm.everything.count(half)
    assert tm.window(2).count(half).item() == 2 * half - 1


def test_offsets_that_add_up_beyond_every_position() -> None:
    mask = tm.everything
    for _ in range(7):
        mask = mask.at(k_start=2**40 - 1).select(heads=[0])
    assert mask.count(5, 3).tolist() == [[15]]


def test_large_questions_are_refused_before_memory_is_asked_for() -> None:
    with pytest.raises(tm.MaskError, match="rows of tiles"):
        tm.everything.tiles(2**39)
    with pytest.raises(tm.MaskError, match="no exact form"):
        tm.random(0.5).count(2**30)
    with pytest.raises(tm.MaskError, match="no exact form"):
        (tm.everything | tm.predicate(descriptions.formula)).to_slabs(5, batch=1, heads=1)


# -- masks outside the form --------------------------------------------------------------------------------------------


@given(expressions(), st.data())
def test_tiles_of_one_phase_have_the_same_cells(drawn: Drawn, data: st.DataObject) -> None:
    cells, r = picture(drawn), drawn.reach
    high, wide = data.draw(st.integers(1, r.q)), data.draw(st.integers(1, r.k))
    places = np.array(list(np.ndindex(r.batch, r.heads, r.q - high + 1, r.k - wide + 1)), np.int64)
    b, h, q0, k0 = places.T
    numbers = drawn.mask._tile_key(Rectangles(b, h, q0, q0 + high, k0, k0 + wide))
    phases = np.stack([np.broadcast_to(number, len(places)) for number in numbers] or [np.zeros(len(places))], 1)
    seen: dict[bytes, bytes] = {}
    for (s, t, i, j), tile_key in zip(places, phases, strict=True):
        tile = cells[s, t, i : i + high, j : j + wide].tobytes()
        assert seen.setdefault(tile_key.tobytes(), tile) == tile


def test_identical_tiles_are_evaluated_once() -> None:
    n, step = 131_072, 96
    counted, calls, _ = work_of(lambda: (tm.causal & tm.dilated(step)).count(n))
    assert counted.item() == sum(q // step + 1 for q in range(n))
    tiles = tm.dilated(step).tiles(n)
    assert tiles.counts.mixed == (n // 128) ** 2
    assert tiles.cells_to_evaluate <= step * 128 * 128
    assert calls < 5_000  # and not some for each of a million tiles


def test_masks_that_can_only_be_evaluated_are_answered_exactly() -> None:
    mask = tm.causal & tm.predicate(lambda b, h, q, k: (q * 3 + k * 5) % 7 < 3)
    other = tm.causal & tm.predicate(lambda b, h, q, k: ((q * 3 + k * 5) % 7 < 3) | ((q == 997) & (k == 500)))
    n = 1009
    q, k = np.arange(n)[:, None], np.arange(n)
    cells = (k <= q) & ((q * 3 + k * 5) % 7 < 3)
    assert mask.count(n).item() == cells.sum()
    assert np.array_equal(mask.dead_queries(n)[0, 0].numpy(), ~cells.any(1))
    assert np.array_equal(mask.dead_keys(n)[0, 0].numpy(), ~cells.any(0))
    assert mask.equivalent(other, n).witness == (0, 0, 997, 500)
    assert mask.implies(other, n)
    assert not other.implies(mask, n)


def test_what_is_not_affordable_says_so() -> None:
    largest = 0

    def every_third(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, torch.broadcast_shapes(q.shape, k.shape).numel())
        return (q + k) % 3 == 0

    mask = tm.predicate(every_third)
    for ask in ("count", "dead_queries", "dead_keys"):
        with pytest.raises(tm.MaskError, match="ask about fewer rows at a time"):
            work_of(lambda ask=ask: getattr(mask, ask)(MILLION))
    assert largest < 128 * 128  # it is clear before a tile is evaluated
    with pytest.raises(tm.MaskError, match="no exact form"):
        mask.equivalent(tm.causal, MILLION)
    with pytest.raises(tm.MaskError) as caught:
        mask.count(MILLION)
    said = re.sub(r"\d+ tiles", "N tiles", str(caught.value))  # it stops counting when it is clear
    assert said == (
        f"`{mask}` has no exact form, and N tiles to evaluate of 128 x 128 are too many for 1048576 queries and "
        "1048576 keys: ask about fewer rows at a time (`mask.at(q_start=...)`), or about larger tiles "
        "(`tiles(..., block=1024)`)"
    )
    with pytest.raises(tm.MaskError, match=r"\d+ cells to evaluate are too many .* ask about fewer rows"):
        mask.count(131_072)
    assert mask.at(q_start=MILLION - 1).count(1, MILLION).item() == MILLION // 3 + 1
    with pytest.raises(tm.MaskError, match=r"has no exact form for 5 queries and 7 keys: `tiles\(\.\.\.\)`"):
        mask.to_slabs(5, 7)


# -- a million tokens --------------------------------------------------------------------------------------------------

THOUSANDS = [257 + 31 * (i % 29) for i in range(1000)]
LONG = {
    "window": tm.causal & tm.window(512),
    "sinks": tm.causal & (tm.window(512) | tm.prefix(4)),
    "packed": tm.causal.packed([25_000 + 97 * i for i in range(32)]),
    "documents": tm.causal & tm.documents(THOUSANDS),
    "blocks": tm.blocks(1000, back=1) & tm.causal,
}


@pytest.mark.parametrize("name", LONG)
def test_a_million_tokens_cost_little(name: str) -> None:
    """Generous: the benchmarks measure, this only notices when work follows the length."""
    mask = LONG[name]
    n = {"packed": sum(25_000 + 97 * i for i in range(32)), "documents": sum(THOUSANDS)}.get(name, MILLION)
    tm.causal.tiles(128)
    tiles, calls, peak_bytes = work_of(lambda: mask.tiles(n))
    assert calls < 10_000
    assert peak_bytes < 50e6
    counted, calls, peak_bytes = work_of(lambda: mask.count(n).item())
    assert calls < 1_000
    assert peak_bytes < 10e6
    cells = counted - sum((tiles.full().q1 - tiles.full().q0) * (tiles.full().k1 - tiles.full().k0))
    assert 0 < cells < tiles.counts.mixed * 128 * 128


def test_counts_at_a_million_are_those_of_arithmetic() -> None:
    n = MILLION
    assert tm.causal.count(n).item() == n * (n + 1) // 2
    assert LONG["window"].count(n).item() == 512 * n - 512 * 511 // 2
    assert LONG["packed"].count(sum(x := [25_000 + 97 * i for i in range(32)])).item() == sum(
        m * (m + 1) // 2 for m in x
    )


# -- threads -----------------------------------------------------------------------------------------------------------


def test_forms_are_remembered_from_many_threads_at_once() -> None:
    """More forms than are kept, asked for by several threads: nobody is told that there is none."""
    mask = tm.causal & (tm.window(7) | tm.prefix(2)) & tm.documents([50, 60])
    expected = {n: int(mask.to_dense(n).sum()) for n in range(90, 101)}
    wrong: list[object] = []

    def ask(seed: int) -> None:
        order = np.random.default_rng(seed).choice(list(expected), 60)
        for n in order.tolist():
            try:
                if len(mask.to_slabs(n).q_start) == 0 or mask.count(n).item() != expected[n]:
                    wrong.append(n)
            except tm.MaskError as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_mask_remembers_few_forms_and_no_large_ones() -> None:
    mask = tm.blocks(3)
    for n in range(1, 20):
        mask.count(n)
    assert len(vars(mask)["_known"]) <= exact.KEPT_FORMS
    mask.count(3 * (exact.KEPT_RUNS + 2))
    assert all(x.ends.shape[1] <= exact.KEPT_RUNS for x in vars(mask)["_known"].values())


# -- corners -----------------------------------------------------------------------------------------------------------

X, O = True, False  # noqa: E741
CORNERS: dict[str, tuple[tm.Mask, int, int]] = {
    "take, repeated and unsorted": (tm.window(3).take(q=[4, 4, 0, 7, 1], k=[2, 0, 5, 5, 3, 6]), 5, 6),
    "take with gaps": (tm.causal.take(q=range(0, 40, 3), k=range(1, 40, 7)), 14, 6),
    "take in many runs of keys": (tm.local(9).take(k=list(range(0, 400, 2))), 71, 200),
    "take per sample": (tm.causal.take(q=torch.tensor([[3, 1, 0], [5, 5, 6]])).select(samples=[1, 0, 1]), 3, 5),
    "packed with empty documents": (tm.causal.packed([0, 3, 0, 0, 2, 0]), 5, 5),
    "packed, keys of their own": (tm.causal.packed([3, 0, 2, 4], [0, 5, 2, 3]), 9, 10),
    "packed, one side empty": (tm.everything.packed([2, 0], [0, 3]), 2, 3),
    "packed in packed": (tm.causal.packed([2, 3]).packed([5, 4, 5, 1]), 15, 15),
    "packed, padded, prepended, T": (
        (tm.window(2) | tm.prefix(1)).packed([4, 3]).padded([2, 0]).prepended(q=1, k=2).T,
        9,
        8,
    ),
    "selected inside a choice": (
        tm.per_sample([tm.causal, tm.keys([[X, O, X], [O, X, X]]).select(samples=[1, 0]), tm.window(2)][:2]),
        3,
        3,
    ),
    "children before parents": (tm.tree([2, 0, -1, 1, 0]), 5, 5),
    "segments, some empty": (tm.tree([2, 0, -1, 1, 0], lengths=[2, 0, 3, 1, 2]), 8, 8),
    "a tree for each sample": (tm.tree([[-1, 0, 0], [2, 2, -1]]), 3, 3),
    "negative labels": (tm.same([-5, -1, -5, 3, -1, 3], none=-5), 6, 6),
    "labels that return": (tm.documents(ids=[4, -2, 4, 4, -2], kv_ids=[-2, 4, 9]), 5, 3),
    "a radius wider than the image": (tm.grid(3, 4, 4), 12, 12),
    "a radius over half the image": (tm.grid(4, 5, 3), 19, 20),
    "an image of one column": (tm.grid(5, 1, 1), 5, 5),
    "blocks cut on both sides": (tm.blocks(5, back=1, ahead=2).at(q_start=7, k_start=3), 9, 11),
    "pads beyond the row": (tm.causal.padded([9, 2]), 5, 5),
    "not of almost nothing": (~(tm.window(1) & tm.prefix(1)), 6, 7),
    "a dense tensor of one cell": (tm.dense([[[[X]], [[O]]]]), 1, 1),
    "prepended rows only": (tm.nothing.prepended(q=3), 5, 4),
    "prepended with flags": (tm.causal.prepended(q=2, k=1, seen=tm.keys([X, O, X])), 5, 4),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name: str) -> None:
    mask, q_len, kv_len = CORNERS[name]
    b, h = mask.batch_size, mask.head_count
    axes = (torch.arange(n) for n in (b, h, q_len, kv_len))
    cells = mask.truth(*torch.meshgrid(*axes, indexing="ij")).numpy()
    check_answers(mask, cells, {"q_len": q_len, "kv_len": kv_len})
    if name != "take in many runs of keys":
        check_slabs(mask, cells, {"q_len": q_len, "kv_len": kv_len})


@given(expressions(leaves=FREE), st.integers(0, 2**39), st.integers(0, 2**39))
def test_expressions_far_out(drawn: Drawn, q: int, k: int) -> None:
    """Free masks at any offset: the slabs against the truth of each cell, where arithmetic is largest."""
    r, mask = drawn.reach, drawn.mask.at(q_start=q, k_start=k)
    try:
        mask.check(r.q, r.k)
    except tm.MaskError:
        return  # packed, or taken: there are no such positions
    cells = mask.truth(*np_indices(r)).numpy()
    found = rebuilt(mask.to_slabs(r.q, r.k, batch=r.batch, heads=r.heads), r.q, r.k)
    assert np.array_equal(np.broadcast_to(found, cells.shape), cells)


def np_indices(r: Reach) -> tuple[torch.Tensor, ...]:
    return torch.meshgrid(*(torch.arange(n) for n in (r.batch, r.heads, r.q, r.k)), indexing="ij")


def test_an_empty_batch_keeps_its_axes() -> None:
    mask = tm.causal.padded([0, 2, 1]).select(samples=[])
    assert mask.count(5, batch=0).shape == (0, 1)
    assert mask.dead_queries(5, 7, batch=0).shape == (0, 1, 5)
    assert mask.dead_keys(5, 7, batch=0).shape == (0, 1, 7)
