"""What a forward was told of positions: `position_ids`, how many keys its cache held, and from where a model counts.

And which masks say themselves how tokens lie in the rows of a batch.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

from torch import Tensor, nn

from truemask.masks.core.mask import Mask
from truemask.masks.leaves.per_token import Padding

LAID_OUT = ("packed", "documents", "tree")  # kinds that say which documents there are
OF_ROWS = (*LAID_OUT, "same", "keys", "queries", "dense")


class Told(NamedTuple):
    """What the caller of a forward said, and what the model adds to every position."""

    positions: Tensor | None = None  # position_ids `[b or 1, q]`, as they were passed
    cached: int | None = None  # keys that the cache held
    first: int = 0  # the position of a sample's first token


class Forward(threading.local):
    """The models of which this thread runs the forward, the outermost first, each with what it was told.

    `last` is what the layers of the innermost were told: a backward may compute them once more.
    """

    def __init__(self) -> None:
        self.running: list[tuple[weakref.ref[nn.Module], Told]] = []
        self.last = Told()

    def begin(self, module: nn.Module, told: Told) -> bool:
        """Note a call of a model; whether it is part of no other one that runs.

        Positions are the outermost caller's, as far as they are handed on: a model makes some for its parts too.
        """
        if self.running:
            outer = self.running[0][0]()
            if outer is None or outer is module or all(module is not part for part in outer.modules()):
                self.running.clear()  # left behind by a forward that was interrupted
        if self.running and told.positions is not None:
            told = told._replace(positions=self.running[0][1].positions)
        self.running.append((weakref.ref(module), told))
        self.last = told
        return len(self.running) == 1

    def end(self, module: nn.Module) -> None:
        """The end of that call: the layers that come next are those of the model around it."""
        if all(running() is not module for running, _ in self.running):
            return  # which began before it was watched
        while self.running.pop()[0]() is not module:
            continue
        if self.running:
            self.last = self.running[-1][1]


FORWARD = Forward()


def first_position(model: nn.Module) -> int:
    """The position of a sample's first token: 0 for nearly all models, `padding_idx + 1` where RoBERTa's way is kept.

    Where learned positions keep an entry for padding (RoBERTa, XLM-R, CamemBERT, ESM, MPNet, Longformer, ...), tokens
    count from the entry after it. PaliGemma counts from 1.

    >>> from truemask.interop.positions import first_position
    >>> first_position(nn.Linear(2, 2))
    0
    """
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        place = getattr(table, "padding_idx", None)
        if isinstance(table, nn.Module) and isinstance(place, int):
            return place + 1
    configs = [getattr(module, "config", None) for module in model.modules()]
    return int(any(getattr(config, "model_type", None) == "paligemma" for config in configs))


def lies_in_rows(mask: Mask, *, packed: bool) -> bool:
    """Whether a mask says itself how tokens lie in the rows of a batch that is `packed`, or else padded on the left.

    Packed rows are described by documents, and by data for each token; padded ones by where samples begin.

    >>> from truemask.masks.leaves.bands import causal
    >>> lies_in_rows(causal.packed([3, 7]), packed=True), lies_in_rows(causal, packed=True)
    (True, False)
    """
    parts = list(mask.walk())
    if any(part.kind == "padded" or (isinstance(part, Padding) and part.starts is not None) for part in parts):
        return True
    return packed and any(part.kind in OF_ROWS for part in parts)
