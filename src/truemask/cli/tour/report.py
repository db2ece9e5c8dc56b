"""The report: everything that the tour said, as one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from truemask.cli.machine import facts

STYLE = """
:root { color-scheme: light dark; --ink: #0072B2; --good: #00704f; --bad: #b3400a; --soft: #8a939b55; }
@media (prefers-color-scheme: dark) { :root { --ink: #56B4E9; --good: #4fc3a1; --bad: #ff9b6a; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--soft); padding-bottom: .2rem; }
h2 small, .dim, figcaption { color: #767f87; font-weight: normal; font-size: .85rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--soft); }
pre { padding: .8rem 1rem; border: 1px solid var(--soft); border-radius: 6px; overflow-x: auto; font-size: .85rem; }
pre, .code { font-family: ui-monospace, Menlo, Consolas, monospace; } .code { color: var(--ink); font-size: .92em; }
.bold { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } svg { max-width: 100%; height: auto; }
.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: center; border-bottom: 1px solid var(--soft); }
.beside > p { flex: 1 1 20rem; }
"""


@dataclass(frozen=True)
class Chapter:
    """One act as it went: its blocks of HTML, its time, and the error if it failed or the word why it was left out."""

    name: str
    title: str
    blocks: list[str]
    seconds: float
    failure: str = ""
    skipped: bool = False

    @property
    def state(self) -> str:
        return (
            "skipped"
            if self.skipped
            else f"failed after {self.seconds:.1f} s"
            if self.failure
            else f"{self.seconds:.1f} s"
        )


def write_report(path: Path, chapters: Sequence[Chapter], commands: Sequence[str], threads: int) -> None:
    """Write the page."""
    machine = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts(threads))
    times = "".join(f"<tr><td>{escape(c.title)}</td><td>{escape(c.state)}</td></tr>" for c in chapters)
    body = "".join(_chapter(i, chapter) for i, chapter in enumerate(chapters, 1))
    after = escape("\n".join(commands))
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>truemask: the tour</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>truemask: the tour</h1><p class="dim">True means attend. {time.strftime("%Y-%m-%d %H:%M")}; every figure '
        f"was measured by this run.</p>{body}"
        f"<h2>What next</h2><pre>{after}</pre>"
        f"<h2>This run</h2><table>{times}</table><table>{machine}</table></body></html>\n",
        encoding="utf-8",
    )


def _chapter(number: int, chapter: Chapter) -> str:
    failure = f'<p class="bad">This act failed: {escape(chapter.failure)}</p>' if chapter.failure else ""
    blocks = "".join(chapter.blocks)
    return f"<h2>{number}. {escape(chapter.title)} <small>{escape(chapter.state)}</small></h2>{blocks}{failure}"
