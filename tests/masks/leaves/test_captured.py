"""A function is asked anew when what it reads has changed: an answer of `attend` is never that of before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks

import truemask as tm
from tests.support.equality import assert_same
from truemask.attention.planning.cache import CACHE
from truemask.backends.base import Inputs
from truemask.backends.shared.eager import eager_attention
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.captured import State
from truemask.masks.leaves.predicate import current

N = 13
torch.manual_seed(0)
Q = torch.randn(1, 2, N, 8)
LIMIT = 5  # a global that a function reads
FLAGS_OF_MODULE = torch.ones(N, dtype=torch.bool)


def flags() -> Tensor:
    return torch.arange(N) % 2 == 0


def wanted(mask: Mask) -> Tensor:
    """`attend` by cells that nobody remembers."""
    return tm.attend(Q, Q, Q, tm.dense(mask.to_dense(N, batch=1, heads=2)))


@pytest.mark.parametrize("backend", [None, "sdpa", "block_sparse", "reference", "flex"])
def test_a_tensor_that_was_written_to_is_read_again(backend: str | None) -> None:
    seen = flags()
    mask = tm.predicate(lambda b, h, q, k: (k <= q) & seen[k.clamp(max=N - 1)])
    before = tm.attend(Q, Q, Q, mask, backend=backend)
    seen.logical_not_()
    after = tm.attend(Q, Q, Q, mask, backend=backend)
    assert not torch.allclose(before, after)
    assert_same(after, wanted(mask))
    seen.logical_not_()
    assert_same(tm.attend(Q, Q, Q, mask, backend=backend), before)


@pytest.mark.parametrize(
    "around",
    [
        lambda mask: tm.causal & mask,
        lambda mask: ~mask | tm.window(3),
        lambda mask: mask.at(q_start=2).at(k_start=1) & tm.causal,
        lambda mask: mask.packed([6, 7]),
        lambda mask: tm.per_head([mask, tm.causal]),
        lambda mask: mask.select(heads=[1, 0]),
    ],
)
def test_within_an_expression_too(around: Callable[[Mask], Mask]) -> None:
    seen = torch.arange(4 * N) % 2 == 0
    mask = around(tm.predicate(lambda b, h, q, k: seen[k] | (q < 0)))
    tm.attend(Q, Q, Q, mask)
    seen[:9] = torch.arange(9) % 3 == 0
    assert_same(tm.attend(Q, Q, Q, mask), wanted(mask))


def test_in_a_compiled_function_and_in_a_model() -> None:
    seen = flags()
    mask = tm.predicate(lambda b, h, q, k: seen[k] | (q < 0))
    model, x = tm.Encoder(dim=16, depth=1, heads=2), torch.randn(1, N, 16)
    torch._dynamo.reset()
    calls = [
        (lambda mask: tm.attend(Q, Q, Q, mask)),
        torch.compile(lambda mask: tm.attend(Q, Q, Q, mask), backend="eager", fullgraph=True),
        (lambda mask: model(x, mask=mask)),
        torch.compile(lambda mask: model(x, mask=mask), backend="eager", fullgraph=True),
    ]
    before = [call(mask) for call in calls]
    seen.logical_not_()
    for call, old in zip(calls, before, strict=True):
        new = call(mask)
        assert not torch.allclose(new, old)
        assert_same(new, call(tm.dense(mask.to_dense(N))))


def test_the_same_function_wrapped_again_is_asked_again() -> None:
    seen = flags()

    def fn(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen[k] | (q < 0)

    before = tm.attend(Q, Q, Q, tm.predicate(fn))
    assert tm.predicate(fn) == tm.predicate(fn)
    seen.logical_not_()
    assert not torch.allclose(tm.attend(Q, Q, Q, tm.predicate(fn)), before)


def test_what_stays_as_it_is_needs_one_plan() -> None:
    seen = flags()
    mask = tm.predicate(lambda b, h, q, k: seen[k] | (q < 0))
    tm.attend(Q, Q, Q, mask)
    made = CACHE.info().misses
    for _ in range(3):
        assert current(mask) is mask
        tm.attend(Q, Q, Q, mask)
    seen.logical_not_()
    for _ in range(3):
        tm.attend(Q, Q, Q, mask)
    assert CACHE.info().misses == made + 1


# -- what a function reads ---------------------------------------------------------------------------------------------


class Rule:
    """A callable object with state."""

    def __init__(self) -> None:
        self.table, self.limit = torch.ones(N), 3

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.table[k] > self.limit


def closure() -> tuple[Any, Callable[[], Any]]:
    seen = flags()
    return lambda b, h, q, k: seen[k], lambda: seen.fill_(True)


def rebound() -> tuple[Any, Callable[[], Any]]:
    limit = torch.tensor(3)

    def other() -> None:
        nonlocal limit
        limit = torch.tensor(4)

    return lambda b, h, q, k: k < limit, other


def number() -> tuple[Any, Callable[[], Any]]:
    limit = 3

    def other() -> None:
        nonlocal limit
        limit = 4

    return lambda b, h, q, k: k < limit, other


def global_number() -> tuple[Any, Callable[[], Any]]:
    return lambda b, h, q, k: k < LIMIT, lambda: globals().update(LIMIT=LIMIT + 1)


def inner() -> tuple[Any, Callable[[], Any]]:
    def fn(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (lambda key: FLAGS_OF_MODULE[key])(k)

    return fn, lambda: FLAGS_OF_MODULE.logical_not_()


def helper() -> tuple[Any, Callable[[], Any]]:
    seen = flags()

    def own(k: Tensor) -> Tensor:
        return seen[k]

    return lambda b, h, q, k: own(k), lambda: seen.fill_(True)


def default() -> tuple[Any, Callable[[], Any]]:
    seen = flags()
    return lambda b, h, q, k, table=seen: table[k], lambda: seen.fill_(True)


def partial() -> tuple[Any, Callable[[], Any]]:
    seen = flags()
    return functools.partial(lambda table, b, h, q, k: table[k], seen), lambda: seen.fill_(True)


def container() -> tuple[Any, Callable[[], Any]]:
    held: dict[str, list[Tensor]] = {"rows": [flags()]}
    return lambda b, h, q, k: held["rows"][0][k], lambda: held["rows"][0].fill_(True)


def array() -> tuple[Any, Callable[[], Any]]:
    sizes = np.arange(4)
    return lambda b, h, q, k: k < int(sizes[-1]), lambda: sizes.__setitem__(-1, 9)


def an_object() -> tuple[Any, Callable[[], Any]]:
    rule = Rule()
    return rule, lambda: rule.table.mul_(7)


def a_number_of_an_object() -> tuple[Any, Callable[[], Any]]:
    rule = Rule()
    return rule, lambda: setattr(rule, "limit", 0)


def a_method() -> tuple[Any, Callable[[], Any]]:
    rule = Rule()
    return rule.__call__, lambda: rule.table.mul_(7)


def combined_by_torch() -> tuple[Any, Callable[[], Any]]:
    seen = flags()
    return and_masks(lambda b, h, q, k: seen[k], lambda b, h, q, k: k <= q), lambda: seen.fill_(True)


def another_mask() -> tuple[Any, Callable[[], Any]]:
    seen = flags()
    mask = tm.predicate(lambda b, h, q, k: seen[k]) & tm.causal
    return lambda b, h, q, k: mask.truth(b, h, q, k), lambda: seen.fill_(True)


def under_inference() -> tuple[Any, Callable[[], Any]]:
    with torch.inference_mode():
        seen = flags()

    def other() -> None:
        with torch.inference_mode():
            seen.fill_(True)

    return lambda b, h, q, k: seen[k], other


READS = [
    closure, rebound, number, global_number, inner, helper, default, partial, container, array, an_object,
    a_number_of_an_object, a_method, combined_by_torch, another_mask, under_inference,
]  # fmt: skip


@pytest.mark.parametrize("reads", READS, ids=lambda reads: reads.__name__)
def test_a_change_of_what_a_function_reads_is_seen(reads: Callable[[], tuple[Any, Callable[[], Any]]]) -> None:
    fn, change = reads()
    before = State(fn)
    assert State(fn).key == before.key
    mask = tm.predicate(fn)
    assert hash(mask) == hash(mask)
    mask.to_dense(N, batch=2, heads=2)
    assert current(mask) is mask
    change()
    assert State(fn).key != before.key
    assert current(mask) != mask
    assert current(mask) is current(mask)


def test_a_mask_that_is_only_used_does_not_change() -> None:
    """What a captured mask remembers is not what it says."""
    other = tm.causal & tm.keys([True] * N)
    mask = tm.predicate(lambda b, h, q, k: other.truth(b, h, q, k))
    tm.attend(Q, Q, Q, mask)
    for ask in (other.count, other.tiles, other.to_dense):
        ask(N)
    assert current(mask) is mask


def test_a_recomputed_forward_is_not_that_of_another_mask() -> None:
    seen = flags()
    mask = tm.predicate(lambda b, h, q, k: seen[k] | (q < 0))
    hash(mask)
    q = Q.clone().requires_grad_()
    for change, error in (
        (lambda: None, None),
        (seen.logical_not_, "was written to between a forward and its backward"),
    ):
        out = eager_attention(Inputs(q, Q, Q, 1.0, None, None, None, 0.0), mask, chunk_bytes=1).out
        change()
        if error is None:
            out.sum().backward()
            continue
        with pytest.raises(tm.MaskError, match=error):
            out.sum().backward()
