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
        self._found = attention_layers(self.model)
        named = {found.module: found.layer for found in self._found if not found.pools}
        masked = assigned(self.model, named, mask, layers, replace) if named or mask is not None else {}
        for found in self._found:
            if found.module in masked and masked[found.module].mask is not None:
                check_maskable(found.module, found.stack, replace)
        return {found.module: masked.get(found.module, found.layer) for found in self._found}

    def _change(self, layers: Mapping[nn.Module, AttentionLayer], hold: ActiveUse) -> None:
        for found in self._found:
            hold.change(partial(_begin, found, layers[found.module], hold))
        for stack in {found.stack: None for found in self._found if found.stack is not None}:
            hold.change(partial(_watch, self.model, stack))


def _begin(found: AttentionModule, layer: AttentionLayer, hold: ActiveUse) -> Callable[[], None]:
    """Put one `Attention` to use; what is returned takes back what that changed."""
    module, core = found.module, found.module.attend
    outer = _stood_in(module, AttentionForward)
    hold.sit(outer.seat, layer)
    inner = install(
        core,
        "forward",
        lambda known: isinstance(known, AttendForward) and known.owner is outer,
        lambda: AttendForward(core, outer),
    )
    standing: dict[nn.Module, ForwardProxy] = {module: outer, core: inner}
    if found.stack is not None:
        stack = standing[found.stack] = _stood_in(found.stack, StackForward)
        outer.frame = stack.frame
    return partial(_end, standing)


def _watch(model: nn.Module, stack: nn.Module) -> Callable[[], None]:
    """Let the wrappers around a stack say what they put beside its tokens; what is returned takes that back."""
    standing: dict[nn.Module, ForwardProxy] = {}
    for module in model.modules():
        if getattr(module, "attn_layers", None) is stack:
            wrapper = standing[module] = _stood_in(module, WrapperForward)
            wrapper.frame = vars(stack)["forward"].frame
    return partial(_end, standing)


def _stood_in(module: nn.Module, kind: type[F]) -> F:
    """What stands in for a module's forward."""
    return install(module, "forward", lambda known: isinstance(known, kind), lambda: kind(module))


def _end(standing: dict[nn.Module, ForwardProxy]) -> None:
    """Withdraw what stands in for the forwards of some modules."""
    for module, forward in standing.items():
        if uninstall(module, "forward", forward) and forward.previous is not None:
            vars(module)["forward"] = forward.previous
        if not forward.users:
            vars(module).pop(REPLICATE, None)
