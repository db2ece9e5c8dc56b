"""Products in tile registers: the emulated instruction against an exact model of it, and matrices against numpy.

A small library of `csrc/`'s headers is compiled for the tests, emulated, and for AMX where the processor has it: then
the instruction itself must give what its emulation gives, bit for bit.
"""

from __future__ import annotations

import ctypes
import math
import runpy
import subprocess
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from truemask.backends.isa import SETS, processor_flags

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("tiles.cpp")
BUILD = runpy.run_path(str(ROOT / "tools" / "native_build.py"))
FLAGS: dict[str, list[str]] = BUILD["variants"]()
SIDE, LINE = 16, 64
SMALLEST, BEYOND = Fraction(2) ** -126, Fraction(2) ** 128
SENTINEL = 0x7FC07FC0  # two NaN of bf16, or one of a float

Numbers = Callable[[np.random.Generator, int], Any]


class ProductStruct(ctypes.Structure):
    """`Product` of tiles.cpp."""

    _fields_ = (
        *((name, c_int64) for name in "mnk"),
        ("a", c_void_p),
        ("row", c_int64),
        ("b", c_void_p),
        ("ldb", c_int64),
        ("c", c_void_p),
        *((name, c_int64) for name in ("ldc", "add")),
    )


def compiled(place: Path, name: str) -> ctypes.CDLL:
    """The library of an instruction set; the test is skipped where none can be made."""
    if BUILD["compiler"]() is None:
        pytest.skip("the move is whoever installs a C++ compiler")
    target = place / f"tiles_{name}.so"
    command = [
        BUILD["compiler"](),
        *BUILD["FLAGS"],
        *FLAGS[name],
        "-I",
        str(ROOT / "csrc"),
        "-o",
        str(target),
        str(SOURCE),
    ]
    subprocess.run(command, check=True, timeout=200)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("tiles"), "amx_emulated")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    needs = next(one.processor for one in SETS if one.name == "amx")
    if not needs <= processor_flags():
        pytest.skip("the move is whoever has a processor with AMX")
    library = compiled(tmp_path_factory.mktemp("tiles"), "amx")
    if (answer := library.is_usable()) != 1:
        pytest.skip(f"the move is whoever has a system that lets processes use AMX: it answered {answer}")
    return library


