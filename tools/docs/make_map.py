"""Writes docs/internals/map.md: each file of the repository with the first sentence of its own docstring."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "internals" / "map.md"
HEAD = """# The map

Every file with the first sentence of its own docstring, the package room by room from the ground floor up (imports run
down only). `python tools/docs/make_map.py` writes this page. [CONTRIBUTING](../../CONTRIBUTING.md) says what the rooms
are for, and the [glossary](glossary.md) what their words mean.

"""

# What is not Python says here what it is; a folder stands for everything in it.
OTHERS = {
    "Makefile": "the commands: run, test, check, bench, format, clean",
    "pyproject.toml": "the package, its extras, and the settings of ruff, pyright and pytest",
    "constraints.txt": "one tested version of every dependency",
    "tools/install_torch.sh": "torch first, with a word before a CUDA build is fetched for nothing",
    "tools/native_build.py": "compiles csrc/ when truemask is installed, where there is a C++ compiler",
    ".ci/run": "what a change must pass: `make run` in bare copies, and `make test`",
    ".pre-commit-config.yaml": "the same checks before a commit",
    "src/truemask_pytest.py": "the pytest fixture of `assert_no_leak`",
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
    "docs/internals/": "for maintainers: this map, the glossary, and the CPU kernel with its numbers",
    "docs/generation.md": "generation under a mask: a cache as small as the mask, beams, drafts",
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
    """The page: the package in the order of the stairs, then tests, documents and the rest."""
    source = ROOT / "src" / "truemask"
    package = [path for room in stairs for path in files_of(source, room, stairs)]
    parts = [
        ("src/truemask/", [(path.relative_to(source).as_posix(), said(path)) for path in package]),
        ("csrc/, compiled by tools/native_build.py", in_folder(ROOT / "csrc")),
        ("tests/", in_folder(ROOT / "tests")),
        ("benchmarks/", in_folder(ROOT / "benchmarks")),
        ("examples/", in_folder(ROOT / "examples")),
        ("tools/docs/", in_folder(ROOT / "tools" / "docs")),
        ("the rest", list(OTHERS.items())),
    ]
    return HEAD + "\n".join(section(title, entries) for title, entries in parts)


def files_of(source: Path, room: str, stairs: Sequence[str]) -> list[Path]:
    """The files of one line of the stairs: the file itself, or what lies in the folder and has no line of its own."""
    if room.endswith(".py"):
        return [source / room]
    return [path for path in sorted((source / room).glob("*.py")) if f"{room}/{path.name}" not in stairs]


def in_folder(folder: Path) -> list[tuple[str, str]]:
    """The files of a folder that say what they are."""
    what = {".py": said, ".h": noted, ".cpp": noted}
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in what]
    found = [(path.relative_to(folder).as_posix(), what[path.suffix](path)) for path in paths]
    return [(name, text) for name, text in found if text]


def section(title: str, entries: Sequence[tuple[str, str]]) -> str:
    """One part of the page: a heading and a list."""
    return "\n".join([f"## {title}", "", *(f"- `{name}`: {what}" for name, what in entries), ""])


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.repo.test_house import STAIRS

    PAGE.write_text(drawn(STAIRS), encoding="utf-8")


if __name__ == "__main__":
    main()
