"""`truemask generate`: text from a trained run or somebody's model, written as it is made."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from truemask.cli.console import make_console, plain, visible
from truemask.cli.options import Model
from truemask.common.formatting import counted, memory
from truemask.masks.formats.parse import parse
from truemask.textmodels.opening import open_model
from truemask.textmodels.text_model import TextModelError, Writing, Written


def generate(
    run: Annotated[str | None, typer.Argument(help="The folder of a run, or of one of its checkpoints.")] = None,
    model: Model = None,
    mask: Annotated[str | None, typer.Option(help="The mask to run it under; by default the model's own.")] = None,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "def ",
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", "--max-new-tokens", min=1, help="How many tokens to write at most; a run's are bytes."
        ),
    ] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among this many likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
) -> None:
    """Continue a prompt; the text appears as it is made."""
    if (run is None) == (model is None):
        raise TextModelError(
            "give exactly one of RUN and --model: a run's folder, a Hugging Face folder or a GGUF file"
        )
    under = None if mask is None else parse(mask)
    opened = open_model(run or model or "")
    sys.stdout.write(prompt)
    try:
        written = opened.write(prompt, under, Writing(tokens, temperature, top_k, seed), _show)
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    plain(make_console(stderr=True), cost(written))


def _show(piece: str) -> None:
    sys.stdout.write(visible(piece))
    sys.stdout.flush()


def cost(written: Written) -> str:
    """Speed and memory in a line.

    >>> cost(Written(200, 4.0, 2**20, 2**22))
    '200 tokens, 50.0 tokens/s; the cache takes 1.0 MiB, with every key it would take 4.0 MiB'
    """
    speed = written.tokens / max(written.seconds, 1e-9)
    return (
        f"{counted(written.tokens, 'token')}, {speed:,.1f} tokens/s; the cache takes {memory(written.cache_bytes)}, "
        f"with every key it would take {memory(written.full_bytes)}"
    )
