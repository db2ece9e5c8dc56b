"""The command `truemask`: its subcommands, and how a caller's mistake is shown: a message and exit code 2.

A subcommand is imported when it is called: `truemask --help` shows the first sentences below, and needs no torch.
"""

from __future__ import annotations

import importlib.metadata
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from truemask.cli.console import never_fail_to_print, show_error

MISTAKE = 2  # the exit code of a call that cannot mean what was asked

COMMANDS = {  # what each does, as the docstring of its function begins
    "tour": "Five minutes with attention masks: what goes wrong, what they cost, and a model that learns under one.",
    "show": "Draw which query may attend to which key.",
    "explain": "Say how many pairs a mask lets through, which rows are dead, and which kernel would run it, and why.",
    "check": "Find what is likely wrong with a mask. Exit code: 0 nothing worse than a note, 1 findings, 2 a mistake.",
    "audit": "Find what the outputs of a model really depend on, and compare it with its mask.",
    "train": "Train a byte-level model; Ctrl-C saves, and `--resume RUN` goes on exactly where it stopped.",
    "generate": "Continue a prompt; the text appears as it is made.",
    "perplexity": "Measure what a text costs a model, in bits per byte and perplexity, under one mask or several.",
    "bench": "Race masks on this machine, or measure what plans predict with (--calibrate).",
    "doctor": "Say what is installed, which backends run here and what keeps the others; test them in a few seconds.",
}


def function_of(command: str) -> Any:
    """The function behind a subcommand; most need torch."""
    folder = command if command in ("tour", "doctor") else "commands"  # those two have a folder of their own
    return getattr(import_module(f"truemask.cli.{folder}.{command}"), command)


class _Subcommand(TyperCommand):
    """A line of the help, and the command itself once it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(self.name)(function_of(self.name or ""))
        return get_command(alone).make_context(info_name, args, parent, **extra)


class _Group(TyperGroup):
    """Shows the library's own errors as messages; anything else is our bug and keeps its traceback."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: _Subcommand(name, help=text) for name, text in COMMANDS.items()})

    def invoke(self, ctx: Any) -> Any:
        from truemask.errors import TruemaskError  # brings torch, which the command needs too

        try:
            return super().invoke(ctx)
        except TruemaskError as error:
            show_error(error)
            raise typer.Exit(MISTAKE) from error


app = typer.Typer(
    name="truemask",
    cls=_Group,
    help="Attention masks as small exact expressions. True means attend.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"truemask {importlib.metadata.version('truemask')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Attention masks as small exact expressions. True means attend."""


def main() -> None:
    """The entry point."""
    never_fail_to_print()
    app(prog_name="truemask")