def aligned(words: int) -> Any:
    """So many words that begin where a cache line does, none of which is a number yet."""
    room = np.empty(words * 4 + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    found = room[start : start + words * 4].view(np.uint32)
    found[:] = SENTINEL
    return found


# -- the instruction ---------------------------------------------------------------------------------------------------


def with_exponents(low: int, high: int) -> Numbers:
    """Random floats, as words, whose biased exponents are from `low` to `high`."""

    def draw(random: np.random.Generator, count: int) -> Any:
        sign, mantissa = random.integers(0, 2, count), random.integers(0, 1 << 23, count)
        return (sign << 31 | random.integers(low, high + 1, count) << 23 | mantissa).astype(np.uint32)

    return draw


def either(numbers: Numbers, *others: int) -> Numbers:
    """Those, and now and then one of others."""

    def draw(random: np.random.Generator, count: int) -> Any:
        return np.where(random.random(count) < 0.05, random.choice(others, count), numbers(random, count)).astype(
            np.uint32
        )

    return draw


INFINITY, NAN, LARGE, DENORMAL, MINUS_0 = 0x7F800000, 0x7FC00000, 0x7F62_0000, 0x00400000, 0x80000000
KINDS: dict[str, tuple[Numbers, Numbers]] = {  # of A and B, of C
    "ordinary": (with_exponents(123, 130), with_exponents(123, 130)),
    "wide exponents": (with_exponents(87, 166), with_exponents(87, 166)),
    "zeros": (either(with_exponents(123, 130), 0, MINUS_0), either(with_exponents(123, 130), 0, MINUS_0)),
    "results near denormals": (with_exponents(57, 66), with_exponents(0, 12)),
    "products below floats": (with_exponents(45, 60), with_exponents(0, 3)),
    "denormals": (either(with_exponents(62, 70), DENORMAL, DENORMAL | MINUS_0), either(with_exponents(1, 9), DENORMAL)),
    "cancelling": (with_exponents(127, 127), with_exponents(127, 127)),
    "products beyond floats": (with_exponents(189, 191), with_exponents(252, 254)),
    "large": (either(with_exponents(64, 66), LARGE), with_exponents(127, 190)),
    "not finite": (either(with_exponents(123, 130), INFINITY, INFINITY | MINUS_0, NAN), with_exponents(123, 130)),
}


def drawn(kind: str, seed: int) -> tuple[Any, Any, Any]:
    """A tile each of A and B, as words, and of C."""
    random = np.random.default_rng(seed)
    factors, sums = KINDS[kind]
    tiles = [aligned(SIDE * SIDE).reshape(SIDE, SIDE) for _ in "abc"]
    for tile in tiles[:2]:
        tile.view(np.uint16)[:] = (factors(random, 2 * tile.size) >> 16).reshape(SIDE, 2 * SIDE)
    tiles[2][:] = sums(random, tiles[2].size).reshape(SIDE, SIDE)
    return tiles[0], tiles[1], tiles[2].view(np.float32)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < SMALLEST else x


def rounded(x: Fraction) -> float:
    """To 24 binary digits, to even, as if exponents had no end; then below 2^-126 zero, from 2^128 on infinite."""
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    digit = Fraction(2) ** (exponent - 23)
    size = round(size / digit) * digit
    return math.copysign(math.inf if size >= BEYOND else 0.0 if size < SMALLEST else float(size), x)


def fma(a: float, b: float, c: float) -> float:
    """a b + c, rounded once."""
    exact = Fraction(a) * Fraction(b) + Fraction(c) if all(map(math.isfinite, (a, b, c))) else None
    return a * b + c if not exact else rounded(exact)  # as doubles have it, where nothing is to be rounded


def modelled(a: Any, b: Any, c: Any) -> Any:
    """C + A B as the manual of the processor says it."""
    left, right = ([[flushed(float(x)) for x in row] for row in halves(tile)] for tile in (a, b))
    found = np.empty((SIDE, SIDE), np.float32)
    for i in range(SIDE):
        for j in range(SIDE):
            sums = [0.0, 0.0]
            for k in range(2 * SIDE):
                sums[k % 2] = fma(left[i][k], right[k // 2][2 * j + k % 2], sums[k % 2])
            found[i, j] = fma(1.0, flushed(float(c[i, j])), fma(1.0, sums[0], sums[1]))
    return found


def halves(tile: Any) -> Any:
    """The bf16 of words, as floats."""
    return (tile.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def by(instruction: Any, a: Any, b: Any, c: Any) -> Any:
    """C + A B as the instruction has it."""
    found = aligned(c.size).view(np.float32).reshape(c.shape)
    found[:] = c
    instruction(*(c_void_p(x.ctypes.data) for x in (a, b, found)))
    return found


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, but for which NaN it is."""
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), ~numbers)
    np.testing.assert_array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_emulated_instruction_is_the_manuals(kind: str, emulated: ctypes.CDLL) -> None:
    for seed in range(3):
        a, b, c = drawn(kind, seed)
        assert_same(by(emulated.emulated_instruction, a, b, c), modelled(a, b, c))


def test_what_is_just_below_the_smallest_number(emulated: ctypes.CDLL) -> None:
    """2^-126 - 3/4 2^-150: of denormals 2^-126 is the nearest; among numbers with as many digits one is below it."""
    a, b, c = drawn("zeros", 0)
    a[:], b[:], c[:] = 0, 0, 0
    left, right = (tile.view(np.uint16) for tile in (a, b))
    for k, (x, y) in enumerate([(2.0**-63, 2.0**-63), (-3 * 2.0**-76, 2.0**-76)]):
        left[0, 2 * k] = np.float32(x).view(np.uint32) >> 16
        right[k, 0] = np.float32(y).view(np.uint32) >> 16
    assert by(emulated.emulated_instruction, a, b, c)[0, 0] == modelled(a, b, c)[0, 0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_instruction_is_its_emulation(kind: str, real: ctypes.CDLL) -> None:
    for seed in range(200):
        tiles = drawn(kind, seed)
        assert_same(by(real.instruction, *tiles), by(real.emulated_instruction, *tiles))


# -- matrices ----------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """Rows of words in memory, a number of words apart, with something else between them and around."""

    memory: Any
    words: Any  # [rows, columns]

    @classmethod
    def of(cls, rows: int, columns: int, gap: int) -> Matrix:
        memory = aligned((rows + 2) * (columns + gap))
        whole = memory.reshape(rows + 2, columns + gap)
        return cls(memory, whole[1:-1, :columns])

    @property
    def step(self) -> int:
        return self.words.strides[0] // 4

    def untouched(self) -> bool:
        """Whether what lies between and around is as it was."""
        inside = np.zeros(self.memory.shape, bool)
        first = (self.words.ctypes.data - self.memory.ctypes.data) // 4
        for row in range(self.words.shape[0]):
            inside[first + row * self.step :][: self.words.shape[1]] = True
        return bool((self.memory[~inside] == SENTINEL).all())


def product(a: Any, b: Any, c: Any, add: bool) -> ProductStruct:
    """C = or += A B, of arrays of words that lie row by row."""
    steps = [x.strides[0] // 4 for x in (a, b, c)]
    places = [x.ctypes.data for x in (a, b, c)]
    return ProductStruct(*c.shape, a.shape[1], places[0], steps[0], places[1], steps[1], places[2], steps[2], add)


def run(library: ctypes.CDLL, *calls: ProductStruct) -> None:
    library.products((ProductStruct * len(calls))(*calls), c_int64(len(calls)))


def in_pairs(a: Any, b: Any) -> Any:
    """A B of words in fp64, and of their sizes."""
    left = halves(np.ascontiguousarray(a)).astype(np.float64)
    right = halves(np.ascontiguousarray(b)).reshape(*b.shape, 2).astype(np.float64)
    both = right.transpose(0, 2, 1).reshape(-1, b.shape[1])  # rows: numbers of k
    return left @ both, abs(left) @ abs(both)


def fill(matrix: Matrix, random: np.random.Generator, pairs: bool) -> None:
    drawn = random.standard_normal((*matrix.words.shape, 1 + pairs)).astype(np.float32).view(np.uint32)
    matrix.words[:] = drawn[..., 0] >> 16 | drawn[..., 1] & 0xFFFF0000 if pairs else drawn[..., 0]


def check_product(library: ctypes.CDLL, m: int, n: int, k: int, gap: int, add: bool) -> None:
    """Every number is within the rounding of so many sums, and nothing else is touched."""
    random = np.random.default_rng(m * n * k)
    a, b, c = Matrix.of(m, k, gap), Matrix.of(k, n, gap), Matrix.of(m, n, gap)
    fill(a, random, pairs=True), fill(b, random, pairs=True)
    if add:
        fill(c, random, pairs=False)
    before = c.words.view(np.float32).astype(np.float64) if add else np.zeros((m, n))
    run(library, product(a.words, b.words, c.words, add))
    exact, size = in_pairs(a.words, b.words)
    off = abs(c.words.view(np.float32) - (exact + before))
    assert (off <= 2.0**-24 * (k + 2) * (size + abs(before))).all()
    assert a.untouched()
    assert b.untouched()
    assert c.untouched()


@pytest.mark.parametrize("m", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("n", [16, 32, 48, 64, 128])
def test_products_of_matrices(m: int, n: int, emulated: ctypes.CDLL) -> None:
    for k in (16, 32, 48, 64):
        for gap in (0, 16):
            for add in (False, True):
                check_product(emulated, m, n, k, gap, add)


def test_products_of_matrices_by_the_processor(real: ctypes.CDLL) -> None:
    for m, n, k in ((16, 48, 16), (48, 16, 64), (80, 112, 48), (128, 64, 128)):
        for gap in (0, 48):
            for add in (False, True):
                check_product(real, m, n, k, gap, add)


def chain(random: np.random.Generator, memory: Any, factors: Any) -> ProductStruct:
    """A product somewhere in `memory`, which most often overlaps what others wrote; its factors may lie there too."""
    m, n, k = (SIDE * int(x) for x in random.integers(1, 4, 3))
    half = memory.shape[0] // 2

    def part(of: Any, rows: int, columns: int) -> Any:
        row, column = (
            SIDE * int(random.integers(0, (room - x) // SIDE + 1))
            for room, x in zip(of.shape, (rows, columns), strict=True)
        )
        return of[row : row + rows, column : column + columns]

    written, read = (memory[:half], memory[half:]) if random.random() < 0.5 else (memory[half:], memory[:half])
    left, right = (read if random.random() < 0.2 else factors for _ in "ab")
    return product(part(left, m, k), part(right, k, n), part(written, m, n), bool(random.random() < 0.7))


def check_chains(library: ctypes.CDLL, seeds: int) -> None:
    """Products that begin before the last one is stored give what they give one by one, whatever they overlap."""
    factors, memory = Matrix.of(80, 80, 0), Matrix.of(192, 96, 16)
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        fill(factors, random, pairs=True), fill(memory, random, pairs=False)
        start = memory.words.copy()
        calls = [chain(random, memory.words, factors.words) for _ in range(12)]
        run(library, *calls)
        together = memory.words.copy()
        memory.words[:] = start
        for call in calls:
            run(library, call)
        assert_same(together.view(np.float32), memory.words.view(np.float32).copy())
        assert memory.untouched()


def test_chains_of_products(emulated: ctypes.CDLL) -> None:
    check_chains(emulated, 150)


def test_chains_of_products_by_the_processor(real: ctypes.CDLL) -> None:
    check_chains(real, 150)
