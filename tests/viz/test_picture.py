"""Pictures show exactly the array: literal drawings, no sign that claims more than is so, valid SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truemask.common.formatting import percent
from truemask.viz.picture import html_picture, shares, text_grid, text_picture

DOTS = """\
causal
  0 1 2 3 4
0 ■ · · · ·
1 ■ ■ · · ·
2 ■ ■ ■ · ·
6 of 15 pairs (40 %); queries down, keys across; ■ may attend, · may not"""

HALVES = """\
   0   4   8   12  16
 0 █▄
 2 ███▄
 4 █████▄
 6 ███████▄
 8 █████████▄
10 ▀▀▀▀▀▀▀▀▀▀▀
66 of 209 pairs (31.6 %); queries down, keys across; █ may attend, two queries to a line"""

SHADES = """\
   0   20
 0 ▓░······
10 ██▓░····
20 ████▓░··
30 ██████▓░
703 of 1369 pairs (51.4 %); queries down, keys across
a sign is 10 queries by 5 keys: █ all, ░▒▓ some, · none"""


def lower(q_len: int, kv_len: int) -> np.ndarray:
    return np.tri(q_len, kv_len, dtype=bool)


arrays = st.tuples(st.integers(1, 67), st.integers(1, 71), st.integers(0, 99)).map(
    lambda t: np.random.default_rng(t[2]).random(t[:2]) < t[2] / 99
)


def test_small_arrays_are_drawn_cell_by_cell() -> None:
    assert text_picture(lower(3, 5), title="causal") == DOTS


def test_middling_arrays_have_two_queries_to_a_line() -> None:
    assert text_picture(lower(11, 19), columns=20) == HALVES


def test_an_odd_last_row_is_drawn_and_nothing_below_it() -> None:
    assert text_picture(np.ones((3, 5), bool), columns=5).splitlines()[1:3] == ["0 █████", "2 ▀▀▀▀▀"]


def test_large_arrays_are_drawn_as_shares() -> None:
    assert text_picture(lower(37, 37), columns=8) == SHADES


@given(arrays)
def test_shares_keep_every_pair_and_claim_all_or_none_only_when_so(array: np.ndarray) -> None:
    cut = shares(array, 7, 5)
    assert cut.density.shape[0] <= 7
    assert cut.density.shape[1] <= 5
    for i, row in enumerate(cut.density):
        for j, share in enumerate(row):
            cell = array[i * cut.q_step : (i + 1) * cut.q_step, j * cut.k_step : (j + 1) * cut.k_step]
            assert share == pytest.approx(cell.mean())
            assert (share == 1) == cell.all()
            assert (share == 0) == (not cell.any())
    assert cut.pairs == array.sum()


@given(arrays, st.booleans())
def test_a_text_picture_counts_the_pairs_and_fits(array: np.ndarray, ascii: bool) -> None:
    picture = text_picture(array, ascii=ascii, columns=16)
    assert f"{array.sum()} of {array.size} pairs" in picture
    assert not ascii or picture.isascii()
    drawn = [line for line in picture.splitlines() if re.match(r" *\d+ [^\d]", line) and "pairs" not in line]
    assert all(len(line) <= 16 + 4 for line in drawn), picture


@pytest.mark.parametrize("length", [3, 9, 10, 13, 31, 67, 1009])
def test_numbers_stand_above_their_columns(length: int) -> None:
    lines = text_picture(lower(length, length)).splitlines()
    margin = lines[1].index(" ", len(lines[1]) - len(lines[1].lstrip())) + 1
    pitch = 2 if length <= 32 else 1
    step = 1 if length <= 64 else shares(lower(length, length), *text_grid(length, length)).k_step
    for number in re.finditer(r"\d+", lines[0]):
        assert int(number[0]) == (number.start() - margin) // pitch * step


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_draw_is_said(shape: tuple[int, int]) -> None:
    assert text_picture(np.zeros(shape, bool)) == f"nothing to draw: {shape[0]} queries, {shape[1]} keys"
    assert ElementTree.fromstring(html_picture(np.zeros((1, *shape), bool))) is not None


@pytest.mark.parametrize("array", [np.zeros((3, 5), np.int64), np.zeros((2, 3, 5), bool), np.zeros(3, bool)])
def test_what_is_no_boolean_matrix_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="bool array with 2 axes"):
        text_picture(array)


def test_svg_inks_exactly_the_cells() -> None:
    array = np.random.default_rng(7).random((2, 11, 13)) < 0.4
    root = ElementTree.fromstring(html_picture(array, title="a & b < c", labels=["one", "two"]))
    groups = root.findall("{*}g")
    assert len(groups) == 2
    for group, panel in zip(groups, array, strict=True):
        drawn = np.zeros_like(panel)
        for path in group.findall("{*}path"):
            for x, y, width, height in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", path.get("d", "")):
                drawn[int(y) : int(y) + int(height), int(x) : int(x) + int(width)] = True
        assert (drawn == panel).all()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b < c", "one", "two", "keys 0 to 12"} <= set(texts)


def test_a_large_svg_stays_small_and_inside_its_panel() -> None:
    svg = html_picture(lower(1009, 1013)[None])
    assert len(svg) < 40_000
    for x, y, width, height in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", svg):
        assert int(x) + int(width) <= 1013
        assert int(y) + int(height) <= 1009


def test_labels_must_match_panels() -> None:
    with pytest.raises(ValueError, match="2 panels but 1 labels"):
        html_picture(np.zeros((2, 3, 5), bool), labels=["one"])


def test_percent_never_rounds_to_the_ends() -> None:
    assert [percent(p, 10**6) for p in (0, 1, 5 * 10**5, 10**6 - 1, 10**6)] == [
        "0 %",
        "under 0.1 %",
        "50 %",
        "over 99.9 %",
        "100 %",
    ]
