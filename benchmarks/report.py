"""Runs `plan.py` and `attend.py` and writes `README.md` of this folder: what `make bench` does.

python benchmarks/report.py [--quick] [--page FILE] [--json FOLDER]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attend
import plan
from harness import options

PAGE = Path(__file__).with_name("README.md")
HEAD = """\
# Benchmarks

`make bench` runs `plan.py` and `attend.py` and writes this page; no number on it was typed. How things are measured
stands at the head of each script. Each runs alone too: `python benchmarks/plan.py [--quick] [--json FILE]`; `costs.py`
shows the constants that plans predict with. `truemask bench` races masks of your own on your machine.

Contestants take turns and medians are shown, *spread* is half the distance of the quartiles. A bar is what the project
asks of itself on a quiet machine with two cores; where it is missed, the page says so.
"""
TINY = "**This run was made at tiny sizes (`--quick`), to see that the scripts run. Its numbers say nothing.**\n"


def main(arguments: Sequence[str] | None = None) -> str:
    """Run everything and write the page."""
    given = options(__doc__, arguments, page={"type": Path, "default": PAGE})
    parts = [HEAD, *([TINY] if given.quick else [])]
    for title, script in (("Knowing a mask", plan), ("Attention under a mask", attend)):
        wanted = ["--quick"] * given.quick
        if given.json:
            given.json.mkdir(parents=True, exist_ok=True)
            wanted += ["--json", str(given.json / f"{script.__name__}.json")]
        parts.append(f"## {title}\n\n```text\n{script.main(wanted)}\n```\n")
    text = "\n".join(parts)
    given.page.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
