"""`truemask generate`: text from a trained run, written as it is made."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from truemask.cli.console import visible
from truemask.train.checkpoint import load_model, read_checkpoint
from truemask.train.model import build_model
from truemask.train.sample import continuation


def generate(
    run: Annotated[str, typer.Argument(help="The folder of a run, or of one of its checkpoints.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="How many bytes to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among this many likeliest bytes.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
) -> None:
    """Continue a prompt; the text appears byte by byte."""
    checkpoint = read_checkpoint(run)
    model = build_model(checkpoint.config)
    load_model(checkpoint, model)
    mask = checkpoint.config.expression()
    sys.stdout.write(prompt)
    for piece in continuation(model, mask, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed):
        sys.stdout.write(visible(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
