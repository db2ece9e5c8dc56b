"""From tokens to logits, again and again: by the cache and the native kernel where they can, to the same result.

Shapes: b batch, n new tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from truemask.generation.kv_cache import KVCache, of_samples
from truemask.generation.native_step import NativeStep, objection
from truemask.masks.compose.boolean import conjunction
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.order import looks_back
from truemask.nn.wrappers import TransformerWrapper


class Reader:
    """A model that reads some sequences bit by bit; what it has read is in its cache, or is read again each time.

    `mask` is over all tokens; `causal_too` is the `causal=` of each call. `cache` None: without one.
    """

    def __init__(
        self, net: TransformerWrapper, mask: Mask, *, causal_too: bool | None = None, cache: KVCache | None = None
    ) -> None:
        self.net, self.mask, self.cache, self._causal = net, mask, cache, causal_too
        self._read: Tensor | None = None
        self._first, self._rows = mask, list[int]()  # that of the first batch, whose samples are here since `select`
        steps = cache is not None and not objection(net)
        self._step = NativeStep(net, cache, mask, causal_too) if cache is not None and steps else None

    def __call__(self, tokens: Tensor, *, every: bool = False) -> Tensor:
        """Logits [b, v] after the last of new tokens [b, n]; [b, n, v], one for each of them, with `every`."""
        if self.cache is None:
            return self._again(tokens, every)
        logits = None if self._step is None else self._step(tokens)
        if logits is None:
            mask = self.mask if self.cache.mask is None else None  # or the cache's own
            x = self.net(tokens, mask, causal=self._causal, cache=self.cache, return_embeddings=True)
            logits = self.net.to_logits(x if every else x[:, -1:])
        self.cache.advance()
        return logits if every else logits[:, -1]

    def select(self, samples: Sequence[int]) -> None:
        """Go on with these samples, in this order; one may come several times."""
        rows = list(samples)
        before, self._rows = self._rows, [self._rows[row] for row in rows] if self._rows else rows
        if self._first.batch_size != 1 and self._rows != before:
            self.mask = of_samples(self._first, self._rows)  # of the first mask: not deeper with every step
        if self._read is not None:
            self._read = self._read[rows]
        if self.cache is not None:
            self.cache.select(rows)
        if self._step is not None:
            self._step.mask = self.mask

    def _again(self, tokens: Tensor, every: bool) -> Tensor:
        new = tokens.shape[1]
        self._read = tokens if self._read is None else torch.cat((self._read, tokens), dim=1)
        x = self.net(self._read, self.mask, causal=self._causal, return_embeddings=True)
        return self.net.to_logits(x[:, -new:] if every else x[:, -1])


def cache_for(net: TransformerWrapper, mask: Mask, *, batch: int, tokens: int, causal_too: bool | None) -> KVCache:
    """A cache that keeps what the mask lets it; all, if the mask looks ahead."""
    mask = mask if causal_too is False else conjunction(causal, mask)
    forgets = mask != causal or net.attn_layers.config.layer_masks is not None
    sized = mask if forgets and looks_back(mask) else None
    return KVCache(net, batch=batch, tokens=tokens, mask=sized)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients inside: `net.modules()`; each of them is back in its own mode afterwards."""
    training = [part for part in modules if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
