"""For which model a cache is, and under which masks it forgets: what every forward that reads it is held to."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn

from truemask.errors import MaskError
from truemask.interop.huggingface.layers import scoped_layer_of
from truemask.interop.layer_masks import AttentionLayer


class Expected:
    """For which attention layers a cache is, and the masks under which it forgets: by layer, as `tm.use` has them."""

    def __init__(self, name: str, layers: Mapping[nn.Module, AttentionLayer]) -> None:
        self.name = name
        self.layers = weakref.WeakKeyDictionary(layers)
        self._places = {id(module): _index(module) for module in layers}

    def __deepcopy__(self, _: object) -> Expected:
        return self

    def place_of(self, module: nn.Module) -> int:
        """The number of a layer's memory. Raises MaskError if the layer is of another model."""
        if module not in self.layers:
            raise MaskError(
                f"the cache was made for a {self.name}, and is read by a {type(module).__name__} of another model, to "
                "which its keys mean nothing: make one with `tm.cache_for(model)` for each model"
            )
        return self._places[id(module)]

    def check(self, model: nn.Module) -> None:
        """Raise if a model is another one, or runs under other masks."""
        mine = [(module, layer) for module, layer in self.layers.items()]
        if not any(part is mine[0][0] for part in model.modules()):
            raise MaskError(
                f"the cache was made for another model ({self.name}), whose keys mean nothing to this "
                f"{type(model).__name__}: make one with `tm.cache_for(model)` for each model"
            )
        for module, layer in mine:
            scoped = scoped_layer_of(module)
            used = None if scoped is None else scoped.here()
            found = (None, False) if used is None else (used.mask, used.replace)
            if found != (layer.mask, layer.replace):
                raise MaskError(
                    f"the cache forgets what `{layer.path}` may not see under `{_written(layer.mask, layer.replace)}`, "
                    f"and in use is `{_written(*found)}`: make the cache with the same mask, layers= and replace= as "
                    "`tm.use`, or inside the block without a mask"
                )


def _index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise MaskError(
            f"{type(module).__name__} does not say which number its keys have in a cache (`layer_idx`): use a "
            "DynamicCache"
        )
    return index


def _written(mask: object, replace: bool) -> str:
    return f"{'the model alone' if mask is None else mask}{', replace=True' if replace else ''}"
