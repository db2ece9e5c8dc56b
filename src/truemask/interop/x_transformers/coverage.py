"""What no mask of ours reaches in an x-transformers model, and what `attend` cannot compute of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from truemask.errors import MaskError


@torch.compiler.disable(recursive=True)
def objections_to(module: Any, keywords: dict[str, Any]) -> list[str]:
    """What `attend` cannot compute of an `Attention`, in x-transformers' words."""
    core = module.attend
    sinks = core.head_learned_sink or core.add_zero_kv
    biased = module.data_dependent_alibi is not None or module.rel_proj_pos_bias is not None
    biased = biased or any(keywords.get(name) is not None for name in ("rel_pos", "attn_bias"))
    heads = ("pre_softmax_talking_heads", "post_softmax_talking_heads", "pre_scale_post_talking_heads")
    objections = {
        "talking heads": any(getattr(core, name) is not None for name in heads),
        "attention weights that are no softmax": not is_softmax(core.attn_fn),
        "inverted_attention": core.inverted_attention,
        "cog_signed": core.cog_signed,
        "selective": core.selective,
        "use_cope": core.cope is not None,
        "flash_pack_seq": core.flash_pack_seq,
        "residual_attn": keywords.get("prev_attn") is not None,
        "attn_delta": keywords.get("attn_delta") is not None,
        "softclamp_logits with a bias": core.softclamp_logits and biased,
        "l2_distance with sinks or softclamp_logits": core.l2_distance and (sinks or core.softclamp_logits),
        "dropout of everything": core.training and dropout_of(core) >= 1,
    }
    return [name for name, true in objections.items() if true]


def is_softmax(function: Any) -> bool:
    """Whether an `attn_fn` is softmax over the keys."""
    return isinstance(function, partial) and function.func is F.softmax and function.keywords.get("dim") == -1


def dropout_of(core: Any) -> float:
    return core.dropout if core.flash else core.attn_dropout.p


def check_maskable(module: Any, stack: nn.Module | None, replace: bool) -> None:
    """Raise for layers that a mask cannot reach."""
    if module.attend.flash_pack_seq:
        raise MaskError(
            "a mask cannot be used with attn_flash_pack_seq=True: the flash-attn package runs there, which takes "
            "lengths of documents and no mask. Build the model without it and use `tm.causal.packed(lengths)`"
        )
    if moving := moves_beside(module, stack):
        raise MaskError(
            f"a mask cannot hold in a model with {moving}, which carries what stands at one position to others beside "
            f"attention: a query would hear of keys that the mask hides. Build the model without {moving}, or use it "
            "without a mask: `tm.use(model)`"
        )
    if replace and any(kind.__name__ == "PrefixDecoder" for kind in type(stack).__mro__):
        raise MaskError(
            "replace=True cannot reach the mask of a PrefixDecoder, which it passes as attn_mask in each call: build "
            "the model with an Encoder, which has none, and write the prefix: `tm.causal | tm.prefix(length)`"
        )


def moves_beside(module: Any, stack: nn.Module | None) -> str:
    """The option by which a stack moves something between positions other than by attention; empty if none."""
    if module.hybrid_module is not None:
        return "attn_hybrid_module"
    parts = () if stack is None else stack.modules()
    return "shift_tokens" if any(type(part).__name__ == "ShiftTokens" for part in parts) else ""
