"""`truemask check`: what is likely wrong with a mask, in a file of any kind or as an expression."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from truemask.cli.console import make_console, needs_ascii, plain
from truemask.cli.options import Batch, Heads, KvLength
from truemask.common.finding import Finding, Findings
from truemask.common.formatting import counted
from truemask.diagnosis.diagnose import diagnose
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.files import Reading, is_file, perhaps_a_file, read_mask
from truemask.masks.foreign.importers import from_huggingface_2d
from truemask.masks.formats.parse import parse
from truemask.masks.structure.data import cells_held, tokens_held
from truemask.viz.panels import text_of

COLUMNS = 32  # of the picture
DEFAULT_TOKENS = 1024  # tokens where nothing says how many


def check(
    what: Annotated[
        str,
        typer.Argument(
            help="An expression, or a file: .pt .npy .npz .safetensors .png .jpg .txt .csv.", metavar="FILE|EXPR"
        ),
    ],
    length: Annotated[
        int | None, typer.Option("--length", "-n", min=1, help="How many queries; of a tensor: its own.")
    ] = None,
    kv_length: KvLength = None,
    batch: Batch = None,
    heads: Heads = None,
    causal: Annotated[
        bool | None, typer.Option("--causal/--not-causal", help="Whether no query may see the future.")
    ] = None,
    documents: Annotated[str | None, typer.Option(help="Lengths of packed documents that must not mix: 5,7,4.")] = None,
    tensor: Annotated[str | None, typer.Option(help="Which tensor of a file that holds several.")] = None,
    axes: Annotated[
        str | None, typer.Option(help="What a file's tensor of three axes has first: bqk (samples) or hqk (heads).")
    ] = None,
    padding: Annotated[
        bool, typer.Option("--padding", help="Rows of a file's \\[b, n] are samples, 1 = a real token: attention_mask.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Find what is likely wrong with a mask. Exit code: 0 nothing worse than a note, 1 findings, 2 a mistake."""
    mask, source, reading_notes = _read(what, tensor, axes)
    mask, notes = (_as_padding(mask), ()) if padding else (mask, (*reading_notes, *_perhaps_padding(mask)))
    q_len, kv_len = sizes(mask, length, kv_length)
    claims = {"causal": causal, "documents": _lengths(documents)}
    findings = Findings([*diagnose(mask, q_len, kv_len, batch=batch, heads=heads, **claims), *notes])
    console = make_console()
    if as_json:
        report = {
            "mask": mask.text,
            "source": source,
            "queries": q_len,
            "keys": kv_len,
            "findings": findings.to_dicts(),
        }
        plain(console, json.dumps(report, indent=2))
    else:
        plain(console, f"{source}: {q_len:,} queries x {kv_len:,} keys")
        ascii = needs_ascii(console)
        plain(console, text_of(mask, q_len, kv_len, batch=batch, heads=heads, columns=COLUMNS, ascii=ascii, title=""))
        plain(console, str(findings))
    if not findings.ok:
        raise typer.Exit(1)


def _read(what: str, tensor: str | None, axes: str | None) -> Reading:
    """The mask in a file, or the one that the text says."""
    if is_file(what):
        return read_mask(Path(what), tensor, axes)
    for option, value in (("--tensor", tensor), ("--axes", axes)):
        if value is not None:
            raise MaskError(f"{option} {value} speaks of a file's tensor, and {what[:60]!r} is an expression")
    try:
        return Reading(parse(what), "an expression")
    except MaskError as error:
        raise MaskError(f"{error}{perhaps_a_file(what)}") from None


def sizes(mask: Mask, length: int | None, kv_length: int | None) -> tuple[int, int]:
    """Queries and keys: as asked, or those that the mask holds data for."""
    held = cells_held(mask)
    shape = None if held is None else held.tensor.shape
    held_tokens = shape[2] if shape is not None and (shape[2] > 1 or length is None) else tokens_held([mask])
    q_len = length or held_tokens or DEFAULT_TOKENS
    kv_len = kv_length or (shape[3] if shape is not None else mask.kv_len_for(q_len))
    return q_len, kv_len


def _perhaps_padding(mask: Mask) -> Iterator[Finding]:
    """That a table of fewer rows than columns may be flags of tokens, a row for each sample."""
    held = cells_held(mask)
    b, h, rows, columns = (0, 0, 0, 0) if held is None else held.tensor.shape
    if (b, h) == (1, 1) and rows < columns:
        reading = f"it was read as {counted(rows, 'query')} x {counted(columns, 'key')}"
        advice = f"if it is the attention_mask of {counted(rows, 'sample')} of {counted(columns, 'token')}"
        fix = "`--padding` here, `from_huggingface_2d(mask)` in Python"
        yield Finding("rows-or-samples", "note", f"the table [{rows}, {columns}]", f"{reading}; {advice}, say so", fix)


def _as_padding(mask: Mask) -> Mask:
    """A table of flags `[b, n]` as key padding."""
    held = cells_held(mask)
    if held is None or held.tensor.shape[:2] != (1, 1):
        raise MaskError(f"--padding reads a file's table [b, n] of 0 and 1, a row for each sample; this is `{mask}`")
    return from_huggingface_2d(held.tensor[0, 0])


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise MaskError(f"--documents takes lengths like 5,7,4, got {text!r}") from None
