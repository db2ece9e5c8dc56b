"""Act 1: the article that this project started from, run as written, and what was meant."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from truemask.cli.tour.stage import SMALL_LENGTH, Act, Stage
from truemask.errors import ConventionWarning
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.leaves.per_token import keys
from truemask.nn.layers import Decoder

ARTICLE = """\
decoder = Decoder(dim = 512, depth = 6, heads = 8, attn_flash = True)
x = torch.randn(1, 256, 512)
mask = torch.ones(1, 256).bool().triu(1)
mask = ~mask
output = decoder(x, mask=mask)"""


def play(stage: Stage) -> None:
    stage.say("An article explains the causal mask with this code, meaning a lower triangle:")
    stage.code(ARTICLE)
    torch.manual_seed(0)
    names: dict[str, object] = {"torch": torch, "Decoder": Decoder}
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always", ConventionWarning)
        exec(ARTICLE, names)
    for warning in caught_warnings:
        if issubclass(warning.category, ConventionWarning):
            stage.say(("It runs, with one warning. ", "bold"), str(warning.message))
    decoder, x, mask = names["decoder"], names["x"], names["mask"]
    assert isinstance(decoder, Decoder)
    assert isinstance(x, Tensor)
    assert isinstance(mask, Tensor)
    rows = [
        _row("as written", "mask=mask", causal & keys(mask), decoder, x, mask),
        _row("as meant", "mask=causal", causal, decoder, x, causal),
    ]
    stage.table(["", "the call", "keys that row 255 may see", "inputs that move its output (by gradient)"], rows)
    pictures = [("as written", causal & keys(mask[:, :SMALL_LENGTH]), "mask=mask"), ("as meant", causal, "mask=causal")]
    stage.pictures(pictures)
    stage.say(
        "A (1, 256) tensor is key padding, one flag per token. The triangle has one row here, so it kept ",
        (f"{int(mask.sum())} key of {mask.shape[1]}", "bad"),
        ". A Decoder is causal by itself: ",
        ("decoder(x)", "code"),
        " was all that was needed, and an expression says what it means: ",
        ("decoder(x, mask=causal & window(64))", "code"),
        ".",
    )


def _row(name: str, call: str, meaning: Mask, decoder: Decoder, x: Tensor, mask: Tensor | Mask) -> list[str]:
    visible_keys = int(meaning.to_dense(x.shape[1])[0, 0, -1].sum())
    return [name, call, f"{visible_keys} of {x.shape[1]}", f"{listened(decoder, x, mask)} of {x.shape[1]}"]


def listened(decoder: Decoder, x: Tensor, mask: Tensor | Mask) -> int:
    """How many input positions the last output row depends on, its own included."""
    leaf = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConventionWarning)
        last = decoder(leaf, mask=mask)[0, -1]
    (last * torch.randn(last.shape)).sum().backward()  # a plain sum says nothing: the last norm keeps it constant
    assert leaf.grad is not None
    return int(leaf.grad[0].abs().amax(-1).gt(0).sum())


ACT = Act("article", "The article, as written", play)
