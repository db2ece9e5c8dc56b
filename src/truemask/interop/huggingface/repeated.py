"""The layers behind the first one of a forward, which ask what it asked: nothing is read, joined or planned twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from truemask.attention.call import AttendArgs, read_call
from truemask.attention.run import Ready
from truemask.common.real_tensors import cannot_look
from truemask.interop.checkpointing import NO_CHECKPOINTS, Checkpoints
from truemask.interop.huggingface.forward_context import ForwardContext
from truemask.interop.huggingface.masks import ModelMask
from truemask.interop.layer_masks import AttentionLayer
from truemask.masks.core.mask import Mask

# options with which each call is read
CHANGING = frozenset(("position_bias", "softcap", "s_aux", "dropout", "mask", "output_attentions"))


def asked(
    layer: AttentionLayer, around: Checkpoints, context: ForwardContext, module: nn.Module, options: dict[str, Any]
) -> Hashable | None:
    """What layers of one forward share if their calls differ in tensors alone; None of a layer that asks for more.

    A model mask lives as long as a forward, and so does what `id` names here.
    """
    if torch.is_grad_enabled() or around is not NO_CHECKPOINTS or context.cache is not None or layer.cross:
        return None
    if not all(_is_off(options[name]) for name in CHANGING & options.keys()):
        return None
    config = vars(module).get("config")
    return id(layer.mask), layer.used, layer.replace, layer.backend, options.get("scaling"), id(config)


def _is_off(option: object) -> bool:
    return option is None or (isinstance(option, (int, float)) and not option)


def made_ready(
    model_mask: ModelMask,
    asks: Hashable | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Mask,
    scale: float | None,
    backend: str | None,
) -> Ready | None:
    """A call, kept for the layers that ask the same; None where each has to be read."""
    if asks is None or model_mask.bias is not None or cannot_look():
        return None
    ready = Ready.of(read_call(*tensors, mask, AttendArgs(scale=scale, backend=backend)))
    if ready is not None:
        model_mask.ready[asks] = ready
    return ready
