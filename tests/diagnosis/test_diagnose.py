"""`diagnose`: each thing that goes wrong in practice is found by name, and what is right is left alone."""

from __future__ import annotations

import pytest
import torch

import truemask as tm
from truemask import MaskError, causal, diagnose, documents, keys, local, padding, prefix, window
from truemask.common.finding import Finding, Findings
from truemask.masks.core.mask import Mask

N = 24
TRIANGLE = torch.ones(N, N, dtype=torch.bool).tril()

FOUND = {
    "dead-queries": (causal - local(0), {}, "warning", "queries 0"),
    "dead-keys": (window(4).at(q_start=10), {"q_len": 4, "kv_len": 14}, "note", "keys 0-6"),
    "future": (causal | prefix(4), {"causal": True}, "error", "`causal | prefix(4)`"),
    "inverted": (~TRIANGLE, {}, "error", "`dense(...)`"),
    "documents-mixed": (causal, {"documents": [8, 16]}, "error", "the documents given"),
    "not-restarted": (causal & documents([8, 16]) & (window(4) | prefix(2)), {}, "warning", "`prefix(2)`"),
    "no-effect": (window(4) & local(9), {}, "note", "`local(9)`"),
    "long-window": (causal & window(100), {}, "note", "`window(100)`"),
    "row-as-square": (torch.ones(1, N, dtype=torch.bool), {}, "error", "`dense(...)`"),
    "right-aligned": (
        torch.ones(12, 8, dtype=torch.bool).tril(-4),
        {"q_len": 12, "kv_len": 8},
        "warning",
        "`dense(...)`",
    ),
    "top-left": (causal, {"q_len": 4, "kv_len": 9}, "warning", "`causal`"),
    "one-axis": (tm.padding(lengths=[5, 3]), {"q_len": 5, "kv_len": 20}, "warning", "`padding(lengths=[5, 3])`"),
    "has-a-name": (TRIANGLE, {}, "note", "`dense(...)`"),
    "diagonal-off": (torch.ones(N, N, dtype=torch.bool).tril(1), {}, "warning", "`dense(...)`"),
    "rows-not-depth": (tm.tree([-1] + [0] * 23) & window(2), {}, "warning", "`window(2)`"),
    "padding-sees-padding": (tm.same([1, 1, 0, 0]), {"q_len": 4}, "note", "`same([1, 1, 0, 0])`"),
}


@pytest.mark.parametrize("code", FOUND)
def test_it_is_found(code: str) -> None:
    mask, claims, severity, where = FOUND[code]
    found = diagnose(mask, **{"q_len": N, **claims})
    assert code in found.codes, found
    one = found[found.codes.index(code)]
    assert (one.severity, one.where) == (severity, where)
    assert f"{severity} [{code}] {where}: {one.message}" in str(found)
    assert found.ok == (severity == "note" and found.worst == "note")


SINKS = causal & (window(3) | prefix(1))


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len"),
    [
        (causal.at(q_start=5), 1, 6),
        (causal.at(q_start=8, k_start=3), 4, 9),
        (window(3).at(q_start=4), 2, 6),
        (SINKS.at(q_start=4), 3, 7),
        (SINKS.at(q_start=4) & keys([True] * 7), 3, 7),
        (causal.padded([0, 2]).at(q_start=5), 1, 6),
        (causal.packed([3, 5]).at(q_start=6), 2, 8),
        ((causal & documents([3, 5])).at(q_start=6), 2, 8),
        (causal.take(q=[6, 7]), 2, 8),
        (causal.take(q=[[6], [3]], k=[[0, 1, 6], [2, 3, 1]]), 1, 3),
        (causal.at(q_start=5).select(samples=[0, 0]), 1, 6),
        (tm.per_head([causal, window(4)]).at(q_start=5), 1, 6),
        (causal.prepended(k=2), 4, 6),
    ],
    ids=str,
)
def test_decoding_is_left_alone(mask: Mask, q_len: int, kv_len: int) -> None:
    """Rows and keys are compared by the positions that they stand at."""
    for claim in (None, True):
        assert diagnose(mask, q_len, kv_len, causal=claim).ok


