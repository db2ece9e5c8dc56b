"""How the next token of every sample is chosen: what is penalised, held back, sampled, and when an answer has ended.

Shapes: b samples, n tokens of the answer, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.generation.penalties import Penalties
from truemask.generation.sampling import Sampler
from truemask.generation.stopping import Stops
from truemask.masks.hashing import WORD, hash32

Pick = Callable[[Tensor, torch.Generator | None], int]  # a token, with the probabilities [v]


class Chosen(NamedTuple):
    """One step: tokens [b], and how likely the model found each of them, log-probabilities [b]."""

    tokens: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Ways:
    """What a caller wants of the choice."""

    sampler: Sampler
    penalties: Penalties
    stops: Stops
    seeds: tuple[int, ...] = ()  # one for each sample; none: from the generator
    generator: torch.Generator | None = None


class Chooser:
    """The choice, step by step, for some samples whose prompts are known.

    `prompt` are their tokens (b, n), `real` (b, n) which of these are no padding.
    """

    def __init__(self, ways: Ways, prompt: Tensor, real: Tensor, words: int, pad_value: int) -> None:
        self._ways, self._pad = ways, pad_value
        self.ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        self._answer = prompt[:, :0]
        self._step = 0
        if ways.penalties:
            places = torch.where(real, prompt.long(), words)  # pads are none of the words
            seen = torch.zeros(len(prompt), words + 1, dtype=torch.bool, device=prompt.device)
            self._seen = seen.scatter_(1, places, True)[:, :words]
            self._counts = torch.zeros(len(prompt), words, dtype=torch.int64, device=prompt.device)

    def __call__(self, logits: Tensor, pick: Pick | None = None) -> Chosen:
        """The next tokens; `pad_value`, with the log-probability 0, where an answer has ended.

        `pick` draws them instead, of each sample with the probabilities that it would be drawn with here.
        """
        ways, given = self._ways, logits
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if ways.penalties:
            logits = ways.penalties.apply(logits, seen=self._seen, counts=self._counts)
        if ways.stops.least:
            logits = ways.stops.held_back(logits, self._answer)
        if pick is None:
            tokens = ways.sampler(logits, ways.generator, self._uniform(logits.device))
        else:
            rows = ways.sampler.probabilities(logits)
            tokens = torch.tensor([pick(row, ways.generator) for row in rows], device=logits.device)
        logprobs = _logprobs(given, tokens).masked_fill(self.ended, 0.0)
        tokens = tokens.masked_fill(self.ended, self._pad)
        self._note(tokens)
        return Chosen(tokens, logprobs)

    def _note(self, tokens: Tensor) -> None:
        self._step += 1
        if self._ways.penalties:
            going = (~self.ended)[:, None]
            self._seen.scatter_(1, tokens[:, None], going | self._seen.gather(1, tokens[:, None]))
            self._counts.scatter_add_(1, tokens[:, None], going.long())
        if self._ways.stops:
            self._answer = torch.cat((self._answer, tokens[:, None]), dim=1)
            self.ended = self.ended | self._ways.stops.ended(self._answer)

    def _uniform(self, device: torch.device) -> Tensor | None:
        """A number in [0, 1) for each sample, of its seed and the step alone; None without seeds."""
        if not self._ways.seeds:
            return None
        return torch.tensor(
            [uniform(seed, self._step) for seed in self._ways.seeds], dtype=torch.float64, device=device
        )


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) for a sample's seed and a step: the same on every machine.

    >>> uniform(0, 0) == uniform(0, 0), uniform(0, 0) == uniform(0, 1)
    (True, False)
    """
    high, low = (hash32(seed & WORD, seed >> 32 & WORD, step, half) for half in (0, 1))
    return (high << 21 | low >> 11) / (1 << 53)


def seeds_of(seed: int | Sequence[int] | None, prompts: int, each: int) -> tuple[int, ...]:
    """One for each of the samples, `each` of them for a prompt: seed, seed + 1, ... of the prompts, or as given.

    >>> seeds_of(5, 2, 1)
    (5, 6)
    """
    if seed is None:
        return ()
    if isinstance(seed, bool) or not (isinstance(seed, int) or _are_whole(seed)):
        raise TypeError(f"seed is {seed!r}; expected a whole number, or one for each prompt")
    own = [seed + i for i in range(prompts)] if isinstance(seed, int) else list(seed)
    if len(own) != prompts:
        raise ValueError(f"seed has {len(own)} numbers for {prompts} prompts: pass one for each, or one for all")
    for one in own:
        if not -(1 << 63) <= one < 1 << 64:
            raise ValueError(
                f"seed is {one}; it counts in 64 bits, so others would draw the same: from -2**63 to 2**64 - 1"
            )
    return tuple(_of_sample(one, sample) if sample else one for one in own for sample in range(each))


def _of_sample(seed: int, sample: int) -> int:
    """The seed of a later sample of a prompt, of all bits of the prompt's own."""
    return hash32(seed, seed >> 32, sample) << 32 | seed & WORD


def _are_whole(seed: object) -> bool:
    numbers = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)) else [None]
    return all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.double().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].float()
