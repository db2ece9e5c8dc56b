"""`explain`: the answer is the cell's own, its parts decide it, and none of them can be spared."""

from __future__ import annotations

from functools import reduce
from itertools import combinations, product
from operator import and_, or_

import pytest

import truemask as tm
from tests.support.cases import CASES, Case
from truemask import MaskError, causal, explain, keys, prefix, window
from truemask.masks.compose.boolean import And, Minus, Not, Or, Xor
from truemask.masks.core.kinds import KINDS
from truemask.masks.core.mask import Mask


def cells(case: Case) -> list[tuple[int, int, int, int]]:
    """Some cells of a case: corners and a stride through the rest."""
    every = list(product(range(case.batch), range(case.heads), range(case.q_len), range(case.kv_len)))
    return every[:: max(1, len(every) // 12)]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_mask_is_explained(case: Case) -> None:
    mask = case.make()
    for b, h, q, k in cells(case):
        said = explain(mask, q, k, sample=b, head=h)
        assert bool(said) == bool(case.cells[b, h, q, k])
        assert said.reasons
        for reason in said.reasons:
            assert reason.why
            assert mask.text[slice(*reason.span)].strip("()") != ""
        assert f"query {q} may{'' if said else ' not'} attend to key {k}" in str(said)


def test_every_kind_has_its_words() -> None:
    """A new leaf needs a sentence of its own in `leaf_reasons.py`; the last case is for `everything` and `nothing`."""
    spoken = set()
    for case in CASES:
        for b, h, q, k in cells(case):
            for reason in explain(case.make(), q, k, sample=b, head=h).reasons:
                if not reason.why.startswith("it lets"):
                    spoken.add(reason.mask.kind)
    passed_through = {
        "and",
        "or",
        "xor",
        "minus",
        "not",
        "per_head",
        "per_sample",
        "at",
        "take",
        "select",
        "transposed",
    }
    assert set(KINDS) - spoken - passed_through == {"everything", "nothing"}


def test_the_parts_are_the_fewest() -> None:
    """No smaller set of leaves decides the cell, whatever the others say."""
    masks = [
        causal & (window(4) | prefix(2)),
        (causal & window(3)) | (prefix(2) & tm.local(2)) | tm.blocks(4),
        ~(causal & window(3)) & (tm.blocks(4) | prefix(1)),
        (causal ^ prefix(3)) & (window(2) | tm.dilated(2)),
        (causal | tm.blocks(4)) - (window(2) & prefix(5)),
        prefix(1) & window(2) | window(2) & prefix(2),
        (prefix(1) | window(2)) & (prefix(2) | window(2)) & (prefix(1) | prefix(2) | causal),
        (causal & prefix(3) | tm.blocks(4)) ^ (window(2) & prefix(3)),
    ]
    for mask, q, k in product(masks, range(0, 10, 3), range(0, 10, 2)):
        said = explain(mask, q, k)
        leaves = list(dict.fromkeys(part for part in mask.walk() if not part.children))
        truths = {leaf: leaf[q, k] for leaf in leaves}
        fewest = next(
            size
            for size in range(len(leaves) + 1)
            for fixed in combinations(leaves, size)
            if decided(mask, {leaf: truths[leaf] for leaf in fixed})
        )
        used = {reason.mask: reason.allows for reason in said.reasons}  # one that stands twice counts once
        assert len(used) == fewest, (mask, q, k)
        assert decided(mask, used)


def decided(mask: Mask, fixed: dict[Mask, bool]) -> bool:
    """Whether the mask has one value for every choice of the leaves that are not fixed."""
    free = [part for part in set(mask.walk()) if not part.children and part not in fixed]
    choices = product((False, True), repeat=len(free))
    return len({value(mask, {**fixed, **dict(zip(free, choice, strict=True))}) for choice in choices}) == 1


def value(mask: Mask, leaves: dict[Mask, bool]) -> bool:
    parts = [value(child, leaves) for child in mask.children]
    match mask:
        case And():
            return all(parts)
        case Or():
            return any(parts)
        case Xor():
            return sum(parts) % 2 == 1
        case Minus():
            return parts[0] and not parts[1]
        case Not():
            return not parts[0]
        case _:
            return leaves[mask]


def test_the_text_of_the_deciding_parts_is_underlined() -> None:
    assert str(explain((causal & window(3)).packed([4, 6]), 6, 2)).splitlines() == [
        "query 6 may not attend to key 2",
        "(causal & window(3)).packed([4, 6])",
        "                    ^^^^^^^^^^^^^^^",
        "  .packed([4, 6]): query 6 is in document 1 and key 2 in document 0",
    ]


def test_a_part_that_stands_twice_is_marked_twice_and_said_once() -> None:
    assert str(explain(prefix(1) & window(2) | window(2) & prefix(2), 9, 3)).splitlines() == [
        "query 9 may not attend to key 3",
        "prefix(1) & window(2) | window(2) & prefix(2)",
        "            ^^^^^^^^^   ^^^^^^^^^",
        "  window(2): key 3 is 6 positions before query 9, and the window reaches 1 back",
    ]


def test_many_ways_to_decide_are_bounded() -> None:
    """Of 40 factors with 8 ways each only few are carried on."""
    mask = reduce(and_, [reduce(or_, [window(50 + 8 * i + j) for j in range(8)]) for i in range(40)])
    assert len(explain(mask, 20, 10).reasons) == 40


def test_positions_are_those_of_the_part() -> None:
    said = explain(causal.at(q_start=10), 2, 13)
    assert [reason.cell[2:] for reason in said.reasons] == [(12, 13)]
    assert said.notes == ("query 2 stands at position 12, key 13 at position 13",)
    assert "key 13 comes after query 12" in str(said)


def test_equal_terms_are_told_apart_by_their_place() -> None:
    mask = prefix(2) & causal & prefix(2).at(q_start=1)
    spans = [reason.span for reason in explain(mask, 5, 1).reasons]
    assert [mask.text[slice(*span)] for span in spans] == ["prefix(2)", "causal", "prefix(2)"]
    assert spans == sorted(set(spans))


def test_long_expressions_are_cut_into_lines() -> None:
    mask = keys([True] * 40) & causal
    lines = str(explain(mask, 30, 35)).splitlines()
    assert max(map(len, lines)) <= 100
    assert "  causal: key 35 comes after query 30" in lines


@pytest.mark.parametrize(
    ("mask", "q", "k", "place", "message"),
    [
        (keys([True, False]), 0, 2, {}, "2 keys"),
        (causal, -1, 0, {}, "q"),
        (prefix([1, 2]), 0, 0, {"sample": 2}, "sample 2 is out of range"),
        (causal, 0, 0, {"head": "x"}, "head"),
    ],
)
def test_cells_that_are_not_there(mask: Mask, q: int, k: int, place: dict[str, int], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        explain(mask, q, k, **place)
