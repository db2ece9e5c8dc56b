"""Checkpoints: whole or not at all, without pickle, and a run that cannot be read says which ones can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from truemask.train.checkpoint import checkpoints, load_model, read_checkpoint
from truemask.train.config import TrainConfig, TrainError
from truemask.train.model import build_model
from truemask.train.trainer import Trainer


@pytest.fixture
def run(config: TrainConfig, tmp_path: Path) -> Path:
    trainer = Trainer(config, tmp_path / "runs" / "one")
    list(trainer.run())
    return tmp_path / "runs" / "one"


def test_a_checkpoint_is_four_files_without_pickle(run: Path, config: TrainConfig) -> None:
    newest = checkpoints(run)[-1]
    assert newest.name == "step-00000006"
    files = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in newest.iterdir()) == files
    assert json.loads((newest / "config.json").read_text()) == config.to_json()
    for path in newest.glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert json.loads(path.read_bytes()[8 : 8 + header])


def test_the_model_comes_back_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(config, tmp_path / "run")
    list(trainer.run())
    other = build_model(config)
    load_model(read_checkpoint(tmp_path / "run"), other)
    states = trainer.model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_unfinished_checkpoint_is_never_read(run: Path) -> None:
    newest = checkpoints(run)[-1]
    newest.rename(run / f".unfinished-{newest.name}-1")
    assert read_checkpoint(run).path.name == "step-00000003"
    (run / "step-00000009").mkdir()
    assert read_checkpoint(run).path.name == "step-00000003"


def test_only_the_newest_are_kept(run: Path, config: TrainConfig, tmp_path: Path) -> None:
    assert [path.name for path in checkpoints(run)] == ["step-00000003", "step-00000006"]
    trainer = Trainer(TrainConfig.from_json({**config.to_json(), "keep": 1, "save_every": 1}), tmp_path / "other")
    list(trainer.run())
    assert [path.name for path in checkpoints(tmp_path / "other")] == ["step-00000006"]


def test_a_checkpoint_can_be_named_itself(run: Path) -> None:
    assert read_checkpoint(run / "step-00000003").state["step"] == 3


def test_a_missing_run_lists_those_there_are(run: Path) -> None:
    with pytest.raises(TrainError, match=r"there is no run .*onee, did you mean 'one'\?; runs in .*: one"):
        read_checkpoint(run.parent / "onee")
    shutil.rmtree(run / "step-00000003")
    shutil.rmtree(run / "step-00000006")
    with pytest.raises(TrainError, match=r"holds no complete checkpoint .*holds no runs"):
        read_checkpoint(run)


def test_another_model_is_refused(run: Path, config: TrainConfig) -> None:
    deeper = build_model(TrainConfig.from_json({**config.to_json(), "depth": 2}))
    with pytest.raises(TrainError, match="does not fit this version's model; they differ in"):
        load_model(read_checkpoint(run), deeper)
