"""Generation by guessing: a drafter proposes, the model reads all of it in one forward and keeps what is right.

Shapes: b samples, n tokens of the answer, f forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from truemask.generation.choosing import Chooser, Chosen, Ways
from truemask.generation.speculation.acceptance import walked
from truemask.generation.speculation.reader import DraftReader
from truemask.generation.speculation.trees import Draft, side_by_side

FIRST_GUESSES, LEAST_GUESSES = 4, 2  # of a sample, at its beginning; where its guesses are wrong


class Speculated(NamedTuple):
    """What was generated: tokens and log-probabilities `[b, n]`, and how many guesses each forward accepted `[b, f]`.

    Of one prompt `[n]` all are without b. A forward gives one token more than it accepts; -1 stands where a sample had
    ended before. Log-probabilities are those of `Chosen`.
    """

    tokens: Tensor
    logprobs: Tensor
    accepted: Tensor

    @property
    def per_forward(self) -> float:
        """Tokens that a forward gave a sample, on average."""
        ran = self.accepted >= 0
        return float((self.accepted + 1)[ran].double().mean()) if bool(ran.any()) else 0.0


class Drafter(Protocol):
    """Who guesses."""

    def __call__(self, texts: Sequence[Sequence[int]], most: Sequence[int]) -> list[Draft]:
        """Drafts of up to `most` tokens behind the last token of each sample's text, which has grown."""
        ...


@dataclass
class Sample:
    """One sample on its way: how it is chosen, what was, and how many guesses it is worth (`ahead`)."""

    choose: Chooser
    text: list[int]  # what its drafter looks at
    chosen: list[Chosen] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    ahead: int = FIRST_GUESSES

    def add(self, chosen: list[Chosen]) -> None:
        """What a forward gave."""
        self.chosen += chosen
        self.text += [int(step.tokens) for step in chosen]

    def note(self, draft: Draft, path: list[int], most: int) -> None:
        """How many guesses of a draft were right: twice as many may come if all were, else about as many as were."""
        right = len(path) - 1  # -1: it had ended
        self.accepted.append(right)
        if len(draft.tokens) > 1 and path:
            all_right = right > 0 and not draft.children(path[-1])
            self.ahead = min(most, 2 * self.ahead if all_right else max(LEAST_GUESSES, right + 1))

    def left(self, seq_len: int) -> int:
        """How many tokens may still come."""
        return 0 if bool(self.choose.ended.any()) else seq_len - len(self.chosen)


def samples_of(
    ways: Ways, tokens: Tensor, real: Tensor, words: int, pad_value: int, *, with_prompts: bool
) -> list[Sample]:
    """One for each prompt [b, n]; `with_prompts`: its text begins with the prompt."""
    found = []
    for i in range(len(tokens)):
        own = replace(ways, seeds=ways.seeds[i : i + 1])
        text = tokens[i][real[i]].tolist() if with_prompts else []
        found.append(Sample(Chooser(own, tokens[i : i + 1], real[i : i + 1], words, pad_value), text))
    return found


def speculated(
    read: DraftReader, draft: Drafter, logits: Tensor, samples: list[Sample], seq_len: int, most: int
) -> None:
    """Go on behind prompts that were read, whose last logits [b, v] are given, until every sample has its tokens."""
    for sample, row in zip(samples, logits, strict=True):
        if seq_len:
            sample.add([sample.choose(row[None])])
    while any(left := [sample.left(seq_len) for sample in samples]):
        # a forward gives at least one token, so that the last ones need no guesses
        room = [max(0, min(most, sample.ahead, many - 1)) for sample, many in zip(samples, left, strict=True)]
        drafts = draft([sample.text for sample in samples], room)
        logits = read(side_by_side(drafts))
        paths: list[list[int]] = []
        for sample, guesses, rows, many in zip(samples, drafts, logits, left, strict=True):
            path, chosen = walked(guesses, rows, sample.choose, many)
            sample.add(chosen)
            sample.note(guesses, path, most)
            paths.append(path)
        read.accept(paths)


def gathered(samples: list[Sample], seq_len: int, pad_value: int, device: torch.device) -> Speculated:
    """The answers side by side, `pad_value` behind their ends."""
    tokens = torch.full((len(samples), seq_len), pad_value, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(samples), seq_len, device=device)
    accepted = torch.full((len(samples), max(len(sample.accepted) for sample in samples)), -1)
    for i, sample in enumerate(samples):
        for step, chosen in enumerate(sample.chosen):
            tokens[i, step], logprobs[i, step] = chosen.tokens[0], chosen.logprobs[0]
        accepted[i, : len(sample.accepted)] = torch.tensor(sample.accepted, dtype=torch.int64)
    return Speculated(tokens, logprobs, accepted)
