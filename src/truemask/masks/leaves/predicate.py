"""Any function of (b, h, q, k): the way out when the language has no word."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.real_tensors import is_recorded, remembered
from truemask.errors import MaskError
from truemask.geometry.logic import MIXED, States
from truemask.geometry.tiles.tile_map import Rectangles
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import ATOM
from truemask.masks.core.value import ANY, Written
from truemask.masks.leaves.captured import State

MaskModFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Predicate(Mask):
    """`fn(b, h, q, k)`: nothing is known of it but what it answers."""

    fn: MaskModFn
    kind: ClassVar[str] = "predicate"

    @remembered
    def _state(self) -> State:
        """What the function read when this mask was first looked at."""
        return State(self.fn)

    @remembered
    def _key(self) -> tuple[object, ...]:
        return (self.kind, self.fn, self._state.key)

    @property
    def changed(self) -> bool:
        """Whether what the function reads has changed since, so that what this mask said holds no more."""
        return "_state" in vars(self) and State(self.fn).key != self._state.key

    @property
    def functions(self) -> tuple[Predicate, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self,)

    @cached_property  # numbers; the function may read tensors that stand in for others
    def _axes(self) -> tuple[int, ...]:
        """The shape of the answer to two samples and two heads: an axis of 2 is one that the function uses."""
        two, one = torch.zeros(2, dtype=torch.int64), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        answer = self._truth(two.view(2, 1, 1, 1), two.view(1, 2, 1, 1), one, one)
        return tuple(answer.expand(torch.broadcast_shapes(answer.shape, (1, 1, 1, 1))).shape)

    @property
    def batch_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ANY if self._axes[0] == 2 else 1

    @property
    def head_count(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ANY if self._axes[1] == 2 else 1

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        try:
            answer = self.fn(b, h, q, k)
        except RuntimeError as error:
            if "Boolean value of Tensor" not in str(error):
                raise
            raise MaskError(
                f"`{self}` asks whether a tensor is true: its indices are whole tensors, so combine comparisons with "
                "`&`, `|` and `~` instead of `and`, `or`, `not` and `if`"
            ) from error
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
            raise MaskError(
                f"`{self}` must return a bool tensor that broadcasts with b, h, q, k; it returned {describe(answer)}"
            )
        return answer

    def _tile(self, r: Rectangles) -> States:
        return np.broadcast_to(MIXED, np.broadcast_shapes(r.q0.shape, r.k0.shape, r.b.shape, r.h.shape))

    def _distinct_key(self, b: int, h: int) -> Hashable:
        return b * (self.batch_size != 1), h * (self.head_count != 1)

    def _periodic_from(self, k_stop: int) -> None:
        return None

    @remembered
    def has_text(self) -> bool:
        return False

    def _write(self) -> Written:
        return f"predicate({getattr(self.fn, '__qualname__', type(self.fn).__name__)})", ATOM


def current(mask: Mask) -> Mask:
    """The mask as its functions are now: itself, or an equal expression that is asked anew if what they read changed.

    >>> import torch
    >>> flags = torch.tensor([True, False])
    >>> mask = predicate(lambda b, h, q, k, flags=flags: flags[k])
    >>> current(mask) is mask, hash(mask) == hash(mask)
    (True, True)
    >>> _ = flags.logical_not_()
    >>> current(mask) is mask, current(mask) == mask, current(mask) is current(mask)
    (False, False, True)
    """
    if is_recorded() or not any(one.changed for one in mask.functions):
        return mask  # a graph that is being recorded asks the function itself, of tensors that stand in for others
    renewed = vars(mask).get("_current")
    if renewed is None or current(renewed) is not renewed:
        renewed = vars(mask)["_current"] = _renewed(mask)
    return renewed


def check_unchanged(mask: Mask) -> None:
    """Raise if the functions of a mask would not answer now as they did when the mask was given."""
    for one in mask.functions:
        if one.changed:
            raise MaskError(
                f"what `{one}` reads was written to between a forward and its backward, which asks it again: leave it "
                "as it is until then, or pass the tensor as `keys(flags)` or `dense(tensor)`, which copy it"
            )


def _renewed(mask: Mask) -> Mask:
    """The same expression with new functions."""
    if isinstance(mask, Predicate):
        new = Predicate(mask.fn)
        _ = new._state
        return new
    if not mask.functions:
        return mask
    parts = {name: getattr(mask, name) for name in mask._child_fields}  # pyright: ignore[reportPrivateUsage]
    new = {
        name: _renewed(part) if isinstance(part, Mask) else tuple(map(_renewed, part)) for name, part in parts.items()
    }
    return replace(cast(Any, mask), **new)


@deferrable
def predicate(fn: MaskModFn) -> Mask:
    """Whatever `fn(b, h, q, k)` says: int64 index tensors that broadcast, to bool; FlexAttention's `mask_mod`.

    Use index arithmetic only (`&`, `|`, comparisons, indexing): no `if`, no `.item()`. The mask pickles if `fn` does,
    and has no text. What it said is kept while the tensors, arrays and numbers that it reads stay as they are: tensors
    are compared by their versions, and where one was written to, or a name bound to another, the function is asked
    anew, at the cost of a new plan. (Data that comes with a batch belongs into `keys`, `documents` or `dense`; a tensor
    written to behind torch's back, by `.data` or through numpy, has no new version.) Prefer the language where it has
    the word: a function can only be evaluated, cell by cell.

    >>> predicate(lambda b, h, q, k: (q + k) % 2 == 0).to_dense(2)[0, 0].int().tolist()
    [[1, 0], [0, 1]]
    """
    if isinstance(fn, Mask) or not callable(fn):
        raise MaskError(f"predicate(fn) takes a function of (b, h, q, k), got {describe(fn)}")
    _check_signature(fn)
    return Predicate(fn)


INDICES = ("b", "h", "q", "k")


def _check_signature(fn: MaskModFn) -> None:
    """Raise unless the function can be called with four indices, and names them in our order if it has our names."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a function of C, which does not say
        return
    names = tuple(signature.parameters)
    name = getattr(fn, "__name__", type(fn).__name__)
    convention = "fn(b, h, q, k): index tensors of the sample, the query head, the query and the key, in this order"
    try:
        signature.bind(*INDICES)
    except TypeError:
        way = f"write `lambda b, h, {', '.join(names)}: ...`" if names in (("q", "k"), ("q_idx", "kv_idx")) else ""
        if names[:1] == ("score",):
            way = "a score_mod changes scores, which is a bias: `attend(..., bias=...)`"
        raise MaskError(
            f"predicate(fn) calls {convention}; `{name}{signature}` takes {len(names)}{way and ': '}{way}"
        ) from None
    if names != INDICES and sorted(names) == sorted(INDICES):
        raise MaskError(f"predicate(fn) calls {convention}; `{name}{signature}` names them in another")
