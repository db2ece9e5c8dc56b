"""The laws of the algebra: operators are set operations, re-indexings are homomorphisms, masks are values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import truemask as tm
from tests.support.strategies import FREE, LEAVES, OPERATORS, Drawn, Reach, build, expressions, reaches
from truemask.masks.core.kinds import KINDS
from truemask.masks.core.mask import Mask

COMBINE: dict[str, Callable[[Mask, Mask], Mask]] = {
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "-": lambda a, b: a - b,
}
signs = st.sampled_from(sorted(COMBINE))


def dense(mask: Mask, reach: Reach) -> torch.Tensor:
    found = mask.to_dense(reach.q, reach.k, batch=reach.batch, heads=reach.heads)
    return found.expand(reach.batch, reach.heads, reach.q, reach.k)


def same(a: Mask, b: Mask, reach: Reach) -> bool:
    asked = {"batch": reach.batch, "heads": reach.heads}
    assert a.equivalent(b, reach.q, reach.k, **asked) == torch.equal(dense(a, reach), dense(b, reach))
    return torch.equal(dense(a, reach), dense(b, reach))


@st.composite
def together(draw: Callable[[st.SearchStrategy], Drawn], count: int, depth: int = 3) -> tuple[Reach, list[Mask]]:
    """Masks that answer for the same sizes."""
    reach: Reach = draw(reaches())  # pyright: ignore[reportAssignmentType]
    return reach, [draw(expressions(depth=depth, reach=reach)).mask for _ in range(count)]


@given(together(3, depth=2))
def test_boolean_algebra(drawn: tuple[Reach, list[Mask]]) -> None:
    reach, (a, b, c) = drawn
    laws = {
        "De Morgan, and": (~(a & b), ~a | ~b),
        "De Morgan, or": (~(a | b), ~a & ~b),
        "exclusive or": (a ^ b, (a | b) - (a & b)),
        "difference": (a - b, a & ~b),
        "double negation": (~~a, a),
        "contradiction": (a & ~a, tm.nothing),
        "excluded middle": (a | ~a, tm.everything),
        "neutral and": (a & tm.everything, a),
        "neutral or": (a | tm.nothing, a),
        "absorbing and": (a & tm.nothing, tm.nothing),
        "absorbing or": (a | tm.everything, tm.everything),
        "flip": (a ^ tm.everything, ~a),
        "absorption": (a | (a & b), a),
        "distribution": (a & (b | c), (a & b) | (a & c)),
        "commuting": (a & b, b & a),
        "grouping": (a ^ (b ^ c), (a ^ b) ^ c),
        "difference twice": ((a - b) - c, a - (b | c)),
        "minus binds to the left": (a - b - c, (a - b) - c),
    }
    broken = [law for law, (left, right) in laws.items() if not same(left, right, reach)]
    assert broken == []


@given(together(2))
def test_operators_are_those_of_the_dense_tensors(drawn: tuple[Reach, list[Mask]]) -> None:
    reach, (a, b) = drawn
    left, right = dense(a, reach), dense(b, reach)
    assert torch.equal(dense(a & b, reach), left & right)
    assert torch.equal(dense(a | b, reach), left | right)
    assert torch.equal(dense(a ^ b, reach), left ^ right)
    assert torch.equal(dense(a - b, reach), left & ~right)
    assert torch.equal(dense(~a, reach), ~left)


@given(together(2), st.integers(0, 5))
def test_double_negation_and_flattening_are_structural(drawn: tuple[Reach, list[Mask]], start: int) -> None:
    _, (a, b) = drawn
    assert ~~a == a
    assert (a & b) & a == a & (b & a)
    assert (a | b) | a == a | (b | a)
    assert (a ^ b) ^ a == a ^ (b ^ a)
    assert (a == b) == (hash(a) == hash(b) and a.text == b.text)


@given(expressions(depth=4, leaves=FREE), *[st.integers(0, 7)] * 4)
def test_at_after_at_is_at_the_sum(drawn: Drawn, q0: int, k0: int, q1: int, k1: int) -> None:
    reach = drawn.reach
    longer = Reach(reach.q, reach.k, reach.batch, reach.heads)
    mask = build(drawn.description)
    if not covers(mask, longer.q + q0 + q1, longer.k + k0 + k1):
        return
    twice, once = mask.at(q0, k0).at(q1, k1), mask.at(q0 + q1, k0 + k1)
    assert twice == once
    assert same(twice, once, longer)
    assert torch.equal(dense(once, longer), dense(mask, later(longer, q0 + q1, k0 + k1))[:, :, q0 + q1 :, k0 + k1 :])


def later(reach: Reach, q: int, k: int) -> Reach:
    return Reach(reach.q + q, reach.k + k, reach.batch, reach.heads)


def covers(mask: Mask, q_len: int, k_len: int) -> bool:
    """Whether the mask's data answers for so many positions."""
    try:
        mask.check(q_len, k_len)
    except tm.MaskError:
        return False
    return True


