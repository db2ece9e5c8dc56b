"""Which attention an x-transformers model has, what `layers=` calls it, and how it is put to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from truemask.errors import MaskError
from truemask.interop.layers import Layer
from truemask.interop.x_attention import AttendForward, AttentionForward, Use
from truemask.interop.x_frame import AfterWrapper, BeforeStack, BeforeWrapper, Frame

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


def begin(found: Found, use: Use, frames: dict[nn.Module, Frame]) -> Callable[[], None]:
    """Put one `Attention` to use; what is returned ends that."""
    module, core = found.module, found.module.attend
    forward = vars(module).get("forward")
    known = isinstance(forward, AttentionForward)
    frame = frames.setdefault(found.stack or module, forward.frame if known else Frame())
    if not known:
        forward = AttentionForward(module, frame)
        module.forward, core.forward = forward, AttendForward(core, forward)
    forward.uses.append(use)

    def end() -> None:
        use.active = False
        forward.uses.remove(use)
        if not forward.uses:
            forward.give_back()
            restore(module)
            restore(core)

    return end


def restore(module: nn.Module) -> None:
    """The module's forward as it was."""
    ours = vars(module).pop("forward")
    if ours.previous is not None:
        vars(module)["forward"] = ours.previous


def watch(model: nn.Module, stack: nn.Module, frame: Frame) -> Callable[[], None]:
    """Hooks on a stack and on the wrappers around it, which keep its frame; what is returned removes them."""
    inner: Any = BeforeStack(frame)
    outer: Any = BeforeWrapper(frame)
    after: Any = AfterWrapper(frame)
    handles = [stack.register_forward_pre_hook(inner, with_kwargs=True)]
    for module in model.modules():
        if getattr(module, "attn_layers", None) is stack:
            handles.append(module.register_forward_pre_hook(outer, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end
