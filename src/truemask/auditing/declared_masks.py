"""What models say of their own masks: truemask's, Hugging Face's by their configuration, x-transformers' layers.

Of any other model something is assumed, and a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from truemask.auditing.subject import AuditedModel
from truemask.auditing.torch_modules import assumed_mask_of, torch_mask_of
from truemask.interop.active_masks import ActiveMask, active_in_transformers, active_in_x_transformers
from truemask.masks.compose.boolean import conjunction, everything
from truemask.masks.core.mask import Mask
from truemask.masks.foreign import from_additive, from_torch_sdpa, from_x_transformers
from truemask.masks.leaves.bands import blocks, causal, local, window
from truemask.masks.leaves.per_token import keys, prefix
from truemask.nn.forward_mask import Layout, read_masks
from truemask.nn.layers import AttentionLayers
from truemask.nn.wrappers import TransformerWrapper

RECURRENT = ("linear_attention", "conv", "mamba", "recurrent")
ASSUMED = "assumed"
CAUSAL_NAMES = ("CausalLM", "LMHeadModel", "Decoder")
_NAMED = {True: "`causal`", False: "`everything`"}


@dataclass(frozen=True)
class DeclaredMask:
    """What a model says, before padding and packing are added; `layers` is None where it does not say.

    `user_masks` is what `tm.use` gave each layer besides, or empty.
    """

    masks: tuple[Mask, ...]
    source: str
    layers: int | None = None
    notes: tuple[str, ...] = ()
    user_masks: tuple[ActiveMask, ...] = ()


def declared_mask_of(subject: AuditedModel) -> DeclaredMask:
    """What this model says."""
    stack = stack_of(subject)
    if stack is not None:
        return _of_truemask(subject, stack)
    if is_peer(subject):
        return _with_user_masks(_of_x_transformers(subject), active_in_x_transformers(_attentions_of(subject)))
    if is_hugging_face(subject):
        part = "decoder" if str(subject.name).startswith("decoder_") else None
        return _with_user_masks(_of_hugging_face(subject), active_in_transformers(subject.model, part))
    torch_mask = torch_mask_of(subject)
    if torch_mask is not None:
        return DeclaredMask((torch_mask.mask,), torch_mask.source, torch_mask.layers)
    mask, note = assumed_mask_of(subject)
    return DeclaredMask((mask,), ASSUMED, None, (note,))


def _with_user_masks(declared: DeclaredMask, user_masks: list[ActiveMask]) -> DeclaredMask:
    """What the model says of its layers, and what `tm.use` gave them."""
    if all(user_mask.mask is None for user_mask in user_masks):
        return declared
    masks = declared.masks * len(user_masks) if len(declared.masks) == 1 else declared.masks
    if len(masks) != len(user_masks):
        note = f"it says what {len(masks)} layers run and tm.use gave masks to {len(user_masks)}; "
        note += "pass mask= with one for each"
        return replace(declared, notes=(*declared.notes, note))
    return replace(declared, masks=masks, user_masks=tuple(user_masks), source=f"{declared.source}, and tm.use")


def is_hugging_face(subject: AuditedModel) -> bool:
    """Whether the model has a configuration as transformers has them."""
    config = getattr(subject.model, "config", None)
    return hasattr(config, "model_type") and hasattr(config, "get_text_config")


def is_peer(subject: AuditedModel) -> bool:
    """Whether the model is one of x-transformers'."""
    return type(subject.model).__module__.partition(".")[0] == "x_transformers"


def heads_of(subject: AuditedModel) -> int | None:
    """How many heads each attention of the model has, if it says so."""
    stack, model = stack_of(subject), subject.model
    if stack is not None:
        return stack.config.heads
    if is_peer(subject):
        return next(
            (module.heads for part in _attentions_of(subject) for module in part.modules() if hasattr(module, "heads")),
            None,
        )
    return getattr(getattr(model, "config", None), "num_attention_heads", None)


def layers_of(subject: AuditedModel) -> int | None:
    """How many layers mix positions, if the model says so."""
    stack = stack_of(subject)
    if stack is not None:
        return stack.depth
    if is_peer(subject):
        return len(_attentions_of(subject)) or None
    return _layer_count(subject, subject.model.config) if is_hugging_face(subject) else None


def has_four_axes(subject: AuditedModel) -> bool:
    """Whether the batch holds a 4-D attention_mask for the audited input, which transformers takes as it is."""
    attention_mask = subject.keywords.get("attention_mask")
    return (
        isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and not str(subject.name).startswith("decoder_")
    )


def stack_of(subject: AuditedModel) -> AttentionLayers | None:
    """The layers of one of truemask's own models; None of any other."""
    model = subject.model
    model = model.attn_layers if isinstance(model, TransformerWrapper) else model
    return model if isinstance(model, AttentionLayers) else None


def _of_truemask(subject: AuditedModel, stack: AttentionLayers) -> DeclaredMask:
    keywords = subject.keywords
    heads = stack.config.heads
    x = subject.inputs
    layout = Layout(batch=subject.batch, heads=heads, new=subject.length)
    user = read_masks(keywords.get("mask"), keywords.get("attn_mask"), layout, x)
    looks_back = stack.causal if keywords.get("causal") is None else bool(keywords["causal"])
    mask = conjunction(causal, user) if looks_back else user
    return DeclaredMask((mask,), f"what {type(subject.model).__name__} runs", stack.depth)


