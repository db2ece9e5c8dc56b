"""A mask of any length as panels of shares, one for each sample and head that differs, without a dense mask.

Tiles that are EMPTY or FULL cost nothing; the others are evaluated while that is affordable, else drawn as "some".
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from truemask.errors import MaskError
from truemask.geometry.logic import FULL, MIXED
from truemask.geometry.tiles.tile_map import TileMap
from truemask.viz.picture import PIXELS_WIDE, Shares, shades_picture, svg_picture, text_grid, text_picture

MAX_PANELS = 8
MAX_CELLS = 1 << 28  # evaluated for a picture: a few seconds


class Drawable(Protocol):
    """What can be drawn: it has a text, and answers for sizes with tiles and with cells. Every mask does."""

    @property
    def text(self) -> Any: ...
    def kv_len_for(self, q_len: int) -> int: ...
    def tiles(
        self, q_len: int, kv_len: int, block: tuple[int, int], *, batch: int | None, heads: int | None
    ) -> TileMap: ...
    def to_dense(self, q_len: int, kv_len: int, *, batch: int | None, heads: int | None) -> Any: ...


class Panels(NamedTuple):
    """Panels of equal size with a label each; `more` is how many there would be beyond them."""

    cuts: list[Shares]
    labels: list[str]
    more: int


def text_of(
    mask: Drawable,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    columns: int = 64,
    ascii: bool = False,
    title: str | None = None,
) -> str:
    """A text picture that fits `columns` characters (labels not counted), cell by cell if there is room.

    Without a `title` the mask's text stands above it.

    >>> from truemask.masks.leaves.bands import causal
    >>> print(text_of(causal, 1 << 20, columns=16))
    causal
           0       524288
         0 ▒▒··············
    131072 ██▒▒············
    262144 ████▒▒··········
    393216 ██████▒▒········
    524288 ████████▒▒······
    655360 ██████████▒▒····
    786432 ████████████▒▒··
    917504 ██████████████▒▒
    queries down, keys across
    a sign is 131072 queries by 65536 keys: █ all, ░▒▓ some, · none
    """
    kv_len = mask.kv_len_for(q_len) if kv_len is None else kv_len
    if max(q_len, kv_len) <= columns or min(q_len, kv_len) == 0:
        dense = mask.to_dense(q_len, kv_len, batch=batch, heads=heads).numpy()
        places, labels, more = _places(dense.shape)
        pictures = [
            text_picture(dense[p], title=t, ascii=ascii, columns=columns) for p, t in zip(places, labels, strict=True)
        ]
    else:
        rows, width = text_grid(q_len, kv_len, columns)
        cuts, labels, more = panels_of(mask, q_len, kv_len, batch=batch, heads=heads, rows=rows, columns=width)
        pictures = [shades_picture(cut, title=label, ascii=ascii) for cut, label in zip(cuts, labels, strict=True)]
    head = mask.text if title is None else title
    return "\n".join([*([head] if head else []), *pictures, *_rest(more)])


def large_text(mask: Drawable, batch: int, heads: int, q_len: int, kv_len: int) -> str:
    """Shares of tiles in characters, with the mask's text above every panel."""
    rows, columns = text_grid(q_len, kv_len)
    panels = panels_of(mask, q_len, kv_len, batch=batch, heads=heads, rows=rows, columns=columns)
    titles = [f"{mask.text}  ({label})" if label else mask.text for label in panels.labels]
    drawn = [shades_picture(cut, title=title) for cut, title in zip(panels.cuts, titles, strict=True)]
    return "\n".join([*drawn, *_rest(panels.more)])


def svg_of(
    mask: Drawable,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    title: str | None = None,
) -> str:
    """An SVG picture; without a `title` the mask's text stands above it."""
    cuts, labels, more = panels_of(mask, q_len, kv_len, batch=batch, heads=heads)
    return svg_picture(cuts, title=" ".join([mask.text if title is None else title, *_rest(more)]), labels=labels)


def panels_of(
    mask: Drawable,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    rows: int = PIXELS_WIDE,
    columns: int = PIXELS_WIDE,
) -> Panels:
    """The mask cut into at most `rows` by `columns` cells per panel."""
    kv_len = mask.kv_len_for(q_len) if kv_len is None else kv_len
    if min(q_len, kv_len) <= 0:
        raise MaskError(f"there is nothing to draw of `{mask.text}` for {q_len} queries and {kv_len} keys")
    block = (-(-q_len // rows), -(-kv_len // columns))
    tiles = mask.tiles(q_len, kv_len, block, batch=batch, heads=heads)
    density, exact = _densities(tiles)
    places, labels, more = _places(density.shape)
    cuts = []
    for place in places:
        pairs = round(float((density[place] * _areas(tiles)).sum())) if exact else None
        cuts.append(Shares(density[place], *block, q_len, kv_len, pairs))
    return Panels(cuts, labels, more)


def _densities(tiles: TileMap) -> tuple[np.ndarray, bool]:
    """The share of pairs in each tile, `[b, h, rows, columns]`, and whether the MIXED ones were counted."""
    state = tiles.state
    density = np.where(state == FULL, 1.0, np.where(state == MIXED, 0.5, 0.0))
    affordable = tiles.counts.mixed * tiles.block[0] * tiles.block[1] <= MAX_CELLS
    if affordable:
        for part in tiles.evaluated():
            density[part.b, part.h, part.i, part.j] = part.cells.sum((1, 2)) / part.area
    return density, affordable or not tiles.counts.mixed


def _areas(tiles: TileMap) -> np.ndarray:
    """Cells in each tile, `[rows, columns]`."""
    i, j = np.arange(tiles.shape[2])[:, None], np.arange(tiles.shape[3])[None, :]
    q0, q1, k0, k1 = tiles.extents(i, j)
    return (q1 - q0) * (k1 - k0)


def _places(shape: tuple[int, ...]) -> tuple[list[tuple[int, int]], list[str], int]:
    """The first samples and heads, their names where there are several, and how many are left out."""
    places = list(np.ndindex(shape[0], shape[1]))
    labels = [
        ", ".join([f"sample {b}"] * (shape[0] > 1) + [f"head {h}"] * (shape[1] > 1)) for b, h in places[:MAX_PANELS]
    ]
    return places[:MAX_PANELS], labels, max(0, len(places) - MAX_PANELS)


def _rest(more: int) -> list[str]:
    return [f"(and {more} more: `.select(samples=[...], heads=[...])` chooses)"] if more else []
