"""The answers of open functions against the cells: a proof is never wrong, an exact answer is the cells themselves.

`looks_back`, `seen_by_all` and `real_queries` are conservative: False, `nothing` and `everything` may be said of masks
of which more is true. `band`, `offset`, `step_into`, `of_head`, `labels_at` and `depths` are exact where they answer.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from torch import Tensor

import truemask as tm
from tests.support.cases import CASES, Case
from tests.support.strategies import Drawn, expressions
from truemask.masks.compose.boolean import conjunction
from truemask.masks.core.mask import Mask
from truemask.masks.core.verdict import Cell
from truemask.masks.structure.data import cells_held, tokens_held
from truemask.masks.structure.documents import depths, is_documents_only, labels_at, lengths_of_documents, packed_like
from truemask.masks.structure.order import band, is_order, looks_back, names_order, window_size
from truemask.masks.structure.padding import paddings, real_queries, seen_by_all
from truemask.masks.structure.parts import all_parts, conjuncts, droppable_terms, of_head, with_term
from truemask.masks.structure.placement import offset, reindexed_like, step_into, without_positions
from truemask.masks.structure.registers import with_registers

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def cells(mask: Mask, drawn: Drawn) -> Tensor:
    """All cells `[b, h, q, k]` at the sizes that were drawn."""
    r = drawn.reach
    return mask.to_dense(r.q, r.k, batch=r.batch, heads=r.heads).expand(r.batch, r.heads, r.q, r.k)


def of_case(case: Case) -> Tensor:
    shape = (case.batch, case.heads, case.q_len, case.kv_len)
    return case.make().to_dense(case.q_len, case.kv_len, batch=case.batch, heads=case.heads).expand(shape)


@given(expressions())
def test_what_looks_back_sees_no_later_key(drawn: Drawn) -> None:
    if looks_back(drawn.mask):
        assert not cells(drawn.mask, drawn).triu(1).any()


@pytest.mark.parametrize(
    ("text", "proof"),
    [
        ("causal", True),
        ("window(3) | causal & local(5)", True),
        ("(causal - prefix(2)).packed([4, 9])", True),
        ("nothing", True),
        ("causal.packed([4, 9], kv_lengths=[6, 7])", False),
        ("local(3)", False),
        ("causal | prefix(3)", False),
        ("~causal", False),
        ("causal.at(q_start=1)", False),
    ],
)
def test_the_form_of_an_expression_proves_that_it_looks_back(text: str, proof: bool) -> None:
    assert looks_back(tm.parse(text)) == proof


@given(expressions())
def test_every_real_query_sees_what_all_see(drawn: Drawn) -> None:
    mask = drawn.mask
    seen, real = seen_by_all(mask), real_queries(mask)
    assert not seen.varies_with_query
    assert not (cells(seen, drawn) & cells(real, drawn) & ~cells(mask, drawn)).any()
    assert bool((cells(real, drawn) == cells(real, drawn)[..., :1]).all()), "who is real is no matter of keys"


@every_case
def test_a_band_is_all_that_is_seen(case: Case) -> None:
    reach = band(case.make())
    if reach is not None:
        distance = torch.arange(case.q_len)[:, None] - torch.arange(case.kv_len)
        back, ahead = (max(case.q_len, case.kv_len) if side is None else side for side in reach)
        assert torch.equal(of_case(case)[0, 0], (-ahead <= distance) & (distance <= back))
        assert (window_size(case.make()) is not None) == (reach.back is not None and is_order(case.make()))


def test_words_that_name_an_order() -> None:
    assert [is_order(mask) for mask in (tm.causal, tm.window(2), tm.nothing, tm.causal & tm.window(2))] == [
        True,
        True,
        False,
        False,
    ]
    assert names_order(~tm.causal | tm.local(2))
    assert not names_order(tm.nothing & tm.local(2))


@given(expressions(depth=3))
def test_a_step_leads_to_the_part_that_decides(drawn: Drawn) -> None:
    mask, r = drawn.mask, drawn.reach
    table = cells(mask, drawn)
    for b, h, q, k in itertools.islice(itertools.product(*map(range, table.shape)), 40):
        step = step_into(mask, Cell(b, h, q, k))
        if step is not None and step.part is not None:
            part = mask.children[step.part]
            indices = (torch.tensor(i) for i in step.cell)
            assert bool(part.truth(*indices)) == bool(table[b, h, q, k]), (mask, r)


@pytest.mark.parametrize("text", ["local(1).packed([2, 3])", "local(1).padded([2])", "local(1).prepended(q=1, k=2)"])
def test_what_no_part_decides_is_the_same_for_all(text: str) -> None:
    """Outside of documents and before the start nothing is seen, extra keys are seen by all."""
    mask = tm.parse(text)
    table = mask.to_dense(5)[0, 0]
    steps = {(q, k): step_into(mask, Cell(0, 0, q, k)) for q in range(5) for k in range(5)}
    alone = {bool(table[place]) for place, step in steps.items() if step is not None and step.part is None}
    assert alone == {"prepended" in text}


@every_case
def test_a_head_alone_is_as_among_the_others(case: Case) -> None:
    for head in range(case.heads):
        alone = of_head(case.make(), head)
        assert alone.head_count in (0, 1)
        asked = None if alone.head_count == 1 else 1
        table = alone.to_dense(case.q_len, case.kv_len, batch=case.batch, heads=asked)
        assert bool((table[:, 0] == of_case(case)[:, head]).all())


@given(expressions(depth=3))
def test_parts_are_put_back_where_they_were(drawn: Drawn) -> None:
    for part, put in all_parts(drawn.mask):
        assert torch.equal(cells(put(part), drawn), cells(drawn.mask, drawn))


def test_terms_that_are_left_out() -> None:
    mask = tm.parse("causal & local(2) & prefix(3)")
    for term, rest in droppable_terms(mask):
        assert (term & rest).equivalent(mask, 9)
    assert list(droppable_terms(tm.causal - tm.local(2))) == [(tm.local(2), tm.causal)]
    assert list(droppable_terms(~mask)) == []
    assert conjuncts(mask) == (tm.causal, tm.local(2), tm.prefix(3))
    assert conjuncts(~mask) == (~mask,)


@given(expressions(depth=2))
def test_an_offset_is_what_at_adds(drawn: Drawn) -> None:
    for mask in (drawn.mask, drawn.mask.at(q_start=3, k_start=1)):
        base, q_start, k_start = offset(mask)
        assert base.at(q_start=q_start, k_start=k_start) == mask
        assert without_positions(mask) == without_positions(base)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("causal.at(q_start=2)", "local(1).at(q_start=2)"),
        ("causal.take(q=[0, 3], k=[4, 1])", "local(1).take(q=[0, 3], k=[4, 1])"),
        ("causal.prepended(q=1, k=1)", "local(1).prepended(q=1, k=1)"),
        ("causal.select(samples=[0])", "local(1).select(samples=[0])"),
        ("causal.at(q_start=2) & prefix(3)", "local(1).at(q_start=2)"),
        ("causal.packed([2, 3])", "local(1)"),
        ("causal.T", "local(1)"),
        ("causal | window(2)", "local(1)"),
    ],
)
def test_another_mask_for_the_same_rows_and_keys(mask: str, expected: str) -> None:
    assert reindexed_like(tm.parse(mask), tm.local(1)) == tm.parse(expected)


def test_parts_that_count_apart_have_no_common_rows() -> None:
    assert reindexed_like(tm.causal.at(q_start=2) & tm.local(3), tm.causal) is None
    assert reindexed_like(tm.causal.packed([2, 3]), tm.causal) == tm.causal
    assert reindexed_like(tm.causal.at(q_start=1).packed([2, 3]), tm.causal) is None


@every_case
def test_cells_held_are_the_cells(case: Case) -> None:
    held = cells_held(case.make())
    if held is not None:
        table = of_case(case)
        assert torch.equal(held.tensor[..., : case.q_len, : case.kv_len].expand(table.shape), table)


@every_case
def test_data_answers_for_the_tokens_that_it_holds(case: Case) -> None:
    mask = case.make()
    held = tokens_held([mask])
    if held is not None:
        mask.check(held, 0)
        mask.check(0, held)
        with pytest.raises(tm.MaskError):
            mask.check(held + 1, held + 1)


@every_case
def test_labels_are_equal_where_documents_see_each_other(case: Case) -> None:
    mask = case.make()
    for q, k in itertools.product(range(case.q_len), range(case.kv_len)):
        labels = labels_at(mask, Cell(0, 0, q, k))
        if labels is None:
            assert not is_documents_only(mask)
        elif is_documents_only(mask):
            assert (labels[0] == labels[1]) == bool(of_case(case)[0, 0, q, k])
        elif bool(of_case(case)[0, 0, q, k]):
            assert labels[0] == labels[1]


@every_case
def test_a_token_of_a_tree_sees_as_many_as_stand_before_it(case: Case) -> None:
    depth = depths(case.make())
    if depth is not None and case.q_len == case.kv_len == depth.shape[-1]:
        expected = of_case(case)[:, 0].sum(-1) - 1
        assert torch.equal(depth.expand(expected.shape), expected)


@every_case
def test_lengths_of_documents_say_the_same(case: Case) -> None:
    lengths = lengths_of_documents(case.make())
    if lengths is not None:
        assert tm.documents(lengths.tensor) == case.make()


def test_packed_like_the_first_term_that_packs() -> None:
    assert packed_like(tm.local(2) & tm.causal.packed([2, 3]), tm.causal) == tm.causal.packed([2, 3])
    assert packed_like(tm.local(2) | tm.causal.packed([2, 3]), tm.causal) is None


@given(expressions(depth=3))
def test_paddings_are_masks_of_the_whole(drawn: Drawn) -> None:
    r = drawn.reach
    for part in paddings(drawn.mask):
        part.check(r.q, r.k)


@given(expressions(depth=2))
def test_a_conjunction_lets_through_what_all_terms_do(drawn: Drawn) -> None:
    for terms in ([drawn.mask], [tm.everything, drawn.mask], [drawn.mask, tm.nothing], [tm.causal, drawn.mask]):
        whole = conjunction(*terms)
        expected = torch.stack([cells(term, drawn) for term in terms]).all(0)
        assert torch.equal(cells(whole, drawn), expected)
        assert tm.everything not in conjuncts(whole) or whole == tm.everything


@given(expressions())
def test_registers_carry_nothing_to_a_token_that_it_may_not_read(drawn: Drawn) -> None:
    """Two steps through a register lead to no key that the mask hides from the query, and tokens see as before."""
    registers, memories, r = 2, 1, drawn.reach
    whole = with_registers(drawn.mask, registers, memories)
    extra = registers + memories
    table = whole.to_dense(registers + r.q, extra + r.k, batch=r.batch, heads=r.heads)
    table = table.expand(r.batch, r.heads, *table.shape[2:])
    assert torch.equal(table[..., registers:, extra:], cells(drawn.mask, drawn))
    assert bool(table[..., :memories].all())
    reads_registers = table[..., registers:, memories:extra].any(-1)
    read_by_registers = table[..., :registers, extra:].any(-2)
    carried = reads_registers[..., :, None] & read_by_registers[..., None, :]
    assert not (carried & ~cells(drawn.mask, drawn)).any()


def test_registers_behind_the_tokens() -> None:
    mask = tm.keys([True, False, True])
    before, behind = with_registers(mask, 1).to_dense(4)[0, 0], with_registers(mask, 1, behind=3).to_dense(4)[0, 0]
    order = torch.tensor([1, 2, 3, 0])
    assert torch.equal(behind, before[order][:, order])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("causal | prefix(2)", "(causal | prefix(2)) & local(1)"),
        ("causal.packed([2, 3])", "(causal & local(1)).packed([2, 3])"),
        ("everything.padded([1, 2])", "local(1).padded([1, 2])"),
        ("causal.padded([1]) & keys([True, False])", "(causal & local(1)).padded([1]) & keys([True, False])"),
        (
            "causal.padded([1]) | prefix(2).padded([1])",
            "(causal & local(1)).padded([1]) | (prefix(2) & local(1)).padded([1])",
        ),
        ("causal.at(q_start=2) - prefix(1)", "(causal & local(1)).at(q_start=2) - prefix(1)"),
        ("causal.padded([1, 0]).select(samples=[1])", "(causal & local(1)).padded([1, 0]).select(samples=[1])"),
        ("~causal", "~causal & local(1)"),
    ],
)
def test_terms_count_as_the_mask_does(mask: str, expected: str) -> None:
    assert with_term(tm.parse(mask), tm.local(1)) == tm.parse(expected)


def test_terms_that_nobody_says_how_to_count() -> None:
    assert with_term(~tm.causal.packed([2, 3]), tm.local(1)) is None
    assert with_term(tm.window(2) & (~tm.causal.packed([2, 3]) | tm.causal), tm.local(1)) is None
    assert with_term(tm.causal.padded([1]).select(heads=[0, 0]), tm.per_head([tm.causal, tm.local(1)])) is None
