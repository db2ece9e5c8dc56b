"""`diagnose`: each thing that goes wrong in practice is found by name, and what is right is left alone."""

from __future__ import annotations

import pytest
import torch

import truemask as tm
from truemask import MaskError, causal, diagnose, documents, keys, local, padding, prefix, window
from truemask.diagnosis.finding import Finding, Findings
from truemask.masks.core import Mask

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
    "has-a-name": (TRIANGLE, {}, "note", "`dense(...)`"),
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
        (~TRIANGLE, "error", "from_torch_mha(mask), if True meant masked out"),
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
