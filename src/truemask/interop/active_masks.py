"""Which masks a model is using now: what `tm.use` gave each of its self-attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from truemask.interop.huggingface.layers import seat_of
from truemask.masks.core.mask import Mask


class ActiveMask(NamedTuple):
    """What a layer was given: a mask or None, and whether it takes the place of the layer's own."""

    mask: Mask | None
    replace: bool

    def combined_with(
        self, own: Mask, placed: Callable[[Mask], Mask], length: int, batch: int, heads: int | None
    ) -> Mask:
        """The mask that the layer runs on so many tokens; in fewer words where `own` says nothing new.

        `placed` brings a mask of logical positions to the rows of the batch, where `own` stands already.
        """
        if self.mask is None:
            return own
        given = placed(self.mask)
        both = own & given
        shorter = self.replace or both.equivalent(given, length, length, batch=batch, heads=heads)
        return given if shorter else both


def active_in_transformers(model: nn.Module, part: str | None = None) -> list[ActiveMask]:
    """What each self-attention layer of a transformers model was given, in order; empty if it is not in use.

    `part` is the name of the part that counts ("decoder"); None takes all.
    """
    seats = [seat for module in model.modules() if (seat := seat_of(module)) is not None]
    found = [layer for seat in seats if (layer := seat.here()) is not None]
    chosen = [layer for layer in found if not layer.cross and part in (None, layer.part)]
    return [ActiveMask(layer.mask, layer.replace) for layer in sorted(chosen, key=lambda layer: layer.index)]


def active_in_x_transformers(attentions: list[nn.Module]) -> list[ActiveMask]:
    """What some `Attention`s of x-transformers were given, in order; empty if none is in use."""
    from truemask.interop.x_transformers.attention import (
        AttentionForward,  # brings `torch._dynamo`, as x-transformers does itself
    )

    forwards = [vars(module).get("forward") for module in attentions]
    found = [forward.seat.here() if isinstance(forward, AttentionForward) else None for forward in forwards]
    return (
        [ActiveMask(None, False) if use is None else ActiveMask(use.mask, use.replace) for use in found]
        if any(found)
        else []
    )
