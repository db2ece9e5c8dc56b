"""What an act writes on: everything said goes to the terminal and, in the same words, into the report.

Styles mean: `bold`, `dim`, `code` (text of the language), `good` and `bad` (always beside words that say the same).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from truemask.cli.console import needs_ascii
from truemask.geometry.picture import half_blocks
from truemask.masks.core import Mask
from truemask.viz.panels import svg_of

Part = str | tuple[str, str]  # text, or (text, style)
STYLES = {"bold": "bold", "dim": "dim", "code": "cyan", "good": "green", "bad": "bold red", "": ""}
SMALL = 24  # length of the pictures that stand beside a text


@dataclass
class Stage:
    """One act's share of the terminal and of the report."""

    console: Console
    minutes: float  # what the learning act may take
    blocks: list[str] = field(default_factory=list)

    def say(self, *parts: Part) -> None:
        """A paragraph."""
        self.console.print(Padding(_text(parts), (0, 0, 1, 0)))
        self.blocks.append(f"<p>{_html(parts)}</p>")

    def code(self, code: str) -> None:
        """Python code, as it is run."""
        shown = Syntax(code, "python", theme="ansi_dark", background_color="default")
        self.console.print(Padding(shown if self.console.is_terminal else Text(code), (0, 0, 1, 4)))
        self.blocks.append(f"<pre>{escape(code)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Part]]) -> None:
        """A table; the first column names the row."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, overflow="fold", no_wrap=i == 0)
        for row in rows:
            table.add_row(*(_text([cell]) for cell in row))
        self.console.print(Padding(table, (0, 0, 1, 0)))
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(f"<td>{_html([cell])}</td>" for cell in row) + "</tr>" for row in rows)
        self.blocks.append(f"<table><tr>{head}</tr>{body}</table>")

    def pictures(self, captioned: Sequence[tuple[str, Mask]], length: int = SMALL) -> None:
        """Small pictures side by side, each below its caption."""
        drawn = [
            Text.assemble((caption, "bold"), "\n", (str(mask), "cyan"), "\n", "\n".join(self.sketch(mask, length)))
            for caption, mask in captioned
        ]
        self.console.print(Padding(Columns(drawn, padding=(0, 4)), (0, 0, 1, 0)))
        figures = "".join(
            f"<figure>{svg_of(mask, length)}<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, mask in captioned
        )
        self.blocks.append(f'<div class="figures">{figures}</div>')

    def picture_beside(self, mask: Mask, parts: Sequence[Part], length: int = SMALL) -> None:
        """A small picture with text at its right."""
        grid = Table.grid(padding=(0, 3, 1, 0))
        grid.add_column(min_width=length, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("\n".join(self.sketch(mask, length)), _text(parts))
        self.console.print(grid)
        self.blocks.append(f'<div class="beside"><div>{svg_of(mask, length)}</div><p>{_html(parts)}</p></div>')

    def sketch(self, mask: Mask, length: int) -> list[str]:
        """A mask's drawing as lines of half blocks."""
        dense: np.ndarray = mask.to_dense(length)[0, 0].numpy()
        return half_blocks(dense, ascii=needs_ascii(self.console))

    def figure(self, svg: str, caption: str) -> None:
        """A drawing for the report alone."""
        self.blocks.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")

    def verbatim(self, text: str) -> None:
        """Text that keeps its columns."""
        self.console.print(Padding(Text(text), (0, 0, 1, 4)), soft_wrap=True)
        self.blocks.append(f"<pre>{escape(text)}</pre>")


@dataclass(frozen=True)
class Act:
    """One act: `--only` and `--skip` know it by `name`; `play` may raise, the tour then goes on without it."""

    name: str
    title: str
    play: Callable[[Stage], None]


def _text(parts: Sequence[Part]) -> Text:
    return Text.assemble(*((part, "") if isinstance(part, str) else (part[0], STYLES[part[1]]) for part in parts))


def _html(parts: Sequence[Part]) -> str:
    return "".join(
        escape(part) if isinstance(part, str) else f'<span class="{part[1]}">{escape(part[0])}</span>' for part in parts
    ).replace("\n", "<br>")
