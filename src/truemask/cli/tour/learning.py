"""Act 8: a Decoder learns to write Python under a mask, and must beat what counting pairs of bytes achieves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.text import Text

from truemask.attention.planning.plan import plan
from truemask.cli.commands.train import step_line
from truemask.cli.console import needs_ascii, visible
from truemask.cli.tour.curve import Level, Point, svg_curve, text_curve
from truemask.cli.tour.stage import Act, Part, Stage
from truemask.errors import TruemaskError
from truemask.train.config import TrainConfig
from truemask.train.sample import continuation
from truemask.train.trainer import Step, Trainer

PROMPT = "def read_"
SAMPLE_BYTES = 240  # bytes
EVALUATIONS = 12  # on the way, at most
MEASURING_SHARE = 0.1  # of the time, at most
LEARNING_MINUTES = 1.0  # minutes of training after which the model must have learned
REDRAW_SECONDS = 0.5  # seconds
LINE_SECONDS = 10.0  # seconds between lines where there is no terminal


class NotLearned(TruemaskError):
    """The model ended above the bigram's entropy, although it had the time to get below."""


def configuration(minutes: float) -> TrainConfig:
    """What fits two cores for two minutes."""
    return TrainConfig(
        minutes=minutes,
        length=384,
        dim=96,
        depth=3,
        heads=3,
        batch=4,
        lr=4e-3,
        evaluate_every=10**9,
        evaluate_rows=64,
        save_every=10**9,
    )


def play(stage: Stage) -> None:
    config = configuration(stage.minutes)
    folder = Path("runs") / f"tour-{time.strftime('%Y%m%d-%H%M%S')}"
    trainer = Trainer(config, folder)
    corpus, base = trainer.corpus, trainer.baselines
    parameters = sum(p.numel() for p in trainer.model.parameters())
    stage.say(
        f"The text: {len(corpus.train)} files of this Python's standard library, {corpus.train_bytes / 1e6:.1f} MB; "
        f"{len(corpus.held_out)} other files are the test. The model: {parameters / 1e6:.1f} M parameters, one token a "
        "byte. The mask, packed per file: ",
        (str(trainer.mask), "code"),
        ".",
    )
    stage.verbatim(
        str(
            plan(
                trainer.mask,
                config.length,
                batch=config.batch,
                heads=config.heads,
                head_dim=config.dim // config.heads,
                grad=True,
            )
        )
    )
    points = _train(trainer, stage)
    _result(trainer, stage, points)
    stage.say("It continues ", (PROMPT, "code"), " like this:")
    pieces = continuation(trainer.model, trainer.mask, PROMPT, SAMPLE_BYTES)
    stage.verbatim(visible(PROMPT + "".join(pieces)))
    stage.say(f"Saved: truemask generate {folder} --prompt 'class '")
    held_out = points[-1][1]
    if not held_out < base.bigram and stage.minutes >= LEARNING_MINUTES:
        raise NotLearned(f"the model ended at {held_out:.2f} bits per byte, not below the bigram's {base.bigram:.2f}")


def _train(trainer: Trainer, stage: Stage) -> list[Point]:
    """Train to the end, drawing on the way; the points of the learning curve, the last one after the last step."""
    points: list[Point] = [(0.0, trainer.held_out_bits())]
    steps = _measured(trainer, points)
    if stage.console.is_terminal:
        with Live(console=stage.console, auto_refresh=False) as screen:
            for step in every(REDRAW_SECONDS, steps):
                screen.update(_drawing(trainer, stage, points, step), refresh=True)
    else:
        for step in every(LINE_SECONDS, steps):
            stage.console.print(step_line(step))
    return points


def _measured(trainer: Trainer, points: list[Point]) -> Iterator[Step]:
    """The steps of the run, some of them measured on the held-out text: evenly, and for a small share of the time."""
    spent, due = 0.0, 1 / EVALUATIONS
    for step in trainer.run():
        if step.share == 1 or (step.share >= due and spent <= MEASURING_SHARE * step.seconds):
            start = time.perf_counter()
            points.append((step.seconds, trainer.held_out_bits()))
            step = replace(step, held_out=points[-1][1])
            spent += time.perf_counter() - start
            due = step.share + 1 / EVALUATIONS
        yield step


def every(seconds: float, steps: Iterator[Step]) -> Iterator[Step]:
    """The steps worth showing: one in so many seconds, every measured one, and the last."""
    shown, last = time.monotonic(), None
    for step in steps:
        last = step
        if step.held_out is not None or time.monotonic() - shown > seconds:
            shown, last = time.monotonic(), None
            yield step
    if last is not None:
        yield last


def _levels(trainer: Trainer) -> list[Level]:
    return [("unigram", trainer.baselines.unigram), ("bigram", trainer.baselines.bigram)]


def _drawing(trainer: Trainer, stage: Stage, points: list[Point], step: Step) -> Group:
    seconds = max(60 * (trainer.config.minutes or 0), step.seconds)
    curve = text_curve(points, _levels(trainer), seconds, ascii=needs_ascii(stage.console))
    return Group(curve, Text(step_line(step)))


def _result(trainer: Trainer, stage: Stage, points: list[Point]) -> None:
    base, (seconds, held_out) = trainer.baselines, points[-1]
    better = ("below the bigram", "good") if held_out < base.bigram else ("NOT below the bigram", "bad")
    stage.figure(svg_curve(points, _levels(trainer), seconds), "learning, and what counting alone achieves")
    rows: list[list[Part]] = [
        ["unigram: how often each byte occurs", f"{base.unigram:.3f}"],
        ["bigram: given the byte before", f"{base.bigram:.3f}"],
        ["the Decoder", (f"{held_out:.3f}, {better[0]}", better[1])],
    ]
    stage.table(["on held-out files", "bits per byte"], rows)
    speed = trainer.tokens / max(trainer.training_seconds, 1e-9)
    stage.say(f"{trainer.step} steps, {trainer.tokens:,} tokens in {seconds:.0f} s: {speed:,.0f} tokens/s of training.")


ACT = Act("learning", "Learning to write Python", play)
