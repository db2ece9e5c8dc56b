"""`cache_for`: caches of Hugging Face models that are as small as the mask."""

from __future__ import annotations

from typing import Any

from torch import nn

from truemask.common.arguments import whole
from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.use import switch_for
from truemask.masks.core.mask import Mask

TOKENS = 32_768  # where a model has no most positions


def cache_for(
    model: Any, mask: Mask | str | None = None, layers: Any = None, *, tokens: int | None = None, static: bool = False
) -> Any:
    """A cache of a transformers model that keeps the keys which later tokens may see under its masks, and no others.

    Pass it as `past_key_values=` to the model or its `generate`, inside `tm.use(model, mask)` with the same mask:

        with tm.use(model, "window(512) | prefix(4)"):
            cache = tm.cache_for(model, "window(512) | prefix(4)")
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=2000)

    Logits are those of a cache that keeps everything, since a key that no later token sees never comes back: what may
    be forgotten follows from the mask and the model's own rule (causal, window, chunks) together, in every sample, pads
    included. Positions count all tokens, kept or not. `window(512) | prefix(4)` keeps 516 keys a layer and room for as
    many, however long the text; a mask whose forgetting would take long to find out keeps all.

    `generate` goes on as always: sampling, beams, assisted and prompt look-up decoding (the last 32 tokens can always
    be taken back), several turns of a chat. Masks of single samples count rows of the batch: with beams choose them,
    as for `use`.

    Args:
        model: a transformers (v5) model.
        mask: the mask of the `use`, an expression or its text; None: whatever is in use when the cache is first read.
        layers: those of the `use`.
        tokens: the most that are read, prompts and answers; by default the model's most positions.
        static: the memory, once it is made by the first call, stays where it is, and a step makes none.

    Returns:
        A transformers `Cache`; `bytes` is what it takes, and `full_bytes` what one that keeps everything would take.
        Of an encoder-decoder an `EncoderDecoderCache`: the decoder's own attention is kept so, the rest whole.

    Raises:
        MaskError: not such a model; it has layers that keep states instead of keys; a mask that does not answer for
            so many tokens. Later, before anything is read: the model is not in use, or under another mask. ValueError:
            another batch, more tokens than `tokens`, or tokens taken back that were forgotten.

    >>> cache_for(nn.Linear(2, 2), "causal")
    Traceback (most recent call last):
    truemask.errors.MaskError: cache_for takes a model of transformers, got Linear Linear(in_features=2, ...
    """
    inner, layer_masks = _self_attention(model, mask, layers)
    config = inner.config.get_text_config(decoder=True)
    most = whole(tokens, "tokens") if tokens is not None else getattr(config, "max_position_embeddings", None) or TOKENS
    for layer in layer_masks.values():
        _check(layer, most)
    from truemask.interop.huggingface.kept_cache import KeptCache, with_cross_attention

    cache = KeptCache(inner, layer_masks, most, mask is not None or layers is not None, static)
    return with_cross_attention(cache) if getattr(inner.config, "is_encoder_decoder", False) else cache


def _self_attention(model: Any, mask: Any, layers: Any) -> tuple[Any, dict[nn.Module, AttentionLayer]]:
    """The model, and the layers whose keys a cache holds."""
    from truemask.interop.huggingface.switch import HuggingFaceSwitch

    try:
        inner, switch = switch_for(model) if isinstance(model, nn.Module) else (model, None)
    except MaskError:
        switch = None
    if switch is not HuggingFaceSwitch:
        raise MaskError(
            f"cache_for takes a model of transformers, got {describe(model)}: models of truemask have KVCache(net, ...)"
        )
    found = HuggingFaceSwitch(inner, mask, layers, False, None).layer_masks()
    decoding = {module: layer for module, layer in found.items() if not layer.cross and layer.part != "encoder"}
    config = inner.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - KINDS
    if kinds or not decoding:
        what = f"has layers of {', '.join(sorted(kinds))}" if kinds else "has no attention that a cache serves"
        raise MaskError(
            f"{type(inner).__name__} {what}, whose states no mask can size: leave past_key_values to transformers"
        )
    return inner, decoding


KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


def _check(layer: AttentionLayer, tokens: int) -> None:
    """Raise if a layer's mask does not answer for all tokens."""
    if layer.mask is None:
        return
    try:
        layer.mask.check(tokens, tokens, batch=max(1, layer.mask.batch_size), heads=max(1, layer.mask.head_count))
    except MaskError as error:
        raise MaskError(
            f"a cache for tokens={tokens} under `{layer.mask}`: {error}. Pass tokens= for as many as will come, or a "
            "mask that answers for more"
        ) from error
