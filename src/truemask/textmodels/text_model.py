"""What a command may ask of a model of text, whoever made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from truemask.errors import TruemaskError
from truemask.masks.core.mask import Mask

Reader = Callable[[Tensor], Tensor]  # the next tokens of a text [n] to the logits behind each of them [n, v]


class TextModelError(TruemaskError, ValueError):
    """A model that cannot be opened, or a text that it cannot read; the message says what would help."""


@dataclass(frozen=True)
class Tokens:
    """A text as a model reads it."""

    ids: Tensor  # int64 [n]; the first is read, the others are judged
    ends: Tensor  # int64 [n]: how many bytes of the text stand up to the end of each token

    @property
    def judged_bytes(self) -> int:
        """Of the text, behind the first token."""
        return int(self.ends[-1] - self.ends[0])

    def first(self, count: int | None) -> Tokens:
        """The same up to so many tokens; None takes all."""
        return Tokens(self.ids[:count], self.ends[:count])


def read_text(path: Path) -> str:
    """A file as text. Raises TextModelError if there is none, or nothing in it, or it is no text."""
    if not path.is_file():
        raise TextModelError(f"there is no file {path}" + (", it is a folder: name a file" if path.is_dir() else ""))
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise TextModelError(
            f"{path} is not text in UTF-8: byte {error.start} is 0x{content[error.start]:02x}, {error.reason}"
        ) from error
    if "\0" in text:
        raise TextModelError(f"{path} is not text: byte {content.index(0)} is 0")
    if not text:
        raise TextModelError(f"{path} is empty: there is nothing to judge")
    return text


@dataclass(frozen=True)
class Writing:
    """How a text goes on."""

    tokens: int = 200  # at most
    temperature: float = 0.8  # 0 always takes the likeliest
    top_k: int | None = 50
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What it took: tokens that came, seconds from the prompt to the last, bytes of keys and values."""

    tokens: int
    seconds: float
    cache_bytes: int
    full_bytes: int  # what the keys and values of every token would take


class TextModel(ABC):
    """Weights, and what turns text into tokens and back. Everything is one text, at positions from 0."""

    name: str
    own_mask: Mask | None  # that it is run under where no other is given; None: what its layers do by themselves
    most_tokens: int | None = None  # a text may have; None: any number

    @abstractmethod
    def tokens(self, text: str) -> Tokens:
        """The text in tokens, with what the model puts before a text."""

    @abstractmethod
    def reading(self, mask: Mask | None, tokens: int) -> AbstractContextManager[Reader]:
        """A reader for one text of `tokens` tokens, through a cache, under a mask or the model's own."""

    @abstractmethod
    def write(self, prompt: str, mask: Mask | None, how: Writing, show: Callable[[str], None]) -> Written:
        """Go on with a prompt; `show` gets the text, piece by piece, without the prompt."""

    def check_tokens(self, count: int) -> None:
        """Raise TextModelError if the positions of the model end before a text does."""
        if self.most_tokens is not None and count > self.most_tokens:
            raise TextModelError(
                f"{self.name} has learned {self.most_tokens} positions, and this takes {count} tokens: "
                f"pass --tokens, so that it is at most {self.most_tokens}, or a model with rotary positions"
            )
