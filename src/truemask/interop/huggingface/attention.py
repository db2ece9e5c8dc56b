"""transformers models on our attention: two functions registered under one key."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from truemask.attention.attend import attend
from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.interop.checkpointing import Checkpoints
from truemask.interop.huggingface.configs import account_of
from truemask.interop.huggingface.drafted import DRAFTED, DraftedMask, refuse_other
from truemask.interop.huggingface.fallback import EAGER, named, own_attention, own_mask, refuse_unknown
from truemask.interop.huggingface.forward_context import ForwardContext, forward_context
from truemask.interop.huggingface.inputs import GRAPH_BREAK_REASON
from truemask.interop.huggingface.layers import ScopedLayer, scoped_layer_of
from truemask.interop.huggingface.mask_functions import Lifted, lift
from truemask.interop.huggingface.masks import ModelMask
from truemask.interop.huggingface.repeated import asked, made_ready
from truemask.interop.huggingface.sized_attention import from_kept, needs_of, of_all_keys
from truemask.interop.huggingface.tensor_masks import of_tensor
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.removed_pairs import warn_of_removed_pairs
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal

KEY = "truemask"


@cache
def register() -> None:
    """Make the key known to transformers: attention function and mask function, always both."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(KEY, torch.compiler.disable(attention_here, reason=GRAPH_BREAK_REASON))
    AttentionMaskInterface.register(KEY, torch.compiler.disable(mask_here, reason=GRAPH_BREAK_REASON))


def unpickled(*state: Any) -> ScopedLayer:
    """What was said of a layer in another process, where its model was in use: here the key may not be known yet."""
    register()
    return ScopedLayer(*state)


copyreg.pickle(ScopedLayer, lambda scoped_layer: (unpickled, scoped_layer.__reduce__()[1]))


# -- in use here, or only elsewhere ------------------------------------------------------------------------------------


def mask_here(*, config: Any = None, **arguments: Any) -> Any:
    """The mask function: an expression where the model is in use, else the mask that transformers makes without us."""
    account = account_of(config)
    name = None if account is not None and account.scoped_user.here() is not None else named(config)
    return model_mask(**arguments) if name in (None, KEY) else own_mask(name, {"config": config, **arguments})


def attention_here(module: nn.Module, *tensors: Any, **options: Any) -> Any:
    """The attention function: ours in a layer in use, else the one that the layer runs without us."""
    scoped_layer, context = scoped_layer_of(module), forward_context()
    around = context.checkpoints()
    layer = None if scoped_layer is None else scoped_layer.here(around)
    if layer is not None:
        return attention(layer, around, context, module, *tensors, **options)
    name = named(getattr(module, "config", None), scoped_layer) or EAGER
    if name == KEY or any(isinstance(argument, ModelMask) for argument in (*tensors, options.get("attention_mask"))):
        refuse_unknown(module)
    original = own_attention(module, name)
    if original is not None:
        return original(module, *tensors, **options)
    if scoped_layer is None:
        refuse_unknown(module)
    return attention(scoped_layer.plain, around, context, module, *tensors, **options)


# -- the mask function -------------------------------------------------------------------------------------------------


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **_: object,
) -> ModelMask:
    """What transformers calls once a forward for each kind of layer, like its `sdpa_mask`: nothing is materialised."""
    sizes, starts = (batch_size, q_length, kv_length), (int(q_offset), int(kv_offset))
    if isinstance(attention_mask, ModelMask):  # generate made it ahead, for a static cache
        same_starts = (attention_mask.q_start, attention_mask.k_start) == starts
        if attention_mask.shape != (batch_size, 1, q_length, kv_length) or not same_starts:
            raise MaskError(f"a mask for {list(attention_mask.shape)} was passed on to a forward of {list(sizes)}")
        return attention_mask
    if attention_mask is not None and attention_mask.ndim != 2:
        raise MaskError(f"attention_mask is [samples, tokens] or 4-D, got {describe(attention_mask)}")
    if mask_function is None:
        from transformers.masking_utils import causal_mask_function as mask_function
    if attention_mask is not None and attention_mask.is_meta:
        attention_mask = None  # shapes are all there is to compute
    real = None if attention_mask is None else attention_mask.bool()
    rule = partial(lift, mask_function, cell_by_cell=use_vmap)
    if (draft := DRAFTED.get()) is not None:
        return DraftedMask(draft, rule, sizes, starts, device=device)
    return ModelMask(rule, sizes, starts, real=real, device=device)


