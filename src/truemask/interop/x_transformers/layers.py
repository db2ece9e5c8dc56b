"""Which attention an x-transformers model has, what `layers=` calls it, and how it is put to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn

from truemask.errors import MaskError
from truemask.interop.layer_masks import Layer
from truemask.interop.scopes import REPLICATE, Hold, stand, withdraw
from truemask.interop.x_transformers.attention import AttendForward, AttentionForward, Use
from truemask.interop.x_transformers.inputs import StackForward, StandIn, WrapperForward

F = TypeVar("F", bound=StandIn)
KINDS = {"a": "self", "c": "cross"}  # x-transformers' letters


@dataclass
class Found:
    """An `Attention`, the stack that it stands in, and what `layers=` calls it; None for pooling, which has no name."""

    module: Any
    stack: nn.Module | None
    layer: Layer | None


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is one of x-transformers' classes, or made from it; by names, so nothing is imported."""
    return any(kind.__name__ == name and kind.__module__.startswith("x_transformers.") for kind in type(module).__mro__)


def find(model: nn.Module) -> list[Found]:
    """Every `Attention` once. Raises MaskError if there is none."""
    pooling = {part for pool in model.modules() if is_a(pool, "AttentionPool") for part in pool.modules()}
    found: dict[nn.Module, Found] = {}
    for path, stack in model.named_modules():
        for letter, module, index in attention_in(stack):
            layer = None if module in pooling else named(path, letter, index)
            found.setdefault(module, Found(module, stack, layer))
    for path, module in model.named_modules():
        if is_a(module, "Attention"):
            found.setdefault(module, Found(module, None, None if module in pooling else named(path, "a", 0)))
    if not found:
        raise MaskError(
            f"{type(model).__name__} has no attention of x-transformers (`x_transformers.Attention`) to give a mask to"
        )
    return list(found.values())


def attention_in(stack: Any) -> list[tuple[str, nn.Module, int]]:
    """The `Attention`s of an `AttentionLayers`: their letter ("a" for self, "c" for cross), and their place."""
    found: list[tuple[str, nn.Module, int]] = []
    if not is_a(stack, "AttentionLayers"):
        return found
    for letter, layer in zip(stack.layer_types, stack.layers, strict=True):
        inside = [part for part in layer[1].modules() if is_a(part, "Attention")] if letter in KINDS else []
        for module in inside:
            if all(module is not known for _, known, _ in found):  # tied layers are one
                found.append((letter, module, sum(letter == other for other, _, _ in found)))
    return found


def named(path: str, letter: str, index: int) -> Layer:
    """What `layers=` calls a layer: "cross_attention", or the part of the model that its stack is, and its place."""
    steps = [step for step in path.split(".") if step not in ("attn_layers", "net", "")]
    part = steps[-1] if steps else "model"
    cross = KINDS[letter] == "cross"
    return Layer(path, index, part, ("cross_attention",) if cross else (part,), cross)


def begin(found: Found, use: Use, hold: Hold) -> Callable[[], None]:
    """Put one `Attention` to use; what is returned takes back what that changed."""
    module, core = found.module, found.module.attend
    outer = stood_in(module, AttentionForward)
    hold.sit(outer.seat, use)
    inner = stand(
        core,
        "forward",
        lambda known: isinstance(known, AttendForward) and known.owner is outer,
        lambda: AttendForward(core, outer),
    )
    standing: dict[nn.Module, StandIn] = {module: outer, core: inner}
    if found.stack is not None:
        stack = standing[found.stack] = stood_in(found.stack, StackForward)
        outer.frame = stack.frame
    return partial(end, standing)


def watch(model: nn.Module, stack: nn.Module) -> Callable[[], None]:
    """Let the wrappers around a stack say what they put beside its tokens; what is returned takes that back."""
    standing: dict[nn.Module, StandIn] = {}
    for module in model.modules():
        if getattr(module, "attn_layers", None) is stack:
            wrapper = standing[module] = stood_in(module, WrapperForward)
            wrapper.frame = vars(stack)["forward"].frame
    return partial(end, standing)


def stood_in(module: nn.Module, kind: type[F]) -> F:
    """What stands in for a module's forward."""
    return stand(module, "forward", lambda known: isinstance(known, kind), lambda: kind(module))


def end(standing: dict[nn.Module, StandIn]) -> None:
    """Withdraw what stands in for the forwards of some modules."""
    for module, forward in standing.items():
        if withdraw(module, "forward", forward) and forward.previous is not None:
            vars(module)["forward"] = forward.previous
        if not forward.standing:
            vars(module).pop(REPLICATE, None)
