"""`pack`: sequences in rows of one length, each with labels, lengths and positions of its own.

Shapes: r rows, n tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from truemask.common.arguments import MAX_POSITION, whole
from truemask.common.formatting import counted, describe, suggest
from truemask.packing.best_fit import best_fit
from truemask.packing.samples import Arrays, Samples, read_samples

LONG_WAYS = ("error", "split", "truncate")


class Place(NamedTuple):
    """Tokens `[start, stop)` of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False, repr=False)
class PackedRows:
    """What `pack` returns; nothing in it is shifted.

    tokens      int64 `[r, n]`; a row's free tail holds `pad`
    labels      int64 `[r, n]`: the token to predict at each place, `ignore_index` where there is none
    lengths     tokens of each document, a list for each row, for `mask.packed(lengths)`. They add up to n: the free
                tail, if there is one, is the last document of its row, so no sequence reads it and it reads none
    positions   int64 `[r, n]`, counted from the start of each document, from `first_position` on
    extras      the other fields of the samples, `[r, n]`, 0 in the tail
    sizes       how many tokens of each sequence were packed, in the order of the sequences
    pieces      int64 `[m, 4]`: sequence, row, start and tokens of each piece, ordered by sequence
    """

    tokens: Tensor
    labels: Tensor
    lengths: list[list[int]]
    positions: Tensor
    sizes: list[int]
    pieces: Tensor
    ignore_index: int = -100
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def fill(self) -> float:
        """The share of the rows' tokens that are no padding, up to 1."""
        return sum(self.sizes) / self.tokens.numel()

    @property
    def targets(self) -> Tensor:
        """The labels shifted by one, int64 `[r, n]`: what the logits of each place are compared with.

        For losses that do not shift by themselves: `cross_entropy(logits.flatten(0, 1), targets.flatten())`.
        """
        end = self.labels.new_full((len(self.labels), 1), self.ignore_index)
        return torch.cat((self.labels[:, 1:], end), dim=1)

    def places(self, sequence: int) -> list[Place]:
        """Where a sequence went: one place; none if it has no tokens, several if it was split."""
        if not -len(self.sizes) <= sequence < len(self.sizes):
            raise IndexError(f"there is no sequence {sequence}: {len(self.sizes)} were packed")
        pieces = self.pieces[self.pieces[:, 0] == sequence % len(self.sizes), 1:].tolist()
        return [Place(row, start, start + size) for row, start, size in pieces]

    def unpack(self, outputs: Tensor) -> list[Tensor]:
        """What belongs to each sequence, in the order they were given: `[r, n, ...]` to a list of `[tokens, ...]`.

        Differentiable; one gather for all sequences. A sequence that was split is whole again.
        """
        check_rows("unpack", outputs, self.tokens)
        return list(outputs.flatten(0, 1)[self._order.to(outputs.device)].split(self.sizes))

    @property
    def _order(self) -> Tensor:
        """Every packed token's place in the flat rows, sequence by sequence."""
        _, row, start, size = self.pieces.numpy().T
        return torch.from_numpy(np.repeat(row * self.tokens.shape[1] + start, size) + ramp(size))

    def __repr__(self) -> str:
        rows, length = self.tokens.shape
        sequences = counted(len(self.sizes), "sequence")
        return f"<PackedRows: {sequences} in {counted(rows, 'row')} of {length}, {self.fill:.1%} full>"


def pack(
    sequences: Iterable[Any],
    length: int | None,
    *,
    long: str = "error",
    pad: int = 0,
    ignore_index: int = -100,
    first_position: int = 0,
) -> PackedRows:
    """Sequences in as few rows of `length` tokens as best fit finds, in time n log n.

    The longest first (equal ones in their order), each into the fullest row with room for it. Never more than 11/9 of
    the fewest rows possible, plus 4 (Johnson 1973). The rows with the longest sequences come first: shuffle rows before
    training on them.

    Labels are not shifted, as Hugging Face and x-transformers have it: their models compare the logits at i with the
    label at i + 1. The first token of each document has the label `ignore_index`, so that it is not predicted from
    another document's last. `targets` are the shifted ones, for losses that do not shift.

    Args:
        sequences: token ids `[n]` as lists, arrays or tensors; or dicts of `input_ids` and, if wanted, `labels` of
            their own and any other field with one number for each token. Sequences without tokens take no place.
        length: tokens of a row; None: as many as there are, so one row without padding.
        long: what to do with a sequence of more than `length` tokens: "error"; "split" it into pieces, each a document
            of its own that starts anew at position 0; or "truncate" it to its first `length` tokens.
        pad: the token in the free tail of a row; nobody reads it.
        ignore_index: the label that losses leave out.
        first_position: what `positions` count from: 0, or where a model's position embeddings begin, which is
            `padding_idx + 1` (usually 2) for RoBERTa, XLM-R, ESM and MPNet. Masks count from 0 whatever this is.

    Raises:
        ValueError, TypeError: what cannot be packed, and why.

    >>> from truemask.masks.leaves.bands import causal
    >>> packed = pack([[1, 2], [3, 4, 5, 6, 7], [8, 9, 10]], length=8)
    >>> packed
    <PackedRows: 3 sequences in 2 rows of 8, 62.5% full>
    >>> packed.tokens.tolist()
    [[3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 0, 0, 0, 0, 0, 0]]
    >>> packed.labels[0].tolist()
    [-100, 4, 5, 6, 7, -100, 9, 10]
    >>> packed.lengths, packed.places(2)
    ([[5, 3], [2, 6]], [Place(row=0, start=5, stop=8)])
    >>> mask = causal.packed(packed.lengths)
    >>> [row.tolist() for row in packed.unpack(packed.tokens)]
    [[1, 2], [3, 4, 5, 6, 7], [8, 9, 10]]
    """
    if long not in LONG_WAYS:
        raise ValueError(f"pack: long is one of {', '.join(map(repr, LONG_WAYS))}, got {describe(long)}{_near(long)}")
    length = None if length is None else whole(length, "length", 1)
    pad, ignore_index = token("pad", pad), token("ignore_index", ignore_index)
    first = whole(first_position, "first_position")
    samples = read_samples("pack", sequences)
    total = int(samples.sizes.sum())
    if not total:
        raise ValueError(f"pack: none of the {len(samples.sizes)} sequences has a token, so there is nothing to pack")
    return _lay_out(samples, total if length is None else length, long, pad, ignore_index, first)


