"""The examples run, at small sizes, and say what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from truemask.nn import attention

FOLDER = Path(__file__).parents[2] / "examples"
SMALL = ("--tokens", "97", "--window", "31", "--steps", "1")


def example(name: str) -> dict[str, Any]:
    """The names of a file of the folder."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))


def test_every_example_is_on_the_page() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.py"):
        assert f"({path.name})" in page


def test_a_step_in_bf16_is_the_same_step_as_the_peers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `peers` has it)")
    ran = example("bf16_training_step")["main"](SMALL)
    ours, theirs = (trainer.losses for trainer in ran.values())
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, abs=0.02)  # bf16
    assert ours[1] < ours[0]
    out = capsys.readouterr().out
    assert "97 tokens under `causal & window(31)`, bf16" in out
    assert "times as fast" in out


def test_without_the_peer_it_runs_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    dtypes: list[torch.dtype] = []
    run = attention.results
    monkeypatch.setattr(attention, "results", lambda q, *rest: dtypes.append(q.dtype) or run(q, *rest))
    assert list(example("bf16_training_step")["main"]((*SMALL[:-1], "0"))) == ["truemask"]
    assert dtypes == [torch.bfloat16] * 4, "autocast reaches attention in every layer"
    assert "pip install x-transformers" in capsys.readouterr().out
