"""What a mask takes in memory: every array that can be reached from it, each piece of memory once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import truemask as tm
from tests.support.cases import CASES, Case
from truemask.common.memory import HoldsArrays, memory_of
from truemask.masks.core.data import Data
from truemask.masks.core.memory import mask_memory


def reachable(thing: object) -> list[Any]:
    """The arrays that some chain of attributes and containers leads to, found without asking who holds them."""
    arrays: list[Any] = []
    visited: set[int] = set()
    stack: list[Any] = [thing]
    while stack:
        one = stack.pop()
        if id(one) in visited or type(one).__name__ == "State":  # what a user's function reads
            continue
        visited.add(id(one))
        if isinstance(one, (torch.Tensor, np.ndarray)):
            arrays.append(one)
        elif isinstance(one, dict):
            stack += one.values()
        elif isinstance(one, (tuple, list)):
            stack += one
        elif type(one).__module__.startswith("truemask."):
            stack += getattr(one, "__dict__", {}).values()
            stack += [one.tensor] if isinstance(one, Data) else []
    return arrays


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_everything_that_a_mask_holds_is_counted(case: Case) -> None:
    mask = case.make()
    sizes: Any = {"batch": case.batch, "heads": case.heads}
    assert mask.nbytes == sum(memory_of(reachable(mask)).values())
    mask.count(case.q_len, case.kv_len, **sizes)
    mask.tiles(case.q_len, case.kv_len, 2, **sizes)
    mask.to_dense(case.q_len, case.kv_len, **sizes)
    assert mask_memory(mask) == memory_of(reachable(mask))
    assert mask.nbytes == sum(memory_of(reachable(mask)).values())


def test_data_counts_once_whoever_shares_it() -> None:
    flags = tm.keys(torch.arange(20_000) % 7 > 0)
    assert flags.nbytes == 20_000
    assert (flags.at(k_start=3) | (flags & ~flags)).nbytes == 20_000
    assert mask_memory(flags.at(k_start=3), counted=flags) == {}
    other = tm.keys(torch.arange(20_000) % 5 > 0)
    assert (flags & other).nbytes == 40_000
    assert sum(mask_memory(flags & other, counted=flags).values()) == 20_000


def test_what_a_mask_remembers_is_counted_when_it_is_there() -> None:
    mask = tm.causal.packed([300, 300, 400])
    before = mask.nbytes
    mask.count(1000)
    exact = mask.nbytes
    mask.truth(*(torch.zeros((), dtype=torch.int64),) * 4)
    assert before < exact < mask.nbytes
    assert mask.nbytes > 4 * 8 * 1000 / 2  # documents and offsets, of queries that are the keys


def test_what_a_function_reads_is_not_counted() -> None:
    flags = torch.ones(10_000, dtype=torch.bool)
    mask = tm.predicate(lambda b, h, q, k: flags[k])
    mask.count(100)
    assert mask.nbytes == 0
    flags.logical_not_()
    tm.plan(mask, q_len=100)  # asks the function anew, as another mask that the first one remembers
    assert mask.nbytes == sum(memory_of(reachable(mask)).values())


def test_tables_say_which_arrays_they_hold() -> None:
    class Table(HoldsArrays):
        def __init__(self) -> None:
            self.numbers = np.zeros(4)
            self.inner = [(torch.zeros(3), {"a": self.numbers[:2]})]
            self.itself = self

    assert len(list(Table().arrays())) == 3
    assert sum(memory_of(Table().arrays()).values()) == 4 * 8 + 3 * 4
