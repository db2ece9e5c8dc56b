"""A model that reads drafts: what they all have in common, and our own models.

Shapes: b samples, n nodes, w tokens of a prompt, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from truemask.generation.native_step import Ahead, NativeStep, objection
from truemask.generation.retention import Retention
from truemask.generation.speculation.ragged_cache import RaggedCache
from truemask.generation.speculation.trees import Nodes
from truemask.masks.compose.boolean import conjunction
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.order import looks_back
from truemask.nn.forward_mask import Layout, token_positions
from truemask.nn.wrappers import TransformerWrapper


class DraftReader(Protocol):
    """A model with a cache of its own, that reads a prompt, and then drafts of which it keeps what is right."""

    def begin(self, tokens: Tensor) -> Tensor:
        """Logits [b, v] after prompts [b, w]."""
        ...

    def __call__(self, nodes: Nodes) -> Tensor:
        """Logits [b, n, v] after each node."""
        ...

    def accept(self, paths: Sequence[Sequence[int]], *, sure: bool = True) -> None:
        """Keep these nodes of the last call; `sure`: they are not taken back."""
        ...

    def rewind(self, read: Sequence[int]) -> None:
        """Forget of each sample all tokens but the first `read`, pads included; what is left is sure."""
        ...


class NativeDraftStep(NativeStep):
    """The nodes of a draft by the native kernel; nothing of it is worked out ahead, as drafts differ."""

    def read(self, tokens: Tensor, positions: Tensor | None) -> Tensor | None:
        """Logits [b, n, v] after nodes [b, n] at these positions; None if this is no call for the kernel."""
        self._positions = torch.zeros_like(tokens) if positions is None else positions
        return self(tokens)

    def _prepared(self, new: int) -> Ahead:
        cache = self._cache
        layout = self._net.attn_layers.layout(cache.batch, new, cache, self._net.num_memory_tokens)
        self._ahead = self._prepared_at(layout, self._positions)
        return self._ahead


class OwnReader:
    """Our own models; `tokens` is what prompt and answer have at most, `most` the nodes of a call."""

    def __init__(
        self, net: TransformerWrapper, mask: Mask, *, causal_too: bool | None, batch: int, tokens: int, most: int
    ) -> None:
        self._net, self._causal = net, causal_too
        heads = net.attn_layers.config.heads
        whole = mask if causal_too is False else conjunction(causal, mask)
        sized = whole != causal and looks_back(whole)
        retention = Retention(whole, tokens, batch, heads) if sized else None
        self.cache = RaggedCache(net, batch=batch, tokens=tokens, most=most, mask=mask, retention=retention)
        self._positions: Tensor | None = None  # [t] or [b, t]: logical ones of all tokens
        if net.pos_emb is not None or net.attn_layers.rotary is not None:
            self._positions = token_positions(mask, Layout(batch=batch, heads=heads, new=tokens), None)
        self._step = None if objection(net) else NativeDraftStep(net, self.cache, mask, causal_too)

    def begin(self, tokens: Tensor) -> Tensor:
        x = self._net(tokens, causal=self._causal, cache=self.cache, return_embeddings=True)
        self.cache.begin(tokens.shape[1])
        return self._net.to_logits(x[:, -1])

    def __call__(self, nodes: Nodes) -> Tensor:
        self.cache.expect(nodes)
        tokens, positions = nodes.tokens.to(self._net.token_emb.weight.device), self._logical(nodes)
        logits = None if self._step is None else self._step.read(tokens, positions)
        if logits is None:
            logits = self._net(tokens, causal=self._causal, cache=self.cache, pos=positions)
        return logits

    def accept(self, paths: Sequence[Sequence[int]], *, sure: bool = True) -> None:
        self.cache.accept(paths, sure=sure)

    def rewind(self, read: Sequence[int]) -> None:
        self.cache.rewind(read)

    def select(self, samples: Sequence[int]) -> None:
        """Go on with these samples, in this order; one may come several times."""
        self.cache.select(samples)
        if self.cache.mask.batch_size > 1:
            self.cache.mask = self.cache.mask.select(samples=list(samples))
        if self._positions is not None and self._positions.ndim == 2:
            self._positions = self._positions[list(samples)]

    def _logical(self, nodes: Nodes) -> Tensor | None:
        """The logical positions of the nodes, [b, n]; None if the model knows no positions."""
        if self._positions is None:
            return None
        rows = self.cache.places.positions_of(nodes)
        return self._positions.expand(len(rows), -1).gather(1, rows)
