"""Where the audit is called from: what a wrong call says, the command line and its exit codes, the plugin elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.support.audited_models import Sums, ids
from truemask.auditing.audit import audit
from truemask.auditing.subject import AuditError
from truemask.cli.commands import audit as command
from truemask.errors import MaskError
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.per_token import keys

MODELS = """
import torch
from torch import nn

class Sums(nn.Module):
    config = type("Config", (), {"vocab_size": 11})

    def __init__(self, back=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.back = nn.Embedding(11, 4), back

    def forward(self, x):
        x = self.embedding(x)
        return x.flip(1).cumsum(1) if self.back else x.cumsum(1)

def clean():
    return Sums()

def leaky():
    return Sums(back=True), torch.tensor([[1, 2, 3, 4]])

def stated():
    return Sums(), torch.tensor([[1, 2, 3, 4]]), "window(2)"

def broken():
    raise KeyError("weights")

def number():
    return 7

def leaves():
    raise SystemExit(0)

class Reads(Sums):
    def forward(self, input_ids, decoder_input_ids):
        named = (input_ids == 7) | (decoder_input_ids == 7)
        assert not named.any(), "an image where there is none"
        return super().forward(decoder_input_ids) + self.embedding(input_ids).mean(1, keepdim=True)

def reads():
    model = Reads()
    model.config = type("Config", (), {})()
    model.config.vocab_size, model.config.image_token_id = 11, 7
    return model
"""


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"the input is int64 \[5\].*pass batch\[None\]"),
        (torch.zeros(2, 5), r"the input is float32 \[2, 5\].*expected whole ids \[b, n\] or embeddings"),
        (torch.ones(2, 5, dtype=torch.bool), r"the input is bool \[2, 5\]"),
        (torch.zeros(0, 5, dtype=torch.int64), r"the input is int64 \[0, 5\]"),
        ({"input": ids(1, 4)}, r"batch has the keys \['input'\], none of which is one of .*input_ids"),
        ("hello", r"batch is str 'hello'; expected token ids"),
    ],
    ids=str,
)
def test_a_batch_that_cannot_be_fed(batch: Any, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        audit(Sums(), batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": 3}, "mask= is int 3; expected a mask such as tm.causal"),
        ({"mask": "windw(3)"}, "did you mean 'window'"),
        ({"mask": keys([True] * 3)}, "the mask does not fit 1 samples of 4 positions: .* holds data for 3 keys"),
        ({"mask": torch.ones(2, 4, 4).bool()}, "two ways: axes='bqk'"),
        ({"mask": torch.ones(4, 4)}, "float32"),
        ({"mask": [causal, window(2)], "layers": 3}, "2 masks were given, one for each layer, and layers=3"),
        ({"mask": []}, "mask= is list"),
        ({"layers": 0}, "layers= is int 0"),
        ({"seeds": True}, "seeds= is bool True"),
        ({"positions": 1}, "positions= is int 1; expected a whole number, 2 or more"),
    ],
    ids=str,
)
def test_an_argument_that_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises((AuditError, MaskError), match=message):
        audit(Sums(), ids(1, 4), **options)


def test_not_a_model() -> None:
    with pytest.raises(AuditError, match=r"model is .*print.*; expected a torch\.nn\.Module"):
        audit(print, ids(1, 4))  # pyright: ignore


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `truemask audit` in a folder with `audited_models.py`; gives the exit code and all that was written."""
    (tmp_path / "audited_models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "audited_models", raising=False)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command.audit)

    def call(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(words))
        return result.exit_code, result.output

    return call


def test_exit_codes(run: Any, tmp_path: Path) -> None:
    code, output = run("audited_models:clean", "--length", "5")
    assert (code, "audit of Sums, 2 samples of 5 positions: held to `causal` (assumed)" in output) == (0, True)
    code, output = run("audited_models.py:leaky", "--html", "report.html", "--ascii")
    assert (code, "future-leak" in output) == (1, True)
    assert output.isascii()
    assert "future-leak" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert run("audited_models:stated", "--layers", "1")[0] == 1
    assert run("audited_models:stated", "--mask", "causal")[0] == 0


def test_json(run: Any) -> None:
    code, output = run("audited_models:leaky", "--json")
    report = json.loads(output)
    assert (code, report["ok"], report["findings"][0]["code"], report["leaks"]) == (1, False, "future-leak", 4)


def test_json_tells_what_the_report_tells(run: Any) -> None:
    for name in ("clean", "leaky", "reads"):
        code, output = run(f"audited_models:{name}", "--json")
        report = json.loads(output)
        text = " ".join(run(f"audited_models:{name}")[1].split())
        assert set(report) == {"title", "ok", "findings", "notes", "leaks", "blind"}
        severities = {finding["severity"] for finding in report["findings"]}
        assert code == int(not report["ok"]) == int(bool(severities - {"note"}))
        assert all(" ".join(note.split()) in text for note in (report["title"], *report["notes"]))
        assert all(" ".join(finding["message"].split()) in text for finding in report["findings"])
        assert bool(report["leaks"]) == any("leak" in finding["code"] for finding in report["findings"])


def test_a_batch_made_here_has_no_special_tokens_and_feeds_both_sides(run: Any) -> None:
    code, output = run("audited_models:reads", "--length", "40")
    assert (code, "audit of Reads, 2 samples of 40 positions" in output) == (0, True), output


def test_a_file_is_that_file_whatever_else_has_its_name(run: Any, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("audited_models.py", "json.py"):
        (tmp_path / "sub" / name).write_text(MODELS.replace("back=False", "back=True"), encoding="utf-8")
        assert run(f"sub/{name}:clean")[0] == 1
    assert run("audited_models.py:clean")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["audited_models"], "is not MODULE:FACTORY"),
        (["nowhere_at_all:clean"], "there is no module 'nowhere_at_all'"),
        (["nowhere.py:clean"], "there is no file nowhere.py"),
        (["audited_models:claen"], "has no function 'claen', did you mean 'clean'?"),
        (["audited_models:number"], "the factory returned int 7; expected a model, (model, batch)"),
        (["audited_models:broken"], "KeyError: 'weights'"),
        (["audited_models:leaves"], "SystemExit: 0"),
        (["audited_models:clean", "--html", "nowhere/report.html"], "nowhere/report.html"),
        (["audited_models:clean", "--mask", "cuasal"], "did you mean 'causal'?"),
        (["audited_models:stated", "--layers", "1", "--mask", "keys([True])"], "the mask does not fit"),
    ],
    ids=str,
)
def test_mistakes_are_exit_code_2(run: Any, words: list[str], message: str) -> None:
    code, written = run(*words)
    assert code == 2
    assert message in written.replace("\n", " ") or message in written


# -- the pytest plugin -------------------------------------------------------------------------------------------------


def test_the_plugin_in_another_project(tmp_path: Path) -> None:
    (tmp_path / "audited_models.py").write_text(MODELS, encoding="utf-8")
    (tmp_path / "test_models.py").write_text(
        "from audited_models import clean, leaky\n"
        "def test_clean(assert_no_leak):\n    assert assert_no_leak(clean(), leaky()[1]).ok\n"
        "def test_leaky(assert_no_leak):\n    assert_no_leak(*leaky())\n",
        encoding="utf-8",
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "truemask_pytest", "-p", "no:cacheprovider", "."]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # whether or not the entry point is installed
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=alone)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed, 1 passed" in result.stdout
    assert "[future-leak]" in result.stdout
