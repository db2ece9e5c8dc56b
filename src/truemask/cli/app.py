"""The command `truemask`: its subcommands, and how a caller's mistake is shown: a message and exit code 2."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from truemask.cli.audit import audit
from truemask.cli.bench import bench
from truemask.cli.check import check
from truemask.cli.console import never_fail_to_print, show_error
from truemask.cli.doctor import doctor
from truemask.cli.explain import explain
from truemask.cli.generate import generate
from truemask.cli.machine import version_of
from truemask.cli.show import show
from truemask.cli.tour.tour import tour
from truemask.cli.train import train
from truemask.errors import TruemaskError

MISTAKE = 2  # the exit code of a call that cannot mean what was asked


class _Group(TyperGroup):
    """Shows the library's own errors as messages; anything else is our bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
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
for command in (tour, show, explain, check, audit, train, generate, bench, doctor):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"truemask {version_of('truemask')}")
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
