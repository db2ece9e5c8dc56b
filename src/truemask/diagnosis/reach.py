"""`reach`: which tokens can influence a position through all layers, one mask for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truemask.common.arguments import MAX_POSITION, whole
from truemask.common.formatting import counted, describe, ranges, shortened
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.core.value import ANY
from truemask.masks.formats.as_mask import expression, from_text
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.data import tokens_held

MIN_TOKENS = 64  # tokens that are looked at where nothing says how many there are


@dataclass(frozen=True, eq=False)
class Reach:
    """What `reach` found.

    Attributes:
        masks: one for each layer, the first layer first.
        query: the position.
        layers: bool `[layers + 1, n]`: row i says which positions of layer i's input matter, the last one the query.
        sample: of which sample.
        heads: how many heads were asked, where the masks hold no number of them.
    """

    masks: tuple[Mask, ...]
    query: int
    layers: Tensor
    sample: int
    heads: int | None

    @property
    def tokens(self) -> Tensor:
        """Which tokens can influence the position, bool `[n]`."""
        return self.layers[0]

    def leaks(self, allowed: Mask | str = causal) -> list[int]:
        """The tokens that can influence the position although `allowed` hides them; by default later ones."""
        allowed = expression("leaks: `allowed`", allowed)
        itself = self.layers[-1]
        _check(allowed, self.query + 1, len(itself), self.sample)
        visible = itself | _seen(allowed, itself, self.sample, self.heads)
        return (self.tokens & ~visible).nonzero().flatten().tolist()

    def path(self, token: int) -> list[int]:
        """How a token gets there: the position of its influence before each layer, and at last the query.

        >>> from truemask.masks.leaves.bands import window
        >>> reach([window(3), window(3)], 9).path(5)
        [5, 7, 9]
        """
        n = self.layers.shape[1]
        place = whole(token, "token")
        if place >= n or not bool(self.tokens[place]):
            raise MaskError(f"token {place} does not influence position {self.query} through `{self._text()}`")
        path = [place]
        for mask, later in zip(self.masks, self.layers[1:], strict=True):
            rows = later.nonzero().flatten()
            cells = _of_sample(mask, self.sample).take(q=rows, k=[path[-1]])
            readers = ~cells.dead_queries(len(rows), 1, heads=self.heads)[0].all(0) | (rows == path[-1])
            path.append(int(rows[readers][-1]))
        return path

    def _text(self) -> str:
        return ", ".join(shortened(mask.text) for mask in self.masks)

    def __str__(self) -> str:
        count = int(self.tokens.sum())
        lines = [
            f"position {self.query} of {self.layers.shape[1]:,} can be influenced by {counted(count, 'token')} "
            f"through {counted(len(self.masks), 'layer')}"
        ]
        for i, row in enumerate(self.layers[:-1]):
            lines.append(
                f"  into layer {i}: {ranges(np.flatnonzero(row.numpy()))}   under `{shortened(self.masks[i].text)}`"
            )
        leaks = self.leaks()
        if leaks:
            lines.append(
                f"  the future, {ranges(np.array(leaks))}, reaches it: {' -> '.join(map(str, self.path(leaks[-1])))}"
            )
        return "\n".join(lines)

    __repr__ = __str__


def reach(
    masks: Sequence[Mask | str] | Mask | str,
    query: int,
    length: int | None = None,
    *,
    sample: int = 0,
    heads: int | None = None,
    layers: int | None = None,
) -> Reach:
    """Which tokens can influence a position through all layers, whatever the weights.

    A layer mixes in what its mask lets a position see, and its residual connection keeps the position itself. So a
    window of w keys reaches `layers * (w - 1)` tokens back, and a token may leak through two masks of which neither
    lets it through directly. Heads count together: one that sees a key is enough.

    Args:
        masks: one mask, or its text, for each layer of self-attention, the first layer first; one for `layers` alike
            ones.
        query: the position whose output is asked about.
        length: tokens of the text. Default: as many as the masks hold data for, or twice as many as stand before the
            query, at least 64: enough to see a future leak.
        sample: which sample, where masks vary over them.
        heads: how many heads, where a mask varies over them without holding a number of them.
        layers: how many layers, where `masks` is one mask.

    Raises:
        MaskError: no layers, no such sample, or a mask that cannot answer for the length.

    >>> from truemask.masks.leaves.bands import blocks, causal, window
    >>> reach(window(4), 20, layers=3)
    position 20 of 64 can be influenced by 10 tokens through 3 layers
      into layer 0: 11-20   under `window(4)`
      into layer 1: 14-20   under `window(4)`
      into layer 2: 17-20   under `window(4)`
    >>> reach([causal, blocks(8)], 20, 32).leaks()
    [21, 22, 23]
    """
    chain = _chain(masks, layers)
    query, sample = whole(query, "query"), whole(sample, "sample")
    heads = None if heads is None else whole(heads, "heads", 1)
    n = _length(chain, query) if length is None else whole(length, "length", 1)
    if query >= n:
        raise MaskError(f"reach: query {query} lies behind the {n} tokens that are looked at: pass `length=`")
    for mask in chain:
        _check(mask, n, n, sample)
    tokens = torch.zeros(n, dtype=torch.bool)
    tokens[query] = True
    layer_tokens = [tokens]
    for mask in reversed(chain):
        layer_tokens.append(layer_tokens[-1] | _seen(mask, layer_tokens[-1], sample, heads))
    return Reach(tuple(chain), query, torch.stack(layer_tokens[::-1]), sample, heads)


def _chain(masks: Sequence[Mask | str] | Mask | str, layers: int | None) -> list[Mask]:
    masks = from_text(masks)
    if isinstance(masks, Mask):
        return [masks] * whole(1 if layers is None else layers, "layers", 1)
    if not isinstance(masks, (list, tuple)) or not masks:
        raise MaskError(f"reach takes one mask for each layer, at least one; got {describe(masks)}")
    if layers is not None and layers != len(masks):
        raise MaskError(
            f"reach: {len(masks)} masks were given for layers={layers}: leave `layers` out, or give one mask"
        )
    return [expression(f"reach: the mask of layer {i}", mask) for i, mask in enumerate(masks)]


def _length(chain: list[Mask], query: int) -> int:
    held = tokens_held(chain)
    return min(max(MIN_TOKENS, 2 * (query + 1)), MAX_POSITION - 1) if held is None else held


def _check(mask: Mask, q_len: int, kv_len: int, sample: int) -> None:
    """Raise if the mask cannot answer for the sizes, or holds no such sample."""
    mask.check(q_len, kv_len)
    if mask.batch_size not in (1, ANY) and sample >= mask.batch_size:
        raise MaskError(f"reach: sample {sample} is out of range, the mask `{mask}` holds {mask.batch_size}")


def _of_sample(mask: Mask, sample: int) -> Mask:
    return mask if mask.batch_size == 1 else mask.select(samples=[sample])


def _seen(mask: Mask, rows: Tensor, sample: int, heads: int | None) -> Tensor:
    """Which keys some of the rows see in some head."""
    places = rows.nonzero().flatten()
    taken = _of_sample(mask, sample).take(q=places)
    return ~taken.dead_keys(len(places), len(rows), heads=heads)[0].all(0)
