"""Caches of transformers, v5, whose layers keep what the masks in use let later queries see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache

from truemask.common.formatting import counted, memory
from truemask.errors import MaskError
from truemask.interop.huggingface.kept_keys import KeptKeys, Places
from truemask.interop.huggingface.layers import scoped_layer_of
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.scopes import LASTING, USES

REMEMBERED = 8  # places that layers may share


class KeptLayer(CacheLayerMixin):
    """One layer: transformers calls `update` before its attention, our attention calls `settle` behind it."""

    is_sliding, is_croppable, supports_early_init = False, True, False

    def __init__(self, kept: KeptKeys) -> None:
        super().__init__()
        self.kept = kept
        self.is_initialized = True  # there is nothing to make ahead

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is made when it is known what must be kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values that this call reads."""
        return self.kept.append(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if every key were there: masks speak of the whole sequence."""
        return self.kept.past + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that were read."""
        return self.kept.past

    def get_max_length(self) -> int:
        """Tokens that can be read."""
        return self.kept.tokens

    def reset(self) -> None:
        """Forget all tokens."""
        self.kept.forget_all()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is below 0, as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to forget, got {tokens_to_remove}")
        if tokens_to_remove:
            self.kept.crop(max(0, self.kept.past + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sample i goes on as sample `beam_idx[i]` was."""
        self.kept.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample so many times."""
        if self.kept.batch is not None:
            self.kept.select(torch.arange(self.kept.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these samples."""
        if self.kept.batch is not None:
            self.kept.select(torch.arange(self.kept.batch)[indices.cpu()])


class KeptCache(Cache):
    """What `cache_for` returns: the self-attention of a model, for the masks that it is made for."""

    def __init__(
        self, model: nn.Module, layers: Mapping[nn.Module, AttentionLayer], tokens: int, declared: bool, static: bool
    ) -> None:
        self.tokens, self.static = tokens, static
        self._model, self._name, self._declared = model, type(model).__name__, declared
        self._masks = {module: (layer.mask, layer.path) for module, layer in layers.items()}
        self._checked: object = None
        self._places: list[Places] = []
        depth = 1 + max((layer.index for layer in layers.values()), default=-1)
        super().__init__(layers=[KeptLayer(KeptKeys(tokens, static, self._shared)) for _ in range(depth)])

    def _shared(self, places: Places) -> Places:
        found = next((one for one in self._places if one == places), places)
        self._places = [*(one for one in self._places if one is not found), found][-REMEMBERED:]
        return found

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def kept(self) -> list[KeptKeys]:
        """What each layer keeps."""
        return [layer.kept for layer in self.layers]

    @property
    def bytes(self) -> int:
        """What keys and values take in memory, in bytes."""
        return sum(kept.bytes for kept in self.kept)

    @property
    def full_bytes(self) -> int:
        """What a cache that keeps every key would take for the tokens that were read."""
        return sum(kept.full_bytes for kept in self.kept)

    def __repr__(self) -> str:
        most = max((kept.count for kept in self.kept), default=0)
        return (
            f"{type(self).__name__} for {self._name}: {counted(self.get_seq_length(), 'token')} of {self.tokens} read, "
            f"{most} kept in {counted(len(self.layers), 'layer')}, {memory(self.bytes)}"
        )

    # -- a call ------------------------------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """What transformers asks before the first layer of a forward, and we use to check who calls."""
        self._check()
        return super().get_mask_sizes(query_length, layer_idx)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of a call of one layer."""
        self._check()
        return self.layers[layer_idx].update(key_states, value_states)

    def _check(self) -> None:
        """Raise if the masks in use are not those that the cache was made for."""
        now = USES.get(), tuple(LASTING)
        if now == self._checked:
            return
        here = {module: scoped.here() for module in self._masks if (scoped := scoped_layer_of(module)) is not None}
        for module, (mask, path) in self._masks.items():
            layer = here.get(module)
            if layer is None:
                raise MaskError(
                    f"this cache of {self._name} keeps what a mask lets it keep, and `{path}` is not in use: run the "
                    "model inside `with tm.use(model, mask)`"
                )
            if layer.mask != mask and self._declared:
                raise MaskError(
                    f"this cache is for `{path}` under `{mask}`, and the mask in use is `{layer.mask}`: what it does "
                    "not keep, that one may need. Make it with cache_for(model, mask) for the mask of the `use`"
                )
        self._masks = {
            module: (layer.mask, path) for module, (_, path) in self._masks.items() if (layer := here[module])
        }
        self._checked, self._declared = now, True

    # `Cache` has the rest: reset, crop, reorder_cache, batch_repeat_interleave, batch_select_indices, layer by layer.


def with_cross_attention(cache: KeptCache) -> EncoderDecoderCache:
    """The same for an encoder-decoder: what comes from the encoder is there once, and stays."""
    return EncoderDecoderCache(cache, DynamicCache())
