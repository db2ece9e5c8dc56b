"""`truemask explain`: what a mask lets through at a length, what it never reaches, and how `attend` would run it."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import numpy as np
import torch
import typer
from rich.text import Text
from torch import Tensor

from truemask.attention.planning.plan import plan
from truemask.cli.console import make_console, needs_ascii, plain
from truemask.cli.options import Batch, Expression, Heads, KvLength, Length
from truemask.common.formatting import percent, ranges
from truemask.diagnosis.explain import explain as why
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.files import read_expression
from truemask.viz.panels import text_of

PICTURE_COLUMNS = 32
HEADS = 8  # of the call that is planned, where neither the mask nor the user says


class Dtype(str, Enum):
    """What the tensors would hold."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def explain(
    expression: Expression,
    length: Length = 1024,
    kv_length: KvLength = None,
    batch: Batch = None,
    heads: Heads = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 64,
    dtype: Annotated[Dtype, typer.Option(help="What the tensors hold.")] = Dtype.float32,
    grad: Annotated[bool, typer.Option("--grad", help="Plan for training: forward and backward.")] = False,
    pair: Annotated[
        tuple[int, int] | None, typer.Option(metavar="QUERY KEY", help="Say instead why this query may see this key.")
    ] = None,
) -> None:
    """Say how many pairs a mask lets through, which rows are dead, and which kernel would run it, and why."""
    mask, console = read_expression(expression), make_console()
    if pair is not None:
        plain(console, str(why(mask, *pair)))
        return
    kv_len = mask.kv_len_for(length) if kv_length is None else kv_length
    for name, value in facts(mask, length, kv_len, batch, heads):
        console.print(Text.assemble((f"{name:<16}", "bold"), value), soft_wrap=True)
    plain(console, "")
    forecast = plan(
        mask,
        length,
        kv_len,
        batch=batch or max(1, mask.batch_size),
        heads=heads or (mask.head_count if mask.head_count > 1 else HEADS),
        head_dim=head_dim,
        dtype=getattr(torch, dtype.value),
        grad=grad,
    )
    plain(console, str(forecast))
    plain(console, "")
    ascii = needs_ascii(console)
    plain(
        console, text_of(mask, length, kv_len, batch=batch, heads=heads, columns=PICTURE_COLUMNS, ascii=ascii, title="")
    )


def facts(
    mask: Mask, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
) -> list[tuple[str, str]]:
    """Names and values of what can be counted; means over samples and heads where they differ."""
    count = mask.count(q_len, kv_len, batch=batch, heads=heads)
    pairs, cells = float(count.double().mean()), q_len * kv_len
    return [
        ("size", f"{q_len:,} queries x {kv_len:,} keys"),
        ("varies over", _varies(mask)),
        ("pairs", f"{pairs:,.10g} of {cells:,} ({percent(pairs, cells)}){_spread(count)}"),
        ("keys per query", f"{pairs / q_len:,.4g} on average"),
        (
            "dead queries",
            dead(mask.dead_queries(q_len, kv_len, batch=batch, heads=heads), "see nothing: their output is 0"),
        ),
        ("dead keys", dead(mask.dead_keys(q_len, kv_len, batch=batch, heads=heads), "are seen by nobody")),
    ]


def _varies(mask: Mask) -> str:
    axes = [
        f"{name} ({size})" if size else name
        for name, size in (("samples", mask.batch_size), ("heads", mask.head_count))
        if size != 1
    ]
    return " and ".join(axes) or "nothing: one mask for all samples and heads"


def _spread(count: Tensor) -> str:
    low, high = int(count.min()), int(count.max())
    return f", from {low:,} to {high:,} over samples and heads" if low != high else ""


def dead(flags: Tensor, meaning: str) -> str:
    """Which positions are dead, as ranges: `none`, or `3 (0-2), which ...`.

    >>> dead(torch.tensor([[[True, True, False, True]]]), "see nothing")
    '3 of 4 see nothing: 0-1, 3'
    """
    total, size = int(flags.sum()), flags.numel()
    if not total:
        return "none"
    where = f" {meaning}"
    if flags.shape[0] * flags.shape[1] > 1:
        return f"{total:,} of {size:,}{where} (all samples and heads together)"
    return f"{total:,} of {size:,}{where}: {ranges(np.flatnonzero(flags[0, 0].numpy()))}"
