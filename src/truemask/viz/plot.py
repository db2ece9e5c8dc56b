"""Pictures of masks in files and in matplotlib figures: `save_picture` and `plot`.

PNG, JPEG and PDF need matplotlib, which comes with the extra `plot`; SVG and text need nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from truemask.common.formatting import percent
from truemask.errors import TruemaskError
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import expression
from truemask.viz.panels import panels_of, svg_of, text_of
from truemask.viz.picture import INK, PAPER, Shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIXELS = 512  # cells along a side of a plot
GRID_BELOW = 48  # lengths up to which the cells are outlined


class PictureError(TruemaskError, ValueError):
    """A picture that cannot be made; the message says what is missing."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    try:
        _matplotlib()
    except PictureError:
        return False
    return True


def save_picture(
    mask: Mask | str,
    path: str | Path,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    title: str | None = None,
    dpi: int = 160,
) -> Path:
    """Draw a mask into a file whose suffix says the format: .png, .jpg, .pdf (matplotlib), .svg or .txt (nothing).

    Queries go down, keys across, and ink means "may attend"; large masks are drawn as the share of pairs per cell.

    Args:
        q_len, kv_len: lengths in tokens; without `kv_len` as many keys as positions have passed.
        batch, heads: how many samples and heads, where the mask varies over them without saying so.
        title: instead of the mask's text.

    Raises:
        PictureError: an unknown suffix, no such folder, or matplotlib is needed and missing.
        MaskError: the mask cannot answer for these sizes.
    """
    mask, path = expression("save_picture: mask", mask), Path(path)
    sizes: dict[str, Any] = {"batch": batch, "heads": heads}
    if not path.parent.is_dir():
        raise PictureError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.suffix == ".txt":
        path.write_text(text_of(mask, q_len, kv_len, title=title, **sizes) + "\n", encoding="utf-8")
    elif path.suffix == ".svg":
        path.write_text(svg_of(mask, q_len, kv_len, title=title, **sizes), encoding="utf-8")
    elif path.suffix in (".png", ".jpg", ".jpeg", ".pdf"):
        _save_plot(mask, path, q_len, kv_len, title, dpi, sizes)
    else:
        raise PictureError(
            f"{path} ends in {path.suffix or 'nothing'!r}; pictures end in .png, .jpg, .pdf, .svg or .txt"
        )
    return path


def plot(
    mask: Mask | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the first sample and head of a mask into matplotlib axes (the current ones by default), and return them."""
    mask = expression("plot: mask", mask)
    panels = panels_of(mask, q_len, kv_len, batch=batch, heads=heads, rows=PIXELS, columns=PIXELS)
    canvas: Axes = _matplotlib().gca() if axes is None else axes
    _draw(canvas, panels.cuts[0], panels.labels[0] or mask.text)
    return canvas


def _save_plot(
    mask: Mask, path: Path, q_len: int, kv_len: int | None, title: str | None, dpi: int, sizes: dict[str, Any]
) -> None:
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(mask, q_len, kv_len, **sizes, rows=PIXELS, columns=PIXELS)
    across = min(4, len(panels.cuts))
    down = -(-len(panels.cuts) // across)
    figure = Figure(figsize=(4.4 * across, 4.6 * down + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[len(panels.cuts) :]:
        axes.set_axis_off()
    for axes, cut, label in zip(grid[: len(panels.cuts)], panels.cuts, panels.labels, strict=True):
        _draw(axes, cut, label)
    figure.suptitle(_wrapped(mask.text if title is None else title, 46 * across), family="monospace", fontsize=9)
    figure.savefig(path, dpi=dpi)


def _draw(axes: Axes, cut: Shares, label: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ink = LinearSegmentedColormap.from_list("truemask", [PAPER, "#a9c9e3", INK])
    extent = (-0.5, cut.kv_len - 0.5, cut.q_len - 0.5, -0.5)
    axes.imshow(_stretched(cut), cmap=ink, vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="equal")
    if max(cut.q_len, cut.kv_len) <= GRID_BELOW:
        axes.set_xticks(np.arange(1, cut.kv_len) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, cut.q_len) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    axes.locator_params(integer=True)
    axes.tick_params(labelsize=7, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    cells = cut.q_len * cut.kv_len
    counted = "" if cut.pairs is None else f"{cut.pairs:,} of {cells:,} pairs ({percent(cut.pairs, cells)})"
    below = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 8}
    axes.text(0.5, -0.02, "\n".join(filter(None, (label, counted))), **below)


def _stretched(cut: Shares) -> np.ndarray:
    """The shares with every cell as wide as it stands for, so that a cut last row or column is not too wide."""
    rows = np.arange(cut.q_len) // cut.q_step if cut.q_len <= 4 * PIXELS else np.arange(len(cut.density))
    columns = np.arange(cut.kv_len) // cut.k_step if cut.kv_len <= 4 * PIXELS else np.arange(cut.density.shape[1])
    return cut.density[rows[:, None], columns[None, :]]


def _wrapped(text: str, width: int) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))


def _matplotlib() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as missing:
        raise PictureError(
            f"{missing.name} is not installed, which PNG, JPEG and PDF pictures need: pip install 'truemask[plot]' "
            "(.svg and .txt pictures need nothing)"
        ) from missing
    return pyplot
