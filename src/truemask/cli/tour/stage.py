"""What an act writes on: everything said goes to the terminal and, in the same words, into the report.

Styles mean: `bold`, `dim`, `code` (text of the language), `good` and `bad` (always beside words that say the same).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from truemask.cli.console import needs_ascii, plain
from truemask.masks.core.mask import Mask
from truemask.viz.panels import svg_of
from truemask.viz.picture import half_blocks

Part = str | tuple[str, str]  # text, or (text, style)
STYLES = {"bold": "bold", "dim": "dim", "code": "cyan", "good": "green", "bad": "bold red", "": ""}
SMALL_LENGTH = 24  # length of the pictures that stand beside a text


@dataclass
class Stage:
    """One act's share of the terminal and of the report."""

    console: Console
    minutes: float  # what the learning act may take
    race_length: int = 8192  # tokens
    blocks: list[str] = field(default_factory=list)

    def say(self, *parts: Part) -> None:
        """A paragraph."""
        self._print(_text(parts))
        self.blocks.append(f"<p>{_html(parts)}</p>")

    def code(self, code: str) -> None:
        """Python code, as it is run."""
        syntax = Syntax(code, "python", theme="ansi_dark", background_color="default")
        self._print(Padding(syntax if self.console.is_terminal else Text(code), (0, 0, 0, 4), expand=False))
        self.blocks.append(f"<pre>{escape(code)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Part]]) -> None:
        """A table; the first column names the row."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, overflow="fold", no_wrap=i == 0)
        for row in rows:
            table.add_row(*(_text([cell]) for cell in row))
        self._print(table)
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(f"<td>{_html([cell])}</td>" for cell in row) + "</tr>" for row in rows)
        self.blocks.append(f"<table><tr>{head}</tr>{body}</table>")

    def pictures(self, captioned: Sequence[tuple[str, Mask, str]], length: int = SMALL_LENGTH) -> None:
        """Small pictures side by side, each below its caption and its code."""
        grid = Table.grid(padding=(0, 4, 0, 0))
        columns = [
            Text.assemble((caption, "bold"), "\n", (code, STYLES["code"]), "\n", self.sketch(mask, length))
            for caption, mask, code in captioned
        ]
        grid.add_row(*columns)
        self._print(grid)
        figures = "".join(
            f"<figure>{svg_of(mask, length, title=code)}<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, mask, code in captioned
        )
        self.blocks.append(f'<div class="figures">{figures}</div>')

    def picture_beside(self, mask: Mask, parts: Sequence[Part], length: int = SMALL_LENGTH) -> None:
        """A small picture with text at its right."""
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_column(min_width=length + 2, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(self.sketch(mask, length), _text(parts))
        self._print(grid)
        self.blocks.append(
            f'<div class="beside"><div>{svg_of(mask, length, title="")}</div><p>{_html(parts)}</p></div>'
        )

    def sketch(self, mask: Mask, length: int) -> Text:
        """A mask's drawing in half blocks, framed."""
        ascii = needs_ascii(self.console)
        dense: np.ndarray = mask.to_dense(length)[0, 0].numpy()
        across, down, corners = ("-", "|", "++++") if ascii else ("─", "│", "┌┐└┘")
        drawing = Text(f"{corners[0]}{across * length}{corners[1]}\n", "dim")
        for line in half_blocks(dense, ascii=ascii):
            drawing.append(down, "dim").append(f"{line:<{length}}", "not dim bright_blue").append(f"{down}\n", "dim")
        return drawing.append(f"{corners[2]}{across * length}{corners[3]}", "dim")

    def figure(self, svg: str, caption: str) -> None:
        """A drawing for the report alone."""
        self.blocks.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")

    def _print(self, what: RenderableType, *, soft_wrap: bool = False) -> None:
        """Print and leave a line free; a pipe gets no blanks at the ends of lines."""
        if self.console.is_terminal:
            self.console.print(what, soft_wrap=soft_wrap)
            self.console.print()
            return
        with self.console.capture() as captured:
            self.console.print(what, soft_wrap=soft_wrap)
        lines = captured.get().rstrip().split("\n")
        plain(self.console, "\n".join(line.rstrip() for line in lines) + "\n")

    def verbatim(self, text: str) -> None:
        """Text that keeps its columns."""
        self._print(Padding(Text(text), (0, 0, 0, 4), expand=False), soft_wrap=True)
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
