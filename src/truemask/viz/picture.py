"""Pictures of boolean arrays, as text and as SVG. Knows arrays only: queries go down, keys go across.

Small arrays are drawn cell by cell, middling ones with two queries to a character, large ones as the share of pairs
per cell, where the empty and the full sign are kept for cells that are empty and full without exception.
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

import numpy as np

from truemask.common.formatting import percent

CELLS_WIDE = 64  # characters (halves, shades) or twice the cells (dots) that a text picture may be wide
PIXELS_WIDE = 128  # cells of an SVG panel before it is drawn as shares
PANEL_SIZE = 240  # units of the longer side of an SVG panel
INK, PAPER = "#0072B2", "#eef1f4"  # blue on pale grey: told apart without colour vision and in print


class _Signs(NamedTuple):
    """The characters of one style of text picture."""

    yes: str
    no: str
    halves: str  # neither, upper, lower, both
    shades: str  # empty, little, about half, much, full


_UNICODE = _Signs("■", "·", " ▀▄█", "·░▒▓█")
_ASCII = _Signs("#", ".", " ',#", ".-+*#")


class Shares(NamedTuple):
    """An array `[q_len, kv_len]` cut into cells of `q_step` by `k_step`, with the share of True in each.

    `density` is float64 `[rows, columns]`, 0 and 1 only where a cell is wholly False or True; the last row and column
    of cells may hold fewer. `pairs` counts the True cells; None if nobody counted.
    """

    density: np.ndarray
    q_step: int
    k_step: int
    q_len: int
    kv_len: int
    pairs: int | None


def shares(array: np.ndarray, rows: int, columns: int) -> Shares:
    """Cut a boolean array `[q, k]`, neither side of which is 0, into at most `rows` by `columns` cells."""
    q_step, k_step = -(-array.shape[0] // rows), -(-array.shape[1] // columns)
    q_edges, k_edges = np.arange(0, array.shape[0], q_step), np.arange(0, array.shape[1], k_step)
    counts = np.add.reduceat(array.view(np.uint8), k_edges, axis=1, dtype=np.int64)
    counts = np.add.reduceat(counts, q_edges, axis=0)
    q_sizes = np.minimum(q_edges + q_step, array.shape[0]) - q_edges
    k_sizes = np.minimum(k_edges + k_step, array.shape[1]) - k_edges
    density = counts / (q_sizes[:, None] * k_sizes)
    return Shares(density, q_step, k_step, array.shape[0], array.shape[1], int(counts.sum()))


def text_grid(q_len: int, kv_len: int, columns: int = CELLS_WIDE) -> tuple[int, int]:
    """Into how many rows and columns of cells a large array is cut for a text picture.

    A character is twice as tall as wide, so a square array keeps its shape with half as many lines as columns.
    """
    step = max(-(-kv_len // columns), -(-q_len // columns), 1)
    return -(-q_len // (2 * step)), -(-kv_len // step)


def text_picture(array: np.ndarray, *, title: str = "", ascii: bool = False, columns: int = CELLS_WIDE) -> str:
    """A picture of a boolean array `[q, k]` in characters, with axes and a legend.

    Args:
        array: True where query q (down) may attend to key k (across).
        title: a line above the picture.
        ascii: use signs that every terminal has.
        columns: how many characters wide the drawing may be, labels not counted.

    >>> print(text_picture(np.tri(3, 5, dtype=bool), title="causal"))
    causal
      0 1 2 3 4
    0 ■ · · · ·
    1 ■ ■ · · ·
    2 ■ ■ ■ · ·
    6 of 15 pairs (40 %); queries down, keys across; ■ may attend, · may not
    """
    _check(array, 2)
    signs = _ASCII if ascii else _UNICODE
    if array.size == 0:
        return "\n".join([*_head(title), f"nothing to draw: {array.shape[0]} queries, {array.shape[1]} keys"])
    if max(array.shape) > columns:
        return shades_picture(
            shares(array, *text_grid(array.shape[0], array.shape[1], columns)), title=title, ascii=ascii
        )
    signs = _ASCII if ascii else _UNICODE
    if max(array.shape) * 2 <= columns:
        body, legend = _dots(array, signs), f"{signs.yes} may attend, {signs.no} may not"
    else:
        body, legend = _halves(array, signs), f"{signs.halves[3]} may attend, two queries to a line"
    return "\n".join([*_head(title), *body, _legend(int(array.sum()), array.size, legend)])


def shades_picture(cut: Shares, *, title: str = "", ascii: bool = False) -> str:
    """A picture of shares in characters, for arrays too large to draw cell by cell."""
    signs = _ASCII if ascii else _UNICODE
    lines = ["".join(_shade(value, signs) for value in row) for row in cut.density]
    body = _with_axes(lines, (cut.q_len, cut.kv_len), q_step=cut.q_step, k_step=cut.k_step, pitch=1)
    some = f"{signs.shades[4]} all, {signs.shades[1:4]} some, {signs.shades[0]} none"
    legend = _legend(cut.pairs, cut.q_len * cut.kv_len)
    return "\n".join([*_head(title), *body, legend, f"a sign is {cut.q_step} queries by {cut.k_step} keys: {some}"])


def _head(title: str) -> list[str]:
    return [title] if title else []


def _legend(pairs: int | None, cells: int, *signs: str) -> str:
    share = [] if pairs is None else [f"{pairs} of {cells} pairs ({percent(pairs, cells)})"]
    return "; ".join([*share, "queries down, keys across", *signs])


def _dots(array: np.ndarray, signs: _Signs) -> list[str]:
    lines = [" ".join(signs.yes if cell else signs.no for cell in row) for row in array]
    return _with_axes(lines, array.shape, q_step=1, k_step=1, pitch=2)


def _halves(array: np.ndarray, signs: _Signs) -> list[str]:
    return _with_axes(_half_blocks(array, signs), array.shape, q_step=2, k_step=1, pitch=1)


def half_blocks(array: np.ndarray, *, ascii: bool = False) -> list[str]:
    """The drawing alone, a character for two queries, for pictures that stand beside a text.

    >>> half_blocks(np.tri(4, dtype=bool))
    ['█▄', '███▄']
    """
    _check(array, 2)
    return [line.rstrip() for line in _half_blocks(array, _ASCII if ascii else _UNICODE)]


def _half_blocks(array: np.ndarray, signs: _Signs) -> list[str]:
    upper, lower = array[0::2].astype(np.int8), array[1::2].astype(np.int8)
    lower = np.pad(lower, ((0, len(upper) - len(lower)), (0, 0)))
    return ["".join(signs.halves[code] for code in row) for row in upper + 2 * lower]


def _shade(value: float, signs: _Signs) -> str:
    if value in (0.0, 1.0):
        return signs.shades[4 * int(value)]
    return signs.shades[1 + min(2, int(3 * value))]


def _with_axes(lines: list[str], shape: tuple[int, ...], *, q_step: int, k_step: int, pitch: int) -> list[str]:
    """Number the lines (first query of each) and the columns (every few); `pitch` characters to a column."""
    columns = -(-shape[1] // k_step)
    widest = len(str((columns - 1) * k_step))
    every = next(step for step in (1 << i for i in range(64)) if step * pitch > widest + (pitch == 1))
    top = "".join(str(i * k_step).ljust(every * pitch) for i in range(0, columns, every))
    margin = len(str((len(lines) - 1) * q_step))
    body = [f"{i * q_step:>{margin}} {line}".rstrip() for i, line in enumerate(lines)]
    return [(" " * (margin + 1) + top).rstrip(), *body]


def html_picture(array: np.ndarray, *, title: str = "", labels: list[str] | None = None) -> str:
    """A picture of boolean arrays `[panel, q, k]` as one inline SVG, which needs no style sheet and no script.

    Args:
        array: one panel per first index (samples, heads), True where query q may attend to key k.
        title: drawn above, and read by screen readers.
        labels: a line below each panel.
    """
    _check(array, 3)
    if 0 in array.shape[1:]:
        cuts = [Shares(np.zeros((0, 0)), 1, 1, array.shape[1], array.shape[2], 0) for _ in array]
    else:
        cuts = [shares(panel, PIXELS_WIDE, PIXELS_WIDE) for panel in array]
    return svg_picture(cuts, title=title, labels=labels)


def svg_picture(cuts: list[Shares], *, title: str = "", labels: list[str] | None = None) -> str:
    """A picture of panels of equal lengths, given as shares, as one inline SVG."""
    names = labels if labels is not None else [""] * len(cuts)
    if len(names) != len(cuts):
        raise ValueError(f"the picture has {len(cuts)} panels but {len(names)} labels; give one label per panel")
    lengths = (cuts[0].q_len, cuts[0].kv_len) if cuts else (1, 1)
    tall, wide = _extent(*lengths)
    pitch, panel_top = max(wide, 60.0) + 24, 40.0 if title else 20.0
    panels = [
        _panel(cut, name, 16 + i * pitch, panel_top) for i, (cut, name) in enumerate(zip(cuts, names, strict=True))
    ]
    width, height = max(24 + 7.3 * len(title), 8 + len(cuts) * pitch), panel_top + tall + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="attention mask {escape(title)}" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" font-size="12" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" fill="currentColor">'
        f'<text x="16" y="16">{escape(title)}</text>{"".join(panels)}</svg>'
    )


def _extent(q_len: int, kv_len: int) -> tuple[float, float]:
    """Height and width of a panel: the longer side is PANEL_SIZE, and a thin one stays visible."""
    longest = max(1, q_len, kv_len)
    return max(PANEL_SIZE * q_len / longest, 8.0), max(PANEL_SIZE * kv_len / longest, 8.0)


def _panel(cut: Shares, label: str, left: float, top: float) -> str:
    tall, wide = _extent(cut.q_len, cut.kv_len)
    small = 'font-size="9" opacity="0.75"'
    keys = f"keys 0 to {cut.kv_len - 1}" if cut.kv_len else "no keys"
    parts = [
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{PAPER}" stroke="#8a939b" '
        f'stroke-width="0.6"/><text x="{left:.1f}" y="{top - 5:.1f}" {small}>{keys}</text>'
        f'<text {small} transform="translate({left - 4:.1f} {top + tall:.1f}) rotate(-90)">queries</text>'
        f'<text x="{left:.1f}" y="{top + tall + 15:.1f}">{escape(label)}</text>'
    ]
    if cut.density.size:
        scale = f"translate({left:.1f} {top:.1f}) scale({wide / cut.kv_len:.6g} {tall / cut.q_len:.6g})"
        parts.append(f'<g transform="{scale}" fill="{INK}" shape-rendering="crispEdges">')
        parts.extend(_inked(cut, level) for level in range(1, 9))
        parts.append(_grid(cut.q_len, cut.kv_len) + "</g>")
    return "".join(parts)


def _inked(cut: Shares, level: int) -> str:
    """One path with all runs of cells whose share rounds up to `level` eighths."""
    hit = np.ceil(cut.density * 8 - 1e-9).astype(np.int8) == level
    edges = np.diff(np.pad(hit, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    runs = []
    for row, start, stop in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True):
        y, x = row * cut.q_step, start * cut.k_step
        width, height = min(stop * cut.k_step, cut.kv_len) - x, min(y + cut.q_step, cut.q_len) - y
        runs.append(f"M{x} {y}h{width}v{height}h-{width}z")
    return f'<path opacity="{0.12 + 0.11 * level:.2f}" d="{"".join(runs)}"/>' if runs else ""


def _grid(q_len: int, kv_len: int) -> str:
    """Thin lines between the cells of a small array."""
    if max(q_len, kv_len) * 2 > CELLS_WIDE:
        return ""
    down = "".join(f"M0 {q}h{kv_len}" for q in range(1, q_len))
    across = "".join(f"M{k} 0v{q_len}" for k in range(1, kv_len))
    return f'<path stroke="{PAPER}" stroke-width="0.08" shape-rendering="auto" d="{down}{across}"/>'


def _check(array: np.ndarray, ndim: int) -> None:
    if array.ndim != ndim or array.dtype != np.bool_:
        raise ValueError(f"a picture is drawn of a bool array with {ndim} axes, not of {array.dtype} {array.shape}")
