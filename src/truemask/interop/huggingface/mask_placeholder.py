"""What stands where a transformers model has its mask: it is handed on, and says so when it is computed with.

No operator answers silently: whoever reads the mask hears what it is and what to do. Identity, hashing and `repr` work,
so that it can be kept and looked for.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from truemask.errors import MaskError

WAY_OUT = (
    "Inside `tm.use` the model's mask is an expression and not a tensor: a part of a model that computes with its mask "
    "itself cannot run there. Leave that part out with layers= (it then keeps the attention that it had), or give the "
    "model the mask as the tensor that it takes (`tm.to_additive`). Call `backward` inside the block if layers are "
    "recomputed then by others than torch.utils.checkpoint"
)

READING_OPERATIONS = {  # what Python calls an operation: how it is written
    "eq": "mask == x",
    "ne": "mask != x",
    "lt": "mask < x",
    "le": "mask <= x",
    "gt": "mask > x",
    "ge": "mask >= x",
    "bool": "bool(mask)",
    "len": "len(mask)",
    "iter": "iter(mask)",
    "contains": "x in mask",
    "int": "int(mask)",
    "float": "float(mask)",
    "complex": "complex(mask)",
    "index": "mask as an index",
    "array": "numpy.asarray(mask)",
    "getitem": "mask[...]",
    "setitem": "mask[...] = x",
    "delitem": "del mask[...]",
    "invert": "~mask",
    "neg": "-mask",
    "pos": "+mask",
    "abs": "abs(mask)",
    "round": "round(mask)",
}
BINARY_OPERATORS = {
    "and": "&",
    "or": "|",
    "xor": "^",
    "add": "+",
    "sub": "-",
    "mul": "*",
    "matmul": "@",
    "truediv": "/",
}
BINARY_OPERATORS |= {"floordiv": "//", "mod": "%", "divmod": "divmod", "pow": "**", "lshift": "<<", "rshift": ">>"}
READING_OPERATIONS |= {name: f"mask {sign} x" for name, sign in BINARY_OPERATORS.items()}
READING_OPERATIONS |= {f"r{name}": f"x {sign} mask" for name, sign in BINARY_OPERATORS.items()}


class MaskPlaceholder:
    """An object of which every operator raises a MaskError with what to do."""

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise MaskError(f"torch's `{getattr(func, '__name__', func)}` was given the mask of `tm.use`. {WAY_OUT}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"the model asks its mask for `.{name}`. {WAY_OUT}")

    def __format__(self, how: str) -> str:
        if how:
            raise MaskError(f"the model formats its mask: `{how}`. {WAY_OUT}")
        return repr(self)

    def __repr__(self) -> str:
        return f"<the mask of a model in use, {list(getattr(self, 'shape', torch.Size()))}>"


def _refusing(written: str) -> Any:
    def refuse(self: MaskPlaceholder, *_: object) -> NoReturn:
        raise MaskError(f"the model computes with its mask: `{written}`. {WAY_OUT}")

    return refuse


for _name, _written in READING_OPERATIONS.items():
    setattr(MaskPlaceholder, f"__{_name}__", _refusing(_written))
