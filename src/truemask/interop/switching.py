"""A model switched to our attention and back: what the switches of all libraries share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace as changed
from functools import partial

from torch import nn

from truemask.errors import MaskError
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.scopes import ActiveUse


class Switch(ABC):
    """A model on our attention with these masks, between `apply` and `undo`; the arguments are those of `tm.use`.

    Which layer gets which mask is found again by `apply`, since layers may be added to the model before its block
    begins; what is wrong with the arguments is said where the use is written.
    """

    def __init__(self, model: nn.Module, mask: object, layers: object, replace: bool, backend: str | None) -> None:
        self.model, self._backend = model, backend
        self._arguments = mask, layers, replace
        layer_masks = self._assigned(*self._arguments)
        if replace and all(layer.mask is None for layer in layer_masks.values()):
            raise MaskError(
                "use: replace=True says that a mask takes the place of the model's own, but there is no mask"
            )
        self._active_use: ActiveUse | None = None

    def apply(self, everywhere: bool = False) -> None:
        """Switch the model over, as it is by now, for this context or for all."""
        layer_masks = self._assigned(*self._arguments)
        active_use = self._active_use = ActiveUse(everywhere)
        mark = partial(changed, used=active_use.number, backend=self._backend)
        try:
            self._change({module: mark(layer) for module, layer in layer_masks.items()}, active_use)
        except BaseException:
            active_use.abandon()  # the error remembers the use, and with it all that it changed
            self._active_use = None
            raise

    def undo(self) -> None:
        """End the use; nothing if that is done. Uses of a model may end in any order."""
        if self._active_use is not None:
            self._active_use.stop()
            self._active_use = None

    @abstractmethod
    def _assigned(self, mask: object, layers: object, replace: bool) -> dict[nn.Module, AttentionLayer]:
        """The layers of the model that attend, with their masks."""

    @abstractmethod
    def _change(self, layers: Mapping[nn.Module, AttentionLayer], active_use: ActiveUse) -> None:
        """Change the model by `active_use`, which takes it back."""
