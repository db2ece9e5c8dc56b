"""`tm.use` on models of x-transformers: masks as expressions, their attention on truemask's backends."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from truemask.errors import MaskError
from truemask.interop.layer_masks import assigned
from truemask.interop.scopes import Hold
from truemask.interop.x_transformers.attention import Use, check_maskable
from truemask.interop.x_transformers.layers import begin, find, watch
from truemask.masks.core.mask import Mask


class Switch:
    """An x-transformers model with masks, between `apply` and `undo`; the arguments of `tm.use`."""

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | None = None,
        layers: Any = None,
        replace: bool = False,
        backend: str | None = None,
    ) -> None:
        self._model, self._found = model, find(model)
        known = {found.module: found.layer for found in self._found if found.layer is not None}
        chosen = assigned(model, known, mask, layers, replace) if known or mask is not None else {}
        self._masks = {module: layer.mask for module, layer in chosen.items()}
        self._layers = chosen
        self._replace, self._backend = replace, backend
        if replace and all(own is None for own in self._masks.values()):
            raise MaskError("use: replace=True says that a mask takes the place of the model's own, but there is none")
        for found in self._found:
            if self._masks.get(found.module) is not None:
                check_maskable(found.module, found.stack, replace)
        self._hold: Hold | None = None

    def apply(self, everywhere: bool = False) -> None:
        """Put the model to use, for this context or for all."""
        hold = self._hold = Hold(everywhere)
        for found in self._found:
            own = self._masks.get(found.module)
            layer = self._layers.get(found.module)
            told = {} if layer is None else {"number": layer.used, "path": layer.path}
            use = Use(own, self._replace and own is not None, backend=self._backend, **told)
            hold.change(partial(begin, found, use, hold))
        for stack in {found.stack: None for found in self._found if found.stack is not None}:
            hold.change(partial(watch, self._model, stack))

    def undo(self) -> None:
        """End the use; nothing if that is done. Uses of a model may end in any order."""
        if self._hold is not None:
            self._hold.stop()
            self._hold = None
