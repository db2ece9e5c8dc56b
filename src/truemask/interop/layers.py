"""Which layers of a transformers model attend, what they are called, and which of them gets which mask."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import lru_cache
from itertools import count
from typing import Any

from torch import Tensor, nn

from truemask.errors import MaskError, describe, suggest
from truemask.masks.core import Mask

MARK = "_truemask"  # the attribute of an attention layer in use that says what it runs
USES = count(1)
CROSS = re.compile(r"encoder_attn|cross_?att|EncDecAttention", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Layer:
    """An attention layer: its place in its part of the model, the names that `layers=` may call it, its mask."""

    path: str
    index: int
    part: str
    names: tuple[str, ...]
    cross: bool
    mask: Mask | None = None
    replace: bool = False
    computes_itself: bool = False  # it would not see a mask
    used: int = 0  # the number of the use that gave the mask

    def __deepcopy__(self, _: object) -> Layer:
        return self


class Kept:
    """Something that belongs to one model and not to its copies, kept in that model so that both end together."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __deepcopy__(self, _: object) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def kept(model: nn.Module, name: str) -> Kept:
    """What a model keeps under a name of its own."""
    return vars(model).setdefault(name, Kept())


def attention_layers(model: nn.Module) -> dict[nn.Module, Layer]:
    """The modules of a model that attend. Raises MaskError if there are none.

    A layer answers to the name of its kind, as in `config.layer_types` ("full_attention", "sliding_attention",
    "chunked_attention"), and to that of its part ("encoder", "decoder", "vision_tower"); cross-attention answers to
    "cross_attention" alone.
    """
    from transformers import PreTrainedModel

    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    found: dict[nn.Module, Layer] = {}
    for path, module in model.named_modules():
        asks, numbered = calls_interface(type(module)), re.search(r"\.\d+\.", path)
        own_way = not asks and numbered is not None and _computes_itself(module)  # a pooling head is no layer
        if asks or own_way:
            found[module] = _layer(module, path, *_owner(path, owners), own_way)
    if not any(not layer.computes_itself for layer in found.values()):
        raise MaskError(
            f"{type(model).__name__} has no layer that asks transformers for its attention function: it has none, or "
            "computes attention itself. A mask can reach it only as the tensor that it takes (`tm.to_additive`)"
        )
    return found


