"""Where the command line writes: a terminal that may have colours, or a pipe that gets plain text."""

from __future__ import annotations

import io
import sys

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


def visible(text: str) -> str:
    """Text without control characters, which could move the cursor or worse; line ends and tabs stay.

    >>> visible("def\\tx:\\n\\x1b[2J")
    'def\\tx:\\n\ufffd[2J'
    """
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in text)


def never_fail_to_print() -> None:
    """A terminal that lacks a character gets a question mark for it, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


OPTIONS = {"pass `heads=`": "pass `--heads`", "pass `batch=`": "pass `--batch`"}  # what Python's words are called here


def show_error(error: Exception) -> None:
    """Write a caller's mistake to standard error, with the caret below the place if the message draws one."""
    console, text = make_console(stderr=True), str(error)
    for word, option in OPTIONS.items():
        text = text.replace(word, option)
    console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)
