"""Runs what the documents show: every Python block, and the `truemask` commands of console blocks.

`python tools/docs/pages.py` writes into each page what its blocks really print; `tests/repo/test_docs.py` checks that.

* A `python` block is executed; the blocks of a page share their names. What it prints stands in a `text` block right
  below it. A warning is printed as `Category: message`, folded like the page.
* In a `console` block a line `$ truemask ...` is a command. If output is shown below it, it is the real output.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
WIDTH = 118
os.environ["TRUEMASK_COSTS"] = "avx2"  # plans are the same on every machine
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page: its language, its text, and where the text begins and ends in the page."""

    language: str
    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class Ran:
    """A block of code, what it printed, and the block in which the page shows that (None: it shows nothing)."""

    code: Block
    printed: str
    shown: Block | None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    return [Block(m[1], m[2], m.start(2), m.end(2)) for m in FENCE.finditer(page)]


def shown_below(page: str, found: list[Block], i: int) -> Block | None:
    """The `text` block that follows block i with nothing but its fences and blank lines between."""
    if i + 1 == len(found) or found[i + 1].language != "text":
        return None
    between = page[found[i].stop : found[i + 1].start]
    return found[i + 1] if between.replace("`", "").strip() == "text" else None


def run_python(page: str, name: str) -> list[Ran]:
    """Execute the Python blocks of a page, in order and with shared names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(page)
    ran = []
    for i, block in enumerate(found):
        if block.language == "python":
            line = page.count("\n", 0, block.start)
            code = compile("\n" * line + block.text, name, "exec")
            ran.append(Ran(block, printed_by(code, names), shown_below(page, found, i)))
    return ran


def printed_by(code: Any, names: dict[str, Any]) -> str:
    """What executing `code` prints, warnings included, without trailing spaces."""
    out = io.StringIO()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        out.write(textwrap.fill(f"{category.__name__}: {message}", WIDTH, break_on_hyphens=False) + "\n")

    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # other libraries', on their first import only
        warnings.showwarning = show
        exec(code, names)
    return tidy(out.getvalue())


def tidy(text: str) -> str:
    """Lines without trailing spaces, one line end at the end."""
    stripped = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
    return stripped + "\n" if stripped else ""


def commands(block: Block) -> list[tuple[str, str]]:
    """The (command, output shown below it) of a console block; a comment behind the command is left out."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    return [(re.sub(r"\s+# .*", "", command), shown) for command, _, shown in (part.partition("\n") for part in parts)]


def run_command(command: str) -> str:
    """What a `truemask ...` command prints, run in an empty folder, 100 columns wide and without colour."""
    words = shlex.split(command)
    program = [sys.executable, "-m", "truemask", *words[1:]]
    plain = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            program, cwd=folder, env=plain, capture_output=True, text=True, encoding="utf-8", check=False
        )
    if done.returncode:
        raise RuntimeError(f"`{command}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return tidy(done.stdout)


def rewritten(page: str, name: str) -> str:
    """The page with what its Python blocks print and what its shown commands print."""
    edits = [(r.shown.start, r.shown.stop, r.printed) for r in run_python(page, name) if r.shown is not None]
    for block in blocks(page):
        if block.language == "console" and any(shown.strip() for _, shown in commands(block)):
            edits.append((block.start, block.stop, console_rewritten(block)))
    for start, stop, text in sorted(edits, reverse=True):
        page = page[:start] + text + page[stop:]
    return page


def console_rewritten(block: Block) -> str:
    text = block.text
    for command, shown in commands(block):
        if shown.strip() and command.startswith("truemask "):
            text = text.replace(shown, run_command(command), 1)
    return text


def main() -> None:
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rewritten(before, str(path))
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"rewrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
