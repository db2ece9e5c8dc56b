"""`show` and `explain`: what they print, where mistakes go, and that pipes and plain terminals get plain text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from truemask import causal, parse, prefix, window
from truemask.cli.app import app
from truemask.cli.commands.explain import dead, facts, ranges
from truemask.cli.console import make_console, needs_ascii

SHOWN = """\
causal & (window(3) | prefix(1))
  0 1 2 3 4
0 ■ · · · ·
1 ■ ■ · · ·
2 ■ ■ ■ · ·
3 ■ ■ ■ ■ ·
4 ■ · ■ ■ ■
14 of 25 pairs (56 %); queries down, keys across; ■ may attend, · may not
"""


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_show_draws_the_mask() -> None:
    assert run("show", "causal & (window(3) | prefix(1))", "--length", "5") == (0, SHOWN, "")


def test_show_takes_as_many_keys_as_are_asked_for() -> None:
    code, out, _ = run("show", "causal", "-n", "3", "-m", "5")
    assert code == 0
    assert "6 of 15 pairs" in out


def test_show_has_signs_for_every_terminal() -> None:
    code, out, _ = run("show", "causal", "-n", "40", "--ascii")
    assert code == 0
    assert out.isascii()


def test_show_saves_instead(tmp_path: Path) -> None:
    code, out, _ = run("show", "causal", "-n", "7", "--save", str(tmp_path / "a.svg"))
    assert (code, (tmp_path / "a.svg").read_text()[:4]) == (0, "<svg")
    assert "a.svg: causal at length 7" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "causal & windw(8)"), "did you mean 'window'?\n  causal & windw(8)\n           ^^^^^\n"),
        (("explain", "causal &"), "^"),
        (("show", "random(0.5, per_head=True)"), "pass `--heads`"),
        (("show", "keys([True, False])", "-n", "5"), "5"),
        (("show", "causal", "--save", "a.bmp"), "'.bmp'"),
        (("show", "causal", "--save", "nowhere/a.svg"), "nowhere/a.svg cannot be written: there is no folder nowhere"),
        (
            ("show", "mask.pt"),
            "'mask.pt' is a file's name, and here an expression is read: `truemask check` reads files",
        ),
        (("explain", "mask.csv"), "`truemask check` reads files"),
        (("explain", "random(0.5, per_head=True)"), "pass `--heads`"),
    ],
)
def test_mistakes_are_messages_on_standard_error(arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert "Traceback" not in err


def test_explain_counts_and_plans() -> None:
    code, out, err = run(
        "explain", "(causal & window(5)) - strided(7)", "--length", "101", "--dtype", "bfloat16", "--grad"
    )
    assert (code, err) == (0, "")
    mask = (causal & window(5)) - parse("strided(7)")
    assert f"{int(mask.count(101)):,} of 10,201" in out
    assert "dead keys       14 of 101 are seen by nobody: 6, 13, 20, 27, 34, 41, and 8 more runs" in out
    assert "bfloat16 on cpu, forward and backward" in out
    assert "\n> " in out
    assert "a sign is" in out


def test_facts_are_means_over_what_varies() -> None:
    found = dict(facts(causal & prefix([3, 5]), 11, 11))
    assert found["varies over"] == "samples (2)"
    assert found["pairs"] == "37.5 of 121 (31 %), from 30 to 45 over samples and heads"
    assert found["dead keys"].startswith("14 of 22 are seen by nobody (all samples")


def test_dead_positions_are_written_as_runs() -> None:
    assert dead(torch.zeros(1, 1, 5, dtype=torch.bool), "x") == "none"
    assert ranges(np.array([3])) == "3"
    assert ranges(np.arange(0, 40, 2)) == "0, 2, 4, 6, 8, 10, and 14 more runs"


def test_no_color_and_pipes_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert make_console().no_color
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    program = "from truemask.cli.app import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "show", "causal", "-n", "40"], capture_output=True, check=True
    )
    assert result.stdout.isascii()
    assert b"\x1b" not in result.stdout
    assert result.stderr == b""


def test_utf_8_terminals_get_blocks() -> None:
    console = make_console()
    assert needs_ascii(console) == (not console.encoding.lower().startswith("utf"))


def test_version_and_help_name_the_commands() -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("truemask ")
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("tour", "show", "explain", "train", "generate"))


def test_python_m_truemask_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "truemask", "show", "causal & windw(8)"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "^^^^^" in result.stderr


def test_explain_says_why_a_pair_is_as_it_is() -> None:
    code, out, _ = run("explain", "causal & (window(4) | prefix(2))", "--pair", "9", "3")
    assert code == 0
    assert out.splitlines()[0] == "query 9 may not attend to key 3"
    assert "prefix(2): key 3 is not among the first 2 keys" in out
    assert run("explain", "keys([True])", "--pair", "0", "5")[0] == 2
