"""Attention under masks: SDPA bare and with the mask, FlexAttention, x-transformers, the portable path, and `attend`.

    python benchmarks/attend.py [--quick] [--json FILE] [--rows TEXT ...] [--flex] [--x-transformers] [--isa NAME]
                                [--lengths 4096 8192] [--head-dims 64 128] [--dtypes fp32 bf16] [--sweep]
                                [--parts masks plain short decode overhead memory dense]
                                [--seconds S] [--minutes M]

b 1, h 8. Contestants take turns; medians. A row is shown as soon as it is measured, and the tables at the end. Each
contestant of the masks' tables gets `--seconds`; after `--minutes` no further row of them is begun, nor another table.

*Ideal* is SDPA's time with the same dense mask (in bf16 with AMX: without any) times the share of pairs that the mask
lets through; where SDPA needs no mask, `attend` is held to the bare call. `attend` stands for the backend that the plan
chose, *portable* for what a plan without the native kernel would take. A rival who is ten times slower than the fastest
runs once. Bars are those of the kernel's instruction set. `--isa avx2` runs all of it in a process in which torch, MKL
and oneDNN are held to that set as well as the kernel (`TRUEMASK_ISA`, `ATEN_CPU_CAPABILITY` and their kin do it by
hand).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attend_dense import dense_table
from attend_peers import BARE, DTYPES, FLEX, MASKED, PLANNED, SECONDS, X_TRANSFORMERS, Peak, Row, bars, measured, peak
from attend_plain import plain_table
from attend_small import DIRECTIONS, decode_table, memory_of, memory_table, overhead_table, short_table
from bench_masks import attend_masks
from harness import AT_ONCE, Table, finish, ms, options

from truemask.backends.costs.model import source
from truemask.backends.isa import ISAS, VARIABLE
from truemask.backends.native.library import isa
from truemask.benchmarking.workloads import Workload
from truemask.cli.commands.bench import measure_what_nobody_has
from truemask.cli.console import make_console

HEADS, QUICK_LENGTH = 8, 300


class Size(NamedTuple):
    """What is raced: so many tokens, in 8 heads of that size."""

    n: int
    d: int = 64
    dtype: str = "fp32"


DEFAULT = (Size(1024), Size(4096), Size(4096, 128), Size(4096, 64, "bf16"))  # a quarter of an hour with two cores
SWEEP = {"lengths": (1024, 2048, 4096, 8192, 16384), "head_dims": (64, 128), "dtypes": tuple(DTYPES)}
USUAL = {"lengths": (8192,), "head_dims": (64,), "dtypes": ("fp32",)}  # of what is not given where something is
SMALL = {
    "plain": plain_table,
    "short": short_table,
    "decode": decode_table,
    "overhead": overhead_table,
    "memory": memory_table,
    "dense": dense_table,
}
CAPABILITY, MKL, ONEDNN = "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"
HELD = {  # what holds torch and its libraries to a variant of the kernel; the best needs nothing
    "avx512_bf16": {ONEDNN: "AVX512_CORE_BF16"},
    "avx512": {ONEDNN: "AVX512_CORE"},
    "avx2": {CAPABILITY: "avx2", MKL: "AVX2", ONEDNN: "AVX2"},
    "base": {CAPABILITY: "default", MKL: "SSE4_2", ONEDNN: "SSE41"},
}


def sizes(given: argparse.Namespace) -> list[Size]:
    """What the command line asks for."""
    if given.quick:
        return [Size(QUICK_LENGTH), Size(QUICK_LENGTH, 16, "bf16")]
    usual = SWEEP if given.sweep else USUAL
    chosen = {name: getattr(given, name) for name in usual}
    if not given.sweep and not any(chosen.values()):
        return list(DEFAULT)
    lengths, dims, dtypes = (chosen[name] or usual[name] for name in usual)
    return [Size(n, d, dtype) for n in lengths for d in dims for dtype in dtypes]


def masks_table(size: Size, grad: bool, top: Peak, given: argparse.Namespace) -> Table:
    """All masks at one size in one direction."""
    workload = Workload.of(size.n, 1 if given.quick else HEADS, size.d, dtype=DTYPES[size.dtype])
    what = f"{size.n} tokens, {workload.q.shape[1]} heads of {size.d}, {size.dtype}, {DIRECTIONS[grad]}"
    table = Table(what, _header(grad, given))
    table.note = f"kernel: {isa() or 'none'}; predicted from {source()}"
    if not grad:
        table.note += f"; of peak: {top.flops / 1e9:.0f} GF/s in {size.dtype}, {top.source}"
    wanted = given.rows or [""]
    masks = {name: mask for name, mask in attend_masks(size.n).items() if any(text in name for text in wanted)}
    print(f"{AT_ONCE}{what}: {', '.join(table.header)}", flush=True)
    for name, mask in masks.items():
        if not is_late(given):
            row = measured(mask, workload, grad, given)
            table.add(
                name, *_cells(row, top, given),
                **size._asdict(), grad=grad, name=name, mask=repr(mask), density=row.density, pace=row.pace(PLANNED),
                timings={who: timing._asdict() for who, timing in row.found.items()}, backend=row.plan.backend,
                predicted=row.plan.costs, flops=None if grad else row.flops, peak=top.flops, isa=isa(),
            )  # fmt: skip
    if len(table.rows) < len(masks):
        table.note += f"; {len(masks) - len(table.rows)} rows were not measured: {given.minutes:g} minutes were over"
    return table


def is_late(given: argparse.Namespace) -> bool:
    """Whether the minutes are over."""
    return given.minutes is not None and time.monotonic() > given.start + 60 * given.minutes


def _header(grad: bool, given: argparse.Namespace) -> tuple[str, ...]:
    rivals = (*(["flex, ms"] if given.flex and not grad else []), *(["x-tr., ms"] if given.x_transformers else []))
    flex = ("of flex", "bar", "") if given.flex and not grad else ()
    peak_share = () if grad else ("of peak",)
    return (
        *("mask", "pairs", "bare, ms", "mask, ms", *rivals, "portable, ms", "attend, ms", "spread", "faster"),
        *("pace", "bar", "", *flex, *peak_share, "backend", "predicted, ms", "chosen"),
    )


def _cells(row: Row, top: Peak, given: argparse.Namespace) -> list[str]:
    """A row but for its name."""
    grad, asked, chosen = row.plan.request.grad, bars(), row.plan.backend
    ours, theirs = row.seconds(PLANNED), row.seconds(MASKED)
    flex = given.flex and not grad
    rivals = [*([row.shown(FLEX)] if flex else []), *([row.shown(X_TRANSFORMERS)] if given.x_transformers else [])]
    return [
        *(f"{row.density:.1%}", row.shown(BARE), row.shown(MASKED), *rivals, row.portable(), ms(ours)),
        *(f"{row.found[PLANNED].spread:.0%}", f"{theirs / ours:.1f} x", *row.judged(PLANNED, asked)),
        *(row.beside_flex(asked) if flex else ()),
        *(() if grad else (f"{row.flops / top.flops:.0%}",)),
        *(chosen, ms(row.plan.costs[chosen]), row.chosen),
    ]


def held_to(name: str, arguments: Sequence[str]) -> str:
    """What this script prints where everybody is held to an instruction set: said before torch is loaded."""
    environment = {**os.environ, VARIABLE: name, **HELD.get(name, {})}
    command = [sys.executable, __file__, *arguments]
    kept: list[str] = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            kept += [] if line.startswith(AT_ONCE) else [line]
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return "".join(kept)


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the tables."""
    flag, many = {"action": "store_true"}, {"nargs": "+", "metavar": "N", "type": int}
    given = options(
        __doc__,
        arguments,
        rows={"nargs": "+", "metavar": "TEXT", "help": "only masks whose name holds one of these"},
        lengths=many,
        head_dims=many,
        dtypes={"nargs": "+", "choices": DTYPES},
        sweep={**flag, "help": "lengths 1024 to 16384, heads of 64 and 128, both dtypes: hours"},
        flex=flag,
        x_transformers=flag,
        isa={"choices": ISAS, "help": "hold everybody to this instruction set"},
        parts={"nargs": "+", "choices": ("masks", *SMALL), "help": "only these tables"},
        seconds={"type": float, "default": SECONDS, "help": "for each contestant of the masks' tables"},
        minutes={"type": float, "help": "how long it may take, but for the row that is being measured"},
        memory={"help": argparse.SUPPRESS},
    )
    given.start = time.monotonic()
    if given.memory:
        print(memory_of(given.memory == "1", given.quick))
        return ""
    if given.isa:
        words = list(sys.argv[1:] if arguments is None else arguments)
        place = next(i for i, word in enumerate(words) if word.startswith("--isa"))
        return held_to(given.isa, words[:place] + words[place + 1 + ("=" not in words[place]) :])
    measure_what_nobody_has(make_console())
    return finish(list(tables(given)), given)


def tables(given: argparse.Namespace) -> Iterator[Table]:
    """Those that are asked for."""
    parts = given.parts or ("masks", *SMALL)
    if "masks" in parts:
        tops: dict[str, Peak] = {}
        for size in sizes(given):  # again for each, for the machine may have been busy
            if is_late(given):
                break
            top = tops[size.dtype] = max(tops.get(size.dtype, Peak()), peak(size.dtype, given.quick))
            yield from (masks_table(size, grad, top, given) for grad in DIRECTIONS if not is_late(given))
    yield from (made(given) for name, made in SMALL.items() if name in parts and not is_late(given))


if __name__ == "__main__":
    main()
