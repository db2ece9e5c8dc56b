"""Beam search: the most likely answers rather than a random one, with caches that are reordered in place.

Shapes: p prompts, w beams of each, n tokens of the answer, v vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.generation.decoding import Reader


class Beams(NamedTuple):
    """The best answers of each prompt, the best first: tokens `[p, return_n, n]`, scores `[p, return_n]`.

    Of one prompt `[n]` they are without p. A score is the sum of the tokens' log-probabilities, the end's included,
    divided by their number to the power of `length_penalty`; -inf where there are fewer answers than were asked for.
    """

    tokens: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Search:
    """How it is searched: `beams` at a time, ends, and what lengths are worth."""

    beams: int
    length_penalty: float
    ends: tuple[int, ...]

    def score(self, total: float, length: int) -> float:
        """Of an answer whose log-probabilities add up to `total`."""
        return total / max(1, length) ** self.length_penalty


@dataclass
class Finished:
    """The best answers of a prompt that have ended: (score, tokens), at most `most`."""

    most: int
    answers: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, score: float, tokens: list[int]) -> None:
        """Keep it if it is among the best; of two that are equal the earlier one is first."""
        self.answers.append((score, tokens))
        self.answers.sort(key=lambda answer: -answer[0])
        del self.answers[self.most :]

    def beats(self, score: float) -> bool:
        """Whether there are so many that an answer of this score would not be kept."""
        return len(self.answers) == self.most and self.answers[-1][0] >= score


def searched(read: Reader, prompts: Tensor, seq_len: int, how: Search) -> list[list[tuple[float, list[int]]]]:
    """The best answers of each of p prompts (p, m), the best first: (score, tokens).

    A step looks at the best continuations of all beams of a prompt; those that end are set aside, the others go on. A
    prompt is done when no beam could still come to a better score at its length, as in Hugging Face.
    """
    p, w = len(prompts), how.beams
    finished = [Finished(w) for _ in range(p)]
    done = [False] * p
    answers: list[list[list[int]]] = [[[] for _ in range(w)] for _ in range(p)]
    totals = torch.full((p, w), -math.inf, dtype=torch.float64)
    totals[:, 0] = 0.0  # at first all beams are the same
    logits = read(prompts)
    read.select([i for i in range(p) for _ in range(w)])
    logits = logits.repeat_interleave(w, dim=0)
    for step in range(1, seq_len + 1):
        sums = totals[..., None] + logits.cpu().double().log_softmax(-1).view(p, w, -1)  # p w v
        words = sums.shape[-1]
        best, places = sums.flatten(1).topk(min((len(how.ends) + 1) * w, w * words), dim=1)
        rows, new = [], []
        for i in range(p):
            beams = _continued(best[i].tolist(), places[i].tolist(), words, answers[i], how, finished[i], step, done[i])
            rows += [i * w + beam for beam, _, _ in beams]
            new += [token for _, token, _ in beams]
            answers[i] = [[*answers[i][beam], token] for beam, token, _ in beams]
            totals[i] = torch.tensor([total for _, _, total in beams], dtype=torch.float64)
            done[i] = done[i] or finished[i].beats(how.score(float(totals[i].max()), step))
        if all(done) or step == seq_len:
            break
        read.select(rows)
        logits = read(torch.tensor(new, dtype=torch.int64, device=prompts.device)[:, None])
    for i in range(p):
        for answer, total in zip(answers[i], totals[i].tolist(), strict=True):
            if not done[i] and total > -math.inf:
                finished[i].add(how.score(total, len(answer)), answer)
    return [found.answers for found in finished]


def _continued(
    best: list[float],
    places: list[int],
    words: int,
    answers: list[list[int]],
    how: Search,
    finished: Finished,
    step: int,
    done: bool,
) -> list[tuple[int, int, float]]:
    """The beams of one prompt after a step: which beam each goes on from, its token, its sum; ends are set aside."""
    going: list[tuple[int, int, float]] = []
    for rank, (total, place) in enumerate(zip(best, places, strict=True)):
        beam, token = divmod(place, words)
        if token not in how.ends:
            going.append((beam, token, total))
        elif rank < how.beams and total > -math.inf and not done:
            finished.add(how.score(total, step), [*answers[beam], token])
        if len(going) == how.beams:
            break
    return [*going, *[(0, 0, -math.inf)] * (how.beams - len(going))]
