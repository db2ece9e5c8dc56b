"""Files become documents: each once, divided by their names alone, and every mistake says what was looked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.train.conftest import small
from truemask.train.config import BOUNDARY, TrainConfig, TrainError
from truemask.train.corpus import read_corpus, standard_library


def test_every_file_is_one_document_on_one_side(folder: Path, config: TrainConfig) -> None:
    corpus = read_corpus(config)
    names = [document.name for document in (*corpus.train, *corpus.held_out)]
    assert sorted(names) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    assert 0 < len(corpus.held_out) < len(corpus.train)
    for document in corpus.train:
        assert document.tokens[0] == BOUNDARY
        assert bytes(document.tokens[1:].astype(np.uint8)) == (folder / document.name).read_bytes()


def test_the_division_depends_on_names_alone(folder: Path, config: TrainConfig, tmp_path: Path) -> None:
    for path in folder.rglob("*.txt"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text().upper())
    here, there = read_corpus(config), read_corpus(small(tmp_path))
    assert [d.name for d in here.held_out] == [d.name for d in there.held_out]
    assert here.digest != there.digest


def test_what_is_no_text_is_passed_over(folder: Path, tmp_path: Path) -> None:
    for name in ("tests/a.txt", ".hidden/a.txt", ".a.txt", "__pycache__/a.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_text("")
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text("yes " * 40)
    corpus = read_corpus(small(tmp_path))
    assert sorted(d.name for d in (*corpus.train, *corpus.held_out)) == [f"{i}.txt" for i in range(9)]


def test_a_lone_file_keeps_its_end_for_the_test(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 100)
    corpus = read_corpus(small(path))
    (train,), (held_out,) = corpus.train, corpus.held_out
    assert (corpus.train_bytes, corpus.held_out_bytes) == (720, 80)
    assert held_out.tokens[0] == BOUNDARY
    assert len(train.tokens) == 721


def test_the_default_is_the_source_of_this_python() -> None:
    corpus = read_corpus(TrainConfig(steps=1))
    names = [document.name for document in (*corpus.train, *corpus.held_out)]
    assert "ast.py" in names
    assert not any(part in ("test", "site-packages") for name in names for part in name.split("/"))
    assert str(standard_library()) in corpus.source
    assert corpus.train_bytes > 2 * corpus.held_out_bytes > 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone", "there is no such file or folder"),
        (".", "no text in"),
    ],
)
def test_mistakes_say_what_was_looked_for(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(TrainError, match=says):
        read_corpus(small(tmp_path, data=(str(tmp_path / name),)))


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 9)
    with pytest.raises(TrainError, match=r"one batch of 3 rows of 31 needs 94"):
        read_corpus(small(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": None}, "exactly one of --steps and --minutes"),
        ({"minutes": 1.0}, "exactly one of --steps and --minutes"),
        ({"dim": 10}, "an even whole number, for example --dim 64"),
        ({"heads": 0}, "heads is 0, which must be at least 1"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"lr": 0.0}, "lr is 0.0"),
    ],
)
def test_choices_that_make_no_run_are_refused(folder: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(TrainError, match=says):
        small(folder, **changes)


def test_a_configuration_survives_json_and_an_unknown_name_does_not(config: TrainConfig) -> None:
    assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(TrainError, match="no 'lenght', did you mean 'length'"):
        TrainConfig.from_json({**config.to_json(), "lenght": 3})
