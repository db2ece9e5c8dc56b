"""`truemask tour`: the acts in order, each on the clock, and the report at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from truemask.cli.console import make_console, plain
from truemask.cli.tour.article import ACT as ARTICLE
from truemask.cli.tour.audited import ACT as AUDITED
from truemask.cli.tour.inverted import ACT as INVERTED
from truemask.cli.tour.leak import ACT as LEAK
from truemask.cli.tour.learning import ACT as LEARNING
from truemask.cli.tour.patterns import ACT as PATTERNS
from truemask.cli.tour.race import ACT as RACE
from truemask.cli.tour.report import Chapter, write_report
from truemask.cli.tour.stage import Act, Stage
from truemask.cli.tour.your_model import ACT as YOUR_MODEL
from truemask.common.formatting import suggest

ACTS = (ARTICLE, INVERTED, PATTERNS, LEAK, RACE, YOUR_MODEL, AUDITED, LEARNING)
NAMES = ", ".join(act.name for act in ACTS)
SECOND_PRESS_SECONDS = 2.0  # seconds within which a second Ctrl-C leaves the tour
COMMANDS = (
    'truemask show "causal & (window(8) | prefix(2))" --length 32',
    'truemask explain "causal & (window(512) | prefix(4))" --length 8192',
    "truemask train --minutes 20",
)


def tour(
    only: Annotated[list[str] | None, typer.Option(help=f"Play this act (may be repeated): {NAMES}.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave this act out (may be repeated).")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="How long the model of the last act trains.")] = 2.0,
    race_length: Annotated[int, typer.Option(min=256, help="How many tokens the masks of the race have.")] = 8192,
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("report.html"),
) -> None:
    """Five minutes with attention masks: what goes wrong, what they cost, and a model that learns under one."""
    played, console = selected_acts(only or [], skip or []), make_console()
    plain(console, f"truemask: a tour of attention masks in {acts(len(played))}. Ctrl-C skips an act, twice leaves.\n")
    start, chapters = time.perf_counter(), []
    for number, act in enumerate(ACTS, 1):
        if act not in played:
            continue
        chapter, leave = perform(act, number, Stage(console, minutes, race_length))
        chapters.append(chapter)
        if leave:
            break
    write_report(report, chapters, COMMANDS, torch.get_num_threads())
    _close(console, chapters, time.perf_counter() - start, report)
    if any(chapter.failure for chapter in chapters):
        raise typer.Exit(1)


def selected_acts(only: list[str], skip: list[str]) -> list[Act]:
    """The acts that are asked for, in their order; an unknown name is an error with the nearest known one."""
    names = [act.name for act in ACTS]
    for name in (*only, *skip):
        if name not in names:
            raise typer.BadParameter(f"there is no act {name!r}{suggest(name, names)}; the acts are {NAMES}")
    played = [act for act in ACTS if (not only or act.name in only) and act.name not in skip]
    if not played:
        raise typer.BadParameter("that leaves no act to play")
    return played


def perform(act: Act, number: int, stage: Stage) -> tuple[Chapter, bool]:
    """Play one act, whatever happens in it; whether the visitor wants to leave."""
    console = stage.console
    console.print(Rule(Text(f" {number}. {act.title} ", "bold"), align="left"))
    failure, skipped, leave = "", False, False
    start = time.perf_counter()
    try:
        act.play(stage)
    except KeyboardInterrupt:
        skipped, leave = True, _pressed_again(console)
    except Exception as error:  # whatever it is, the tour says it and goes on
        failure = f"{type(error).__name__}: {error}"
        console.print(Text(f"this act failed: {failure}", "bold red"))
    chapter = Chapter(act.name, act.title, stage.blocks, time.perf_counter() - start, failure, skipped)
    console.print(Text(f"({chapter.state})\n", "dim"))
    return chapter, leave


def _pressed_again(console: Console) -> bool:
    try:
        console.print(Text(f"act skipped; Ctrl-C again within {SECOND_PRESS_SECONDS:.0f} s leaves the tour", "dim"))
        time.sleep(SECOND_PRESS_SECONDS)
    except KeyboardInterrupt:
        return True
    return False


def _close(console: Console, chapters: list[Chapter], seconds: float, report: Path) -> None:
    console.print(Rule(style="dim"))
    failed = [chapter.title for chapter in chapters if chapter.failure]
    outcome = f"; failed: {', '.join(failed)}" if failed else ""
    plain(
        console,
        f"{acts(len(chapters))} in {seconds:.0f} s{outcome}. The report, one file, offline: {report.resolve()}\n",
    )
    plain(console, "Next:\n" + "\n".join(f"  {command}" for command in COMMANDS))


def acts(count: int) -> str:
    """`1 act`, `2 acts`."""
    return f"{count} act{'s' * (count != 1)}"