# -- the attention function --------------------------------------------------------------------------------------------


def attention(
    layer: AttentionLayer,
    around: Checkpoints,
    context: ForwardContext,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every layer: `[b, h, q, d]` in, `[b, q, h, d]` and perhaps the weights out."""
    asks = asked(layer, around, context, module, options)
    ready = attention_mask.ready.get(asks) if isinstance(attention_mask, ModelMask) else None
    if ready is None or not ready.takes(query, key, value):
        return _read(layer, around, context, asks, module, query, key, value, attention_mask, **options)
    attention_mask.note(module, layer)
    _refuse(options, attention_mask)
    context.rows = layer, attention_mask
    return ready.run(query, key, value).transpose(1, 2).contiguous(), None


def _read(
    layer: AttentionLayer,
    around: Checkpoints,
    context: ForwardContext,
    asks: Hashable | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """A call of the attention function that no layer before has made ready."""
    model_mask = _model_mask_for(context, module, layer, attention_mask, query, key, is_causal)
    _note(model_mask, layer, around, context, module, options)
    user_mask, kept, needs = None, None, None
    keys = model_mask.keys_written
    bias = _bias(position_bias, model_mask.bias, keys)
    if layer.cross:
        mask = _mask_across(layer, around, context, module, model_mask)
    else:
        user_mask, positions = _with_batch(layer.mask, options.get("mask")), options.get("position_ids")
        _warn(layer, model_mask, user_mask, positions, heads=query.shape[1])
        if context.cache is not None:
            kept = context.cache.layer_of(module)
            needs = needs_of(kept, key, layer, model_mask, user_mask, heads=query.shape[1])
            key, value, mask, bias = from_kept(kept, needs, bias)
        else:
            mask = model_mask.combined_with(user_mask, layer.replace, positions)
        context.rows = layer, model_mask
    if kept is None and keys < key.shape[2]:
        key, value = key[:, :, :keys], value[:, :, :keys]
    weights = _wants_weights(module, options)
    ready = made_ready(model_mask, None if weights else asks, (query, key, value), mask, scaling, layer.backend)
    if ready is not None:
        return ready.run(query, key, value).transpose(1, 2).contiguous(), None
    result = attend(
        query,
        key,
        value,
        mask,
        bias=bias,
        scale=scaling,
        softcap=softcap,
        sink_logits=s_aux,
        dropout=dropout,
        backend=layer.backend,
        return_weights=weights,
    )
    out, shares = result if isinstance(result, tuple) else (result, None)
    if kept is not None and needs is not None:
        shares = None if shares is None else of_all_keys(shares, kept)
        kept.advance(needs)
    return out.transpose(1, 2).contiguous(), shares


def _note(
    model_mask: ModelMask,
    layer: AttentionLayer,
    around: Checkpoints,
    context: ForwardContext,
    module: nn.Module,
    options: dict[str, Any],
) -> None:
    """Note that a layer reads a model's mask, and tell it what the forward was told; refuse what cannot be honoured."""
    refuse_other(model_mask, layer.path)
    model_mask.note(module, layer)
    model_mask.tell(around.as_in_forward((module, "told"), lambda: context.caller_positions))
    _refuse(options, model_mask)


def _mask_across(
    layer: AttentionLayer, around: Checkpoints, context: ForwardContext, module: nn.Module, model_mask: ModelMask
) -> Mask:
    """The mask of cross-attention, whose rows stand where those of the self-attention before did."""
    rows = around.as_in_forward((module, "rows"), lambda: _rows_before(context, layer, model_mask))
    return model_mask.combined_across(layer.mask, rows, layer.replace)


def _warn(layer: AttentionLayer, model_mask: ModelMask, user_mask: Mask | None, positions: object, heads: int) -> None:
    """Say what of the user's mask the model's rule removes, and which documents nothing keeps apart."""
    model_mask.warn_of_documents(user_mask)
    if user_mask is not None and not layer.replace and model_mask.is_first_with(user_mask, layer.used):
        rule, length = model_mask.rule_beside(user_mask, positions)
        warn_of_removed_pairs(layer.used, layer.path, user_mask, rule, length, model_mask.batch, heads)


def _with_batch(user_mask: Mask | None, batch_mask: object) -> Mask | None:
    """The user's mask, and the one that a batch of `PackCollator` carries: transformers hands keywords on."""
    if not isinstance(batch_mask, Mask):
        return user_mask
    return batch_mask if user_mask is None else user_mask & batch_mask


def _model_mask_for(
    context: ForwardContext,
    module: nn.Module,
    layer: AttentionLayer,
    mask: Any,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
) -> ModelMask:
    """The model's own mask, whatever came: an expression, a 4-D tensor, or nothing."""
    batch, q_len, k_len = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        looks_back = (
            not layer.cross and q_len > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        )
        if looks_back and k_len < q_len:
            raise MaskError(f"`{layer.path}` is causal, has no mask, and {q_len} queries meet only {k_len} keys")
        rule, placed = causal if looks_back else everything, q_len == k_len
        return ModelMask(Lifted(rule, looks_back=bool(looks_back)), (batch, q_len, k_len), placed=placed)
    if isinstance(mask, Tensor):
        return of_tensor(context, mask, (batch, q_len, k_len), module)
    if not isinstance(mask, ModelMask):
        raise MaskError(
            f"`{layer.path}` was given {describe(mask)} as its mask: tensors and masks of `tm.use` are known"
        )
    if (mask.batch, mask.q_len, mask.k_len) != (batch, q_len, k_len):
        raise MaskError(
            f"`{layer.path}`: the model made its mask for {mask.batch} samples, {mask.q_len} queries and {mask.k_len} "
            f"keys, but attends with {batch}, {q_len} and {k_len}"
        )
    return mask


def _rows_before(context: ForwardContext, layer: AttentionLayer, model_mask: ModelMask) -> ModelMask | None:
    """The mask of the self-attention that came just before in the same layer: it knows where the rows stand."""
    if context.rows is None:
        return None
    before, earlier = context.rows
    same = (before.used, before.part, before.index) == (layer.used, layer.part, layer.index)
    return earlier if same and earlier.q_len == model_mask.q_len else None


def _bias(position_bias: Tensor | None, added: Tensor | None, keys: int) -> Tensor | None:
    """What is added to the scores, for the keys that exist."""
    bias = position_bias if added is None else added if position_bias is None else position_bias + added
    return bias[..., :keys] if bias is not None and bias.shape[-1] > keys else bias


def _wants_weights(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether anybody reads the attention weights: the argument, the config, or transformers' output recorder."""
    from transformers.utils.output_capturing import _active_collector

    if options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    return any("attentions" in name for name in _active_collector.get() or ())


def _refuse(options: dict[str, Any], model_mask: ModelMask) -> None:
    """Raise for what changes the meaning and cannot be honoured (law 9)."""
    if options.get("cache") is not None:
        raise MaskError("paged caches (continuous batching) do not run under `tm.use`: use `generate` without them")
    selecting = [name for name in ("block_indices", "indices") if options.get(name) is not None]
    if selecting:
        raise MaskError(
            f"this model passes `{selecting[0]}=`, the keys that it selects for each query, which `tm.use` cannot "
            "honour: run the model without it"
        )
    if options.get("sinks") is not None:
        raise MaskError("this model passes `sinks=`, which `tm.use` does not know: it knows the sinks called `s_aux`")
    if options.get("cu_seq_lens_q") is not None and model_mask.packing is None:
        raise MaskError(
            "cu_seq_lens_q says that documents are packed, but the model's mask does not keep them apart: transformers "
            "does that if position_ids restart and neither attention_mask nor a cache is passed"
        )