def _of_x_transformers(subject: AuditedModel) -> DeclaredMask:
    keywords, model = subject.keywords, subject.model
    stack: Any = getattr(model, "attn_layers", model)
    parts = []
    looks_back = keywords.get("causal") if keywords.get("causal") is not None else getattr(stack, "causal", True)
    if type(stack).__name__ == "PrefixDecoder":
        parts.append(causal | prefix(keywords.get("prefix_attn_len") or 0))
    elif looks_back:
        parts.append(causal)
    attn_mask, flags = keywords.get("attn_mask"), keywords.get("self_attn_kv_mask")
    if isinstance(attn_mask, Tensor):
        parts.append(from_x_transformers(attn_mask=attn_mask))
    if isinstance(flags, Tensor):
        parts.append(keys(flags))
    base = conjunction(*parts)
    pasts = [getattr(part, "max_attend_past", None) for part in _peer_attentions(stack)]
    masks = tuple(base & (window(past + 1) | ~causal) if past is not None else base for past in pasts) or (base,)
    masks = masks[:1] if len(set(masks)) == 1 else masks
    return DeclaredMask(masks, f"what x-transformers' {type(stack).__name__} says", len(pasts) or None)


def _attentions_of(subject: AuditedModel) -> list[Any]:
    return _peer_attentions(getattr(subject.model, "attn_layers", subject.model))


def _peer_attentions(stack: Any) -> list[Any]:
    types, layers = getattr(stack, "layer_types", ()), getattr(stack, "layers", ())
    return [layer[1] for kind, layer in zip(types, layers, strict=False) if kind == "a"]


def _of_hugging_face(subject: AuditedModel) -> DeclaredMask:
    config: Any = subject.model.config
    name = type(subject.model).__name__
    attention_mask = subject.keywords.get("attention_mask")
    layers = _layer_count(subject, config)
    if isinstance(attention_mask, Tensor) and has_four_axes(subject):
        read = from_torch_sdpa if attention_mask.dtype == torch.bool else from_additive
        return DeclaredMask((read(attention_mask),), "the 4-D attention_mask", layers)
    looks_back, notes = _is_causal(subject, config)
    types = _layer_types(config, layers)
    masks = tuple(_of_layer(kind, config, looks_back) for kind in types) or (causal if looks_back else everything,)
    masks = masks[:1] if len(set(masks)) == 1 else masks
    return DeclaredMask(masks, f"the configuration of {name}", layers, notes)


def _layer_count(subject: AuditedModel, config: Any) -> int | None:
    names = ["num_hidden_layers", "num_layers"]
    counts = [getattr(config.get_text_config(), name, None) for name in names]
    if str(subject.name).startswith("decoder_"):
        decoder_counts = [getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers")]
        counts = [*decoder_counts, *[getattr(config.get_text_config(decoder=True), name, None) for name in names]]
    return next((count for count in counts if isinstance(count, int)), None)


def _is_causal(subject: AuditedModel, config: Any) -> tuple[bool, tuple[str, ...]]:
    text = config.get_text_config()
    if str(subject.name).startswith("decoder_") or getattr(text, "is_decoder", False):
        return True, ()
    if getattr(text, "use_bidirectional_attention", None) in (True, "all") or getattr(text, "is_causal", None) is False:
        return False, ()
    flags = _flags(subject.model, text)
    if flags in ({True}, {False}):
        return flags == {True}, ()
    name = type(subject.model).__name__
    by_name = any(word in name for word in CAUSAL_NAMES)
    return by_name, (f"{name} does not say whether it is causal; by its name it was held to {_NAMED[by_name]}",)


def _flags(model: nn.Module, text: Any) -> set[bool]:
    """What its attention modules say of `is_causal`: those of the text, where a model sees and hears too."""
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    kinds = [getattr(getattr(module, "config", text), "model_type", None) for module in attentions]
    of_text = [module for module, kind in zip(attentions, kinds, strict=True) if kind == text.model_type]
    return {bool(module.is_causal) for module in of_text or attentions}


def _layer_types(config: Any, layers: int | None) -> tuple[str, ...]:
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    if types:
        return tuple(types[:layers] if layers else types)
    slides = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return ("sliding_attention",) * (layers or 1) if slides else ()


def _of_layer(kind: str, config: Any, looks_back: bool) -> Mask:
    """The mask of one layer, as transformers' `masking_utils` has it.

    It is worked out here from the configuration and not by interop, which lifts what transformers made: an audit is a
    second opinion.
    """
    text = config.get_text_config()
    size = getattr(text, "sliding_window", None)
    if kind == "sliding_attention" and isinstance(size, int):
        return window(size) if looks_back else local(size)
    chunk = getattr(text, "attention_chunk_size", None)
    if kind == "chunked_attention" and isinstance(chunk, int):
        return causal & blocks(chunk) if looks_back else blocks(chunk)
    if kind in RECURRENT:
        return causal
    return causal if looks_back else everything
