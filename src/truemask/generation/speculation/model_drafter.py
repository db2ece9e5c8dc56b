"""Guesses of another model, smaller than the one that checks them.

Shapes: b samples, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truemask.generation.sampling import Sampler
from truemask.generation.speculation.reader import DraftReader
from truemask.generation.speculation.trees import Draft, chains

SIDE = 3  # one token in so many is a second guess, beside the first ones of the chain


class ModelDrafter:
    """A model that has read the prompts, `width` tokens each, and goes on from there.

    Its first guesses form a chain; the first nodes of the chain have a second guess beside them. `sampler`: guesses are
    drawn in this way; None: the best ones.
    """

    def __init__(
        self, reader: DraftReader, width: int, sampler: Sampler | None, generator: torch.Generator | None
    ) -> None:
        self._read, self._width, self._sampler, self._generator = reader, width, sampler, generator
        self._known: list[list[int]] = []  # of each answer, what the model has read

    def __call__(self, texts: Sequence[Sequence[int]], most: Sequence[int]) -> list[Draft]:
        """Drafts of up to `most` tokens behind the last token of each answer."""
        drafts = [Draft([text[-1]]) for text in texts]
        if not any(most):
            return drafts
        known = self._known or [[] for _ in texts]
        shared = [_shared(ours, theirs) for ours, theirs in zip(known, texts, strict=True)]
        self._read.rewind([self._width + count for count in shared])
        self._known = [row[:count] for row, count in zip(known, shared, strict=True)]
        new = [list(text[count:]) if many else [] for text, count, many in zip(texts, shared, most, strict=True)]
        ends = [0] * len(texts)  # of the chains, whose last tokens are new
        while any(new):
            logits = self._read(chains(new))
            self._read.accept([range(len(row)) for row in new], sure=False)
            for sample, row in enumerate(new):
                self._known[sample] += row
                if row:
                    ends[sample] = self._guess(drafts[sample], ends[sample], logits[sample, len(row) - 1], most[sample])
                    goes_on = drafts[sample].depths[ends[sample]] < _length(most[sample])
                    new[sample] = [drafts[sample].tokens[ends[sample]]] if goes_on else []
        return drafts

    def _guess(self, draft: Draft, node: int, logits: Tensor, most: int) -> int:
        """Guess behind a node of the chain, perhaps twice; the node of the first guess."""
        many = 2 if draft.depths[node] < most - _length(most) else 1
        if self._sampler is None:
            guesses = logits.topk(min(many, len(logits))).indices
        else:
            q = self._sampler.probabilities(logits[None])[0].cpu()
            guesses = torch.multinomial(q, min(many, int((q > 0).sum())), generator=self._generator)
            draft.drawn[node] = q
        first, *_ = [draft.add(node, token) for token in guesses.tolist()]
        return first


def _length(most: int) -> int:
    """How long the chain is in a draft of `most` tokens."""
    return most - most // SIDE


def _shared(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two texts begin with in common, fewer than the second has."""
    most = min(len(ours), len(theirs) - 1)
    return next((at for at in range(most) if ours[at] != theirs[at]), most)
