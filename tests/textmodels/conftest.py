"""A model of each kind: a run of bytes, a folder with rotary positions, one with learned ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.text_models import gpt2_folder, llama_folder
from tests.train.conftest import folder as folder
from tests.train.conftest import small
from truemask.train.trainer import Trainer

TEXT = "the cat sat on the mat, at the café; " * 3


@pytest.fixture(scope="session")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    list(Trainer(small(folder), out).run())
    return out


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2_folder(tmp_path_factory.mktemp("models") / "gpt2")
