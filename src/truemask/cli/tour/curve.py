"""A learning curve, as lines of text that can be redrawn and as SVG; the levels to beat are drawn across it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rich.text import Text

Point = tuple[float, float]  # seconds, bits per byte
Level = tuple[str, float]  # name, bits per byte
INK, LEVEL, GREY = "#0072B2", "#D55E00", "#8a939b"  # blue, vermilion: apart in every kind of colour vision
WIDTH, HEIGHT = 640, 260
LEFT, TOP, RIGHT, BOTTOM = 44, 14, 96, 34  # margins of the SVG


def text_curve(
    points: Sequence[Point],
    levels: Sequence[Level],
    seconds: float,
    *,
    columns: int = 60,
    rows: int = 12,
    ascii: bool = False,
) -> Text:
    """The curve so far on an axis of `seconds`, with its levels named at the right."""
    low, high = _range(points, levels)
    dot, line = ("*", "-") if ascii else ("●", "─")
    canvas = [[" "] * columns for _ in range(rows)]
    names = [""] * rows

    def row_of(bits: float) -> int:
        return min(rows - 1, max(0, round((high - bits) / (high - low) * (rows - 1))))

    for name, bits in levels:
        canvas[row_of(bits)] = [line] * columns
        names[row_of(bits)] = " ".join(filter(None, (names[row_of(bits)], f"{name} {bits:.2f}")))
    for at, bits in points:
        canvas[row_of(bits)][min(columns - 1, int(at / seconds * columns))] = dot
    text = Text()
    for i, row in enumerate(canvas):
        label = f"{high - i * (high - low) / (rows - 1):4.1f} "
        text.append(label, "dim")
        for sign in row:
            text.append(sign, "bold bright_blue" if sign == dot else "yellow" if sign == line else "")
        text.append(f" {names[i]}\n", "yellow")
    text.append(f"     0 s{f'{seconds:.0f} s':>{columns - 3}}   bits per byte on held-out files", "dim")
    return text


def svg_curve(points: Sequence[Point], levels: Sequence[Level], seconds: float) -> str:
    """The same as an inline SVG."""
    low, high = _range(points, levels)
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(at: float) -> float:
        return LEFT + wide * at / max(seconds, 1e-9)

    def y(bits: float) -> float:
        return TOP + tall * (high - bits) / (high - low)

    parts = [
        f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="{GREY}" opacity="0.25"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>'
        for tick in range(math.ceil(low), math.floor(high) + 1)
    ]
    for name, bits in levels:
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{y(bits):.1f}" y2="{y(bits):.1f}" stroke="{LEVEL}" '
            f'stroke-dasharray="6 4"/><text x="{LEFT + wide + 6}" y="{y(bits) + 4:.1f}" fill="{LEVEL}">'
            f"{escape(name)} {bits:.2f}</text>"
        )
    path = " ".join(f"{'L' if i else 'M'}{x(at):.1f} {y(bits):.1f}" for i, (at, bits) in enumerate(points))
    parts.append(f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="2"/>')
    parts.extend(f'<circle cx="{x(at):.1f}" cy="{y(bits):.1f}" r="3" fill="{INK}"/>' for at, bits in points)
    if points:
        at, bits = points[-1]
        parts.append(
            f'<text x="{x(at):.1f}" y="{y(bits) + 18:.1f}" fill="{INK}" text-anchor="end" '
            f'font-weight="bold">{bits:.2f}</text>'
        )
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 8}">0 s</text><text x="{LEFT + wide}" y="{HEIGHT - 8}" text-anchor="end">'
        f"{seconds:.0f} s of training; bits per byte on held-out files</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="learning curve" width="{WIDTH}" '
        f'height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" '
        f'font-family="system-ui, sans-serif" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def _range(points: Sequence[Point], levels: Sequence[Level]) -> tuple[float, float]:
    """The axis: whole bits around everything drawn."""
    values = [bits for _, bits in (*points, *levels)] or [0.0, 8.0]
    low, high = math.floor(min(values) - 0.05), math.ceil(max(values) + 0.05)
    return float(low), float(max(high, low + 1))
