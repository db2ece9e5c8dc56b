"""Masks of models that come as 4-D tensors."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.interop.huggingface.forward_context import ForwardContext
from truemask.interop.huggingface.mask_functions import Lifted
from truemask.interop.huggingface.masks import ModelMask
from truemask.masks.compose.boolean import everything
from truemask.masks.foreign.importers import from_torch_sdpa
from truemask.masks.foreign.tensors import highest_hidden


def of_tensor(context: ForwardContext, mask: Tensor, sizes: tuple[int, int, int], reader: nn.Module) -> ModelMask:
    """The mask that a 4-D tensor `[b or 1, h or 1, q, k]` says: bool, True = attend, or floats added to the scores.

    Floats at or below half of the dtype's lowest hide (law 1 in docs/conventions.md); all others are a bias. The layers
    of one forward share it; a layer that reads the tensor again begins another forward, in which it may be changed.
    """
    batch, q_len, k_len = sizes
    shape = tuple(mask.shape)
    fits = len(shape) == 4 and all(n in (1, size) for n, size in zip((shape[0], *shape[2:]), sizes, strict=True))
    if not fits:
        raise MaskError(
            f"the attention_mask that reached the attention is {describe(mask)}, but the call has {batch} samples, "
            f"{q_len} queries and {k_len} keys: a 4-D one is [{batch}, 1, {q_len}, {k_len}]"
        )
    if mask.is_inference() or mask.requires_grad:
        return _read(mask, sizes)
    if context.tensor is not None:
        tensor, version, model_mask = context.tensor
        same = tensor() is mask and version == mask._version and model_mask.shape == (batch, 1, q_len, k_len)
        if same and not model_mask.read_by(reader):
            return model_mask
    model_mask = _read(mask, sizes)
    context.tensor = weakref.ref(mask), mask._version, model_mask
    return model_mask


def _read(mask: Tensor, sizes: tuple[int, int, int]) -> ModelMask:
    placed = sizes[1] == sizes[2]
    if mask.is_meta:  # shapes are all there is to compute
        return ModelMask(Lifted(everything), sizes, placed=placed, device=mask.device)
    if not mask.is_floating_point():
        rule = from_torch_sdpa(mask)
        return ModelMask(Lifted(rule), sizes, placed=placed, visible=_seen(mask), device=mask.device)
    visible = mask.detach() > highest_hidden(mask.dtype)
    rule = everything if bool(visible.all()) else from_torch_sdpa(visible)
    added = torch.where(visible, mask, 0)
    bias = added if mask.requires_grad or bool((added != 0).any()) else None
    return ModelMask(Lifted(rule), sizes, bias=bias, placed=placed, visible=_seen(visible), device=mask.device)


def _seen(mask: Tensor) -> Tensor:
    """`[b or 1, k]`: the keys that some row of some head sees."""
    return mask.detach().bool().any(dim=2).any(dim=1).cpu()
