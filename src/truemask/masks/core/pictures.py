"""Pictures of a mask: `show` for people with a terminal, `_repr_html_` for those with a notebook.

What is too large to be drawn cell by cell is cut into tiles (`viz/panels.py`), so that no size needs every cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np

from truemask.errors import MaskError
from truemask.masks.core.queries import Sizes, check, dense, sizes_of
from truemask.masks.core.value import Value
from truemask.viz.panels import Drawable, large_text
from truemask.viz.picture import CELLS_WIDE, html_picture, text_picture


def text_panels(mask: Value, sizes: Sizes) -> str:
    """A picture in text, one panel for each sample and head that differs; of a large one, of the first few."""
    if max(sizes.q_len, sizes.kv_len) > CELLS_WIDE and min(sizes.q_len, sizes.kv_len):
        return large_text(cast("Drawable", mask), *sizes)
    cells = dense(mask, sizes, "cpu").numpy()
    panels = [(label, cells[place]) for place, label in _panels(cells.shape)]
    return "\n".join(text_picture(panel, title=f"{mask}{label}") for label, panel in panels)


def html_panels(mask: Value) -> str:
    """The same as one SVG of a length that the mask's data answers for."""
    cells = dense(mask, sizes_of(mask, _picture_length(mask), None, mask.batch_size or 1, mask.head_count or 1), "cpu")
    places = list(_panels(cells.shape))[:8]
    panels = np.stack([cells.numpy()[place] for place, _ in places])
    return html_picture(panels, title=str(mask.text), labels=[label for _, label in places])


def _panels(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], str]]:
    for b, h in np.ndindex(*shape[:2]):
        names = [f"sample {b}"] * (shape[0] > 1) + [f"head {h}"] * (shape[1] > 1)
        yield (b, h), f"  ({', '.join(names)})" if names else ""


def _picture_length(mask: Value, longest: int = 24) -> int:
    """The longest length up to `longest` that the mask's data answers for."""
    for length in range(longest, 0, -1):
        try:
            check(mask, length, mask.kv_len_for(length), None, None)
        except MaskError:
            continue
        return length
    return 0
