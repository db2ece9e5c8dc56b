"""A name is given for what was checked: of rules at other lengths too, of data never, and no term is too many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import truemask as tm
from truemask import causal, diagnose, predicate, strided, window
from truemask.diagnosis.naming import Name, name_of, other_lengths
from truemask.masks.core.mask import Mask

N = 30
ELSEWHERE = (43, 89, 331)  # primes beyond N, none of which `other_lengths(N)` asks about
Fn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def all_rows(q: Tensor) -> Tensor:
    return q >= 0


RULES: dict[str, tuple[Fn, Mask]] = {
    "every third key": (lambda b, h, q, k: k % 3 == 0, strided(3).at(k_start=2)),
    "every third key of all rows": (lambda b, h, q, k: (k % 3 == 1) & all_rows(q), strided(3).at(k_start=1)),
    "all but every fourth": (lambda b, h, q, k: k % 4 != 1, strided(4, 3).at(k_start=3)),
    "two of seven": (
        lambda b, h, q, k: (k % 7 == 0) | (k % 7 == 3),
        strided(7).at(k_start=6) | strided(7).at(k_start=3),
    ),
    "every third query": (lambda b, h, q, k: (q % 3 == 0) & (k >= 0), strided(3).at(k_start=2).T),
    "causal, every third key": (lambda b, h, q, k: (k <= q) & (k % 3 == 0), causal & strided(3).at(k_start=2)),
    "an odd distance": (lambda b, h, q, k: (q - k) % 2 == 1, tm.dilated(2).at(q_start=1)),
    "one ahead": (lambda b, h, q, k: k <= q + 1, causal.at(q_start=1)),
    "strictly before": (lambda b, h, q, k: k < q, causal.at(k_start=1)),
    "a band": (lambda b, h, q, k: (k <= q + 1) & (k > q - 4), window(5).at(q_start=1)),
    "a long window": (lambda b, h, q, k: (k <= q) & (q - k < 64), window(64)),
    "near": (lambda b, h, q, k: (q - k).abs() <= 2, tm.local(2)),
    "heads": (lambda b, h, q, k: (k <= q) & (q - k <= h), tm.per_head([window(1), window(2)])),
}


def named(fn: Fn, q_len: int = N, kv_len: int = N) -> Name | None:
    return name_of(predicate(fn), q_len, kv_len, batch=2, heads=2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(N, N), (31, 17), (17, 31)])
def test_a_rule_has_its_name_at_every_length(rule: str, sizes: tuple[int, int]) -> None:
    fn, wanted = RULES[rule]
    name = named(fn, *sizes)
    assert name is not None
    assert (name.mask, name.is_rule) == (wanted, True)
    assert all(wanted.equivalent(predicate(fn), n, heads=None if wanted.head_count > 1 else 2) for n in ELSEWHERE)


def test_the_name_of_periodic_keys_answers_where_the_function_does() -> None:
    third = predicate(lambda b, h, q, k: k % 3 == 0)
    (one,) = [one for one in diagnose(third, N) if one.code == "has-a-name"]
    assert one.fix == "strided(3).at(k_start=2)"
    assert "everything" not in one.message
    assert tm.parse(one.fix).equivalent(third, 40)
    assert "(15, 61, 127, 1,009, 100,003)" in one.message


FLAGS = torch.rand(N, generator=torch.Generator().manual_seed(3)) < 0.5
DOCUMENT = torch.tensor([0] * 8 + [1] * 22)
DATA: dict[str, tuple[Fn, Mask]] = {
    "flags": (lambda b, h, q, k: FLAGS[k] & all_rows(q), tm.keys(FLAGS)),
    "flags for ever": (lambda b, h, q, k: FLAGS[k % N] & all_rows(q), tm.keys(FLAGS)),
    "causal documents": (lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (k <= q), causal.packed([8, 22])),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_is_never_a_rule(kind: str) -> None:
    fn, wanted = DATA[kind]
    name = named(fn)
    assert name is not None
    assert (name.mask, name.is_rule, name.lengths) == (wanted, False, ())
    assert "data of these tokens" in name.words()


@pytest.mark.parametrize(
    ("fn", "where"),
    [
        (lambda b, h, q, k: (k <= q) & (q - k < 5000), "at 100,003 tokens they are not, first query"),
        (lambda b, h, q, k: (k <= q) | (q > 50), "at 61 tokens they are not, first query 51 and key 52"),
    ],
)
def test_a_name_that_holds_here_only_is_no_fix(fn: Fn, where: str) -> None:
    (one,) = [one for one in diagnose(predicate(fn), N) if one.code == "has-a-name"]
    assert one.message == f"its cells here are `causal`; {one.message.partition('; ')[2]}"
    assert where in one.message
    assert one.fix == ""


@settings(max_examples=40, deadline=None)
@given(st.integers(-2, 2), st.integers(-2, 2), st.integers(2, 5), st.sets(st.integers(0, 4), min_size=1), st.booleans())
def test_what_is_called_a_rule_is_one(a: int, b: int, modulus: int, kept: set[int], back: bool) -> None:
    table = torch.tensor([i in kept for i in range(modulus)])

    def fn(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return table[(a * q + b * k) % modulus] & ((k <= q) | (not back)) & all_rows(q + k)

    name = named(fn)
    if name is not None and name.is_rule:
        assert all(name.mask.equivalent(predicate(fn), n) for n in ELSEWHERE)
    if name is not None:
        assert name.mask == tm.everything or "everything" not in str(name.mask)


@pytest.mark.parametrize("mask", [causal, window(5), strided(3), tm.blocks(4), causal | tm.prefix(3)], ids=str)
def test_a_tensor_with_the_cells_of_a_rule_is_not_said_to_hold_elsewhere(mask: Mask) -> None:
    name = name_of(tm.dense(mask.to_dense(N)), N, N)
    assert name is not None
    assert (name.mask, name.is_rule, name.lengths) == (mask, True, ())
    assert "length" not in name.words()


@pytest.mark.parametrize("mask", [causal & tm.padding(lengths=[9]), tm.keys(FLAGS), causal.packed([8, 22])], ids=str)
def test_a_tensor_with_data_has_a_name_for_these_tokens(mask: Mask) -> None:
    name = name_of(tm.dense(mask.to_dense(N)), N, N)
    assert name is not None
    assert not name.is_rule
    assert name.mask.equivalent(mask, N)


def test_a_function_that_raises_elsewhere_is_not_asked_for_more() -> None:
    def fn(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if int(k.max()) >= N:
            raise RuntimeError("no more tokens")
        return k <= q

    name = named(fn)
    assert name is not None
    assert (name.mask, name.is_rule, name.differs) == (causal, False, False)
    assert "at 61 the function does not answer (RuntimeError)" in name.words()


def test_other_lengths_are_shorter_and_longer_and_prime() -> None:
    assert other_lengths(1) == (3, 5, 1009, 100_003)
    assert other_lengths(2000) == (1000, 4001, 8009, 100_003)
