"""What the benchmarks share: turns and medians, peak memory in a process of its own, bars met or missed, text and JSON.

Every script is `python benchmarks/X.py [--quick] [--json FILE]` and ends in `finish`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import truemask as tm
from truemask.backends.costs.calibration_file import this_machine
from truemask.benchmarking.timing import Timing as Timing
from truemask.benchmarking.timing import clock as clock
from truemask.benchmarking.timing import race as race
from truemask.benchmarking.timing import timing as timing

MEGABYTE = 1e6
AT_ONCE = "> "  # before rows that are shown as they are measured; the tables come at the end
STATUS = Path("/proc/self/status")


@dataclass
class Table:
    """Rows of text under a title; `numbers` holds the same measurements unrounded."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""

    def add(self, *row: str, **numbers: Any) -> None:
        """A row as it is read, and its numbers; shown at once, into a pipe too: the next row may take minutes."""
        self.rows.append(row)
        self.numbers.append(numbers)
        print(AT_ONCE + " | ".join(row), flush=True)

    def __str__(self) -> str:
        lines = [tuple(self.header), *map(tuple, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        text = [_columns(line, widths) for line in lines]
        return "\n".join([self.title, *text, *([self.note] if self.note else [])])


def _columns(line: Sequence[str], widths: Sequence[int]) -> str:
    """The first cell to the left of its column, the others to the right."""
    cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
    return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()


def options(description: str | None, arguments: Sequence[str] | None, **more: dict[str, Any]) -> argparse.Namespace:
    """The command line: `--quick`, `--json FILE`, and what else a script wants."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the script runs")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    for name, keywords in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    return parser.parse_args(arguments)


def machine_line() -> str:
    """Processor, threads, versions, day."""
    versions = f"Python {sys.version.split()[0]}, truemask {tm.__version__}"
    return f"{this_machine()}, {versions}, {time.strftime('%Y-%m-%d')}"


def finish(tables: Sequence[Table], given: argparse.Namespace) -> str:
    """Print the tables under the machine's line, write the JSON if it is wanted; the text."""
    text = "\n\n".join([machine_line(), *map(str, tables)])
    print(text)
    if given.json:
        found = {"machine": machine_line(), "tables": [asdict(table) for table in tables]}
        given.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    return text


def verdict(value: float, bar: float, *, at_least: bool = False) -> str:
    """`met` or `MISSED`."""
    return "met" if (value >= bar if at_least else value <= bar) else "MISSED"


def ms(seconds: float) -> str:
    """Milliseconds, with three digits that count.

    >>> ms(0.0001234), ms(0.01234), ms(1.234)
    ('0.123', '12.3', '1234')
    """
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}".rstrip("0")[:5]


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_now(what: str) -> int:
    """Bytes of this process: `VmRSS` now, or `VmHWM` at its highest."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def peak_beyond(run: Callable[[], object]) -> int:
    """By how many bytes this process grows at its highest while it runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest is now
    before = memory_now("VmRSS")
    kept = run()
    peak = memory_now("VmHWM") - before
    del kept
    return peak


def peak_elsewhere(script: str, case: str) -> float | None:
    """Bytes that `script --memory CASE` prints, run in a process of its own; None where Linux is missing."""
    if not STATUS.exists():
        return None
    command = [sys.executable, script, "--memory", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def megabytes(nbytes: float | None) -> str:
    """Bytes as megabytes."""
    return "?" if nbytes is None else f"{nbytes / MEGABYTE:.1f} MB"


def fresh_threads() -> None:
    """Start torch's threads and load what it imports when it is first used, before memory is counted."""
    x = torch.randn(1, 4, 256, 64, requires_grad=True)
    out = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    torch.autograd.grad(out, x, torch.ones_like(out))
