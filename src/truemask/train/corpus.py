"""Files as documents: found, read as bytes, and divided into training and held-out ones by a hash of their paths."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from truemask.train.config import BOUNDARY, TrainConfig, TrainError

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
TAIL_SHARE = 0.1  # of a lone file, held out


@dataclass(frozen=True)
class Document:
    """One file: its name relative to what the user gave, and its tokens (`BOUNDARY`, then its bytes)."""

    name: str
    tokens: np.ndarray  # uint16


@dataclass(frozen=True)
class Corpus:
    """The documents of a run. `digest` changes when any byte or any file name does."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    digest: str
    source: str

    @property
    def train_bytes(self) -> int:
        return sum(len(document.tokens) - 1 for document in self.train)

    @property
    def held_out_bytes(self) -> int:
        return sum(len(document.tokens) - 1 for document in self.held_out)


def read_corpus(config: TrainConfig) -> Corpus:
    """Read the files of a run.

    Raises:
        TrainError: a path that does not exist, nothing to read, or too little text for one batch.
    """
    documents = [Document(name, _tokens(path)) for name, path in _files(config.data)]
    documents = [document for document in documents if len(document.tokens) > 1]
    source = ", ".join(config.data) or f"the standard library in {standard_library()}"
    if not documents:
        raise TrainError(f"no text in {source}: hidden, empty and binary files are passed over; give --data PATH...")
    train, held_out = _split(documents, config.held_out)
    corpus = Corpus(train, held_out, _digest(documents), source)
    needed = config.batch * config.length + 1
    have = corpus.train_bytes + len(train)
    if have < needed:
        raise TrainError(
            f"{source} has {have} tokens to train on, and one batch of {config.batch} rows of {config.length} needs "
            f"{needed}; give more text, or a smaller --batch or --length"
        )
    return corpus


def standard_library() -> Path:
    """The folder of the running interpreter's own library."""
    return Path(sysconfig.get_path("stdlib"))


def _files(data: Sequence[str]) -> Iterator[tuple[str, Path]]:
    if not data:
        root = standard_library()
        paths = [path for path in _below(root) if path.suffix == ".py"]
        if not paths:
            raise TrainError(f"this Python keeps no source in {root}; name some text with --data PATH...")
        yield from ((path.relative_to(root).as_posix(), path) for path in paths)
        return
    for place in map(Path, data):
        if place.is_dir():
            yield from ((path.relative_to(place).as_posix(), path) for path in _below(place))
        elif place.is_file():
            yield place.name, place
        else:
            raise TrainError(f"--data {place}: there is no such file or folder (looked in {Path.cwd()})")


def _below(folder: Path) -> list[Path]:
    """All readable text files below a folder, in the order of their paths; tests, caches and hidden ones excluded."""
    paths: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        paths.extend(Path(root, name) for name in files if not name.startswith("."))
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _tokens(path: Path) -> np.ndarray:
    """A file's tokens; a file with a zero byte is not text and counts as empty."""
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    text = raw if raw.size and raw.all() else raw[:0]
    return np.concatenate(([BOUNDARY], text)).astype(np.uint16)


def _split(documents: list[Document], share: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    if len(documents) == 1:
        return _cut(documents[0])
    places = [_place(document.name) for document in documents]
    limit = max(share, min(places))  # at least one file is held out
    train = tuple(d for d, place in zip(documents, places, strict=True) if place > limit)
    held_out = tuple(d for d, place in zip(documents, places, strict=True) if place <= limit)
    return train, held_out


def _cut(document: Document) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """A lone file: its last part is held out, as a document of its own."""
    at = len(document.tokens) - max(1, int(TAIL_SHARE * len(document.tokens)))
    tail = np.concatenate(([BOUNDARY], document.tokens[at:])).astype(np.uint16)
    return (Document(document.name, document.tokens[:at]),), (Document(f"{document.name} (end)", tail),)


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _digest(documents: list[Document]) -> str:
    total = hashlib.sha256()
    for document in documents:
        total.update(document.name.encode() + b"\0" + hashlib.sha256(document.tokens.tobytes()).digest())
    return total.hexdigest()[:16]
