"""A small text, and the smallest run that trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from truemask.train.config import TrainConfig

WORDS = "the cat sat on a mat and saw one red fox run far off into the old dark wood".split()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty files of simple text, some of them in a folder of their own."""
    root = tmp_path_factory.mktemp("text")
    (root / "more").mkdir()
    for i in range(30):
        words = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(40 + 3 * i)]
        (root / ("more" if i % 3 else ".") / f"{i}.txt").write_text(" ".join(words) + "\n")
    return root


@pytest.fixture
def config(folder: Path) -> TrainConfig:
    return small(folder)


def small(folder: Path, **changes: Any) -> TrainConfig:
    """A configuration that trains in a blink."""
    values = {
        "data": (str(folder),),
        "mask": "causal & (window(7) | prefix(2))",
        "length": 31,
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "batch": 3,
        "steps": 6,
        "warmup": 2,
        "held_out": 0.2,
        "evaluate_rows": 5,
        "save_every": 3,
        "evaluate_every": 3,
    }
    return TrainConfig(**{**values, **changes})
