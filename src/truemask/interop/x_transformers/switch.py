"""An x-transformers model switched to our attention and back: what stands in for forwards while it is in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from torch import nn

from truemask.interop.layer_masks import AttentionLayer, assigned
from truemask.interop.scopes import REPLICATE, ActiveUse, install, uninstall
from truemask.interop.switching import Switch
from truemask.interop.x_transformers.attention import AttendForward, AttentionForward
from truemask.interop.x_transformers.coverage import check_maskable
from truemask.interop.x_transformers.inputs import ForwardProxy, StackForward, WrapperForward
from truemask.interop.x_transformers.layers import AttentionModule, attention_layers

F = TypeVar("F", bound=ForwardProxy)


class XTransformersSwitch(Switch):
    """An x-transformers model on our attention, between `apply` and `undo`."""

    def _assigned(self, mask: object, layers: object, replace: bool) -> dict[nn.Module, AttentionLayer]:
        attentions = attention_layers(self.model)
        named = {attention.module: attention.layer for attention in attentions if not attention.pools}
        masked = assigned(self.model, named, mask, layers, replace) if named or mask is not None else {}
        for attention in attentions:
            if attention.module in masked and masked[attention.module].mask is not None:
                check_maskable(attention.module, attention.stack, replace)
        return {attention.module: masked.get(attention.module, attention.layer) for attention in attentions}

    def _change(self, layers: Mapping[nn.Module, AttentionLayer], active_use: ActiveUse) -> None:
        attentions = attention_layers(self.model)
        for attention in attentions:
            active_use.change(partial(_begin, attention, layers[attention.module], active_use))
        for stack in {attention.stack: None for attention in attentions if attention.stack is not None}:
            active_use.change(partial(_watch, self.model, stack))


def _begin(attention: AttentionModule, layer: AttentionLayer, active_use: ActiveUse) -> Callable[[], None]:
    """Put one `Attention` to use; what is returned takes back what that changed."""
    module, core = attention.module, attention.module.attend
    outer = _stood_in(module, AttentionForward)
    active_use.set_value(outer.scoped_layer, layer)
    inner = install(
        core,
        "forward",
        lambda value: isinstance(value, AttendForward) and value.owner is outer,
        lambda: AttendForward(core, outer),
    )
    proxies: dict[nn.Module, ForwardProxy] = {module: outer, core: inner}
    if attention.stack is not None:
        stack = proxies[attention.stack] = _stood_in(attention.stack, StackForward)
        outer.stack_key = stack.stack_key
    return partial(_end, proxies)


def _watch(model: nn.Module, stack: nn.Module) -> Callable[[], None]:
    """Let the wrappers around a stack say what they put beside its tokens; what is returned takes that back."""
    proxies: dict[nn.Module, ForwardProxy] = {}
    for module in model.modules():
        if getattr(module, "attn_layers", None) is stack:
            wrapper = proxies[module] = _stood_in(module, WrapperForward)
            wrapper.stack_key = vars(stack)["forward"].stack_key
    return partial(_end, proxies)


def _stood_in(module: nn.Module, kind: type[F]) -> F:
    """What stands in for a module's forward."""
    return install(module, "forward", lambda value: isinstance(value, kind), lambda: kind(module))


def _end(proxies: dict[nn.Module, ForwardProxy]) -> None:
    """Withdraw what stands in for the forwards of some modules."""
    for module, forward in proxies.items():
        if uninstall(module, "forward", forward) and forward.previous is not None:
            vars(module)["forward"] = forward.previous
        if not forward.users:
            vars(module).pop(REPLICATE, None)
