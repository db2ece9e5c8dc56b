"""Which layers of a transformers model attend, what they are called, and what the uses of each say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace as changed
from typing import Any

from torch import nn

from truemask.errors import MaskError
from truemask.interop.huggingface.coverage import MIXES, asks_for_attention, check_selection, own_ways, partitions
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.scopes import ScopedValue

MARK = "_truemask"  # the attribute of an attention layer in use that says what it runs, and where
CROSS = re.compile(
    r"encoder_attn|encoder_decoder_att|cross_?att|EncDecAttention|\bx_attn|token_to_image|image_to_token|image_pooling",
    re.IGNORECASE,
)
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")  # as transformers calls them


def attention_layers(model: nn.Module) -> dict[nn.Module, AttentionLayer]:
    """The modules of a model that attend. Raises MaskError if there are none.

    A layer answers to the name of its kind, as in `config.layer_types` ("full_attention", "sliding_attention",
    "chunked_attention"), to that of its part ("encoder", "decoder", "vision_tower"), and to both
    ("encoder.full_attention"); cross-attention answers to "cross_attention" alone.
    """
    from transformers import PreTrainedModel

    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    asking = {path: module for path, module in model.named_modules() if asks_for_attention(type(module))}
    ways = dict.fromkeys(asking, "") | own_ways(model, asking)
    layers: dict[nn.Module, AttentionLayer] = {}
    for path, module in model.named_modules():
        if path in ways:
            layers[module] = _layer(module, path, *_owner(path, owners), ways[path])
    for module in asking.values():
        check_selection(model, module)
    if all(layer.own_way for layer in layers.values()):
        raise MaskError(
            f"{type(model).__name__} has no layer that asks transformers for its attention function: it has none, or "
            "computes attention itself. A mask can reach it only as the tensor that it takes (`tm.to_additive`)"
        )
    return _mixers_renamed(layers)


def _owner(path: str, owners: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """The innermost model that a module is part of, with its path."""
    inside = [name for name in owners if name == "" or path == name or path.startswith(f"{name}.")]
    name = max(inside, key=len)
    return name, owners[name]


def _layer(module: nn.Module, path: str, owner_path: str, owner: nn.Module, own_way: str) -> AttentionLayer:
    config: Any = getattr(module, "config", None) or owner.config
    own_path = path[len(owner_path) :].strip(".")
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", own_path)
    index = int(number.group(1)) if number else 0
    above = owner_path.split(".")[::-1]
    part = next((name for name in above if name in ("encoder", "decoder")), above[0]) or "model"
    named_cross = bool(getattr(module, "is_cross_attention", False)) or bool(CROSS.search(own_path))
    cross = named_cross and own_way != MIXES
    names = ("cross_attention",) if cross else _names(part, kind_of(config, index))
    return AttentionLayer(path, index, part, names, cross, own_way=own_way, in_windows=partitions(type(module)))


def _names(part: str, kind: str) -> tuple[str, ...]:
    return f"{part}.{kind}", kind, part


def _mixers_renamed(layers: Mapping[nn.Module, AttentionLayer]) -> dict[nn.Module, AttentionLayer]:
    """The kind of a layer is that of its attention: what mixes tokens beside it is called a mixer.

    So is what mixes tokens in a model whose config does not say which layers do that.
    """
    attending = {(layer.part, layer.index) for layer in layers.values() if not layer.own_way}
    renamed = dict(layers)
    for module, layer in layers.items():
        if layer.own_way == MIXES and ((layer.part, layer.index) in attending or layer.names[1] in LAYER_TYPES):
            renamed[module] = changed(layer, names=_names(layer.part, "mixer"))
    return renamed


def kind_of(config: Any, index: int) -> str:
    """The kind of a layer, as transformers decides which mask it makes for it."""
    kinds = getattr(config, "layer_types", None)
    if kinds and index < len(kinds):
        return kinds[index]
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


# -- what uses say of a layer ------------------------------------------------------------------------------------------


class ScopedLayer(ScopedValue[AttentionLayer]):
    """What the uses of an attention layer say; `plain` is the layer without a mask, `before` its attention in no use.

    A copy of the layer runs for good what counted where it was copied, for its config is a copy too, and names ours.
    """

    def __init__(self, layer: AttentionLayer, before: str | None = None, always: AttentionLayer | None = None) -> None:
        super().__init__(always)
        self.plain, self.before = changed(layer, mask=None, replace=False), before
        self.users = 1  # the copied module, which keeps it when its uses end; where a use makes it, `install` sets 0

    def __deepcopy__(self, _: object) -> ScopedLayer:
        return self.for_good()

    def __reduce__(self) -> tuple[Any, ...]:
        copied = self.for_good()
        return ScopedLayer, (copied.plain, None, copied.always)

    def for_good(self) -> ScopedLayer:
        """A `ScopedLayer` of its own, in which what counts here counts everywhere."""
        entry = self.now()
        return ScopedLayer(self.plain, always=self.plain if entry is None else entry.value)


def scoped_layer_of(module: nn.Module) -> ScopedLayer | None:
    """What the uses of a layer say."""
    return vars(module).get(MARK)
