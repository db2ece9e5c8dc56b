"""Which layers of an x-transformers model attend, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from truemask.errors import MaskError
from truemask.interop.layer_masks import AttentionLayer

ATTENTION_LETTERS = {"a": "self", "c": "cross"}  # of x-transformers' `layer_types`


@dataclass(frozen=True)
class AttentionModule:
    """An `Attention`, the stack that it stands in, and what `layers=` calls it; nothing if it only `pools`."""

    module: Any
    stack: nn.Module | None
    layer: AttentionLayer
    pools: bool


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is one of x-transformers' classes, or made from it; by names, so nothing is imported."""
    return any(kind.__name__ == name and kind.__module__.startswith("x_transformers.") for kind in type(module).__mro__)


def attention_layers(model: nn.Module) -> list[AttentionModule]:
    """Every `Attention` once. Raises MaskError if there is none."""
    pooling = {part for pool in model.modules() if is_a(pool, "AttentionPool") for part in pool.modules()}
    modules: dict[nn.Module, AttentionModule] = {}
    for path, stack in model.named_modules():
        for letter, module, index in attention_in(stack):
            modules.setdefault(module, AttentionModule(module, stack, named(path, letter, index), module in pooling))
    for path, module in model.named_modules():
        if is_a(module, "Attention"):
            modules.setdefault(module, AttentionModule(module, None, named(path, "a", 0), module in pooling))
    if not modules:
        raise MaskError(
            f"{type(model).__name__} has no attention of x-transformers (`x_transformers.Attention`) to give a mask to"
        )
    return list(modules.values())


def attention_in(stack: Any) -> list[tuple[str, nn.Module, int]]:
    """The `Attention`s of an `AttentionLayers`: their letter ("a" for self, "c" for cross), and their place."""
    modules: list[tuple[str, nn.Module, int]] = []
    if not is_a(stack, "AttentionLayers"):
        return modules
    for letter, layer in zip(stack.layer_types, stack.layers, strict=True):
        inside = [part for part in layer[1].modules() if is_a(part, "Attention")] if letter in ATTENTION_LETTERS else []
        for module in inside:
            if all(module is not other for _, other, _ in modules):  # tied layers are one
                modules.append((letter, module, sum(letter == other for other, _, _ in modules)))
    return modules


def named(path: str, letter: str, index: int) -> AttentionLayer:
    """What `layers=` calls a layer: "cross_attention", or the part of the model that its stack is, and its place."""
    steps = [step for step in path.split(".") if step not in ("attn_layers", "net", "")]
    part = steps[-1] if steps else "model"
    cross = ATTENTION_LETTERS[letter] == "cross"
    return AttentionLayer(path, index, part, ("cross_attention",) if cross else (part,), cross)
