"""Each instruction of isa/amx.h, carried out by tests/support/amx_trap.cpp: test_amx_trapped.py runs this file."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from ctypes import c_int64
from typing import Any

import numpy as np
import pytest

from tests.backends.test_tiles import KINDS, SIDE, aligned, assert_same, drawn
from tests.support.amx_trap import BYTES, config, instructions

TRIPLES = list(itertools.permutations(range(8), 3))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return instructions(tmp_path_factory.mktemp("instructions"))


@pytest.fixture
def configured(tiles: ctypes.CDLL) -> ctypes.CDLL:
    tiles.configure()
    return tiles


def at(x: Any) -> ctypes.c_void_p:
    """Where an array begins; it lives as long as this."""
    return x.ctypes.data_as(ctypes.c_void_p)


def random_tile(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, BYTES), np.uint8)


def loaded(tiles: ctypes.CDLL, t: int, content: Any) -> None:
    tiles.load(t, at(content), c_int64(content.strides[0]))


def stored(tiles: ctypes.CDLL, t: int) -> Any:
    found = np.full((SIDE, BYTES), 255, np.uint8)
    tiles.store(t, at(found), c_int64(BYTES))
    return found


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", range(8))
def test_a_register_holds_what_was_loaded_until_it_is_zeroed(t: int, configured: ctypes.CDLL) -> None:
    contents = [random_tile(i) for i in range(8)]
    for i, content in enumerate(contents):
        loaded(configured, i, content)
    configured.zero(t)
    for i, content in enumerate(contents):
        assert np.array_equal(stored(configured, i), content if i != t else 0 * content)


@pytest.mark.parametrize("step", [64, 128, 192, 4096, 65, 100, 8, 0, -64, -200])
def test_rows_may_be_any_step_apart(step: int, configured: ctypes.CDLL) -> None:
    """Backwards, overlapping, or all the same; nothing but them is written."""
    memory = np.random.default_rng(0).integers(0, 256, 2 * 16 * 4096, np.uint8)
    middle = memory.size // 2 + 13
    configured.load(3, at(memory[middle:]), c_int64(step))
    rows = [slice(middle + i * step, middle + i * step + BYTES) for i in range(SIDE)]
    assert np.array_equal(stored(configured, 3), [memory[row] for row in rows])
    written, expected = memory[::-1].copy(), memory[::-1].copy()
    for row in rows:
        expected[row] = memory[row]
    configured.store(3, at(written[middle:]), c_int64(step))
    assert np.array_equal(written, expected)


def test_every_register_may_hold_the_place_and_the_step(configured: ctypes.CDLL) -> None:
    """With every scale, and numbers of no, one and four bytes added."""
    forms = 0
    for step in (64, 200, -72):
        memory, found = (np.random.default_rng(i).integers(0, 256, 32 * 256, np.uint8) for i in (1, 2))
        for i in itertools.count():
            expected, middle = found.copy(), 16 * 256
            if not configured.moved(i, at(memory[middle:]), at(found[middle:]), c_int64(step)):
                break
            for row in range(SIDE):
                lies = slice(middle + row * step, middle + row * step + BYTES)
                expected[lies] = memory[lies]
            assert np.array_equal(found, expected), i
            found[:] = 0
            forms += 1
    assert forms == 3 * 16


def test_places_on_the_stack_in_the_code_and_without_a_step(configured: ctypes.CDLL) -> None:
    content = random_tile(5)
    configured.from_stack(at(content))
    assert np.array_equal(stored(configured, 5), content)
    content = random_tile(6)
    assert configured.from_number(at(content))
    assert np.array_equal(stored(configured, 5), content)
    configured.same_row(at(content))
    assert np.array_equal(stored(configured, 5), np.tile(content[0], (SIDE, 1)))


# -- configurations ----------------------------------------------------------------------------------------------------


def test_a_configuration_may_lie_anywhere_and_clears_the_tiles(tiles: ctypes.CDLL) -> None:
    content, forms = random_tile(0), 0
    for i in itertools.count():
        tiles.release()
        if not tiles.configure_in_form(i):
            break
        assert not any(stored(tiles, t).any() for t in range(8))
        loaded(tiles, 7, content)
        assert np.array_equal(stored(tiles, 7), content)
        forms += 1
    assert forms == 6


def test_tiles_are_as_large_as_configured(tiles: ctypes.CDLL) -> None:
    """What is beyond is not read, not written, and zero when the tile is larger again."""
    tiles.configure_by(at(config({0: 5, 1: 16, 7: 1}, {0: 20, 1: 64, 7: 3})))
    content = random_tile(2)
    for t, (rows, count) in {0: (5, 20), 1: (16, 64), 7: (1, 3)}.items():
        loaded(tiles, t, content)
        expected = np.full((SIDE, BYTES), 255)
        expected[:rows, :count] = content[:rows, :count]
        assert np.array_equal(stored(tiles, t), expected)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 3, 7), (16, 2, 16), (3, 16, 9)])
def test_products_of_smaller_tiles(m: int, n: int, k: int, tiles: ctypes.CDLL) -> None:
    """Of whole numbers, so that every order of sums gives the same."""
    random = np.random.default_rng(m)
    a, b = random.integers(-8, 9, (m, 2 * k)), random.integers(-8, 9, (2 * k, n))
    c = random.integers(-99, 99, (m, n))
    tiles.configure_by(at(config({2: m, 4: m, 6: k}, {2: 4 * n, 4: 4 * k, 6: 4 * n})))
    pairs = b.reshape(k, 2, n).transpose(0, 2, 1).reshape(k, 2 * n)
    for t, content in ((4, a), (6, pairs)):
        whole = np.ascontiguousarray(content, np.float32).view(np.uint32)
        loaded(tiles, t, padded((whole >> 16).astype(np.uint16)))
    loaded(tiles, 2, padded(c.astype(np.float32)))
    tiles.multiply(2, 4, 6)
    assert np.array_equal(stored(tiles, 2).view(np.float32)[:m, :n], c + a @ b)


def padded(x: Any) -> Any:
    """In a whole tile, with NaN around, which must not be read."""
    found = np.full((SIDE, BYTES), 255, np.uint8)
    found[: x.shape[0], : x.shape[1] * x.itemsize] = x.view(np.uint8)
    return found


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_emulations(kind: str, configured: ctypes.CDLL) -> None:
    """A, B and C in any three registers; A and B stay."""
    for seed, (c, a, b) in enumerate(TRIPLES[list(KINDS).index(kind) :: len(KINDS)]):
        left, right, start = drawn(kind, seed)
        expected = aligned(start.size).view(np.float32).reshape(start.shape)
        expected[:] = start
        configured.emulated(at(left), at(right), at(expected))
        for t, content in ((a, left), (b, right), (c, start)):
            loaded(configured, t, content)
        configured.multiply(c, a, b)
        assert_same(stored(configured, c).view(np.float32), expected)
        assert np.array_equal(stored(configured, a).view(np.uint32), left)
        assert np.array_equal(stored(configured, b).view(np.uint32), right)


def test_every_thread_has_its_own_tiles(configured: ctypes.CDLL) -> None:
    """And configures them: some are whole, some small, all at once."""
    wrong, together = [], threading.Barrier(4, timeout=20)

    def work(number: int) -> None:
        rows = 16 - 3 * number
        configured.configure_by(at(config({0: rows}, {0: 64})))
        for turn in range(50):
            content = random_tile(100 * number + turn)
            loaded(configured, 0, content)
            together.wait()
            content[rows:] = 255
            if not np.array_equal(stored(configured, 0), content):
                wrong.append((number, turn))
        configured.release()

    mine = random_tile(9999)
    loaded(configured, 0, mine)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert np.array_equal(stored(configured, 0), mine)


def test_a_fork_keeps_its_tiles_apart(configured: ctypes.CDLL) -> None:
    """What the child process loads or releases is not the parent's."""
    mine, other = random_tile(1), random_tile(2)
    loaded(configured, 4, mine)
    child = os.fork()
    if not child:
        configured.configure()
        loaded(configured, 4, other)
        same = np.array_equal(stored(configured, 4), other)
        configured.release()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(stored(configured, 4), mine)
