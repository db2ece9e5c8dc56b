"""What the operator `truemask::attend` is given, and the schema by which torch knows it: `AttendArgs` and some more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

from torch import Tensor

from truemask.attention.call import AttendArgs


class OperatorArgs(NamedTuple):
    """What the operator is given; to torch it is one list, the options last (`flat`, and `of` back again)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: str  # as `DeferredText` wrote it, with the tensors, ints and floats of its places
    tensors: Sequence[Tensor]
    ints: Sequence[int]
    floats: Sequence[float]
    bias_form: str  # as text, with the tensor `options.bias` in its place
    seed: Tensor | None
    grads: str  # the names of the tensors that want gradients
    options: AttendArgs

    @classmethod
    def of(cls, args: Sequence[Any]) -> OperatorArgs:
        """From torch's list."""
        return cls._make([*args[:BEFORE_OPTIONS], AttendArgs._make(args[BEFORE_OPTIONS:])])

    @property
    def flat(self) -> tuple[Any, ...]:
        """Torch's list."""
        return *self[:BEFORE_OPTIONS], *self.options

    @property
    def wanted(self) -> list[str]:
        """The names of the tensors that want gradients."""
        return self.grads.split()

    def tensor(self, name: str) -> Tensor | None:
        """One of the tensors that may want gradients."""
        return getattr(self.options if name in TENSOR_OPTIONS else self, name)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> OperatorArgs:
        """The same with other tensors under those names."""
        options = {name: x for name, x in tensors.items() if name in TENSOR_OPTIONS}
        others = {name: x for name, x in tensors.items() if name not in options}
        return self._replace(**others, options=self.options._replace(**options))


def _schema_type(annotation: Any) -> str:
    """How torch's schemas write the type of an option; a bias object comes as its tensor."""
    kinds = get_args(annotation) or (annotation,)
    name = "Tensor" if Tensor in kinds else kinds[0].__name__
    return f"{name}?" if type(None) in kinds else name


OPTION_TYPES = {name: _schema_type(annotation) for name, annotation in get_type_hints(AttendArgs).items()}
TENSOR_OPTIONS = tuple(name for name, kind in OPTION_TYPES.items() if kind == "Tensor?")
DIFFERENTIABLE = ("q", "k", "v", *TENSOR_OPTIONS)
BEFORE_OPTIONS = len(OperatorArgs._fields) - 1
FIELDS = (*OperatorArgs._fields[:BEFORE_OPTIONS], *OPTION_TYPES)
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, str mask, Tensor[] tensors, SymInt[] ints, float[] floats, str bias_form, "
    f"Tensor? seed, str grads, {', '.join(f'{kind} {name}' for name, kind in OPTION_TYPES.items())}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
