"""`truemask show`: the picture of a mask, in the terminal or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from truemask.cli.console import make_console, needs_ascii, plain
from truemask.cli.options import Batch, Expression, Heads, KvLength, Length
from truemask.masks.foreign.files import read_expression
from truemask.viz.panels import text_of
from truemask.viz.plot import save_picture

LABELS = 12  # characters kept free for the numbers of the rows


def show(
    expression: Expression,
    length: Length = 16,
    kv_length: KvLength = None,
    batch: Batch = None,
    heads: Heads = None,
    save: Annotated[Path | None, typer.Option(help="Draw into a .png, .jpg, .pdf, .svg or .txt file instead.")] = None,
    ascii: Annotated[bool, typer.Option("--ascii", help="Use signs that every terminal has.")] = False,
) -> None:
    """Draw which query may attend to which key."""
    mask, console = read_expression(expression), make_console()
    if save is not None:
        written = save_picture(mask, save, length, kv_length, batch=batch, heads=heads)
        plain(console, f"{written}: {mask} at length {length}")
        return
    columns = max(16, min(64, console.width - LABELS))
    signs = ascii or needs_ascii(console)
    plain(console, text_of(mask, length, kv_length, batch=batch, heads=heads, columns=columns, ascii=signs))
