"""A model that reads drafts: what they all have in common, and our own models.

Shapes: b samples, n nodes, w tokens of a prompt, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

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

    def begin(self, tokens: Tensor) -> Tensor:
        x = self._net(tokens, causal=self._causal, cache=self.cache, return_embeddings=True)
        self.cache.begin(tokens.shape[1])
        return self._net.to_logits(x[:, -1])

    def __call__(self, nodes: Nodes) -> Tensor:
        self.cache.expect(nodes)
        tokens = nodes.tokens.to(self._net.token_emb.weight.device)
        return self._net(tokens, causal=self._causal, cache=self.cache, pos=self._logical(nodes))

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
