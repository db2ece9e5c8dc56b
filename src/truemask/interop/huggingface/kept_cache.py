"""Caches of transformers that forget what their masks let them forget. To the model each looks as if it kept all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from truemask.common.formatting import counted, memory
from truemask.errors import MaskError
from truemask.interop.huggingface.expected_masks import Expected
from truemask.interop.huggingface.kept_layer import KeptLayer, Scratch
from truemask.interop.huggingface.sized_cache import SizedCache, SizedLayer


class KeptCache(SizedCache, DynamicCache):
    """A cache that keeps of each layer what its mask lets later queries see. Made by `tm.cache_for`."""

    def __init__(self, expected: Expected, depth: int, tokens: int | None, static: bool) -> None:
        self._expected, self.tokens, self.static = expected, tokens, static
        self._gate, scratch = Gate(), Scratch(static)
        layers: Any = [KeptLayer(tokens, static, self._gate.is_open, scratch) for _ in range(depth)]
        Cache.__init__(self, layers=layers)

    @property
    def _kept_layers(self) -> list[KeptLayer]:
        return [layer for layer in self.layers if isinstance(layer, KeptLayer)]

    @property
    def bytes(self) -> int:
        """What the keys and values take, in bytes; 0 before the first call, in which the memory is set aside."""
        return sum(layer.bytes for layer in self._kept_layers)

    @property
    def full_bytes(self) -> int:
        """What the keys and values of all tokens that were read would take."""
        return sum(layer.full_bytes for layer in self._kept_layers)

    def positions(self, layer_idx: int = 0) -> Tensor:
        """Of which tokens a layer has keys, int64 `[n]`, pads counted; the last ones may be visible no more."""
        layer = self._kept_layers[layer_idx]
        return torch.from_numpy(layer.kept.all_places(layer.past))

    def __repr__(self) -> str:
        kept = sorted({layer.kept.count(layer.past) for layer in self._kept_layers})
        numbers = str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
        return (
            f"KeptCache({self._expected.name}): {counted(self.get_seq_length(), 'token')} read, {numbers} kept in "
            f"{counted(len(self.layers), 'layer')}, {memory(self.bytes)} (all keys: {memory(self.full_bytes)})"
        )

    # -- a forward ---------------------------------------------------------------------------------------------------

    def admit(self, model: nn.Module) -> None:
        """Begin a forward: the model and its masks are those that the cache is for."""
        self.finish()  # an interrupt tells no hook
        self._expected.check(model)
        lengths = {layer.past for layer in self._kept_layers}
        if len(lengths) > 1:
            raise MaskError(
                f"an earlier forward was broken off when layers had read {sorted(lengths)} tokens, and what they "
                "forgot is gone: `cache.reset()` begins again"
            )
        self._gate.past = lengths.pop()

    def finish(self) -> None:
        """End it; of one that was broken off nothing stays, where that can be."""
        past, self._gate.past = self._gate.past, None
        lengths = {layer.past for layer in self._kept_layers}
        if past is not None and len(lengths) > 1:
            for layer in self._kept_layers:
                layer.leave(past)

    def layer_of(self, module: nn.Module) -> SizedLayer:
        """The memory of an attention layer."""
        return self._kept_layers[self._expected.place_of(module)]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of all layers: minus their number. Raises before any is, if one cannot."""
        for layer in self._kept_layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)


class Gate:
    """Whether a forward that may use the cache runs: how many tokens were read when it began."""

    def __init__(self) -> None:
        self.past: int | None = None

    def is_open(self) -> bool:
        return self.past is not None


class KeptEncoderDecoderCache(EncoderDecoderCache):
    """The same for a model with an encoder: the decoder's self-attention forgets, its cross-attention does not."""

    self_attention_cache: KeptCache

    @property
    def bytes(self) -> int:
        """What the decoder's own keys and values take, in bytes."""
        return self.self_attention_cache.bytes

    @property
    def full_bytes(self) -> int:
        """What those of all its tokens would take."""
        return self.self_attention_cache.full_bytes

    def positions(self, layer_idx: int = 0) -> Tensor:
        """Of which tokens a layer of the decoder has keys, int64 `[n]`."""
        return self.self_attention_cache.positions(layer_idx)
