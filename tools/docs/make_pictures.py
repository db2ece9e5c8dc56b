"""Draws the pictures of the documents with the library itself, into docs/pictures/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

import truemask as tm
from truemask.viz.picture import html_picture

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs" / "pictures"
LENGTH = 32
PACKED = [12, 20]  # tokens of two documents in one row


def panels(title: str, masks: dict[str, tm.Mask]) -> str:
    """One SVG with a panel for each mask above its label, on white: it is seen on dark pages too."""
    cells = np.stack([mask.to_dense(LENGTH)[0, 0].numpy() for mask in masks.values()])
    svg = html_picture(cells, title=title, labels=list(masks))
    head, _, rest = svg.partition(">")
    return f'{head} color="#1b1f23"><rect width="100%" height="100%" fill="#fff"/>{rest}\n'


def hero() -> str:
    masks = [
        tm.causal,
        tm.causal & (tm.window(8) | tm.prefix(2)),
        tm.blocks(8, back=1, ahead=1),
        tm.local(2) | tm.global_tokens([0, 16]),
        tm.causal.packed(PACKED),
    ]
    title = "Attention masks as expressions: queries go down, keys across, blue = may attend"
    return panels(title, {mask.text: mask for mask in masks})


def packed() -> str:
    mask = tm.causal & (tm.window(4) | tm.prefix(2))
    masks = {"mask & documents([12, 20])": mask & tm.documents(PACKED), "mask.packed([12, 20])": mask.packed(PACKED)}
    return panels(f"mask = {mask}, two documents in one row", masks)


PICTURES: dict[str, Callable[[], str]] = {"masks.svg": hero, "packed.svg": packed}


def drawn(name: str) -> str:
    """The text of one picture."""
    return PICTURES[name]()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        (FOLDER / name).write_text(drawn(name), encoding="utf-8")


if __name__ == "__main__":
    main()
