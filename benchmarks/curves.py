"""A picture of speeds over lengths: lines on logarithmic axes, each named at its end. Needs matplotlib (`plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

INK_OF_OTHERS, TEXT, RULES, GREY = "#b4531a", "#1b1f23", "#e3e7ea", "#8a939b"
DASHES = (0, (4, 2))
ROOM = 3.8  # times the last length: the names stand there
APART = 0.055  # of the height, between two names


class Line(NamedTuple):
    """Points of one line, and what its name says; a second line of text says why it ends before the others."""

    name: str
    xs: Sequence[int]
    ys: Sequence[float]
    color: str
    dashed: bool = False
    why: str = ""


def draw(lines: Sequence[Line], title: str, across: str, path: Path) -> None:
    """Write the picture; the suffix says whether .svg or .png."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=TEXT, fontsize=11)
    axes.set_xlabel(across, color=TEXT, fontsize=9, loc="left")
    for line in lines:
        style: Any = DASHES if line.dashed else "-"
        axes.plot(line.xs, line.ys, marker="o", markersize=4.5, linewidth=2, linestyle=style, color=line.color)
    _scales(axes, sorted({x for line in lines for x in line.xs}))
    _names(axes, lines)
    with matplotlib.rc_context({"svg.hashsalt": "truemask"}):  # the same picture from the same numbers
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _scales(axes: Any, lengths: Sequence[int]) -> None:
    """Logarithmic, with the lengths themselves below and 1, 2, 5, 10 ... at the side; few strokes."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = [digit * 10**power for power in range(-3, 7) for digit in (1, 2, 5)]
    low, high = max(step for step in steps if step <= low), min(step for step in steps if step >= high)
    axes.set_ylim(low, high)
    for axis, places in ((axes.xaxis, lengths), (axes.yaxis, [step for step in steps if low <= step <= high])):
        axis.set_major_locator(FixedLocator(places))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda place, _: f"{place:,g}")
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * ROOM)
    axes.grid(axis="y", color=RULES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(length=0, labelsize=9, labelcolor=TEXT)


def _names(axes: Any, lines: Sequence[Line]) -> None:
    """Beside the last point of each line, pushed up where two would meet; below it where the line ends early."""
    low, high = axes.get_ylim()
    last, taken = max(x for line in lines for x in line.xs), 0.0
    for line in sorted(lines, key=lambda line: line.ys[-1]):
        x, y = line.xs[-1], line.ys[-1]
        style = {"color": line.color, "fontsize": 9, "textcoords": "offset points"}
        if x < last:
            text = f"{line.name}\n{line.why}".strip()
            axes.annotate(text, (x, y), xytext=(4, -8), ha="right", va="top", **style)
        else:
            taken = max(y, taken * (high / low) ** APART)
            axes.annotate(line.name, (x, taken), xytext=(8, 0), va="center", **style)
