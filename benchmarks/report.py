"""Runs the benchmarks and writes `README.md` of this folder: what `make bench` does.

python benchmarks/report.py [--quick] [--page FILE] [--json FOLDER] [--resume FOLDER]

Pages of other machines lie in `machines/`, and are shorter: `--page benchmarks/machines/NAME.md` takes ten minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from types import ModuleType

import attend
import decode
import endless
import huggingface
import plan
import soak
import speculate
from harness import options

import train

PAGE = Path(__file__).with_name("README.md")
MACHINES = PAGE.resolve().with_name("machines")
HEAD = """\
# Benchmarks

`make bench` runs the commands that stand above their tables and writes this page; no number on it was typed. How things
are measured stands at the head of each script, and each takes `--quick` and `--json FILE`. `costs.py` shows the
constants that plans predict with, `choices.py` whether plans choose well; `soak_use.py` holds the answers to requests
of many threads to those of the same requests alone. `truemask bench` races masks of your own on your machine.

Each table says which machine it is of; other machines have pages in [machines/](machines).

Contestants take turns and medians are shown, *spread* is half the distance of the quartiles. A bar is what the project
asks of itself on a quiet machine with two cores; where it is missed, the page says so.
"""
MACHINE_HEAD = """\
# Benchmarks of one machine

Written as [the page of all benchmarks](../README.md) is, which says how to read it.
"""
PEERS = (
    "--parts",
    "masks",
    "--lengths",
    "8192",
    "--flex",
    "--x-transformers",
    "--rows",
    "causal",
    "sinks",
    "documents",
)
LONG = ("--parts", "masks", "--lengths", "16384", "--rows", "causal", "documents")
SECTIONS: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "Knowing a mask": (plan, ()),
    "Attention under a mask": (attend, ()),
    "Attention beside other libraries": (attend, PEERS),
    "Attention at 16,384 tokens": (attend, LONG),
    "Steps of training": (train, ("--plot", "docs/pictures/training.svg")),
    "A real model under `tm.use`": (huggingface, ()),
    "Generation": (decode, ()),
    "Speculation": (speculate, ()),
    "A text without end": (endless, ()),
    "Random calls of the native kernel": (soak, ()),
}
BRIEF: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "Attention": (
        attend,
        (
            *("--parts", "masks", "plain", "decode", "--lengths", "4096"),
            "--dtypes",
            *attend.DTYPES,
            *("--seconds", "1"),
        ),
    ),
    "Generation": (decode, ("--turns", "5")),
}
TINY = "**This run was made at tiny sizes (`--quick`), to see that the scripts run. Its numbers say nothing.**\n"


def main(arguments: Sequence[str] | None = None) -> str:
    """Run everything and write the page."""
    folder = {
        "type": Path,
        "metavar": "FOLDER",
        "help": "keep each section here, and take those that are there already",
    }
    given = options(__doc__, arguments, page={"type": Path, "default": PAGE}, resume=folder)
    is_other = given.page.resolve().parent == MACHINES
    parts = [MACHINE_HEAD if is_other else HEAD, *([TINY] if given.quick else [])]
    for number, (title, (script, words)) in enumerate((BRIEF if is_other else SECTIONS).items()):
        command = " ".join(["python", f"benchmarks/{Path(str(script.__file__)).name}", *map(quote, words)])
        parts.append(f"## {title}\n\n```text\n$ {command}\n{section(script, words, number, given)}\n```\n")
    text = "\n".join(parts)
    given.page.write_text(text, encoding="utf-8")
    return text


def section(script: ModuleType, words: tuple[str, ...], number: int, given: argparse.Namespace) -> str:
    """What a script prints, or printed before an interruption."""
    name = f"{number}-{script.__name__}"
    kept = given.resume / f"{name}.txt" if given.resume else None
    if kept and kept.is_file():
        return kept.read_text(encoding="utf-8")
    wanted = [*(["--quick"] if given.quick else words)]
    for folder in (given.json, given.resume):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    if given.json:
        wanted += ["--json", str(given.json / f"{name}.json")]
    text = script.main(wanted)
    if kept:
        kept.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
