"""`recognise`: cells that are an expression of the language are found, and a wrong name is never given."""

from __future__ import annotations

import pytest
import torch

import truemask as tm
from tests.support.cases import CASES, Case
from truemask import blocks, causal, dense, dilated, global_tokens, local, padding, prefix, window
from truemask.diagnosis.recognise import recognise
from truemask.masks.core.mask import Mask

N = 24


@pytest.mark.parametrize(
    "mask",
    [
        causal,
        tm.everything,
        tm.nothing,
        window(5),
        local(2),
        prefix(9),
        blocks(4),
        blocks(4, back=1),
        blocks(4, back=1, ahead=1),
        dilated(3),
        causal & dilated(3),
        causal | prefix(3),
        causal & (window(5) | prefix(3)),
        local(1) | global_tokens([0, 7]),
        causal.packed([8, 10, 6]),
        window(3).packed([8, 10, 6]),
        tm.documents([8, 16]),
        causal & padding(lengths=[20, 13, 24]),
        causal & padding(lengths=[20, 13, 24], on="keys"),
        tm.per_head([causal, window(3)]),
    ],
    ids=str,
)
def test_common_masks_get_their_name_back(mask: Mask) -> None:
    cells = dense(mask.to_dense(N, batch=mask.batch_size, heads=mask.head_count))
    assert recognise(cells, N) == mask


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_name_is_always_right(case: Case) -> None:
    found = recognise(dense(torch.from_numpy(case.cells)), case.q_len, case.kv_len)
    if found is not None:
        assert "dense" not in {part.kind for part in found.walk()}
        assert (found.to_dense(case.q_len, case.kv_len, batch=case.batch, heads=case.heads).numpy() == case.cells).all()


def test_rows_that_start_late() -> None:
    assert recognise(dense(torch.ones(4, 9, dtype=torch.bool).tril(5)), 4, 9) == causal.at(q_start=5)
    assert recognise(dense(torch.ones(9, 4, dtype=torch.bool).tril(-5)), 9, 4) == causal.at(k_start=5)
    late = window(3).at(q_start=6).to_dense(3, 9)[0, 0]
    assert recognise(dense(late), 3, 9) == window(3).at(q_start=6)


def test_noise_has_no_name() -> None:
    generator = torch.Generator().manual_seed(0)
    assert recognise(dense(torch.rand(N, N, generator=generator) < 0.5), N) is None


def test_a_function_is_recognised_too() -> None:
    assert recognise(tm.predicate(lambda b, h, q, k: (q >= k) & (q - k < 7)), N) == window(7)
