"""transformers models on our attention: two functions registered under one key."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from truemask.attention.attend import attend
from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.interop.checkpointing import checkpoints
from truemask.interop.huggingface.configs import account_of
from truemask.interop.huggingface.fallback import EAGER, named, own_attention, own_mask, refuse_unknown
from truemask.interop.huggingface.forward_context import ForwardContext, forward_context
from truemask.interop.huggingface.inputs import GRAPH_BREAK_REASON
from truemask.interop.huggingface.layers import ScopedLayer, seat_of
from truemask.interop.huggingface.mask_functions import Lifted, lift
from truemask.interop.huggingface.masks import ModelMask
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


def unpickled(*said: Any) -> ScopedLayer:
    """What was said of a layer in another process, where its model was in use: here the key may not be known yet."""
    register()
    return ScopedLayer(*said)


copyreg.pickle(ScopedLayer, lambda seat: (unpickled, seat.__reduce__()[1]))


# -- in use here, or only elsewhere ------------------------------------------------------------------------------------


def mask_here(*, config: Any = None, **given: Any) -> Any:
    """The mask function: a claim where the model is in use, else the mask that transformers makes without us."""
    account = account_of(config)
    name = None if account is not None and account.seat.here() is not None else named(config)
    return claim(**given) if name in (None, KEY) else own_mask(name, {"config": config, **given})


def attention_here(module: nn.Module, *tensors: Any, **options: Any) -> Any:
    """The attention function: ours in a layer in use, else the one that the layer runs without us."""
    seat = seat_of(module)
    layer = None if seat is None else seat.here()
    if layer is not None:
        return attention(layer, module, *tensors, **options)
    name = named(getattr(module, "config", None), seat) or EAGER
    if name == KEY or any(isinstance(given, ModelMask) for given in (*tensors, options.get("attention_mask"))):
        refuse_unknown(module)
    own = own_attention(module, name)
    if own is not None:
        return own(module, *tensors, **options)
    if seat is None:
        refuse_unknown(module)
    return attention(seat.plain, module, *tensors, **options)


# -- the mask function -------------------------------------------------------------------------------------------------


def claim(
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
        known = attention_mask
        if known.shape != (batch_size, 1, q_length, kv_length) or (known.q_start, known.k_start) != starts:
            raise MaskError(f"a mask for {list(known.shape)} was passed on to a forward of {list(sizes)}")
        return known
    if attention_mask is not None and attention_mask.ndim != 2:
        raise MaskError(f"attention_mask is [samples, tokens] or 4-D, got {describe(attention_mask)}")
    if mask_function is None:
        from transformers.masking_utils import causal_mask_function as mask_function
    if attention_mask is not None and attention_mask.is_meta:
        attention_mask = None  # shapes are all there is to compute
    real = None if attention_mask is None else attention_mask.bool()
    return ModelMask(partial(lift, mask_function, cell_by_cell=use_vmap), sizes, starts, real=real, device=device)


# -- the attention function --------------------------------------------------------------------------------------------


def attention(
    layer: AttentionLayer,
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
    """What transformers calls in every layer: `[b, h, q, d]` in, `[b, q, h, d]` and perhaps the weights out."""
    context, around = forward_context(), checkpoints()
    own = _claim_for(context, module, layer, attention_mask, query, key, is_causal)
    own.note(module, layer)
    own.tell(around.as_in_forward((module, "told"), lambda: context.told))
    _refuse(options, own)
    if layer.cross:
        rows = around.as_in_forward((module, "rows"), lambda: _rows_before(context, layer, own))
        mask = own.cross_mask(layer.mask, rows, layer.replace)
    else:
        users, places = _with_batch(layer.mask, options.get("mask")), options.get("position_ids")
        own.warn_of_documents(users)
        mask, context.rows = own.mask(users, layer.replace, places), (layer, own)
        if users is not None and not layer.replace:
            rule, length = own.own_beside(users, places)
            warn_of_removed_pairs(layer.used, layer.path, users, rule, length, own.batch, query.shape[1])
    keys = own.keys_written
    if keys < key.shape[2]:
        key, value = key[:, :, :keys], value[:, :, :keys]
    weights = _wants_weights(module, options)
    found = attend(
        query,
        key,
        value,
        mask,
        bias=_bias(position_bias, own.bias, keys),
        scale=scaling,
        softcap=softcap,
        sink_logits=s_aux,
        dropout=dropout,
        backend=layer.backend,
        return_weights=weights,
    )
    out, shares = found if isinstance(found, tuple) else (found, None)
    return out.transpose(1, 2).contiguous(), shares


def _with_batch(users: Mask | None, given: object) -> Mask | None:
    """The user's mask, and the one that a batch of `PackCollator` carries: transformers hands keywords on."""
    if not isinstance(given, Mask):
        return users
    return given if users is None else users & given


def _claim_for(
    context: ForwardContext,
    module: nn.Module,
    layer: AttentionLayer,
    mask: Any,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
) -> ModelMask:
    """The model's own mask, whatever came: a claim, a 4-D tensor, or nothing."""
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


def _rows_before(context: ForwardContext, layer: AttentionLayer, own: ModelMask) -> ModelMask | None:
    """The claim of the self-attention that came just before in the same layer: it knows where the rows stand."""
    if context.rows is None:
        return None
    before, rows = context.rows
    same = (before.used, before.part, before.index) == (layer.used, layer.part, layer.index)
    return rows if same and rows.q_len == own.q_len else None


def _bias(position_bias: Tensor | None, added: Tensor | None, keys: int) -> Tensor | None:
    """What is added to the scores, for the keys that exist."""
    found = position_bias if added is None else added if position_bias is None else position_bias + added
    return found[..., :keys] if found is not None and found.shape[-1] > keys else found


def _wants_weights(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether anybody reads the attention weights: the argument, the config, or transformers' output recorder."""
    from transformers.utils.output_capturing import _active_collector

    if options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    return any("attentions" in name for name in _active_collector.get() or ())


def _refuse(options: dict[str, Any], own: ModelMask) -> None:
    """Raise for what changes the meaning and cannot be honoured (law 9)."""
    if options.get("cache") is not None:
        raise MaskError("paged caches (continuous batching) do not run under `tm.use`: use `generate` without them")
    chosen = [name for name in ("block_indices", "indices") if options.get(name) is not None]
    if chosen:
        raise MaskError(
            f"this model passes `{chosen[0]}=`, the keys that it selects for each query, which `tm.use` cannot honour: "
            "run the model without it"
        )
    if options.get("sinks") is not None:
        raise MaskError("this model passes `sinks=`, which `tm.use` does not know: it knows the sinks called `s_aux`")
    if options.get("cu_seq_lens_q") is not None and own.packing is None:
        raise MaskError(
            "cu_seq_lens_q says that documents are packed, but the model's mask does not keep them apart: transformers "
            "does that if position_ids restart and neither attention_mask nor a cache is passed"
        )
