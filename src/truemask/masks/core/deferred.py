"""What is built while `torch.compile` traces: a text of it, which the compiled graph reads again in every call."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from truemask.common.real_tensors import is_diverted, is_recorded
from truemask.errors import MaskError
from truemask.geometry.logic import States
from truemask.geometry.tiles.tile_map import Rectangles
from truemask.masks.core.construction import made_apart, register_deferred
from truemask.masks.core.handles import mask_of
from truemask.masks.core.kinds import KINDS
from truemask.masks.core.mask import Mask
from truemask.masks.core.value import Written

# What Dynamo, which reads a function's bytecode to make a graph of tensors of it, cannot do with masks:
#
# * It cannot follow what building one does: data is copied, checked number by number and hashed, and tables are made
#   with numpy. Each would break the graph in two, or keep numbers of the first call for all later ones.
# * It treats an object that comes from outside (a mask in a closure, an argument, an attribute of a module) as a
#   constant: it compares the object in every call and compiles anew when another one comes, so decoding, with another
#   offset in each step, would compile in each step.
# * It can take tensors and numbers as inputs of the graph, and no mask; an operator of a graph (`torch.library`) takes
#   tensors, numbers and text.
#
# What is done instead:
#
# * A mask from outside enters the graph as its handle, a tensor of one number (handles.py).
# * What is built inside is not built. `mask.at(q_start=start) & window(64)` becomes a `DeferredMask`, which remembers
#   names and arguments: `build` (construction.py) makes it in place of what an operator makes, `deferrable` in place of
#   what a public function makes. Only `attend` and the modules can use it, and any question refuses.
# * `DeferredText` writes it as text with places for what may change from call to call, which are inputs of the graph:
#
#       _and(_at(M0, I0, I1), window(I2, {}))      masks M and tensors T of the list of tensors, ints I, floats F
#
# * `read_deferred` makes the mask from the text in every call, with its places filled; equal ones are made once.
# * `torch.export` runs what it traces once more before it ends: there a mask from outside is written by its number.

P = ParamSpec("P")
BUILDERS: dict[str, Callable[..., Any]] = {}


class DeferredMask(Mask):
    """A mask that somebody will build: `builder` is a kind or a deferrable function."""

    def __init__(self, builder: str, args: tuple[Any, ...]) -> None:
        self.builder, self.args = builder, args

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        raise self._refusal()

    def _tile(self, r: Rectangles) -> States:
        raise self._refusal()

    def _write(self) -> Written:
        raise self._refusal()

    def _refusal(self) -> MaskError:
        return MaskError(
            f"a mask that a compiled function builds (here by `{self.builder.lstrip('_')}`) can be combined, "
            "re-indexed and given to attend there, nothing else: ask it outside"
        )


register_deferred(DeferredMask)
BUILDERS["numbered"] = mask_of


def deferrable(fn: Callable[P, Mask]) -> Callable[P, Mask]:
    """A public function that makes a mask, able to stand in a compiled function."""
    name = fn.__name__
    BUILDERS[name] = fn
    examples: Any = fn  # doctest passes over what another module wrapped, and looks into `__test__`
    examples.__globals__.setdefault("__test__", {})[name] = fn

    @wraps(fn)
    def build_or_defer(*args: P.args, **keywords: P.kwargs) -> Mask:
        if torch.compiler.is_dynamo_compiling():
            return DeferredMask(name, (*args, keywords))
        return made_apart(fn, args, keywords) if is_diverted() else fn(*args, **keywords)

    return build_or_defer


class DeferredText:
    """Text, and the values for its places; written while tracing.

    With `by_number` the text names masks from outside itself: it is read before the tracing ends.
    """

    def __init__(self, *, by_number: bool = False) -> None:
        self.by_number = by_number
        self.tensors: list[Tensor] = []
        self.ints: list[int] = []
        self.floats: list[float] = []

    def write(self, value: Any) -> str:
        """The text of a mask or an argument; what may change is kept aside."""
        if isinstance(value, DeferredMask):
            return f"{value.builder}({', '.join([self.write(arg) for arg in value.args])})"
        if isinstance(value, Mask) and value.kind == "at":
            return self.write(DeferredMask("_at", (value.base, value.q_start, value.k_start)))  # pyright: ignore
        if isinstance(value, Mask) and self.by_number:
            return f"numbered({value.number!r}, {{}})"
        if isinstance(value, Mask):
            self.tensors.append(value.handle)
            return f"M{len(self.tensors) - 1}"
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return f"T{len(self.tensors) - 1}"
        if isinstance(value, bool):
            return "True" if value else "False"  # what depends on a changing size has no repr
        if value is None or isinstance(value, str):
            return repr(value)
        if isinstance(value, int):
            self.ints.append(value)
            return f"I{len(self.ints) - 1}"
        if isinstance(value, float):
            self.floats.append(value)
            return f"F{len(self.floats) - 1}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join([self.write(item) for item in value])}]"
        if isinstance(value, dict):
            return f"{{{', '.join([f'{name!r}: {self.write(item)}' for name, item in value.items()])}}}"
        raise MaskError(
            f"a compiled function cannot build a mask from a {type(value).__name__}: build it outside, or from "
            "numbers, lists and tensors"
        )


# -- reading -----------------------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """What stands in the places of a text."""

    masks: tuple[Mask | None, ...]
    tensors: tuple[Tensor | None, ...]
    ints: tuple[int, ...]
    floats: tuple[float, ...]


def read_deferred(text: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Any:
    """What `DeferredText` wrote, with these values in its places: a mask, a tensor or None."""
    kinds = _kinds(text)
    masks = tuple(mask_of(tensors[i]) if kinds.get(i) == "M" else None for i in range(len(tensors)))
    if "T" not in kinds.values() and not is_recorded():
        return _reread(text, Values(masks, (), tuple(ints), tuple(floats)))  # all layers and steps share one mask
    return _value(_parsed(text), Values(masks, tuple(tensors), tuple(ints), tuple(floats)))


@lru_cache(maxsize=64)
def _reread(text: str, values: Values) -> Any:
    return _value(_parsed(text), values)


@lru_cache(maxsize=256)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@lru_cache(maxsize=256)
def _kinds(text: str) -> dict[int, str]:
    """For each place in the list of tensors, M or T."""
    names = [node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name)]
    return {int(name[1:]): name[0] for name in names if name[0] in "MT"}


def _value(node: ast.expr, values: Values) -> Any:
    match node:
        case ast.Name(id=name):
            lists = {"M": values.masks, "T": values.tensors, "I": values.ints, "F": values.floats}
            return lists[name[0]][int(name[1:])]
        case ast.Call(func=ast.Name(id=name)):
            args = [_value(arg, values) for arg in node.args]
            if name in BUILDERS:
                return BUILDERS[name](*args[:-1], **args[-1])
            return KINDS[name[1:]].make(*args)
        case ast.List():
            return [_value(item, values) for item in node.elts]
        case ast.Dict():
            return {_value(k, values): _value(v, values) for k, v in zip(node.keys, node.values, strict=True) if k}
        case ast.Constant():
            return node.value
        case _:
            raise AssertionError(f"no deferred text says {ast.dump(node)}")
