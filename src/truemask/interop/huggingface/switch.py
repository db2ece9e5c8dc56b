"""A transformers model switched to our attention and back: what its configs and layers hold while it is in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from truemask.errors import MaskError
from truemask.interop.huggingface.attention import KEY, register
from truemask.interop.huggingface.configs import (
    account_of,
    configs_of,
    in_use_here,
    models_in,
    parts_meant,
    switch_config,
)
from truemask.interop.huggingface.inputs import watch
from truemask.interop.huggingface.layers import MARK, ScopedLayer, attention_layers
from truemask.interop.layer_masks import AttentionLayer, assigned
from truemask.interop.scopes import REPLICATE, ActiveUse, Replicas, install, uninstall
from truemask.interop.switching import Switch


class HuggingFaceSwitch(Switch):
    """A transformers model on our attention, between `apply` and `undo`."""

    def _assigned(self, mask: object, layers: object, replace: bool) -> dict[nn.Module, AttentionLayer]:
        return assigned(self.model, attention_layers(self.model), mask, layers, replace)

    def _change(self, layers: Mapping[nn.Module, AttentionLayer], active_use: ActiveUse) -> None:
        register()
        model: Any = self.model
        parts = parts_meant(model, layers)
        for part in parts:
            _check_switchable(part)
        for config in configs_of(model, parts):
            active_use.change(partial(switch_config, config, type(model).__name__, KEY, active_use))
        owners = {module: part for part in models_in(model) for module in part.modules()}  # the innermost
        for module, layer in layers.items():
            if self._runs_ours(module, layer, owners[module]):
                active_use.change(partial(_give, model, module, layer, active_use))
        active_use.change(partial(_replicate, model))
        for part in models_in(model):
            active_use.change(partial(watch, model, part, in_use_here))

    def _runs_ours(self, module: nn.Module, layer: AttentionLayer, owner: Any) -> bool:
        """Whether a layer's config is switched. Raises MaskError if one with a mask goes on with another attention."""
        config: Any = getattr(module, "config", None) or owner.config
        ours = config._attn_implementation == KEY
        if layer.mask is not None and not ours:
            raise MaskError(
                f"{type(self.model).__name__}: `{layer.path}` keeps its attention '{config._attn_implementation}', "
                "because its config is none that the model, or a part of it, is made from"
            )
        return ours


def _give(model: Any, module: nn.Module, layer: AttentionLayer, active_use: ActiveUse) -> Callable[[], object]:
    """The use's say in a layer; what is returned ends that."""
    account = account_of(getattr(module, "config", None) or model.config)
    before = None if account is None else account.before
    scoped_layer = install(module, MARK, lambda value: value is not None, lambda: ScopedLayer(layer, before))
    active_use.set_value(scoped_layer, layer)
    return partial(uninstall, module, MARK, scoped_layer)


def _replicate(model: nn.Module) -> Callable[[], object]:
    """DataParallel's replicas of the model have the uses of the thread that makes them; what is returned ends that."""
    replicas = install(model, REPLICATE, lambda value: isinstance(value, Replicas), lambda: Replicas(model))
    return partial(uninstall, model, REPLICATE, replicas)


def _check_switchable(part: Any) -> None:
    if not part._can_set_attn_implementation():
        raise MaskError(
            f"{type(part).__name__} cannot switch its attention: transformers looks for its AttentionInterface in "
            "the file of the class, and does not find it (classes of a notebook have no file). A mask can reach "
            "such a model only as the tensor that it takes: `tm.to_additive(mask, ...)` or `tm.to_torch_sdpa`"
        )