@given(st.data())
def test_at_is_a_crop(data: st.DataObject) -> None:
    reach = data.draw(reaches())
    q, k = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    whole = later(reach, q, k)
    mask = data.draw(expressions(reach=whole, depth=4)).mask
    assert torch.equal(dense(mask.at(q, k), reach), dense(mask, whole)[:, :, q:, k:])


@given(st.data())
def test_take_is_a_gather(data: st.DataObject) -> None:
    base = data.draw(reaches())
    reach = Reach(data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)), base.batch, base.heads)
    mask = data.draw(expressions(reach=base, depth=4)).mask
    q = torch.tensor(data.draw(st.lists(st.integers(0, base.q - 1), min_size=reach.q, max_size=reach.q)))
    k = torch.tensor(data.draw(st.lists(st.integers(0, base.k - 1), min_size=reach.k, max_size=reach.k)))
    cells = dense(mask, base)
    assert torch.equal(dense(mask.take(q=q, k=k), reach), cells[:, :, q][..., k])
    rows = Reach(reach.q, base.k, base.batch, base.heads)
    assert torch.equal(dense(mask.take(q=q), rows), cells[:, :, q])
    columns = Reach(base.q, reach.k, base.batch, base.heads)
    assert torch.equal(dense(mask.take(k=k), columns), cells[..., k])


@given(st.data(), signs)
def test_reindexing_a_composition_is_composing_the_reindexed(data: st.DataObject, sign: str) -> None:
    reach = data.draw(reaches())
    larger = Reach(reach.q + 4, reach.k + 4, 3, 3)
    a, b = (data.draw(expressions(depth=2, reach=larger)).mask for _ in range(2))
    combine = COMBINE[sign]
    rows = st.lists(st.integers(0, larger.q - 1), min_size=reach.q, max_size=reach.q)
    columns = st.lists(st.integers(0, larger.k - 1), min_size=reach.k, max_size=reach.k)
    q_at, k_at = data.draw(rows), data.draw(columns)
    samples = data.draw(st.lists(st.integers(0, 2), min_size=reach.batch, max_size=reach.batch))
    heads = data.draw(st.lists(st.integers(0, 2), min_size=reach.heads, max_size=reach.heads))
    small, sideways = Reach(reach.q, reach.k, 3, 3), Reach(larger.k, larger.q, 3, 3)
    moves: dict[str, tuple[Callable[[Mask], Mask], Reach]] = {
        "at": (lambda m: m.at(2, 3), small),
        "take": (lambda m: m.take(q=q_at, k=k_at), small),
        "select": (
            lambda m: m.select(samples=samples, heads=heads),
            Reach(larger.q, larger.k, reach.batch, reach.heads),
        ),
        "T": (lambda m: m.T, sideways),
        "padded": (lambda m: m.padded([0, 2, 5]), larger),
        "packed": (lambda m: m.packed([min(larger.q, larger.k), 3, 1]), Reach(larger.q, larger.k, 3, 3)),
    }
    for name, (move, sizes) in moves.items():
        if name == "packed" and max(larger.q, larger.k) > min(larger.q, larger.k) + 4:
            continue
        assert same(move(combine(a, b)), combine(move(a), move(b)), sizes), name
    assert same((~a).padded([0, 2, 5]), tm.everything.padded([0, 2, 5]) - a.padded([0, 2, 5]), larger)
    assert same((~a).at(1, 2), ~a.at(1, 2), small)


