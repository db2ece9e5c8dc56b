"""Attention over the keys that a sized cache still has: the mask and the bias asked about their places."""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.errors import MaskError
from truemask.interop.huggingface.kept_keys import Needs, of_places
from truemask.interop.huggingface.masks import ModelMask
from truemask.interop.huggingface.sized_cache import SizedLayer
from truemask.interop.layer_masks import AttentionLayer
from truemask.masks.core.mask import Mask


def needs_of(
    kept: SizedLayer, key: Tensor, layer: AttentionLayer, model_mask: ModelMask, user_mask: Mask | None, heads: int
) -> Needs:
    """What queries of a layer see. Raises MaskError if `key` is not the cache's, or one is forgotten."""
    if not kept.gave(key):
        raise MaskError(
            f"`{layer.path}` does not attend to the keys as its cache gave them, so a cache of `tm.cache_for` cannot "
            "serve it: use a DynamicCache"
        )
    needs = model_mask.needs(user_mask, layer.replace, heads, kept.tokens)
    lost, before = kept.kept.lost_now(needs, kept.past), kept.kept.needs
    if before is not None and lost is not None:
        raise MaskError(
            f"`{layer.path}` may need key {lost} now, under `{needs.mask}`, which was forgotten under `{before.mask}`: "
            "begin again with `cache.reset()`, or use a DynamicCache"
        )
    return needs


def from_kept(kept: SizedLayer, needs: Needs, bias: Tensor | None) -> tuple[Tensor, Tensor, Mask, Tensor | None]:
    """Keys and values that are there, the mask for the call's rows and them, and their columns of the bias."""
    key, value = kept.read()
    mask = kept.kept.for_rows(needs, kept.past, kept.total)
    return key, value, mask, of_places(bias, kept.kept, kept.total)


def of_all_keys(shares: Tensor, kept: SizedLayer) -> Tensor:
    """Weights `[b, h, q, n]` as they are of all keys: what was forgotten has none."""
    whole = shares.new_zeros((*shares.shape[:-1], kept.total))
    whole[..., torch.from_numpy(kept.kept.all_places(kept.total)).to(shares.device)] = shares
    return whole
