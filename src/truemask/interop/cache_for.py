"""`cache_for`: the cache of a Hugging Face model, as small as its masks allow."""

from __future__ import annotations

from typing import Any

from torch import nn

from truemask.common.arguments import whole
from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.generation.retention import check_cacheable
from truemask.interop.huggingface.expected_masks import Expected
from truemask.interop.huggingface.layers import attention_layers, scoped_layer_of
from truemask.interop.layer_masks import AttentionLayer, assigned
from truemask.interop.use import huggingface_model
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.order import looks_back

KINDS = ("full_attention", "sliding_attention", "chunked_attention")


def cache_for(
    model: Any,
    mask: Mask | str | None = None,
    layers: Any = None,
    *,
    replace: bool = False,
    tokens: int | None = None,
    static: bool = False,
) -> Any:
    """A cache for a transformers model in use, which keeps of each layer the keys that later queries may still see.

    Pass it as `past_key_values=` inside `tm.use(model, mask)`, to `generate` or to the model: text, logits, positions
    and lengths are those of a cache that keeps every key, the memory is not. `causal & (window(256) | prefix(4))` keeps
    260 keys a layer however long the text, `causal & blocks(512)` 512, `causal` all; the model's own windows and chunks
    count, so each layer has its own size. It goes on over several turns of a chat, with beams, several sequences,
    drafts and left padding (with pads elsewhere every key is kept). A copy (`copy.deepcopy`) goes on by itself.

    Args:
        model: as in `tm.use`.
        mask, layers, replace: as in the `tm.use` in which the cache will be read; every forward checks that they are
            the same. Without a mask, inside a `tm.use`: those in use.
        tokens: how many tokens will come at most, prompt, answers and pads. None: any number; a mask that does not
            repeat itself (`random`, a function) then keeps every key.
        static: memory of a fixed size, set aside in the first call: no step takes more, and addresses stay. It needs
            `tokens`, which the size follows from. Otherwise memory grows and shrinks with what is kept.

    Returns:
        A transformers `Cache`. `cache.bytes` is what keys and values take, `cache.full_bytes` what those of all tokens
        read would take, `cache.positions(layer)` of which tokens there are keys. `cache.crop(-n)` takes back the last n
        tokens, of at least the last 32; after `cache.activate_past_recording()`, as drafts have it, of the last 256.

    Raises:
        MaskError: the mask lets queries see later keys, or its data end before `tokens`; the model's layers keep
            something else than keys, or share them; there is no mask. Before the first token of a call, and without a
            change in the cache: another model, other masks in use, another batch, more than `tokens`, no `tm.use`.

    >>> cache_for(nn.Linear(2, 2), "causal & window(4)")
    Traceback (most recent call last):
    truemask.errors.MaskError: cache_for takes a model of transformers, got Linear
    """
    inner = huggingface_model(model)
    if inner is None:
        name = type(model).__name__ if isinstance(model, nn.Module) else describe(model)
        raise MaskError(f"cache_for takes a model of transformers, got {name}")
    tokens = None if tokens is None else whole(tokens, "tokens", 1)
    if static and tokens is None:
        raise MaskError("cache_for: static=True sets memory aside, whose size follows from tokens=: pass it")
    from truemask.interop.huggingface.kept_cache import KeptCache, KeptEncoderDecoderCache

    depth = _depth(inner)
    meant = _layers_of_decoder(inner, mask, layers, replace)
    for layer in meant.values():
        _check_mask(layer, tokens)
    cache = KeptCache(Expected(type(inner).__name__, meant), depth, tokens, static)
    if not inner.config.is_encoder_decoder:
        return cache
    from transformers import DynamicCache

    return KeptEncoderDecoderCache(cache, DynamicCache(config=inner.config.get_text_config(decoder=True)))


def _layers_of_decoder(model: nn.Module, mask: object, where: object, replace: bool) -> dict[nn.Module, AttentionLayer]:
    """The self-attention layers that have a cache, with the masks under which they will run."""
    layers = attention_layers(model)
    part = "decoder" if any(layer.part == "encoder" for layer in layers.values()) else None
    mine = {module: layer for module, layer in layers.items() if not layer.cross and part in (None, layer.part)}
    own = next((layer for layer in mine.values() if layer.own_way), None)
    if own is not None:
        raise MaskError(
            f"cache_for: `{own.path}` of {type(model).__name__} {own.own_way}, so nobody can tell it which keys there "
            "are: use a DynamicCache"
        )
    if mask is not None or where is not None:
        with_masks = assigned(model, layers, mask, where, replace)
        return {module: with_masks[module] for module in mine}
    if replace:
        raise MaskError("cache_for: replace=True says that a mask takes the place of the model's own: pass the mask")
    scoped = {module: scoped_layer_of(module) for module in mine}
    used = {module: None if value is None else value.here() for module, value in scoped.items()}
    here = {module: layer for module, layer in used.items() if layer is not None}
    if len(here) < len(mine):
        raise MaskError(
            f"cache_for: no mask is given, and the {type(model).__name__} is not in use here: pass the mask of the "
            "`tm.use` in which the cache will be read, or make it inside the block"
        )
    return here


def _check_mask(layer: AttentionLayer, tokens: int | None) -> None:
    """Raise MaskError if a layer's mask cannot say what to keep."""
    mask = layer.mask
    if mask is None:
        return
    heads = max(1, mask.head_count)
    batch = max(1, mask.batch_size)
    if tokens is not None:
        check_cacheable(mask if layer.replace else causal & mask, tokens, batch, heads)
    elif layer.replace and not looks_back(mask):
        raise MaskError(
            f"cache_for: `{mask}` takes the place of the model's own mask and may let queries see later keys, "
            "which are not there yet when a query is computed: pass `tm.causal & ...`"
        )


def _depth(model: Any) -> int:
    """The number of layers that have keys. Raises MaskError if one keeps something else, or shares those of another."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]
    others = sorted(set(kinds) - set(KINDS))
    if others:
        raise MaskError(
            f"cache_for: {type(model).__name__} has layers of kind {', '.join(others)}, which keep something else than "
            f"keys of their own; known are {', '.join(KINDS)}. Leave past_key_values= to transformers"
        )
    return len(kinds)
