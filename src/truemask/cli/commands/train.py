"""`truemask train`: a byte-level Decoder trained on files, under any mask that can be written down."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from truemask.cli.console import make_console, plain
from truemask.train.config import DEFAULT_MASK, TrainConfig, TrainError
from truemask.train.trainer import Step, Trainer
from truemask.viz.plot import can_plot, save_picture

LINE_SECONDS = 5.0  # seconds between lines where there is no terminal
CHANGEABLE = ("steps", "minutes", "evaluate_every", "save_every", "keep")  # of a run that goes on


def train(
    context: typer.Context,
    more: Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="More text, after --data.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A file or folder of text; may be repeated. Default: the standard library's source."),
    ] = None,
    mask: Annotated[str, typer.Option(help="Any mask that can be written down.")] = DEFAULT_MASK,
    length: Annotated[int, typer.Option(help="Tokens in a row, one a byte.")] = TrainConfig.length,
    dim: Annotated[int, typer.Option(help="Width of the model.")] = TrainConfig.dim,
    depth: Annotated[int, typer.Option(help="Layers.")] = TrainConfig.depth,
    heads: Annotated[int, typer.Option(help="Attention heads; dim must be a multiple.")] = TrainConfig.heads,
    batch: Annotated[int, typer.Option(help="Rows in a step.")] = TrainConfig.batch,
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this long (default: 5 minutes).")] = None,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = TrainConfig.lr,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the text.")] = TrainConfig.seed,
    evaluate_every: Annotated[int, typer.Option(help="Steps between tests.")] = TrainConfig.evaluate_every,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = TrainConfig.save_every,
    keep: Annotated[int, typer.Option(help="How many checkpoints stay.")] = TrainConfig.keep,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: a new one in runs/).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run, where its last checkpoint is.")] = None,
) -> None:
    """Train a byte-level model; Ctrl-C saves, and `--resume RUN` goes on exactly where it stopped."""
    console = make_console()
    if resume is not None:
        trainer = Trainer.resume(resume, **_changes(context))
    else:
        config = TrainConfig(
            data=tuple(str(Path(path).resolve()) for path in (*(data or ()), *(more or ()))),
            mask=mask,
            length=length,
            dim=dim,
            depth=depth,
            heads=heads,
            batch=batch,
            steps=steps,
            minutes=5.0 if steps is None and minutes is None else minutes,
            lr=lr,
            seed=seed,
            evaluate_every=evaluate_every,
            save_every=save_every,
            keep=keep,
        )
        trainer = Trainer(config, _new_folder(out))
    watch(trainer, console)


def watch(trainer: Trainer, console: Console) -> None:
    """Train with a progress bar, or plain lines where there is no terminal, and say what came out."""
    folder = trainer.folder
    assert folder is not None
    _introduce(trainer, folder, console)
    first_step = trainer.step
    with stop_on_interrupt() as stopped:
        show = _with_bar if console.is_terminal else _with_lines
        show(trainer.run(stop=lambda: bool(stopped)), trainer, console)
    held_out = trainer.held_out_bits()
    base = trainer.baselines
    plain(
        console, f"after {trainer.step} steps ({trainer.step - first_step} now), on held-out files, in bits per byte:"
    )
    plain(console, f"  model {held_out:.3f}    bigram {base.bigram:.3f}    unigram {base.unigram:.3f}")
    place = shlex.quote(str(folder))
    if trainer.share < 1:
        plain(console, f"stopped and saved; to go on: truemask train --resume {place}")
    else:
        plain(console, f"saved in {folder}; next: truemask generate {place} --prompt 'def '")


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """A list that is empty until Ctrl-C is pressed: the step in hand is finished. A second Ctrl-C ends at once."""
    stopped: list[bool] = []

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _introduce(trainer: Trainer, folder: Path, console: Console) -> None:
    config, corpus = trainer.config, trainer.corpus
    parameters = sum(p.numel() for p in trainer.model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / ("mask.png" if can_plot() else "mask.svg")
    if not picture.exists():
        save_picture(trainer.mask, picture, config.length, batch=config.batch, heads=config.heads)
    files = f"{len(corpus.train)} files, {corpus.train_bytes / 1e6:.1f} MB; held out {len(corpus.held_out)} files"
    plain(console, f"text   {corpus.source} ({files}, {corpus.held_out_bytes / 1e6:.2f} MB)")
    plain(console, f"mask   {trainer.mask}, per document (picture: {picture})")
    plain(
        console,
        f"model  {parameters / 1e6:.2f} M parameters: dim {config.dim}, depth {config.depth}, heads {config.heads}",
    )
    plain(console, f"rows   {config.batch} of {config.length} tokens a step; from step {trainer.step}")


def _with_bar(steps: Iterator[Step], trainer: Trainer, console: Console) -> None:
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("step {task.fields[step]}"),
        TextColumn("[bold]{task.fields[bits]:.2f}[/] bits"),
        TextColumn("held out {task.fields[held_out]}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1.0, step=trainer.step, bits=8.0, held_out="-", speed=0.0)
        for step in steps:
            held_out: dict[str, Any] = {} if step.held_out is None else {"held_out": f"{step.held_out:.3f}"}
            fields = {"step": step.step, "bits": step.bits, "speed": step.tokens_per_second, **held_out}
            progress.update(bar, completed=step.share, **fields)


def _with_lines(steps: Iterator[Step], trainer: Trainer, console: Console) -> None:
    last_line = 0.0
    for step in steps:
        if step.held_out is not None or time.monotonic() - last_line > LINE_SECONDS:
            last_line = time.monotonic()
            plain(console, step_line(step))


def step_line(step: Step) -> str:
    """One step as a line of plain text."""
    held_out = "" if step.held_out is None else f"  held out {step.held_out:.3f}"
    return (
        f"{100 * step.share:3.0f} %  step {step.step}  {step.bits:.3f} bits  lr {step.lr:.1e}  "
        f"{step.tokens_per_second:,.0f} tokens/s{held_out}"
    )


def _new_folder(out: Path | None) -> Path:
    folder = out if out is not None else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if folder.is_dir() and any(folder.iterdir()):
        raise TrainError(
            f"{folder} exists and is not empty: go on with it (--resume {folder}), or choose another --out"
        )
    return folder


def _changes(context: typer.Context) -> dict[str, Any]:
    """What was given with --resume. A run goes on as it began: what would change it is refused, not ignored."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    names = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    changes = {name: context.params[name] for name in names if name != "resume"}
    for name in changes:
        if name not in CHANGEABLE:
            raise TrainError(
                f"--resume goes on with the run as it began, so --{name} cannot be given with it "
                f"(only --{', --'.join(CHANGEABLE).replace('_', '-')} can)"
            )
    return {"steps": None, "minutes": None, **changes} if "steps" in changes or "minutes" in changes else changes
