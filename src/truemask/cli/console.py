"""Where the command line writes: a terminal that may have colours, or a pipe that gets plain text."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

PIPE_WIDTH = 100


def make_console(*, stderr: bool = False) -> Console:
    """A console for standard output or error; `NO_COLOR`, `COLUMNS` and pipes are obeyed."""
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, emoji=False, width=PIPE_WIDTH)
    return console


def needs_ascii(console: Console) -> bool:
    """Whether the output cannot hold block characters."""
    return not console.encoding.lower().replace("-", "").startswith("utf")


def plain(console: Console, text: str) -> None:
    """Write text as it is: no markup, no wrapping (pictures and carets must keep their columns)."""
    console.print(Text(text), soft_wrap=True)


def show_error(error: Exception) -> None:
    """Write a caller's mistake to standard error, with the caret below the place if the message draws one."""
    console = make_console(stderr=True)
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