@given(st.data())
def test_a_packed_document_is_the_document_alone(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
    longest, total = max(lengths), sum(lengths)
    mask = data.draw(expressions(depth=4, reach=Reach(longest, longest, 2, 2))).mask
    packed = dense(mask.packed(lengths), Reach(total, total, 2, 2))
    expected, start = torch.zeros_like(packed), 0
    for length in lengths:
        if length:
            own = slice(start, start + length)
            expected[:, :, own, own] = dense(mask, Reach(length, length, 2, 2))
        start += length
    assert torch.equal(packed, expected)


@given(st.data())
def test_a_padded_sample_is_the_sample_alone(data: st.DataObject) -> None:
    length, starts = data.draw(st.integers(1, 11)), data.draw(st.lists(st.integers(0, 11), min_size=3, max_size=3))
    mask = data.draw(expressions(depth=4, reach=Reach(length, length, 3, 2))).mask
    padded = dense(mask.padded(starts), Reach(length, length, 3, 2))
    alone = dense(mask, Reach(length, length, 3, 2))
    for sample, start in enumerate(starts):
        own = slice(start, length)
        size = max(length - start, 0)
        assert torch.equal(padded[sample, :, own, own], alone[sample, :, :size, :size])
        assert not padded[sample, :, :start].any()
        assert not padded[sample, :, :, :start].any()


def test_decoding_row_by_row_and_in_chunks_is_the_whole() -> None:
    mask = tm.causal & (tm.window(5) | tm.prefix(2)) - tm.dilated(3)
    whole = mask.to_dense(23)[0, 0]
    rows = [mask.at(q_start=i).to_dense(1)[0, 0] for i in range(23)]
    assert [row.shape for row in rows] == [(1, i + 1) for i in range(23)]
    assert all(torch.equal(row[0], whole[i, : i + 1]) for i, row in enumerate(rows))
    chunks = [mask.at(q_start=i).to_dense(min(7, 23 - i), 23)[0, 0] for i in range(0, 23, 7)]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("leaf", ["keys", "queries", "dense", "block_pattern", "same", "document_ids", "take", "tree"])
def test_changing_the_tensor_afterwards_changes_nothing(leaf: str) -> None:
    flags, ids = torch.tensor([True, False, True, True, False]), torch.tensor([0, 0, 1, 2, 2])
    grid = torch.eye(5, dtype=torch.bool)
    parents = torch.tensor([-1, 0, 1, 1, 3])
    make: dict[str, Callable[[], Mask]] = {
        "keys": lambda: tm.keys(flags),
        "queries": lambda: tm.queries(flags),
        "dense": lambda: tm.dense(grid),
        "block_pattern": lambda: tm.block_pattern(grid, 2),
        "same": lambda: tm.same(ids),
        "document_ids": lambda: tm.documents(ids=ids),
        "take": lambda: tm.causal.take(q=ids),
        "tree": lambda: tm.tree(parents),
    }
    mask = make[leaf]()
    before, name, digest = mask.to_dense(5, 5), mask.text, hash(mask)
    flags.logical_not_()
    grid.logical_not_()
    ids.fill_(0)
    parents.fill_(-1)
    assert torch.equal(mask.to_dense(5, 5), before)
    assert (mask.text, hash(mask)) == (name, digest)
    assert mask != make[leaf]()


def test_a_mask_gives_no_way_in() -> None:
    mask = tm.window(3)
    with pytest.raises((AttributeError, TypeError)):
        mask.size = 5  # pyright: ignore[reportAttributeAccessIssue]
    found = tm.dense(torch.eye(3, dtype=torch.bool))
    found.to_dense(3).fill_(True)
    assert found.count(3).item() == 3


def test_every_kind_can_be_drawn() -> None:
    """A new kind gets its draw in tests/support/strategies.py, or no property test ever meets it."""
    drawn = {{"T": "transposed", "document_ids": "documents"}.get(name, name) for name in (*LEAVES, *OPERATORS)}
    assert set(KINDS) == drawn
    assert set(FREE) <= set(LEAVES)


def test_at_nothing_is_the_mask_itself() -> None:
    assert tm.causal.at() is tm.causal
    assert tm.window(3).at(q_start=2).at(0, 0) == tm.window(3).at(q_start=2)


def test_the_transposed_default_length_is_the_other_side() -> None:
    packed = tm.causal.packed([2, 3], kv_lengths=[4, 5])
    assert packed.T.to_dense(9).shape == (1, 1, 9, 5)
    assert tm.documents([2], kv_lengths=[4]).T.to_dense(4).shape == (1, 1, 4, 2)
    assert tm.keys(flags=[True, False]) & tm.queries(flags=[True, True]) == tm.parse(
        "keys(flags=[True, False]) & queries(flags=[True, True])"
    )
