"""The configs of transformers models in use: who switched each of them, and which attention it named before.

A config says for every thread which attention runs, and may belong to several models: it keeps account of the uses that
switched it, and of what it named before, which is what runs for those who have nothing in use. Uses end in any order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.scopes import ActiveUse, ScopedValue


class Account:
    """Who uses a config, by the class of the model, and the attention that it named before."""

    def __init__(self, config: Any) -> None:
        self.config, self.before = weakref.ref(config, self._forget), config._attn_implementation
        self.users: list[str] = []
        self.scoped_user: ScopedValue[str] = ScopedValue()
        self._place = id(config)

    def _forget(self, _: object) -> None:
        ACCOUNTS.pop(self._place, None)


ACCOUNTS: dict[int, Account] = {}  # by the id of the config: configs have no hash


def switch_config(config: Any, user: str, key: str, active_use: ActiveUse) -> Callable[[], None]:
    """Note that a use of a model, of class `user`, switches this config to `key`; what is returned ends that.

    The last one that ends gives the config back what it named, unless it names something else by then.
    """
    account = account_of(config) or ACCOUNTS.setdefault(id(config), Account(config))
    account.users.append(user)
    active_use.set_value(account.scoped_user, user, held=False)  # accounts outlive models
    config._attn_implementation_internal = key

    def release() -> None:
        account.users.remove(user)
        config_alive = account.config()
        if not account.users and config_alive is not None:
            if config_alive._attn_implementation == key:
                config_alive._attn_implementation_internal = account.before
            del ACCOUNTS[id(config_alive)]

    return release


def account_of(config: Any) -> Account | None:
    """The account of a config that somebody switched."""
    account = ACCOUNTS.get(id(config))
    return account if account is not None and account.config() is config else None


def in_use_here(model: nn.Module) -> bool:
    """Whether a model is in use in this context; a copy of one in use is."""
    account = account_of(getattr(model, "config", None))
    return account is None or account.scoped_user.here() is not None


def models_in(model: nn.Module) -> list[Any]:
    """A model and the parts of it that are models of transformers themselves."""
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def parts_meant(model: nn.Module, layers: Mapping[nn.Module, AttentionLayer]) -> list[Any]:
    """The models in a model that own a layer that is meant: one with a mask, or any where there is none."""
    masked = {module for module, layer in layers.items() if layer.mask is not None}
    meant = masked or layers.keys()
    return [part for part in models_in(model) if any(module in meant for module in part.modules())]


def configs_of(model: nn.Module, parts: list[Any]) -> list[Any]:
    """Every config that these parts of a model read, each once; not those that only other parts do."""
    wanted = {id(part.config) for part in parts}
    others = {id(part.config) for part in models_in(model)} - wanted
    waiting = [part.config for part in parts]
    configs: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in configs and id(config) not in others:
            configs[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(configs.values())
