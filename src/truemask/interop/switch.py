"""A transformers model switched to our attention and back: what its configs and layers hold while it is in use.

One config may belong to several models, and one layer to several uses: each keeps account of who uses it, so uses end
in any order, and what was before comes back with the last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from truemask.errors import MaskError
from truemask.interop.layers import MARK, Layer, assigned, attention_layers
from truemask.interop.positions import watch

STACK = "_truemask_uses"  # the attribute of an attention layer with all its uses; the last one counts


# -- configs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """Who switched a config, and the attention that it named before."""

    config: weakref.ref[Any]
    before: str | None
    users: list[str] = field(default_factory=list)


ACCOUNTS: dict[int, Account] = {}  # by the id of the config: configs have no hash


def switch_config(config: Any, user: str) -> None:
    """Note that a use of a model, of class `user`, switches this config."""
    place = id(config)
    if _account(config) is None:
        gone = weakref.ref(config, lambda _: ACCOUNTS.pop(place, None))
        ACCOUNTS[place] = Account(gone, config._attn_implementation)
    ACCOUNTS[place].users.append(user)


def release_config(config: Any, user: str) -> None:
    """The end of what `switch_config` noted: the last one gives the config back what it named."""
    account = ACCOUNTS[id(config)]
    account.users.remove(user)
    if not account.users:
        config._attn_implementation_internal = account.before
        del ACCOUNTS[id(config)]


def users_of(config: Any) -> list[str]:
    """The classes of the models in use that switched this config."""
    account = _account(config)
    return [] if account is None else sorted(set(account.users))


def _account(config: Any) -> Account | None:
    found = ACCOUNTS.get(id(config))
    return found if found is not None and found.config() is config else None


def models_in(model: nn.Module) -> list[Any]:
    """A model and the parts of it that are models of transformers themselves."""
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def configs_of(model: nn.Module) -> list[Any]:
    """Every config that the model or a part of it reads, each once."""
    waiting = [module.config for module in models_in(model)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


# -- layers ------------------------------------------------------------------------------------------------------------


def push(module: nn.Module, layer: Layer) -> None:
    """From now on this use of the layer counts."""
    vars(module).setdefault(STACK, []).append(layer)
    vars(module)[MARK] = layer


def drop(module: nn.Module, layer: Layer) -> None:
    """The end of a use of the layer; of those that are left the last one counts."""
    uses = vars(module).get(STACK, [])
    if layer in uses:
        uses.remove(layer)
        if uses:
            vars(module)[MARK] = uses[-1]
        else:
            del vars(module)[STACK], vars(module)[MARK]


# -- the switch --------------------------------------------------------------------------------------------------------


class Switch:
    """A model on the attention called `key` with these masks, between `apply` and `undo`."""

    def __init__(
        self, key: str, register: Callable[[], None], model: Any, mask: object, layers: object, replace: bool
    ) -> None:
        self._key, self._register, self._model = key, register, model
        self._masks = mask, layers, replace
        self._assigned()
        if replace and mask is None and not layers:
            raise MaskError(
                "use: replace=True says that a mask takes the place of the model's own, but there is no mask"
            )
        self._configs: list[Any] = []
        self._layers: dict[nn.Module, Layer] = {}
        self._unwatch: Callable[[], None] | None = None

    def _assigned(self) -> dict[nn.Module, Layer]:
        mask, layers, replace = self._masks
        return assigned(self._model, attention_layers(self._model), mask, layers, replace)

    def apply(self) -> None:
        """Switch the model over, as it is by now."""
        _check_switchable(self._model)
        self._register()
        found = self._assigned()
        try:
            for config in configs_of(self._model):
                switch_config(config, type(self._model).__name__)
                self._configs.append(config)
            self._model.set_attn_implementation(self._key)
            for module, layer in found.items():
                _check_switched(self._model, module, layer, self._key)
                push(module, layer)
                self._layers[module] = layer
            self._unwatch = watch(self._model, models_in(self._model))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """End the use; uses of a model may end in any order."""
        for module, layer in self._layers.items():
            drop(module, layer)
        for config in self._configs:
            release_config(config, type(self._model).__name__)
        if self._unwatch is not None:
            self._unwatch()
        self._layers, self._configs, self._unwatch = {}, [], None


def _check_switchable(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not part._can_set_attn_implementation():
            raise MaskError(
                f"{type(part).__name__} cannot switch its attention: transformers looks for its AttentionInterface in "
                "the file of the class, and does not find it (classes of a notebook have no file). A mask can reach "
                "such a model only as the tensor that it takes: `tm.to_additive(mask, ...)` or `tm.to_torch_sdpa`"
            )


def _check_switched(model: nn.Module, module: nn.Module, layer: Layer, key: str) -> None:
    """Raise if a layer goes on with another attention: its config is not one that transformers switches."""
    config: Any = getattr(module, "config", None)
    if config is not None and config._attn_implementation != key:
        raise MaskError(
            f"{type(model).__name__}: `{layer.path}` keeps its attention '{config._attn_implementation}', because "
            "transformers does not switch its config with the model's"
        )