def test_the_future_is_seen_in_decoding_too() -> None:
    leaky = (causal | prefix(8)).at(q_start=4)
    found = diagnose(leaky, 2, 10)[0]
    assert (found.code, found.severity) == ("future", "warning")
    assert "5 pairs see the future, first query 0 and key 5" in found.message
    assert tm.parse(found.fix).equivalent(causal.at(q_start=4), 2, 10)
    assert "documents-mixed" in diagnose((causal | documents([3, 5])).at(q_start=4), 2, 6).codes
    assert "documents-mixed" in diagnose(causal.at(q_start=4), 2, 6, documents=[3, 5]).codes
    assert "documents-mixed" not in diagnose(causal.at(q_start=1), 2, 3, documents=[3, 5]).codes


def test_advice_is_taken_without_a_new_complaint() -> None:
    fix = diagnose(causal, 1, 6)[0].fix
    assert fix == "causal.at(q_start=5)"
    assert diagnose(tm.parse(fix), 1, 6).codes == []


def test_a_cause_comes_before_what_follows_from_it() -> None:
    assert diagnose(causal & documents([8, 16]) & prefix(2), N).codes[:2] == ["not-restarted", "dead-queries"]


def test_parts_that_count_differently_claim_nothing() -> None:
    mixed = causal.at(q_start=4) & (window(3) | prefix(2))
    assert "future" not in diagnose(mixed, 2, 6).codes
    assert diagnose(causal.at(q_start=4) | window(3), 2, 6, causal=True).worst == "error"


@pytest.mark.parametrize(
    "mask",
    [
        causal,
        causal & window(8),
        causal & (window(8) | prefix(4)),
        (causal & (window(4) | prefix(2))).packed([8, 16]),
        causal.padded([0, 5]),
        local(3),
        tm.blocks(4) | tm.global_tokens([0]),
        tm.per_head([causal, window(4)]),
        tm.documents([8, 16]),
        tm.random(0.5) & causal | local(0),
    ],
    ids=str,
)
def test_what_is_right_is_left_alone(mask: Mask) -> None:
    assert diagnose(mask, N).ok


def test_the_first_cell_is_shown() -> None:
    message = diagnose(causal | prefix(4), N, causal=True)[0].message
    assert message == "6 pairs see the future, first query 0 and key 1"
    assert (causal | prefix(4))[0, 1]
    mixed = diagnose(causal | tm.global_tokens([0]), N, documents=[8, 16])
    assert "first query 0 and key 8" in mixed[mixed.codes.index("documents-mixed")].message


def test_claims_decide_about_the_future() -> None:
    assert "future" in diagnose(causal | prefix(4), N).codes
    assert "future" not in diagnose(causal | prefix(4), N, causal=False).codes
    assert "future" not in diagnose(local(3), N).codes
    assert diagnose(local(3), N, causal=True).worst == "error"
    leaky = TRIANGLE.clone()
    leaky[3, 9] = True
    assert "future" in diagnose(leaky, N).codes  # all but one cell of the future are hidden
    assert "future" not in diagnose(torch.ones(N, N, dtype=torch.bool), N).codes


def test_the_fix_is_what_was_meant() -> None:
    packed = diagnose(causal & documents([8, 16]) & (window(4) | prefix(2)), N)
    fix = packed[packed.codes.index("not-restarted")].fix
    assert tm.parse(fix).equivalent((causal & (window(4) | prefix(2))).packed([8, 16]), N)
    for mask in (window(4) & local(9), causal & window(100), window(3) - prefix(0)):
        for one in diagnose(mask, N):
            assert tm.parse(one.fix).equivalent(mask, N), one


@pytest.mark.parametrize(
    ("mask", "where"),
    [
        (window(4) & local(9), ""),
        (causal & prefix(100), ", at 24 queries and 24 keys"),
        (local(3) & local(2000), ""),
        (causal & (tm.blocks(64) | local(0)), ", at 24 queries and 24 keys"),
        (causal & keys([True] * N), ""),
        (causal & tm.predicate(lambda b, h, q, k: (q - k) < 40), ", at 24 queries and 24 keys"),
    ],
    ids=str,
)
def test_a_part_without_effect_here_may_have_one_in_longer_texts(mask: Mask, where: str) -> None:
    found = diagnose(mask, N)
    message = found[found.codes.index("no-effect")].message
    assert message == f"the expression means the same without it{where}"


