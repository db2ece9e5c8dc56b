"""Which layer of a model gets which mask: the `layers=` of `tm.use`, for models of every library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed

from torch import nn

from truemask.common.formatting import describe, suggest
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import from_text, not_a_mask


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """An attention layer: its place in its part of the model, the names that `layers=` may call it, its mask."""

    path: str
    index: int
    part: str
    names: tuple[str, ...]
    cross: bool
    mask: Mask | None = None
    replace: bool = False
    own_way: str = ""  # how it computes without transformers' attention function, so that it would not see a mask
    in_windows: bool = False  # whether the model cuts windows beforehand, in which it counts positions
    used: int = 0  # the number of the use that gave the mask
    backend: str | None = None  # that its use names

    def __deepcopy__(self, _: object) -> AttentionLayer:
        return self


def assigned(
    model: nn.Module, layers: Mapping[nn.Module, AttentionLayer], mask: object, where: object, replace: bool
) -> dict[nn.Module, AttentionLayer]:
    """The layers that ask for the attention function, with their masks.

    `where` is the `layers` of `tm.use`: None, names, indices, or a dict of them to masks.
    """
    masks_by_name = _masks_by_name(mask, where)
    for name in masks_by_name:
        _check_clear(model, layers, name)
    layer_masks = {module: _with_mask(layer, masks_by_name, replace) for module, layer in layers.items()}
    _check_reached(model, layer_masks, masks_by_name)
    return {module: layer for module, layer in layer_masks.items() if not layer.own_way}


def _check_reached(
    model: nn.Module, layers: Mapping[nn.Module, AttentionLayer], masks_by_name: Mapping[str | int | None, Mask]
) -> None:
    """Raise if a mask is for layers that would not see it, or if information goes around it through such layers."""
    for module, layer in layers.items():
        if layer.mask is not None and not layer.own_way and layer.in_windows:
            raise MaskError(
                f"{type(model).__name__}: `{layer.path}` ({type(module).__name__}) attends inside windows that the "
                "model cuts beforehand, so a mask would count positions there; `tm.use(model)` without one runs"
            )
    attending = {layer.index for layer in layers.values() if not layer.own_way}
    numbers = attending & masks_by_name.keys()  # meant for the attention
    deaf = [
        f"`{layer.path}` ({type(module).__name__}) {layer.own_way}"
        for module, layer in layers.items()
        if layer.own_way and layer.mask is not None and layer.index not in numbers
    ]
    if deaf:
        more = f", and {len(deaf) - 1} more like it" if len(deaf) > 1 else ""
        reached = _known_names({module: layer for module, layer in layers.items() if not layer.cross}, kinds=True)
        raise MaskError(
            f"{type(model).__name__}: {deaf[0]} and would not see the mask{more}: only what goes through transformers' "
            f"AttentionInterface can be given one. Name its layers to say that they alone are meant: layers={reached}"
        )


def _masks_by_name(mask: object, where: object) -> dict[str | int | None, Mask]:
    """Which mask for which name or index; None stands for all self-attention."""
    if isinstance(where, Mapping):
        others = {} if mask is None else {None: _mask(mask, "mask")}
        return {**others, **{_name(name): _mask(layer_mask, f"layers[{name!r}]") for name, layer_mask in where.items()}}
    if where is None:
        return {} if mask is None else {None: _mask(mask, "mask")}
    if mask is None:
        raise MaskError(f"layers={describe(where)} says where, but there is no mask: pass a mask or a dict of masks")
    names = [where] if isinstance(where, (str, int)) or not isinstance(where, Iterable) else list(where)
    if not names:
        raise MaskError("layers= is empty, so the mask would apply nowhere; leave it out for all layers")
    return {_name(name): _mask(mask, "mask") for name in names}


def _name(name: object) -> str | int:
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise MaskError(
            "layers= takes kinds of layers ('sliding_attention'), indices, or a dict of them to masks; got "
            f"{describe(name)}"
        )
    return name


def _mask(mask: object, name: str) -> Mask:
    expression = from_text(mask)
    if not isinstance(expression, Mask):
        wanted = f"use: {name} must be a mask expression, such as `causal & window(256)`, or its text"
        raise MaskError(not_a_mask(wanted, mask, ", and one for each layer `layers={0: ..., 1: ...}`"))
    return expression


def _check_clear(model: nn.Module, layers: Mapping[nn.Module, AttentionLayer], name: str | int | None) -> None:
    """Raise if nobody answers to a name or index, or if it could mean layers in several parts of the model."""
    answering = [layer for layer in layers.values() if name is None or _answers(layer, name)]
    parts = sorted({layer.part for layer in layers.values() if not layer.cross})
    crosses = ["cross_attention"] if any(layer.cross for layer in layers.values()) else []
    several = len(parts) > 1 or bool(crosses)
    meant = {layer.part for layer in answering if not layer.cross}
    names = _known_names(layers)
    if several if not isinstance(name, str) else len(meant) > 1:
        what = "a mask for all layers" if name is None else f"layers={name!r}"
        raise MaskError(
            f"{type(model).__name__} attends in several places ({', '.join([*parts, *crosses])}), so {what} could mean "
            f"any of them. Name them with layers=, one or more of {', '.join(names)}, or a dict of them to masks"
        )
    if name is not None and not answering:
        most = max(layer.index for layer in layers.values())
        hint = suggest(name, names) if isinstance(name, str) else ""
        raise MaskError(
            f"layers={name!r}: no layer of {type(model).__name__} answers to that{hint} (known: {', '.join(names)}, "
            f"and the indices 0 to {most})"
        )


def _known_names(layers: Mapping[nn.Module, AttentionLayer], *, kinds: bool = False) -> list[str]:
    """The names that mean one thing, of kinds or also of parts: with its part a kind is named where there are several.

    Layers that would not see a mask are left out.
    """
    reached = [layer for layer in layers.values() if not layer.own_way]
    parts = {layer.part for layer in reached if not layer.cross}
    names = {(name, layer.part) for layer in reached for name in (layer.names[:2] if kinds else layer.names)}
    several = {name for name, part in names for other, another in names if name == other and part != another}
    several -= {"cross_attention"}
    return sorted({name for name, _ in names if name not in several and (len(parts) > 1 or "." not in name)})


def _answers(layer: AttentionLayer, name: str | int) -> bool:
    return layer.index == name and not layer.cross if isinstance(name, int) else name in layer.names


def _with_mask(layer: AttentionLayer, masks_by_name: Mapping[str | int | None, Mask], replace: bool) -> AttentionLayer:
    """The most specific rule counts: an index, then a name, then the mask for all."""
    order = [*layer.names] if layer.cross else [layer.index, *layer.names, None]
    mask = next((masks_by_name[name] for name in order if name in masks_by_name), None)
    return changed(layer, mask=mask, replace=replace and mask is not None)
