"""Guesses that are looked up: what came after the last tokens where they stood before (prompt look-up)."""

from __future__ import annotations

from collections.abc import Sequence

from truemask.generation.speculation.trees import Draft

LONGEST, SHORTEST = 5, 2  # tokens that are looked up, the most of them that were there before
BRANCHES = 3  # guesses that go different ways
MAIN = 2 / 3  # of the tokens are for the first of them


class NgramDrafter:
    """Looks up the last tokens of each sample in what stands before them, prompt and answer.

    The longest run of tokens that was there before counts, where it stood last; a few other places are tried beside it.
    Source: prompt look-up decoding (Saxena, 2023), here with several places in a tree.

    >>> drafter = NgramDrafter()
    >>> drafter([[1, 2, 3, 4, 9, 1, 2]], [3])[0].tokens
    [2, 3, 4, 9]
    """

    def __init__(self) -> None:
        self._seen: list[dict[tuple[int, ...], list[int]]] = []  # of each sample: where runs of tokens end
        self._read: list[int] = []

    def __call__(self, texts: Sequence[Sequence[int]], most: Sequence[int]) -> list[Draft]:
        """Drafts of up to `most` tokens behind the last token of each text, which has grown since the last call."""
        while len(self._seen) < len(texts):
            self._seen.append({})
            self._read.append(0)
        return [self._draft(sample, text, many) for sample, (text, many) in enumerate(zip(texts, most, strict=True))]

    def _draft(self, sample: int, text: Sequence[int], most: int) -> Draft:
        draft = Draft([text[-1]])
        if most < 1:
            return draft
        self._note(sample, text)
        ends = self._places(sample, text)
        first = most if len(ends) == 1 else max(1, round(most * MAIN))
        for end in ends:
            draft.add_path(text[end : end + (first if end == ends[0] else most)], most + 1)
        return draft

    def _note(self, sample: int, text: Sequence[int]) -> None:
        """Where the runs that end before the last token end."""
        seen = self._seen[sample]
        for end in range(max(1, self._read[sample]), len(text)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                seen.setdefault(tuple(text[end - size : end]), []).append(end)
        self._read[sample] = len(text)

    def _places(self, sample: int, text: Sequence[int]) -> list[int]:
        """Where to go on: behind the longest runs first, the latest first; each with another next token or path."""
        found: list[int] = []
        for size in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
            for end in reversed(self._seen[sample].get(tuple(text[len(text) - size :]), [])):
                if end not in found:
                    found.append(end)
                if len(found) == BRANCHES:
                    return found
        return found
