"""Every mask of the catalogue: its literal picture, however it is asked, and its life as a value."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import truemask as tm
from tests.support import descriptions
from tests.support.cases import CASES, Case
from truemask.masks.core.kinds import KINDS
from truemask.masks.formats.serialization import from_json, to_json
from truemask.masks.leaves.predicate import Predicate

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
LANGUAGE = {name: getattr(tm, name) for name in (*descriptions.LEAVES, "per_head", "per_sample") if hasattr(tm, name)}


def dense(mask: tm.Mask, case: Case) -> torch.Tensor:
    return mask.to_dense(case.q_len, case.kv_len, batch=case.batch, heads=case.heads)


def picture(case: Case) -> torch.Tensor:
    return torch.from_numpy(case.cells)


def shape(case: Case) -> tuple[int, int, int, int]:
    return case.batch, case.heads, case.q_len, case.kv_len


@every_case
def test_to_dense_is_the_picture_and_has_size_one_where_it_does_not_vary(case: Case) -> None:
    mask = case.make()
    found = dense(mask, case)
    assert found.dtype == torch.bool
    assert found.shape == (
        *(1 if n == 1 else m for n, m in zip(sizes(mask), shape(case), strict=False)),
        *shape(case)[2:],
    )
    assert torch.equal(found.expand(shape(case)), picture(case))


def sizes(mask: tm.Mask) -> tuple[int, int]:
    return mask.batch_size, mask.head_count


@every_case
def test_a_larger_batch_needs_nothing_where_the_mask_does_not_vary(case: Case) -> None:
    mask = case.make()
    batch, heads = case.batch, case.heads
    batch, heads = (5 if mask.batch_size == 1 else batch), (3 if mask.head_count == 1 else heads)
    found = mask.to_dense(case.q_len, case.kv_len, batch=batch, heads=heads)
    assert torch.equal(found.expand(shape(case)), picture(case))


@every_case
def test_truth_answers_at_any_shape_that_broadcasts(case: Case) -> None:
    mask, cells = case.make(), picture(case)
    axes = [torch.arange(n) for n in shape(case)]
    b, h, q, k = torch.meshgrid(*axes, indexing="ij")
    assert torch.equal(mask.truth(b, h, q, k), cells)
    flat = [i.reshape(-1) for i in (b, h, q, k)]
    assert torch.equal(mask.truth(*flat), cells.reshape(-1))
    some = mask.truth(torch.tensor(0), torch.tensor(0), axes[2][:, None], axes[3])
    assert torch.equal(some, cells[0, 0])
    one = mask.truth(*(torch.tensor(n - 1) for n in shape(case)))
    assert one.shape == ()
    assert one.item() == cells[-1, -1, -1, -1].item()
    column = mask.truth(axes[0][:, None], torch.tensor(0), axes[2], torch.tensor(case.kv_len - 1))
    assert torch.equal(column, cells[:, 0, :, -1])
    assert mask.truth(b[:0], h[:0], q[:0], k[:0]).shape == (0, *shape(case)[1:])


@every_case
def test_truth_may_be_vmapped(case: Case) -> None:
    over_keys = torch.vmap(case.make().truth, (None, None, None, 0))
    over_all = torch.vmap(
        torch.vmap(torch.vmap(over_keys, (None, None, 0, None)), (None, 0, None, None)), (0, None, None, None)
    )
    assert torch.equal(over_all(*(torch.arange(n) for n in shape(case))), picture(case))


@every_case
def test_single_cells(case: Case) -> None:
    mask = case.make()
    if sizes(mask) != (1, 1):
        with pytest.raises(tm.MaskError, match="select"):
            mask[0, 0]
        mask = mask.select(samples=[case.batch - 1], heads=[case.heads - 1])
    if sizes(mask) == (1, 1):
        found = [[mask[q, k] for k in range(case.kv_len)] for q in range(case.q_len)]
        assert np.array_equal(found, case.cells[-1, -1])
        assert type(mask[0, 0]) is bool


@every_case
def test_transposed_twice(case: Case) -> None:
    mask = case.make()
    turned = mask.T.to_dense(case.kv_len, case.q_len, batch=case.batch, heads=case.heads)
    assert torch.equal(turned.expand(case.batch, case.heads, case.kv_len, case.q_len), picture(case).mT)
    assert mask == mask.T.T


@every_case
@pytest.mark.parametrize("block", [1, 2, 3, (2, 5), (5, 2), 128], ids=str)
def test_tiles_keep_their_promises(case: Case, block: int | tuple[int, int]) -> None:
    found = case.make().tiles(case.q_len, case.kv_len, block=block, batch=case.batch, heads=case.heads)
    exact = tile_states(case.cells, found.block)
    state = np.broadcast_to(found.state, exact.shape)
    assert ((state == exact) | (state == 1)).all()
    assert np.array_equal(np.broadcast_to(found.refine().state, exact.shape), exact)


def tile_states(cells: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """0 EMPTY, 1 MIXED, 2 FULL of every tile, cut at the true lengths."""
    rows = range(0, cells.shape[2], block[0])
    columns = range(0, cells.shape[3], block[1])
    parts = [[cells[:, :, q : q + block[0], k : k + block[1]] for k in columns] for q in rows]
    states = [[part.any((2, 3)).astype(int) + part.all((2, 3)) for part in row] for row in parts]
    return np.array(states).transpose(2, 3, 0, 1)


@every_case
def test_questions_about_the_whole(case: Case) -> None:
    mask, cells = case.make(), picture(case)
    asked = {"q_len": case.q_len, "kv_len": case.kv_len, "batch": case.batch, "heads": case.heads}
    assert torch.equal(mask.count(**asked).expand(shape(case)[:2]), cells.sum((2, 3)))
    assert mask.density(**asked) == pytest.approx(cells.double().mean().item())
    assert torch.equal(mask.dead_queries(**asked).expand(shape(case)[:3]), ~cells.any(3))
    assert torch.equal(mask.dead_keys(**asked).expand(case.batch, case.heads, -1), ~cells.any(2))


@every_case
def test_varies_with_query_is_false_only_if_all_rows_are_alike(case: Case) -> None:
    if not case.make().varies_with_query:
        assert (case.cells == case.cells[:, :, :1]).all()


@every_case
def test_text_is_the_expression(case: Case) -> None:
    mask = case.make()
    assert repr(mask) == str(mask) == mask.text
    if mask.has_text:
        assert tm.parse(mask.text) == mask
        assert eval(mask.text, dict(LANGUAGE)) == mask  # the same text is the Python expression
    else:
        with pytest.raises(tm.MaskError):
            tm.parse(mask.text)


@every_case
def test_json_round_trip(case: Case) -> None:
    mask = case.make()
    if any(isinstance(part, Predicate) for part in mask.walk()):
        with pytest.raises(tm.MaskError, match="predicate"):
            to_json(mask)
    else:
        again = from_json(*to_json(mask))
        assert again == mask
        assert torch.equal(dense(again, case), dense(mask, case))


@every_case
def test_pickle_and_deepcopy(case: Case) -> None:
    mask = case.make()
    before = dense(mask, case)  # fills the caches: they must neither travel nor be shared wrongly
    for again in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
        assert again == mask
        assert hash(again) == hash(mask)
        assert again.text == mask.text
        assert torch.equal(dense(again, case), before)
    assert len(pickle.dumps(mask)) < 5000


@every_case
def test_made_twice_is_equal(case: Case) -> None:
    first, second = case.make(), case.make()
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second}) == 1
    assert first.equivalent(second, case.q_len, case.kv_len, batch=case.batch, heads=case.heads)


def test_different_masks_are_different() -> None:
    by_text = {mask.text: mask for mask in (case.make() for case in CASES)}
    assert len(set(by_text.values())) == len(by_text)
    assert all((a == b) == (a is b) for a in by_text.values() for b in by_text.values())
    assert tm.causal != "causal"


def test_every_kind_is_in_the_catalogue() -> None:
    seen = {part.kind for case in CASES for part in case.make().walk()}
    assert seen == set(KINDS)


def test_pictures_are_drawn() -> None:
    for case in CASES[::7]:
        mask = case.make()
        assert mask.text in mask.show(case.q_len, case.kv_len, batch=case.batch, heads=case.heads)


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [(tm.causal, (5, 7)), (tm.window(3), (7, 11)), (tm.local(2), (5, 5)), (tm.blocks(3, back=1), (11, 7))],
    ids=str,
)
def test_pictures_by_a_loop_over_cells(mask: tm.Mask, lengths: tuple[int, int]) -> None:
    rule = {
        tm.causal: lambda q, k: k <= q,
        tm.window(3): lambda q, k: k in (q, q - 1, q - 2),  # three keys, the query's own included
        tm.local(2): lambda q, k: k in (q - 2, q - 1, q, q + 1, q + 2),
        tm.blocks(3, back=1): lambda q, k: k // 3 in (q // 3, q // 3 - 1),
    }[mask]
    q_len, kv_len = lengths
    assert mask.to_dense(q_len, kv_len)[0, 0].tolist() == [[rule(q, k) for k in range(kv_len)] for q in range(q_len)]


def trace(mask: tm.Mask, cells: tuple[torch.Tensor, ...]) -> torch.fx.GraphModule:
    return make_fx(lambda b, h, q, k: mask.truth(b, h, q, k))(*cells)  # a lambda: fx counts the self of a method


@every_case
def test_truth_may_be_traced(case: Case) -> None:
    """Index arithmetic only: FlexAttention and Inductor see a graph, with no question asked of the values."""
    axes = [torch.arange(n) for n in shape(case)]
    cells = torch.meshgrid(*axes, indexing="ij")
    traced = trace(case.make(), cells)
    assert torch.equal(traced(*cells), picture(case))


def test_a_new_number_is_not_a_new_graph() -> None:
    cells = torch.meshgrid(*(torch.arange(n) for n in (1, 1, 5, 7)), indexing="ij")
    pairs = [
        (tm.window(3), tm.window(5)),
        (tm.blocks(2, back=1), tm.blocks(3, back=2)),
        (tm.causal.at(q_start=3), tm.causal.at(q_start=4)),
        (tm.random(0.5, seed=1), tm.random(0.25, seed=2)),
        (tm.prefix(2) & tm.strided(3), tm.prefix(4) & tm.strided(5, last=2)),
        (tm.padding(starts=[1, 2]), tm.padding(starts=[0, 4])),
        (tm.causal.padded([1, 2]), tm.causal.padded([3, 0])),
    ]
    for first, second in pairs:
        codes = {trace(mask, cells).code for mask in (first, second)}
        assert len(codes) == 1, first


@every_case
def test_a_tracer_that_comes_first_leaves_no_fakes_behind(case: Case) -> None:
    mask, cells = case.make(), torch.meshgrid(*(torch.arange(n) for n in shape(case)), indexing="ij")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert mask.truth(*map(mode.from_tensor, cells)).shape == shape(case)
    assert torch.equal(dense(mask, case).expand(shape(case)), picture(case))