def test_padding_is_no_mistake() -> None:
    for mask in (causal & padding(lengths=[20, 24]), causal.padded([3, 0]), causal & keys([False] * 3 + [True] * 21)):
        found = diagnose(mask, N)
        assert found.ok
        assert "padding" in found[found.codes.index("dead-queries")].message
    assert not diagnose(padding(lengths=[20], on="queries"), N).ok  # the others see these tokens: rows that were lost


PAD = torch.tensor([[False] * 3 + [True] * 21, [True] * 20 + [False] * 4])


@pytest.mark.parametrize(
    "mask",
    [
        causal & tm.from_huggingface_2d(PAD),
        causal & tm.same([0] * 20 + [-1] * 4),
        causal - keys(~PAD[0]),
        (causal & keys(PAD)).select(samples=[0]),
        tm.per_head([causal, window(3)]) & padding(lengths=[20, 24]),
        tm.dense(TRIANGLE & PAD[0] & PAD[0][:, None]),
    ],
    ids=lambda mask: mask.kind,
)
def test_rows_that_padding_explains_are_a_note(mask: Mask) -> None:
    found = diagnose(mask, N)
    one = found[found.codes.index("dead-queries")]
    assert (one.severity, "like padding" in one.message, found.ok) == ("note", True, True)


@pytest.mark.parametrize(
    "mask",
    [
        tm.nothing,
        causal & tm.random(0.0),
        tm.per_head([causal, tm.nothing]),
        tm.per_head([causal & keys(PAD[0]), causal]),
        causal & documents([8, 16]) & prefix(2),
        causal & padding(lengths=[24, 20]) & documents([8, 16]) & prefix(2),
        causal & padding(lengths=[0, 24]),
        causal.padded([24]),
        tm.nothing.padded([3]),
        tm.dense(TRIANGLE & (torch.arange(N) % 5 != 0) & (torch.arange(N) % 5 != 0)[:, None]),
    ],
    ids=str,
)
def test_rows_that_padding_does_not_explain_are_a_warning(mask: Mask) -> None:
    found = diagnose(mask, N)
    one = found[found.codes.index("dead-queries")]
    assert (one.severity, "padding" in one.message, found.ok) == ("warning", False, False)


@pytest.mark.parametrize(
    ("mask", "severity", "fix"),
    [
        (TRIANGLE.T, "warning", "mask.T, if queries and keys changed places"),
        (~TRIANGLE, "error", "~mask"),
        (causal.T, "warning", "causal"),
        (window(4).T, "warning", "window(4)"),
        (~causal | local(0), "warning", "(~causal | local(0)).T"),
        (~causal, "error", "causal"),
        (tm.everything - causal, "error", "~(everything - causal)"),
    ],
    ids=str,
)
def test_upside_down(mask: Mask | torch.Tensor, severity: str, fix: str) -> None:
    found = diagnose(mask, N)
    one = found[found.codes.index("inverted")]
    assert (one.severity, one.fix) == (severity, fix)
    assert "inverted" not in diagnose(mask, N, causal=False).codes


@pytest.mark.parametrize(
    ("mask", "length", "fix"),
    [
        (causal & window(8), 5, "causal"),
        (window(8) & prefix(2) & causal, 5, "causal & prefix(2)"),
        (causal & window(8) | prefix(2), 5, "causal | prefix(2)"),
    ],
    ids=str,
)
def test_equal_terms_of_a_fix_are_said_once(mask: Mask, length: int, fix: str) -> None:
    assert [one.fix for one in diagnose(mask, length, causal=False) if one.code == "long-window"] == [fix]


def test_parts_that_vary_over_heads_need_their_number() -> None:
    mask = causal & tm.random(0.5, per_head=True) | local(0)
    with pytest.raises(MaskError, match="heads="):
        diagnose(mask, N)
    assert diagnose(mask, N, heads=4).ok


