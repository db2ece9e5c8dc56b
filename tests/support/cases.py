"""The catalogue: every mask of the language, every option, operator and re-indexing, with its 0/1 picture.

The pictures are literal. They were written from the inequalities of the language by `descriptions.py` beside this
file, which does not know the library, and are here to be read; 1 = may attend, rows are queries, columns are keys.
Where a mask varies, one picture stands for each sample, and within it for each head, in order.

The file is longer than others because a picture takes as many lines as it has rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support.descriptions import formula
from truemask import (
    block_pattern,
    blocks,
    causal,
    dense,
    dilated,
    documents,
    everything,
    global_tokens,
    grid,
    keys,
    local,
    nothing,
    padding,
    per_head,
    per_sample,
    predicate,
    prefix,
    queries,
    random,
    same,
    strided,
    tree,
    window,
)
from truemask.masks.core.mask import Mask


@dataclass(frozen=True)
class Case:
    """One mask at one size, and what it must look like."""

    name: str
    make: Callable[[], Mask]
    q_len: int
    kv_len: int
    picture: str
    batch: int = 1
    heads: int = 1

    @property
    def cells(self) -> NDArray[np.bool_]:
        """The picture as bool `[batch, heads, q_len, kv_len]`."""
        bits = [bit == "1" for bit in self.picture if bit in "01"]
        return np.array(bits, bool).reshape(self.batch, self.heads, self.q_len, self.kv_len)

    def __repr__(self) -> str:
        return self.name


def flags(*rows: str) -> torch.Tensor:
    """Rows of 0 and 1 as a bool tensor: `[n]` for one, `[rows, n]` for several."""
    cells = torch.tensor([[bit == "1" for bit in row] for row in rows])
    return cells[0] if len(rows) == 1 else cells


def stack(*grids: torch.Tensor) -> torch.Tensor:
    return torch.stack(grids)


# fmt: off
CASES: list[Case] = [
    # values
    Case("everything-3x5", lambda: everything, 3, 5, """
        11111
        11111
        11111
    """),
    Case("nothing-5x3", lambda: nothing, 5, 3, """
        000
        000
        000
        000
        000
    """),
    Case("causal-7x7", lambda: causal, 7, 7, """
        1000000
        1100000
        1110000
        1111000
        1111100
        1111110
        1111111
    """),
    Case("causal-5x7", lambda: causal, 5, 7, """
        1000000
        1100000
        1110000
        1111000
        1111100
    """),
    Case("causal-7x5", lambda: causal, 7, 5, """
        10000
        11000
        11100
        11110
        11111
        11111
        11111
    """),
    Case("causal-1x1", lambda: causal, 1, 1, """
        1
    """),
    # window and local
    Case("window-1", lambda: window(1), 5, 7, """
        1000000
        0100000
        0010000
        0001000
        0000100
    """),
    Case("window-3", lambda: window(3), 7, 7, """
        1000000
        1100000
        1110000
        0111000
        0011100
        0001110
        0000111
    """),
    Case("window-3-wide", lambda: window(3), 5, 7, """
        1000000
        1100000
        1110000
        0111000
        0011100
    """),
    Case("window-3-tall", lambda: window(3), 11, 5, """
        10000
        11000
        11100
        01110
        00111
        00011
        00001
        00000
        00000
        00000
        00000
    """),
    Case("window-longer-than-all", lambda: window(97), 5, 7, """
        1000000
        1100000
        1110000
        1111000
        1111100
    """),
    Case("local-0", lambda: local(0), 5, 7, """
        1000000
        0100000
        0010000
        0001000
        0000100
    """),
    Case("local-2", lambda: local(2), 7, 7, """
        1110000
        1111000
        1111100
        0111110
        0011111
        0001111
        0000111
    """),
    Case("local-2-tall", lambda: local(2), 11, 5, """
        11100
        11110
        11111
        01111
        00111
        00011
        00001
        00000
        00000
        00000
        00000
    """),
    # prefix and global tokens
    Case("prefix-0", lambda: prefix(0), 3, 5, """
        00000
        00000
        00000
    """),
    Case("prefix-3", lambda: prefix(3), 5, 7, """
        1110000
        1110000
        1110000
        1110000
        1110000
    """),
    Case("prefix-per-sample", lambda: prefix([0, 2, 5]), 2, 7, """
        0000000
        0000000

        1100000
        1100000

        1111100
        1111100
    """, batch=3),
    Case("global-tokens", lambda: global_tokens([0, 3]), 7, 5, """
        11111
        10010
        10010
        11111
        10010
        10010
        10010
    """),
    Case("global-tokens-none", lambda: global_tokens([]), 3, 5, """
        00000
        00000
        00000
    """),
    Case("global-token-beyond", lambda: global_tokens([6]), 5, 7, """
        0000001
        0000001
        0000001
        0000001
        0000001
    """),
    # blocks
    Case("blocks-3", lambda: blocks(3), 7, 7, """
        1110000
        1110000
        1110000
        0001110
        0001110
        0001110
        0000001
    """),
    Case("blocks-3-back", lambda: blocks(3, back=1), 11, 5, """
        11100
        11100
        11100
        11111
        11111
        11111
        00011
        00011
        00011
        00000
        00000
    """),
    Case("blocks-2-ahead", lambda: blocks(2, ahead=1), 5, 7, """
        1111000
        1111000
        0011110
        0011110
        0000111
    """),
    Case("blocks-2-both", lambda: blocks(2, back=1, ahead=1), 7, 11, """
        11110000000
        11110000000
        11111100000
        11111100000
        00111111000
        00111111000
        00001111110
    """),
    Case("block-pattern", lambda: block_pattern(flags("101", "010"), 3), 5, 7, """
        1110001
        1110001
        1110001
        0001110
        0001110
    """),
    Case("block-pattern-per-head", lambda: block_pattern(stack(flags("10", "01"), flags("01", "11")), 3), 5, 5, """
        11100
        11100
        11100
        00011
        00011

        00011
        00011
        00011
        11111
        11111
    """, heads=2),
    # dilated, strided, random and grid
    Case("dilated-1", lambda: dilated(1), 3, 5, """
        11111
        11111
        11111
    """),
    Case("dilated-3", lambda: dilated(3), 7, 5, """
        10010
        01001
        00100
        10010
        01001
        00100
        10010
    """),
    Case("strided-3", lambda: strided(3), 5, 11, """
        00100100100
        00100100100
        00100100100
        00100100100
        00100100100
    """),
    Case("strided-5-last-2", lambda: strided(5, last=2), 3, 13, """
        0001100011000
        0001100011000
        0001100011000
    """),
    Case("random", lambda: random(0.4), 7, 7, """
        1000111
        0001000
        0011001
        1001001
        1110001
        1101110
        1000001
    """),
    Case("random-seed", lambda: random(0.4, seed=11), 7, 7, """
        0011001
        1011010
        0000111
        1011000
        1101000
        0000011
        0110101
    """),
    Case("random-block", lambda: random(0.5, block=3), 7, 11, """
        11100000000
        11100000000
        11100000000
        00000000011
        00000000011
        00000000011
        00000011111
    """),
    Case("random-per-head", lambda: random(0.5, seed=2, per_head=True), 3, 5, """
        10001
        10010
        10010

        11101
        11000
        11110

        01000
        10011
        01111
    """, heads=3),
    Case("grid-3x3", lambda: grid(3, 3, 1), 7, 9, """
        110110000
        111111000
        011011000
        110110110
        111111111
        011011011
        000110110
    """),
    Case("grid-2x5-radius-0", lambda: grid(2, 5, 0), 7, 7, """
        1000000
        0100000
        0010000
        0001000
        0000100
        0000010
        0000001
    """),
    Case("grid-4x3-radius-2", lambda: grid(4, 3, 2), 11, 11, """
        11111111100
        11111111100
        11111111100
        11111111111
        11111111111
        11111111111
        11111111111
        11111111111
        11111111111
        00011111111
        00011111111
    """),
    # documents and labels
    Case("documents", lambda: documents([2, 3, 2]), 7, 7, """
        1100000
        1100000
        0011100
        0011100
        0011100
        0000011
        0000011
    """),
    Case("documents-with-an-empty-one", lambda: documents([2, 0, 3]), 5, 5, """
        11000
        11000
        00111
        00111
        00111
    """),
    Case("documents-cross", lambda: documents([2, 3], kv_lengths=[4, 3]), 5, 7, """
        1111000
        1111000
        0000111
        0000111
        0000111
    """),
    Case("documents-per-sample", lambda: documents([[2, 3], [4, 1]]), 5, 5, """
        11000
        11000
        00111
        00111
        00111

        11110
        11110
        11110
        11110
        00001
    """, batch=2),
    Case("documents-ids", lambda: documents(ids=[0, 0, 1, 0, 2]), 5, 5, """
        11010
        11010
        00100
        11010
        00001
    """),
    Case("documents-ids-cross", lambda: documents(ids=[1, 0, 1], kv_ids=[0, 1, 1, 2, 0]), 3, 5, """
        01100
        10001
        01100
    """),
    Case("documents-ids-per-sample", lambda: documents(ids=[[0, 0, 1], [0, 1, 1]]), 3, 3, """
        110
        110
        001

        100
        011
        011
    """, batch=2),
    Case("same", lambda: same([3, -1, 3, 1, -1]), 5, 5, """
        10100
        00000
        10100
        00010
        00000
    """),
    Case("same-none-is-0", lambda: same([1, 0, 1, 2, 0], none=0), 5, 5, """
        10100
        00000
        10100
        00010
        00000
    """),
    Case("same-cross", lambda: same([1, 2, -1], kv_labels=[2, 2, 1, -1, 5]), 3, 5, """
        00100
        11000
        00000
    """),
    Case("same-per-sample", lambda: same([[1, 1, -1], [2, 0, 2]]), 3, 3, """
        110
        110
        000

        101
        010
        101
    """, batch=2),
    # keys, queries and padding
    Case("keys", lambda: keys(flags("10110")), 3, 5, """
        10110
        10110
        10110
    """),
    Case("keys-per-sample", lambda: keys(flags("110", "011")), 2, 3, """
        110
        110

        011
        011
    """, batch=2),
    Case("queries", lambda: queries(flags("10110")), 5, 3, """
        111
        000
        111
        111
        000
    """),
    Case("queries-per-sample", lambda: queries(flags("110", "001")), 3, 2, """
        11
        11
        00

        00
        00
        11
    """, batch=2),
    Case("padding-lengths", lambda: padding(lengths=[3, 5]), 5, 5, """
        11100
        11100
        11100
        00000
        00000

        11111
        11111
        11111
        11111
        11111
    """, batch=2),
    Case("padding-lengths-keys", lambda: padding(lengths=[0, 2], on="keys"), 2, 3, """
        000
        000

        110
        110
    """, batch=2),
    Case("padding-starts", lambda: padding(starts=[0, 2]), 5, 5, """
        11111
        11111
        11111
        11111
        11111

        00000
        00000
        00111
        00111
        00111
    """, batch=2),
    Case("padding-starts-keys", lambda: padding(starts=[1, 3], on="keys"), 2, 5, """
        01111
        01111

        00011
        00011
    """, batch=2),
    Case("padding-queries", lambda: padding(lengths=[1, 3], on="queries"), 3, 2, """
        11
        00
        00

        11
        11
        11
    """, batch=2),
    Case("padding-one-number", lambda: padding(lengths=3), 5, 5, """
        11100
        11100
        11100
        00000
        00000
    """),
    # trees
    Case("tree", lambda: tree([-1, 0, 0, 1, 1, -1, 5]), 7, 7, """
        1000000
        1100000
        1010000
        1101000
        1100100
        0000010
        0000011
    """),
    Case("tree-of-segments", lambda: tree([-1, 0, 0], lengths=[2, 3, 2]), 7, 7, """
        1000000
        1100000
        1110000
        1111000
        1111100
        1100010
        1100011
    """),
    Case("tree-per-sample", lambda: tree([[-1, 0, 0], [-1, 0, 1]]), 3, 3, """
        100
        110
        101

        100
        110
        111
    """, batch=2),
    # dense, predicates, per head and per sample
    Case("dense", lambda: dense(flags("10110", "01101", "00000")), 3, 5, """
        10110
        01101
        00000
    """),
    Case("dense-bqk", lambda: dense(stack(flags("10", "01"), flags("11", "00")), axes="bqk"), 2, 2, """
        10
        01

        11
        00
    """, batch=2),
    Case("dense-hqk", lambda: dense(stack(flags("10", "01"), flags("11", "00")), axes="hqk"), 2, 2, """
        10
        01

        11
        00
    """, heads=2),
    Case("predicate", lambda: predicate(formula), 3, 5, """
        10010
        01001
        00110

        10011
        01100
        10010

        11001
        00100
        10011

        01001
        00110
        11001
    """, batch=2, heads=2),
    Case("per-head", lambda: per_head([causal, window(2), ~causal]), 3, 5, """
        10000
        11000
        11100

        10000
        11000
        01100

        01111
        00111
        00011
    """, heads=3),
    Case("per-head-repeated", lambda: per_head([window(1), window(1), causal]), 3, 3, """
        100
        010
        001

        100
        010
        001

        100
        110
        111
    """, heads=3),
    Case("per-sample", lambda: per_sample([prefix(1), local(1)]), 3, 5, """
        10000
        10000
        10000

        11000
        11100
        01110
    """, batch=2),
    Case("per-sample-of-per-head", lambda: per_sample([per_head([causal, nothing]), local(1)]), 3, 3, """
        100
        110
        111

        000
        000
        000

        110
        111
        011

        110
        111
        011
    """, batch=2, heads=2),
    # operators
    Case("and", lambda: causal & prefix(2), 5, 7, """
        1000000
        1100000
        1100000
        1100000
        1100000
    """),
    Case("or", lambda: causal | prefix(3), 5, 7, """
        1110000
        1110000
        1110000
        1111000
        1111100
    """),
    Case("xor", lambda: causal ^ local(1), 5, 7, """
        0100000
        0010000
        1001000
        1100100
        1110010
    """),
    Case("xor-of-three", lambda: causal ^ local(1) ^ prefix(2), 5, 7, """
        1000000
        1110000
        0101000
        0000100
        0010010
    """),
    Case("minus", lambda: causal - window(3), 7, 7, """
        0000000
        0000000
        0000000
        1000000
        1100000
        1110000
        1111000
    """),
    Case("not", lambda: ~causal, 5, 7, """
        0111111
        0011111
        0001111
        0000111
        0000011
    """),
    Case("sinks-and-window", lambda: causal & (window(3) | prefix(2)), 11, 11, """
        10000000000
        11000000000
        11100000000
        11110000000
        11111000000
        11011100000
        11001110000
        11000111000
        11000011100
        11000001110
        11000000111
    """),
    Case("contradiction", lambda: causal & ~causal, 5, 7, """
        0000000
        0000000
        0000000
        0000000
        0000000
    """),
    Case("excluded-middle", lambda: causal | ~causal, 5, 7, """
        1111111
        1111111
        1111111
        1111111
        1111111
    """),
    Case("big-bird", lambda: blocks(2, back=1, ahead=1) | global_tokens([0]) | random(0.2, block=2, seed=3), 11, 11, """
        11111111111
        11111100000
        11111100110
        11111100110
        11111111000
        11111111000
        11001111111
        11001111111
        11000011111
        11000011111
        10000000111
    """),
    Case("strictly-past", lambda: causal - local(0), 5, 5, """
        00000
        10000
        11000
        11100
        11110
    """),
    # re-indexing
    Case("at-q", lambda: causal.at(q_start=3), 2, 5, """
        11110
        11111
    """),
    Case("at-k", lambda: window(3).at(q_start=5, k_start=2), 5, 7, """
        0111000
        0011100
        0001110
        0000111
        0000011
    """),
    Case("take-q", lambda: causal.take(q=[4, 0, 2]), 3, 5, """
        11111
        10000
        11100
    """),
    Case("take-rolled-keys", lambda: window(3).take(q=[6], k=[5, 6, 2, 3, 4]), 1, 5, """
        11001
    """),
    Case("take-per-sample", lambda: causal.take(q=[[0, 3], [2, 1]]), 2, 5, """
        10000
        11110

        11100
        11000
    """, batch=2),
    Case("take-keys-per-sample", lambda: window(2).take(k=[[1, 0], [0, 2]]), 3, 2, """
        01
        11
        10

        10
        10
        01
    """, batch=2),
    Case("select-samples", lambda: prefix([0, 1, 3]).select(samples=[2, 0, 2, 1]), 1, 5, """
        11100

        00000

        11100

        10000
    """, batch=4),
    Case("select-heads", lambda: per_head([causal, local(0), nothing]).select(heads=[1, 0]), 3, 3, """
        100
        010
        001

        100
        110
        111
    """, heads=2),
    Case("T", lambda: window(3).T, 5, 7, """
        1110000
        0111000
        0011100
        0001110
        0000111
    """),
    Case("T-of-prefix", lambda: prefix(2).T, 5, 3, """
        111
        111
        000
        000
        000
    """),
    Case("packed", lambda: (causal & (window(2) | prefix(1))).packed([3, 4]), 7, 7, """
        1000000
        1100000
        1110000
        0001000
        0001100
        0001110
        0001011
    """),
    Case("packed-is-not-documents", lambda: (causal & (window(2) | prefix(1))) & documents([3, 4]), 7, 7, """
        1000000
        1100000
        1110000
        0001000
        0001100
        0000110
        0000011
    """),
    Case("packed-cross", lambda: causal.packed([2, 3], kv_lengths=[3, 4]), 5, 7, """
        1000000
        1100000
        0001000
        0001100
        0001110
    """),
    Case("packed-per-sample", lambda: causal.packed([[2, 3], [4, 1]]), 5, 5, """
        10000
        11000
        00100
        00110
        00111

        10000
        11000
        11100
        11110
        00001
    """, batch=2),
    Case("padded", lambda: (causal & (window(2) | prefix(1))).padded([0, 2]), 7, 7, """
        1000000
        1100000
        1110000
        1011000
        1001100
        1000110
        1000011

        0000000
        0000000
        0010000
        0011000
        0011100
        0010110
        0010011
    """, batch=2),
    Case("prepended", lambda: causal.prepended(q=2, k=2), 5, 5, """
        11111
        11111
        11100
        11110
        11111
    """),
    Case("prepended-keys-only", lambda: causal.prepended(k=3), 5, 7, """
        1111000
        1111100
        1111110
        1111111
        1111111
    """),
    Case("prepended-seen", lambda: causal.prepended(q=1, k=1, seen=padding(lengths=[2, 3], on="keys")), 4, 4, """
        1110
        1100
        1110
        1111

        1111
        1100
        1110
        1111
    """, batch=2),
    Case("at-of-packed", lambda: causal.packed([2, 3]).at(q_start=3), 2, 5, """
        00110
        00111
    """),
    Case("not-of-packed", lambda: ~causal.packed([2, 3]), 5, 5, """
        01111
        00111
        11011
        11001
        11000
    """),
]
# fmt: on
