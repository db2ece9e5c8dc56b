"""When an answer ends: at a token, at a sequence of tokens, and not before it has a length.

Shapes: b samples, n tokens of the answer, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truemask.common.formatting import describe

Tokens = int | Sequence[int] | None  # one token or several


@dataclass(frozen=True)
class Stops:
    """Sequences of tokens, of one token or more, that end an answer; `least` tokens come before its last one.

    >>> stops = Stops(((7,), (2, 3)), least=1)
    >>> stops.ended(torch.tensor([[1, 7], [2, 3], [3, 2]])).tolist()
    [True, True, False]
    >>> stops.held_back(torch.zeros(1, 8), torch.zeros(1, 0)).isinf().nonzero()[:, 1].tolist()
    [7]
    """

    sequences: tuple[tuple[int, ...], ...] = ()
    least: int = 0

    @classmethod
    def read(cls, eos: Tokens, stop: Sequence[Sequence[int]] | None, least: int, seq_len: int, words: int) -> Stops:
        """From what a caller passes; ValueError or TypeError on what the model can never give."""
        given = eos.tolist() if isinstance(eos, Tensor) else eos
        ends: tuple[Any, ...] = () if given is None else tuple(given) if isinstance(given, Sequence) else (given,)
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ends):
            raise TypeError(f"eos_token is {describe(eos)}; expected a token id, several of them, or None")
        for token in ends:
            _check_word("eos_token is", token, words)
        if isinstance(least, bool) or not isinstance(least, int) or not 0 <= least <= seq_len:
            raise ValueError(f"min_tokens is {least!r}; it counts tokens of the answer, from 0 to seq_len={seq_len}")
        sequences = (*((token,) for token in ends), *_sequences(stop, words))
        if least and len({sequence for sequence in sequences if len(sequence) == 1}) == words:
            raise ValueError(
                f"min_tokens is {least}, and every one of {words} tokens ends an answer: none may come first"
            )
        return cls(sequences, least)

    def __bool__(self) -> bool:
        """Whether anything ends an answer."""
        return bool(self.sequences)

    def ended(self, answer: Tensor) -> Tensor:
        """Whether these answers (b, n) end with their last token, bool (b)."""
        found = torch.zeros(len(answer), dtype=torch.bool, device=answer.device)
        if answer.shape[1] <= self.least:
            return found
        for sequence in self.sequences:
            found |= _ends_with(answer, sequence)
        return found

    def held_back(self, logits: Tensor, answer: Tensor) -> Tensor:
        """Logits (b, v) after answers (b, n) that are too short to end with one more token: -inf for what would."""
        if answer.shape[1] >= self.least:
            return logits
        logits = logits.clone()
        for *before, last in self.sequences:
            logits[_ends_with(answer, before), last] = -math.inf
        return logits


def _ends_with(answer: Tensor, sequence: Sequence[int]) -> Tensor:
    if len(sequence) > answer.shape[1]:
        return torch.zeros(len(answer), dtype=torch.bool, device=answer.device)
    tail = answer[:, answer.shape[1] - len(sequence) :]
    return (tail == torch.tensor(sequence, dtype=torch.int64, device=answer.device)).all(dim=1)


def _sequences(stop: object, words: int) -> list[tuple[int, ...]]:
    given = stop.tolist() if isinstance(stop, Tensor) else [] if stop is None else stop
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise TypeError(f"stop is {describe(stop)}; expected a list of sequences of token ids, such as stop=[[7, 2]]")
    return [_sequence(one.tolist() if isinstance(one, Tensor) else one, words) for one in given]


def _sequence(given: object, words: int) -> tuple[int, ...]:
    if isinstance(given, int) and not isinstance(given, bool):
        raise TypeError(
            f"stop has {given}; it is a list of sequences of tokens: stop=[[{given}]], or eos_token={given}"
        )
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise TypeError(f"stop has {describe(given)}; expected sequences of token ids, as the tokenizer gives them")
    if not given:
        raise ValueError("stop has an empty sequence, which every answer would end with at once")
    for token in given:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"stop has {token!r} in a sequence; expected token ids")
        _check_word("stop has", token, words)
    return tuple(given)


def _check_word(name: str, token: int, words: int) -> None:
    if not 0 <= token < words:
        raise ValueError(
            f"{name} {token}, which the model never gives: num_tokens={words}, so tokens are 0 to {words - 1}"
        )
