"""Prose runs: Python blocks are executed and what they show is compared, commands run, links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "docs"))

import make_pictures  # noqa: E402
import pages  # noqa: E402

# Commands of the documents that the tests do not run, with the reason.
NOT_RUN = {
    "truemask tour": "minutes; tests of the command line run its acts",
    "truemask train": "two minutes of training; tests of the command line train for a few steps",
    "truemask bench": "seconds of timing; tests of the command line race at tiny sizes",
    "truemask generate": "needs a trained run; tests of the command line make one",
    "truemask perplexity": "needs a model; tests of the command line make some",
}

# Kinds of mask that have no section of their own: operators have one together, `prepended` is how models add registers.
NOT_IN_THE_LANGUAGE = {"and", "or", "xor", "minus", "not", "transposed", "prepended"}

PAGES = [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in pages.PAGES]
NAMES = re.compile(r"^### `(\w+)", re.MULTILINE)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES)
def test_python_blocks_print_what_the_page_shows(path: Path) -> None:
    for ran in pages.run_python(read(path), str(path)):
        shown = pages.tidy(ran.shown.text) if ran.shown else ""
        assert ran.printed == shown, f"{path.name} differs; `python tools/docs/pages.py` writes what is printed"


@pytest.mark.slow
@pytest.mark.parametrize("path", [page for page in PAGES if page.id != "README.zh-CN.md"])  # it shows README's
def test_commands_run(path: Path) -> None:
    for block in pages.blocks(read(path)):
        if block.language != "console":
            continue
        for command, shown in pages.commands(block):
            if command.startswith("make "):
                assert f"\n{command.split()[1]}:" in read(ROOT / "Makefile"), (
                    f"`{command}` is no target of the Makefile"
                )
            if not command.startswith("truemask ") or " ".join(command.split()[:2]) in NOT_RUN:
                continue
            printed = pages.run_command(command)
            assert printed
            assert not shown.strip() or pages.tidy(shown) == printed


def anchors(page: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", read(path)):
        if "://" not in target:
            file = path.parent / target if target else path
            assert file.exists(), f"{path.name} links to {target}, which is not there"
            assert not anchor or anchor in anchors(read(file)), (
                f"{path.name} links to {target}#{anchor}: no such heading"
            )


def test_the_language_page_has_every_mask() -> None:
    from truemask.masks.core.kinds import KINDS

    missing = {kind for kind in KINDS if kind not in NAMES.findall(read(ROOT / "docs" / "language.md"))}
    assert missing <= NOT_IN_THE_LANGUAGE, f"docs/language.md does not show {sorted(missing)}"


def test_both_readmes_show_the_same_code() -> None:
    def code(name: str) -> list[str]:
        found = pages.blocks(read(ROOT / name))
        return [re.sub(r" *#.*", "", block.text) for block in found if block.language in {"python", "console", "text"}]

    assert code("README.md") == code("README.zh-CN.md")


def test_the_table_of_conventions_is_told_the_same_everywhere() -> None:
    page = read(ROOT / "docs" / "conventions.md")
    table = page.partition("<!-- conventions: begin -->\n")[2].partition("<!-- conventions: end -->")[0]
    assert table.startswith("| you have |")
    assert table in read(ROOT / "README.md")
    assert table in re.sub("；反过来：", "; back: ", read(ROOT / "README.zh-CN.md"))  # noqa: RUF001


def test_both_readmes_begin_with_the_promise() -> None:
    assert "attention masks" in read(ROOT / "README.md").splitlines()[0]
    assert "注意力掩码" in read(ROOT / "README.zh-CN.md").splitlines()[0]


@pytest.mark.parametrize("name", sorted(make_pictures.PICTURES))
def test_pictures_are_up_to_date(name: str) -> None:
    committed = read(make_pictures.FOLDER / name)
    assert committed == make_pictures.drawn(name), "`python tools/docs/make_pictures.py` (or `make format`) redraws it"
