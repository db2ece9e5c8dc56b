"""Which masks a model is using now: what `tm.use` gave each of its self-attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from truemask.interop.huggingface.layers import scoped_layer_of
from truemask.masks.core.mask import Mask


class ActiveMask(NamedTuple):
    """What a layer was given: a mask or None, and whether it takes the place of the layer's own."""

    mask: Mask | None
    replace: bool

    def combined_with(
        self, model_mask: Mask, placed: Callable[[Mask], Mask], length: int, batch: int, heads: int | None
    ) -> Mask:
        """The mask that the layer runs on so many tokens; in fewer words where `model_mask` says nothing new.

        `placed` brings a mask of logical positions to the rows of the batch, where `model_mask` stands already.
        """
        if self.mask is None:
            return model_mask
        user_mask = placed(self.mask)
        combined = model_mask & user_mask
        shorter = self.replace or combined.equivalent(user_mask, length, length, batch=batch, heads=heads)
        return user_mask if shorter else combined


def active_in_transformers(model: nn.Module, part: str | None = None) -> list[ActiveMask]:
    """What each self-attention layer of a transformers model was given, in order; empty if it is not in use.

    `part` is the name of the part that counts ("decoder"); None takes all.
    """
    values = [value for module in model.modules() if (value := scoped_layer_of(module)) is not None]
    layers = [layer for value in values if (layer := value.here()) is not None]
    layers_of_part = [layer for layer in layers if not layer.cross and part in (None, layer.part)]
    return [ActiveMask(layer.mask, layer.replace) for layer in sorted(layers_of_part, key=lambda layer: layer.index)]


def active_in_x_transformers(attentions: list[nn.Module]) -> list[ActiveMask]:
    """What some `Attention`s of x-transformers were given, in order; empty if none is in use."""
    from truemask.interop.x_transformers.attention import (
        AttentionForward,  # brings `torch._dynamo`, as x-transformers does itself
    )

    forwards = [vars(module).get("forward") for module in attentions]
    layers = [forward.scoped_layer.here() if isinstance(forward, AttentionForward) else None for forward in forwards]
    return (
        [ActiveMask(None, False) if layer is None else ActiveMask(layer.mask, layer.replace) for layer in layers]
        if any(layers)
        else []
    )