def _near(long: object) -> str:
    return suggest(long, LONG_WAYS) if isinstance(long, str) else ""


def _lay_out(samples: Samples, length: int, long: str, pad: int, ignore_index: int, first: int) -> PackedRows:
    sequence, offset, size = _pieces(samples.sizes, length, long)
    row, start = best_fit(size, length)
    documents = _with_tails(np.stack((sequence, row, start, size, offset)), length)
    labels = _joined(samples.labels, documents, length, ignore_index, np.int64)
    labels[documents[1], documents[2]] = ignore_index
    return PackedRows(
        tokens=torch.from_numpy(_joined(samples.tokens, documents, length, pad, np.int64)),
        labels=torch.from_numpy(labels),
        lengths=_lengths(documents),
        positions=torch.from_numpy(first + ramp(documents[3]).reshape(-1, length)),
        sizes=np.bincount(sequence, size, len(samples.sizes)).astype(np.int64).tolist(),
        pieces=torch.from_numpy(np.stack((sequence, row, start, size), axis=1)),
        ignore_index=ignore_index,
        extras={
            name: torch.from_numpy(
                _joined(values, documents, length, 0, np.result_type(*{x.dtype for x in values if len(x)}))
            )
            for name, values in samples.extras.items()
        },
    )


def _pieces(sizes: np.ndarray, length: int, long: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence, first token and number of tokens of each piece; sequences without tokens have none."""
    if long == "error" and sizes.max() > length:
        worst = int(sizes.argmax())
        raise ValueError(
            f"pack: {int((sizes > length).sum())} of {len(sizes)} sequences are longer than length={length}, the "
            f"longest is sequence {worst} with {sizes[worst]} tokens; pass a larger length, long='split' (pieces that "
            "do not read each other) or long='truncate'"
        )
    sizes = np.minimum(sizes, length) if long == "truncate" else sizes
    counts = -(-sizes // length)
    sequence = np.repeat(np.arange(len(sizes)), counts)
    offset = ramp(counts) * length
    return sequence, offset, np.minimum(sizes[sequence] - offset, length)


def _with_tails(pieces: np.ndarray, length: int) -> np.ndarray:
    """Sequence (-1 for a tail), row, start, tokens and offset of every document of the rows, as they lie there."""
    used = np.bincount(pieces[1], pieces[3]).astype(np.int64)
    row = np.flatnonzero(used < length)
    tails = np.stack((row * 0 - 1, row, used[row], length - used[row], row * 0))
    documents = np.concatenate((pieces, tails), axis=1)
    return documents[:, np.lexsort((documents[2], documents[1]))]


def _joined(values: Arrays, documents: np.ndarray, length: int, rest: int, dtype: Any) -> np.ndarray:
    """One field of all documents end to end, `[r, n]`, with `rest` in the tails."""
    tail = np.full(length, rest, dtype)
    parts = [
        values[sequence][offset : offset + size] if sequence >= 0 else tail[:size]
        for sequence, size, offset in zip(*documents[[0, 3, 4]].tolist(), strict=True)
    ]
    return np.concatenate(parts, dtype=dtype, casting="same_kind").reshape(-1, length)


def _lengths(documents: np.ndarray) -> list[list[int]]:
    """Tokens of each document, a list for each row."""
    sizes, stops = documents[3].tolist(), np.cumsum(np.bincount(documents[1])).tolist()
    return [sizes[i:j] for i, j in zip([0, *stops[:-1]], stops, strict=True)]


def ramp(sizes: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for each size anew.

    >>> ramp(np.array([2, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    steps = np.ones(sizes.sum(), np.int64)
    sizes = sizes[sizes > 0]
    steps[np.cumsum(sizes[:-1])] -= sizes[:-1]
    steps[:1] = 0
    return np.cumsum(steps, out=steps)


def token(name: str, value: object) -> int:
    """A token or label, which may be negative, as a Python int."""
    return whole(value, name, 1 - MAX_POSITION)


def check_rows(caller: str, outputs: object, tokens: Tensor, *, logits: bool = False) -> None:
    """Raise unless `outputs` holds something for each token of the rows; `logits` are `[r, n, vocabulary]`."""
    if not isinstance(outputs, Tensor) or outputs.shape[:2] != tokens.shape or (logits and outputs.ndim != 3):
        what = "logits" if logits else "outputs"
        rows, length = tokens.shape
        shape = f"is [{rows}, {length}, vocabulary]" if logits else f"begins with [{rows}, {length}]"
        raise ValueError(f"{caller}: {what} are {describe(outputs)}; expected a tensor that {shape}")
