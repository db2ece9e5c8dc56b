"""`reach`: the tokens that matter are those of the boolean matrix product of the layers, and paths lead there."""

from __future__ import annotations

import pytest
import torch

import truemask as tm
from truemask import MaskError, blocks, causal, keys, prefix, reach, window
from truemask.masks.core.mask import Mask

N = 30
CHAINS: list[list[Mask]] = [
    [causal],
    [window(4)] * 3,
    [causal, causal | prefix(8)],
    [causal, blocks(8), window(2)],
    [tm.per_head([window(2), tm.local(1)]), causal & tm.dilated(3)],
    [causal.packed([12, 18])] * 2,
    [causal.padded([4])] * 2,
    [tm.random(0.1, seed=3), tm.random(0.1, seed=4)],
    [tm.predicate(lambda b, h, q, k: (q + k) % 7 == 0)] * 2,
    [tm.nothing, tm.nothing],
]


def product_of(chain: list[Mask], query: int) -> list[torch.Tensor]:
    """Which inputs of each layer matter: dense matrices with the residual connection, from the last layer down."""
    rows = [torch.eye(N, dtype=torch.bool)[query]]
    for mask in reversed(chain):
        matrix = mask.to_dense(N)[0].any(0) | torch.eye(N, dtype=torch.bool)
        rows.append((rows[-1].float() @ matrix.float()) > 0)
    return rows[::-1]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("query", [0, 11, N - 1])
def test_the_tokens_that_matter(chain: list[Mask], query: int) -> None:
    found = reach(chain, query, N)
    assert torch.equal(found.layers, torch.stack(product_of(chain, query)))
    assert found.leaks() == [i for i in found.tokens.nonzero().flatten().tolist() if i > query]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_paths_go_through_cells_that_are_on(chain: list[Mask]) -> None:
    found = reach(chain, 17, N)
    for token in found.tokens.nonzero().flatten().tolist():
        path = found.path(token)
        assert (path[0], path[-1], len(path)) == (token, 17, len(chain) + 1)
        for mask, start, stop in zip(chain, path, path[1:], strict=False):
            assert start == stop or bool(mask.to_dense(N)[0, :, stop, start].any())


def test_a_leak_that_no_single_layer_has() -> None:
    """A layer that looks ahead within blocks, after one that looks back: together they see the future."""
    found = reach([causal, blocks(8)], 20, 32)
    assert found.leaks() == [21, 22, 23]
    assert found.path(23) == [23, 23, 20]
    assert "the future, 21-23, reaches it: 23 -> 23 -> 20" in str(found)
    assert reach([causal, causal], 20, 32).leaks() == []


def test_what_is_allowed_may_be_any_mask() -> None:
    found = reach([window(4)] * 3, 20, 32)
    assert found.leaks() == []
    assert found.leaks(window(4)) == [11, 12, 13, 14, 15, 16]


def test_one_mask_for_many_layers_and_lengths_by_default() -> None:
    assert torch.equal(reach(window(4), 20, 40, layers=3).layers, reach([window(4)] * 3, 20, 40).layers)
    assert reach(causal, 5).tokens.shape == (64,)
    assert reach(causal, 100).tokens.shape == (202,)
    assert reach(causal & keys([True] * 9), 5).tokens.shape == (9,)


def test_samples_and_heads() -> None:
    mask = causal.padded([0, 6])
    assert reach(mask, 8, 12, sample=0).tokens.nonzero().flatten().tolist() == list(range(9))
    assert reach(mask, 8, 12, sample=1).tokens.nonzero().flatten().tolist() == [6, 7, 8]
    own = tm.predicate(lambda b, h, q, k: (k <= q) & ((b == 0) | (k > 1)))
    found = reach(own, 5, 8, sample=1)
    assert (found.tokens.nonzero().flatten().tolist(), found.path(3)) == ([2, 3, 4, 5], [3, 5])
    assert reach(causal, 5, 8, sample=1).leaks(own) == [0, 1]
    per_head = tm.random(0.2, per_head=True)
    expected = torch.eye(N, dtype=torch.bool) | per_head.to_dense(N, heads=4)[0].any(0)
    assert torch.equal(reach(per_head, 3, N, heads=4).tokens, expected[3])


def test_a_million_tokens() -> None:
    found = reach(causal & (window(512) | prefix(4)), 900_000, 1_000_000, layers=3)
    assert int(found.tokens.sum()) == 3 * 511 + 1 + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3), "at least one"),
        (("causl", 3), "did you mean 'causal'"),
        ((3, 3), "one mask for each layer"),
        ((causal, 40, 30), "behind the 30 tokens"),
        (([causal, causal], 3, 9, {"layers": 5}), "2 masks were given for layers=5"),
        ((causal & keys([True] * 4), 2, 9), "4 keys"),
        ((causal.padded([0, 1]), 2, 9, {"sample": 2}), "sample 2 is out of range"),
        ((causal, 5, 9, {"sample": -1}), "sample must be at least 0"),
        ((causal, 5, 9, {"sample": "a"}), "sample must be a whole number, got str 'a'"),
        ((causal, 5, 9, {"heads": 0}), "heads must be at least 1"),
    ],
)
def test_questions_without_an_answer(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        reach(*arguments[:3], **(arguments[3] if len(arguments) > 3 else {}))  # pyright: ignore


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ("causl", "did you mean 'causal'"),
        (torch.ones(3, dtype=torch.bool), "`allowed` must be a mask expression, .* got bool"),
        (causal & keys([True] * 4), "4 keys"),
        (causal.padded([0, 1]), "sample 2 is out of range"),
    ],
)
def test_what_is_allowed_must_answer(allowed: Mask, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        reach(causal, 5, 9, sample=2).leaks(allowed)


def test_no_path_from_what_does_not_matter() -> None:
    with pytest.raises(MaskError, match="token 3 does not influence position 9"):
        reach(window(3), 9, layers=2).path(3)
