"""Act 4: two documents in one row. Does changing the first change the second?"""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.attention.attend import attend
from truemask.cli.tour.stage import Act, Part, Stage
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.documents import documents
from truemask.masks.leaves.per_token import prefix
from truemask.nn.layers import Decoder

A, B = 97, 151  # tokens of the two documents


def play(stage: Stage) -> None:
    stage.say(
        f"Training packs several texts into one row. Here: A ({A} tokens), then B ({B} tokens). We replace all of A "
        "and look at how far the outputs of B move."
    )
    torch.manual_seed(0)
    decoder = Decoder(dim=64, depth=3, heads=4, attn_dim_head=16, rotary_pos_emb=True).eval()
    x, other = torch.randn(1, A + B, 64), torch.randn(1, A, 64)
    sinks, lengths = causal & (window(32) | prefix(4)), [A, B]
    pairs = [
        (causal, causal),
        (causal.packed(lengths), causal),
        (sinks & documents(lengths), sinks),
        (sinks.packed(lengths), sinks),
    ]
    rows = [_measure(decoder, x, other, mask, alone) for mask, alone in pairs]
    stage.table(["mask", "B moves (Decoder)", "B moves (attend)", "and B alone?"], rows)
    small = [9, 15]
    stage.pictures([(name, mask, str(mask)) for name, mask in (("leaks", causal), ("does not", causal.packed(small)))])
    stage.say(
        ("packed", "code"),
        " is the same document and positions that restart in it, so a sample means in the row what it means alone. ",
        ("& documents(...)", "code"),
        " separates too, but keeps the row's positions: only the first document has a prefix.",
    )


@torch.no_grad()
def _measure(decoder: Decoder, x: Tensor, other: Tensor, mask: Mask, alone_mask: Mask) -> list[Part]:
    changed = torch.cat([other, x[:, A:]], dim=1)
    before, after = decoder(x, mask=mask), decoder(changed, mask=mask)
    alone = decoder(x[:, A:], mask=alone_mask)
    heads = [value.view(1, A + B, 4, 16).transpose(1, 2) for value in (x, changed)]
    direct = [attend(h, h, h, mask)[:, :, A:] for h in heads]
    return [
        str(mask),
        moved(before[:, A:], after[:, A:]),
        moved(direct[0], direct[1]),
        difference(before[:, A:], alone),
    ]


def moved(before: Tensor, after: Tensor) -> Part:
    """By how much an output changed, relative to its size; `no` only if not one bit did."""
    if torch.equal(before, after):
        return ("not one bit", "good")
    return (f"yes, by {_relative(before, after):.0%}", "bad")


def difference(packed: Tensor, alone: Tensor) -> Part:
    """How far the packed output is from the one of the document alone."""
    if torch.equal(packed, alone):
        return ("same, bit for bit", "good")
    relative = _relative(alone, packed)
    same = relative < 1e-5
    return (f"{'same' if same else 'differs'} ({relative:.0e})", "good" if same else "bad")


def _relative(a: Tensor, b: Tensor) -> float:
    """The root mean square of the difference against that of `a`."""
    return float((a - b).norm() / a.norm())


ACT = Act("leak", "The leak between documents", play)
