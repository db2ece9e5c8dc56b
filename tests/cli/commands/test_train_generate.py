"""`train` and `generate` as a person uses them: train, stop, go on, write; and mistakes that say the way out."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.train.conftest import folder as folder
from truemask.cli.app import app
from truemask.cli.commands.train import stop_on_interrupt
from truemask.train.checkpoint import checkpoints

SMALL = ["--length", "31", "--dim", "16", "--depth", "1", "--heads", "2", "--batch", "3", "--evaluate-every", "2"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> tuple[Path, str]:
    out = tmp_path / "runs" / "one"
    code, output, err = run("train", "--data", str(folder), "--steps", "4", "--out", str(out), *SMALL)
    assert (code, err) == (0, "")
    return out, output


def test_train_writes_a_run_and_says_what_next(trained: tuple[Path, str]) -> None:
    out, said = trained
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert len(checkpoints(out)) == 1
    assert (out / "mask.png").is_file() or (out / "mask.svg").is_file()
    assert "causal & (window(256) | prefix(4)), per document" in said
    assert "bigram" in said
    assert "unigram" in said
    assert f"truemask generate {out}" in said
    assert "\x1b" not in said


def test_train_goes_on_and_can_be_made_longer(trained: tuple[Path, str]) -> None:
    out, _ = trained
    code, output, _ = run("train", "--resume", str(out), "--steps", "6", "--keep", "1")
    assert code == 0
    assert "after 6 steps (2 now)" in output
    assert [path.name for path in checkpoints(out)] == ["step-00000006"]


def test_several_paths_follow_data(folder: Path, tmp_path: Path) -> None:
    texts = [str(folder / "more"), str(folder / "0.txt"), str(folder / "3.txt")]
    code, output, _ = run("train", "--data", *texts, "--steps", "1", "--out", str(tmp_path / "run"), *SMALL)
    assert code == 0
    assert ", ".join(texts) in output


def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from truemask.train import trainer

    plain = trainer.Trainer._train_one

    def interrupted(self: trainer.Trainer) -> tuple[float, float]:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(self)

    monkeypatch.setattr(trainer.Trainer, "_train_one", interrupted)
    out = tmp_path / "run"
    code, output, _ = run("train", "--data", str(folder), "--steps", "50", "--out", str(out), *SMALL)
    assert code == 0
    assert f"stopped and saved; to go on: truemask train --resume {out}" in output
    assert checkpoints(out)[-1].name == "step-00000003"


def test_a_second_ctrl_c_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_generate_writes_the_same_text_for_the_same_seed(trained: tuple[Path, str]) -> None:
    out, _ = trained
    texts = [run("generate", str(out), "--prompt", "the ", "--tokens", "30", "--seed", seed)[1] for seed in "112"]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the ") and text.endswith("\n") for text in texts)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "{runs}/onee"), "did you mean 'one'"),
        (("train", "--resume", "{runs}/two"), "runs in"),
        (("train", "--resume", "{runs}/one", "--dim", "192"), "--dim cannot be given with it"),
        (("train", "--resume", "{runs}/one", "--data", "."), "--data cannot be given with it"),
        (("train", "--out", "{runs}/one"), "exists and is not empty"),
        (("train", "--mask", "causal & windw(8)"), "^^^^^"),
        (("train", "--mask", "keys([True])", "--steps", "1"), "1"),
        (("train", "--data", "{runs}/gone"), "no such file or folder"),
        (("train", "--steps", "1", "--minutes", "1"), "exactly one of"),
    ],
)
def test_mistakes_say_the_way_out(trained: tuple[Path, str], arguments: tuple[str, ...], says: str) -> None:
    runs = trained[0].parent
    code, _, err = run(*(argument.format(runs=runs) for argument in arguments))
    assert code == 2
    assert says in err
    assert "Traceback" not in err
