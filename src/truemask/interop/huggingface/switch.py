"""A transformers model switched to our attention and back: what its configs and layers hold while it is in use.

A config says for every thread which attention runs, and may belong to several models: it keeps account of the uses that
switched it, and of what it named before, which is what runs for those who have nothing in use. Uses end in any order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace as changed
from functools import partial
from typing import Any

from torch import nn

from truemask.errors import MaskError
from truemask.interop.huggingface.layers import MARK, attention_layers
from truemask.interop.layer_masks import Layer, assigned
from truemask.interop.scopes import REPLICATE, Hold, Replicas, Seat, stand, withdraw

# -- configs -----------------------------------------------------------------------------------------------------------


class Account:
    """Who uses a config, by the class of the model, and the attention that it named before."""

    def __init__(self, config: Any) -> None:
        self.config, self.before = weakref.ref(config, self._forget), config._attn_implementation
        self.users: list[str] = []
        self.seat: Seat[str] = Seat()
        self._place = id(config)

    def _forget(self, _: object) -> None:
        ACCOUNTS.pop(self._place, None)


ACCOUNTS: dict[int, Account] = {}  # by the id of the config: configs have no hash


def switch_config(config: Any, user: str, key: str, hold: Hold) -> Callable[[], None]:
    """Note that a use of a model, of class `user`, switches this config to `key`; what is returned ends that.

    The last one that ends gives the config back what it named, unless it names something else by then.
    """
    account = account_of(config) or ACCOUNTS.setdefault(id(config), Account(config))
    account.users.append(user)
    hold.sit(account.seat, user, held=False)  # accounts outlive models
    config._attn_implementation_internal = key

    def release() -> None:
        account.users.remove(user)
        own = account.config()
        if not account.users and own is not None:
            if own._attn_implementation == key:
                own._attn_implementation_internal = account.before
            del ACCOUNTS[id(own)]

    return release


def account_of(config: Any) -> Account | None:
    """The account of a config that somebody switched."""
    found = ACCOUNTS.get(id(config))
    return found if found is not None and found.config() is config else None


def in_use_here(model: nn.Module) -> bool:
    """Whether a model is in use in this context; a copy of one in use is."""
    account = account_of(getattr(model, "config", None))
    return account is None or account.seat.here() is not None


def models_in(model: nn.Module) -> list[Any]:
    """A model and the parts of it that are models of transformers themselves."""
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def parts_meant(model: nn.Module, layers: Mapping[nn.Module, Layer]) -> list[Any]:
    """The models in a model that own a layer that is meant: one with a mask, or any where there is none."""
    masked = {module for module, layer in layers.items() if layer.mask is not None}
    meant = masked or layers.keys()
    return [part for part in models_in(model) if any(module in meant for module in part.modules())]


def configs_of(model: nn.Module, parts: list[Any]) -> list[Any]:
    """Every config that these parts of a model read, each once; not those that only other parts do."""
    own = {id(part.config) for part in parts}
    others = {id(part.config) for part in models_in(model)} - own
    waiting = [part.config for part in parts]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found and id(config) not in others:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


# -- layers ------------------------------------------------------------------------------------------------------------


class LayerSeat(Seat[Layer]):
    """What the uses of an attention layer say; `plain` is the layer without a mask, `before` its attention in no use.

    A copy of the layer runs for good what counted where it was copied, for its config is a copy too, and names ours.
    """

    def __init__(self, layer: Layer, before: str | None = None, always: Layer | None = None) -> None:
        super().__init__(always)
        self.plain, self.before, self.standing = changed(layer, mask=None, replace=False), before, 1

    def __deepcopy__(self, _: object) -> LayerSeat:
        return self.for_good()

    def __reduce__(self) -> tuple[Any, ...]:
        copied = self.for_good()
        return LayerSeat, (copied.plain, None, copied.always)

    def for_good(self) -> LayerSeat:
        """A seat of its own, in which what counts here counts everywhere."""
        found = self.now()
        return LayerSeat(self.plain, always=self.plain if found is None else found.value)


# -- the switch --------------------------------------------------------------------------------------------------------


class Switch:
    """A model on the attention called `key` with these masks, between `apply` and `undo`."""

    def __init__(
        self,
        key: str,
        register: Callable[[], None],
        model: Any,
        mask: object,
        layers: object,
        replace: bool,
        backend: str | None,
    ) -> None:
        self._key, self._register, self._model = key, register, model
        self._masks, self._backend = (mask, layers, replace), backend
        self._assigned()
        if replace and mask is None and not layers:
            raise MaskError(
                "use: replace=True says that a mask takes the place of the model's own, but there is no mask"
            )
        self._hold: Hold | None = None

    def _assigned(self) -> dict[nn.Module, Layer]:
        mask, layers, replace = self._masks
        found = assigned(self._model, attention_layers(self._model), mask, layers, replace)
        return {module: changed(layer, backend=self._backend) for module, layer in found.items()}

    def apply(self, everywhere: bool = False) -> None:
        """Switch the model over, as it is by now, for this context or for all."""
        from truemask.interop.huggingface.inputs import watch  # brings `torch._dynamo`

        self._register()
        model, found = self._model, self._assigned()
        parts = parts_meant(model, found)
        for part in parts:
            _check_switchable(part)
        hold = self._hold = Hold(everywhere)
        try:
            for config in configs_of(model, parts):
                hold.change(partial(switch_config, config, type(model).__name__, self._key, hold))
            owners = {module: part for part in models_in(model) for module in part.modules()}  # the innermost
            for module, layer in found.items():
                if self._runs_ours(module, layer, owners[module]):
                    hold.change(partial(_seat, model, module, layer, hold))
            hold.change(partial(_replicate, model))
            for part in models_in(model):
                hold.change(partial(watch, model, part, in_use_here))
        except BaseException:
            del hold  # the error remembers what stands here
            self.undo()
            raise

    def _runs_ours(self, module: nn.Module, layer: Layer, owner: Any) -> bool:
        """Whether a layer's config is switched. Raises MaskError if one with a mask goes on with another attention."""
        config: Any = getattr(module, "config", None) or owner.config
        ours = config._attn_implementation == self._key
        if layer.mask is not None and not ours:
            raise MaskError(
                f"{type(self._model).__name__}: `{layer.path}` keeps its attention '{config._attn_implementation}', "
                "because its config is none that the model, or a part of it, is made from"
            )
        return ours

    def undo(self) -> None:
        """End the use; uses of a model may end in any order."""
        if self._hold is not None:
            self._hold.stop()
            self._hold = None


def _seat(model: Any, module: nn.Module, layer: Layer, hold: Hold) -> Callable[[], object]:
    """The use's say in a layer; what is returned ends that."""
    account = account_of(getattr(module, "config", None) or model.config)
    before = None if account is None else account.before
    seat = stand(module, MARK, lambda known: known is not None, lambda: LayerSeat(layer, before))
    hold.sit(seat, layer)
    return partial(withdraw, module, MARK, seat)


def _replicate(model: nn.Module) -> Callable[[], object]:
    """DataParallel's replicas of the model have the uses of the thread that makes them; what is returned ends that."""
    replicas = stand(model, REPLICATE, lambda known: isinstance(known, Replicas), lambda: Replicas(model))
    return partial(withdraw, model, REPLICATE, replicas)


def _check_switchable(part: Any) -> None:
    if not part._can_set_attn_implementation():
        raise MaskError(
            f"{type(part).__name__} cannot switch its attention: transformers looks for its AttentionInterface in "
            "the file of the class, and does not find it (classes of a notebook have no file). A mask can reach "
            "such a model only as the tensor that it takes: `tm.to_additive(mask, ...)` or `tm.to_torch_sdpa`"
        )