def test_it_costs_no_cells() -> None:
    """A million tokens, exactly."""
    mask = (causal & (window(512) | prefix(4))).packed([400_000, 600_000])
    assert diagnose(mask, 1_000_000).codes == []
    assert "6 pairs" in diagnose(causal | prefix(4), 1_000_000, causal=True)[0].message


@pytest.mark.parametrize(
    ("mask", "sizes", "message"),
    [
        ("causl", {"q_len": 4}, "did you mean 'causal'"),
        (4, {"q_len": 4}, "diagnose: mask must be a mask expression, such as .* got int 4"),
        (torch.zeros(4, 4), {"q_len": 4}, "from_additive"),
        (causal, {"q_len": 0}, "q_len"),
        (keys([True] * 4), {"q_len": 9}, "4 keys"),
        (causal, {"q_len": 9, "documents": [3, 4]}, "7"),
    ],
)
def test_questions_without_an_answer(mask: object, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        diagnose(mask, **sizes)  # pyright: ignore[reportArgumentType]


def test_findings_are_a_sequence_the_gravest_first() -> None:
    note, error = Finding("a", "note", "here", "small"), Finding("b", "error", "there", "large", "do this")
    found = Findings([note, error])
    assert list(found) == [error, note]
    assert (found.worst, found.ok, len(found), found.codes) == ("error", False, 2, ["b", "a"])
    assert str(found) == "error [b] there: large\n    fix: do this\nnote [a] here: small"
    assert found.to_dicts()[1] == {"code": "a", "severity": "note", "where": "here", "message": "small", "fix": ""}
    assert (str(Findings()), Findings().ok, bool(Findings())) == ("nothing found", True, False)


# -- tensors whose diagonal is off -------------------------------------------------------------------------------------

ONES = torch.ones(N, N, dtype=torch.bool)


@pytest.mark.parametrize(
    ("cells", "code", "fix"),
    [
        (ONES.tril(1), "diagonal-off", "causal"),
        (ONES.tril(2).triu(-3), "diagonal-off", "window(6)"),
        (ONES[:4].tril(N - 4 + 1), "diagonal-off", "causal.at(q_start=20)"),
        (ONES[:4].tril(), "top-left", "causal.at(q_start=20)"),
        (ONES[:1].tril(), "top-left", "causal.at(q_start=23)"),
        (ONES[:4].tril().triu(-1), "top-left", "window(2).at(q_start=20)"),
        (ONES[:, :20].tril(-4), "right-aligned", "causal, if both count from the same start"),
    ],
)
def test_a_tensor_with_its_diagonal_elsewhere_is_told(cells: torch.Tensor, code: str, fix: str) -> None:
    found = diagnose(cells, *cells.shape)
    assert code in found.codes
    assert found[found.codes.index(code)].fix == fix
    assert not found.ok


@pytest.mark.parametrize(
    "cells",
    [
        ONES.tril(),
        ONES.tril().triu(-4),
        ONES[:4].tril(N - 4),
        ONES,
        ONES[:1],
        ONES.tril(9).triu(-9),
        ONES.tril(1).triu(-1),
    ],
)
def test_a_tensor_with_its_diagonal_in_place_is_left_alone(cells: torch.Tensor) -> None:
    assert diagnose(cells, *cells.shape).ok


def test_a_function_that_sees_the_next_key_is_told_too() -> None:
    ahead = tm.predicate(lambda b, h, q, k: k <= q + 1)
    assert "diagonal-off" in diagnose(ahead, N).codes
    assert "diagonal-off" not in diagnose(ahead, N, causal=False).codes


# -- single heads ------------------------------------------------------------------------------------------------------


def test_a_finding_of_one_head_names_it() -> None:
    cells = ONES.tril().repeat(1, 4, 1, 1)
    cells[0, 1, 5] = False
    cells[0, 2] = ~cells[0, 2]
    cells[0, 3] = ONES.tril(1)
    where = {one.code: one.where for one in reversed(diagnose(cells, N)) if one.severity != "note"}
    assert where == {
        "inverted": "head 2, `dense(...)`",
        "dead-queries": "head 1, queries 5",
        "diagonal-off": "head 3, `dense(...)`",
    }


def test_findings_of_all_heads_name_none() -> None:
    (one,) = [one for one in diagnose(tm.per_head([~causal, ~window(9)]), N) if one.code == "dead-queries"]
    assert one.where == "head 0, queries 23"
    both = diagnose(tm.per_head([causal, window(9)]) & (tm.everything - tm.queries([False] * 23 + [True])), N)
    assert [one.where for one in both if one.code == "dead-queries"] == ["queries 23"]


def test_heads_of_an_expression_are_written_as_they_would_be_alone() -> None:
    found = diagnose(tm.per_head([causal, ~causal, window(4), ~causal]), N)
    one = found[found.codes.index("inverted")]
    assert (one.where, one.fix) == ("2 heads (1, 3), `~causal`", "causal")


def test_a_name_of_some_heads_is_told_of_them() -> None:
    noise = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5
    found = diagnose(torch.stack([ONES.tril(), noise | ONES.tril().triu(), ONES.tril()])[None], N)
    names = [(one.where, one.fix) for one in found if one.code == "has-a-name"]
    assert names == [("2 heads (0, 2), `dense(...)`", "causal")]


# -- words that count something else -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "n"),
    [
        (tm.tree([-1, 0, 0, 1, 1, 2]) & window(2), 6),
        (tm.tree([-1, 0, 0, 1, 1, 2]) & (window(2) | prefix(1)), 6),
        (tm.tree([-1, 0, 0], lengths=[5, 3, 4]) & local(3), 12),
        (tm.tree([-1, 0, 0], lengths=[5, 3, 4]) & tm.dilated(2), 12),
        (tm.tree([[-1, 0, 0], [-1, 0, 1]]) & window(2), 3),
    ],
    ids=str,
)
def test_a_window_in_a_tree_counts_rows_and_the_fix_counts_depth(mask: Mask, n: int) -> None:
    found = diagnose(mask, n)
    one = found[found.codes.index("rows-not-depth")]
    fixed = tm.parse(one.fix)
    tree = next(part for part in mask.walk() if part.kind == "tree")
    depth = tree.to_dense(n)[:, 0].sum(-1) - 1
    q, k = depth[:, None, :, None], depth[:, None, None, :]
    term = next(term for term in mask.terms if term.kind != "tree")  # pyright: ignore[reportAttributeAccessIssue]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    wanted = tree.to_dense(n) & term.truth(zero, zero, q, k)
    assert torch.equal(fixed.to_dense(n), wanted)
    assert "rows-not-depth" not in diagnose(fixed, n).codes


