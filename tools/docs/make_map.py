"""Writes the map of the house into CONTRIBUTING.md: each file with the first sentence of its own docstring."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- map: begin -->\n```text\n", "```\n<!-- map: end -->"

# What is not Python says here what it is; a folder stands for everything in it.
OTHERS = {
    "Makefile": "the commands: run, test, check, bench, format, clean",
    "pyproject.toml": "the package, its extras, and the settings of ruff, pyright and pytest",
    "constraints.txt": "one tested version of every dependency",
    "tools/install_torch.sh": "torch first, with a word before a CUDA build is fetched for nothing",
    "tools/native_build.py": "compiles csrc/ when truemask is installed, where there is a C++ compiler",
    ".ci/run": "what a change must pass: `make test`",
    ".pre-commit-config.yaml": "the same checks before a commit",
    "README.md": "what it is, in English",
    "README.zh-CN.md": "what it is, in Chinese",
    "CHANGELOG.md": "what changed for users",
    "CITATION.cff": "how to cite it",
    "LICENSE": "MIT",
    "docs/conventions.md": "the laws, each once, and the table of conventions",
    "benchmarks/README.md": "one run of the benchmarks, written by `make bench`",
    "docs/attend.md": "every option of attend, run",
    "docs/diagnosis.md": "what is likely wrong with a mask, why a pair is as it is, what gets through all layers",
    "docs/recipes.md": "short recipes, run: encoder-decoders, threads, checkpointing, adapters, pictures, extras",
    "docs/your_model.md": "your model under any mask, audited, and packed texts",
    "docs/problems/": "twenty problems with attention masks, each with its answer, run",
    "docs/exact.md": "what a mask knows of itself without looking at cells, and intervals for other kernels",
    "docs/internals/native.md": "the CPU kernel: what it does with a mask, its numbers, instruction sets, building",
    "docs/flex.md": "block masks for FlexAttention, and the backend that runs it",
    "docs/language.md": "every mask: name, formula, picture",
    "docs/article.md": "the article that this project started from, line by line, run as written",
    "docs/from_x_transformers.md": "names kept, names changed",
    "docs/pictures/": "pictures that the library drew",
}


def said(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence, dot, _ = text.partition(". ")
    return sentence + "." if dot else text


def noted(path: Path) -> str:
    """The first sentence of a C++ file's comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("//").strip() for line in lines[:3] if line.startswith("//"))
    sentence, dot, _ = comment.partition(". ")
    return sentence + "." if dot else comment


def drawn(stairs: Sequence[str]) -> str:
    """The map: the package in the order of the stairs, then tests, documents and the rest."""
    source, tests = ROOT / "src" / "truemask", ROOT / "tests"
    rooms = [
        ("src/truemask/, from the ground floor up", [(name, said(source / name)) for name in stairs]),
        ("src/", [(p.name, said(p)) for p in sorted((ROOT / "src").glob("*.py"))]),
        ("tests/", [(p.relative_to(tests).as_posix(), said(p)) for p in sorted(tests.rglob("*.py")) if said(p)]),
        ("benchmarks/", [(p.name, said(p)) for p in sorted((ROOT / "benchmarks").glob("*.py"))]),
        ("tools/docs/", [(p.name, said(p)) for p in sorted((ROOT / "tools" / "docs").glob("*.py"))]),
        ("csrc/, compiled by tools/native_build.py", [(p.name, noted(p)) for p in sorted((ROOT / "csrc").iterdir())]),
        ("the rest", list(OTHERS.items())),
    ]
    lines = []
    for title, entries in rooms:
        width = max(len(name) for name, _ in entries) + 2
        lines += ["", title, *(f"  {name:<{width}}{what}".rstrip() for name, what in entries)]
    return "\n".join(lines[1:]) + "\n"


def in_page(page: str) -> str:
    """The map that stands between the marks of the page."""
    return page.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.test_house import STAIRS

    head, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} has lost the marks of the map: {BEGIN.strip()!r} and {END.strip()!r}")
    PAGE.write_text(head + begin + drawn(STAIRS) + end + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
