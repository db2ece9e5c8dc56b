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
        ("causal", {"q_len": 4}, "diagnose takes a mask or a bool tensor, got str"),
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