def test_later_rows_of_a_tree_count_rows_too() -> None:
    mask = tm.tree([-1, 0, 0, 1, 1, 2]) & window(2)
    found = diagnose(mask.at(q_start=4), 2, 6)
    fixed = tm.parse(found[found.codes.index("rows-not-depth")].fix)
    whole = diagnose(mask, 6)
    assert fixed == tm.parse(whole[whole.codes.index("rows-not-depth")].fix).at(q_start=4)


def test_a_tree_without_branches_counts_as_its_rows() -> None:
    assert "rows-not-depth" not in diagnose(tm.tree([-1, 0, 1, 2]) & window(2), 4).codes


def test_labels_of_more_groups_or_with_none_are_left_alone() -> None:
    for mask in (tm.same([1, 2, 2, 0]), tm.same([1, 1, 0, 0], none=0), tm.same([1, 1, -1]), tm.same([1, 1, 1])):
        assert "padding-sees-padding" not in diagnose(mask, 3).codes
    found = diagnose(tm.same([1, 1, 0, 0]), 4)
    fixed = tm.parse(found[found.codes.index("padding-sees-padding")].fix)
    assert fixed.equivalent(keys([True, True, False, False]) & tm.queries([True, True, False, False]), 4)


@pytest.mark.parametrize("flags", [[True, False], torch.tensor([True, False]), [[True, False]]])
def test_flags_are_no_labels(flags: object) -> None:
    with pytest.raises(MaskError, match=r"`keys\(flags\) & queries\(flags\)`"):
        tm.same(flags)