@lru_cache(maxsize=1024)
def calls_interface(kind: type[nn.Module]) -> bool:
    """Whether a class asks transformers for the attention function, in any of its own methods."""
    functions = [value for _, value in inspect.getmembers(kind, inspect.isfunction)]
    methods = [function for function in functions if not function.__module__.startswith("torch.")]
    try:
        return any("ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(method) for method in methods)
    except OSError:  # a class without a file
        return False


def _computes_itself(module: nn.Module) -> bool:
    """Whether a module is softmax attention by its name and projections, and nothing in it asks for the function."""
    name, parts = type(module).__name__, list(module.modules())
    is_attention = name.endswith("Attention") and "Linear" not in name and any(isinstance(x, nn.Linear) for x in parts)
    return is_attention and not any(calls_interface(type(part)) for part in parts)


def _owner(path: str, owners: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """The innermost model that a module is part of, with its path."""
    inside = [name for name in owners if name == "" or path == name or path.startswith(f"{name}.")]
    name = max(inside, key=len)
    return name, owners[name]


def _layer(module: nn.Module, path: str, owner_path: str, owner: nn.Module, own_way: bool) -> Layer:
    config: Any = getattr(module, "config", None) or owner.config
    own_path = path[len(owner_path) :].strip(".")
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", own_path)
    index = int(number.group(1)) if number else 0
    above = owner_path.split(".")[::-1]
    part = next((name for name in above if name in ("encoder", "decoder")), above[0]) or "model"
    cross = bool(getattr(module, "is_cross_attention", False)) or bool(CROSS.search(own_path))
    names = ("cross_attention",) if cross else (kind_of(config, index), part)
    return Layer(path, index, part, names, cross, computes_itself=own_way)


def kind_of(config: Any, index: int) -> str:
    """The kind of a layer, as transformers decides which mask it makes for it."""
    kinds = getattr(config, "layer_types", None)
    if kinds and index < len(kinds):
        return kinds[index]
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


def assigned(
    model: nn.Module, layers: Mapping[nn.Module, Layer], mask: object, where: object, replace: bool
) -> dict[nn.Module, Layer]:
    """The layers that ask for the attention function, with their masks.

    `where` is the `layers` of `tm.use`: None, names, indices, or a dict of them to masks.
    """
    rules = _rules(mask, where)
    for wanted in rules:
        _check_clear(model, layers, wanted)
    number = next(USES)
    found = {module: changed(_with_mask(layer, rules, replace), used=number) for module, layer in layers.items()}
    for module, layer in found.items():
        if layer.computes_itself and layer.mask is not None:
            raise MaskError(
                f"{type(model).__name__}: `{layer.path}` ({type(module).__name__}) computes attention itself and would "
                "not see the mask: only what goes through transformers' AttentionInterface can be given one"
            )
    return {module: layer for module, layer in found.items() if not layer.computes_itself}


def _rules(mask: object, where: object) -> dict[str | int | None, Mask]:
    """Which mask for which name or index; None stands for all self-attention."""
    if isinstance(where, Mapping):
        rest = {} if mask is None else {None: _mask(mask, "mask")}
        return {**rest, **{_name(name): _mask(each, f"layers[{name!r}]") for name, each in where.items()}}
    if where is None:
        return {} if mask is None else {None: _mask(mask, "mask")}
    if mask is None:
        raise MaskError(f"layers={describe(where)} says where, but there is no mask: pass a mask or a dict of masks")
    names = [where] if isinstance(where, (str, int)) or not isinstance(where, Iterable) else list(where)
    return {_name(name): _mask(mask, "mask") for name in names}


def _name(name: object) -> str | int:
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise MaskError(
            "layers= takes kinds of layers ('sliding_attention'), indices, or a dict of them to masks; got "
            f"{describe(name)}"
        )
    return name


def _mask(mask: object, name: str) -> Mask:
    if isinstance(mask, Mask):
        return mask
    way = ""
    if isinstance(mask, Tensor):
        way = (
            ": a bool tensor with True = attend is `tm.dense(tensor)`, others go through `tm.from_additive` and its kin"
        )
    if isinstance(mask, str):
        way = ": text becomes a mask by `tm.parse(text)`"
    raise MaskError(f"use: {name} must be a mask expression such as `causal & window(256)`, got {describe(mask)}{way}")


def _check_clear(model: nn.Module, layers: Mapping[nn.Module, Layer], wanted: str | int | None) -> None:
    """Raise if nobody answers to a name or index, or if it could mean layers in several parts of the model."""
    known = sorted({name for layer in layers.values() for name in layer.names})
    parts = sorted({layer.part for layer in layers.values() if not layer.cross})
    crosses = ["cross_attention"] if any(layer.cross for layer in layers.values()) else []
    if (len(parts) > 1 or crosses) and not isinstance(wanted, str):
        what = "a mask for all layers" if wanted is None else f"layer {wanted}"
        raise MaskError(
            f"{type(model).__name__} attends in several places ({', '.join([*parts, *crosses])}), so {what} could mean "
            f"any of them. Name them with layers=, one or more of {', '.join(known)}, or a dict of them to masks"
        )
    if wanted is not None and not any(_answers(layer, wanted) for layer in layers.values()):
        most = max(layer.index for layer in layers.values())
        hint = suggest(wanted, known) if isinstance(wanted, str) else ""
        raise MaskError(
            f"layers={wanted!r}: no layer of {type(model).__name__} answers to that{hint} (known: {', '.join(known)}, "
            f"and the indices 0 to {most})"
        )


def _answers(layer: Layer, wanted: str | int) -> bool:
    return layer.index == wanted and not layer.cross if isinstance(wanted, int) else wanted in layer.names


def _with_mask(layer: Layer, rules: Mapping[str | int | None, Mask], replace: bool) -> Layer:
    """The most specific rule counts: an index, then a name, then the mask for all."""
    order = [*layer.names] if layer.cross else [layer.index, *layer.names, None]
    mask = next((rules[name] for name in order if name in rules), None)
    return changed(layer, mask=mask, replace=replace and mask is not None)
