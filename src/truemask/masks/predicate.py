"""Any function of (b, h, q, k): the way out when the language has no word."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from truemask.errors import MaskError, describe
from truemask.geometry.logic import MIXED, States
from truemask.geometry.tiles import Rectangles
from truemask.masks.core import Mask
from truemask.masks.questions import ANY
from truemask.masks.traced import recorded
from truemask.masks.value import Written
from truemask.masks.writing import ATOM

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Predicate(Mask):
    """`fn(b, h, q, k)`: nothing is known of it but what it answers."""

    fn: MaskMod
    kind: ClassVar[str] = "predicate"
    has_text: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleVariableOverride]

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
        answer = self.fn(b, h, q, k)
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
            raise MaskError(
                f"`{self}` must return a bool tensor that broadcasts with b, h, q, k; it returned {describe(answer)}"
            )
        return answer

    def _tile(self, r: Rectangles) -> States:
        return np.broadcast_to(MIXED, np.broadcast_shapes(r.q0.shape, r.k0.shape, r.b.shape, r.h.shape))

    def _variant(self, b: int, h: int) -> Hashable:
        return b * (self.batch_size != 1), h * (self.head_count != 1)

    def _settles(self, k_stop: int) -> None:
        return None

    def _write(self) -> Written:
        return f"predicate({getattr(self.fn, '__qualname__', type(self.fn).__name__)})", ATOM


@recorded
def predicate(fn: MaskMod) -> Mask:
    """Whatever `fn(b, h, q, k)` says: int64 index tensors that broadcast, to bool; FlexAttention's `mask_mod`.

    Use index arithmetic only (`&`, `|`, comparisons, indexing): no `if`, no `.item()`. The mask pickles if `fn` does,
    and has no text. It must always answer the same: what it said is kept, so no tensor that it reads may change (data
    that comes with a batch belongs into `keys`, `documents` or `dense`). Prefer the language where it has the word: a
    function can only be evaluated, cell by cell.

    >>> predicate(lambda b, h, q, k: (q + k) % 2 == 0).to_dense(2)[0, 0].int().tolist()
    [[1, 0], [0, 1]]
    """
    if isinstance(fn, Mask) or not callable(fn):
        raise MaskError(f"predicate(fn) takes a function of (b, h, q, k), got {describe(fn)}")
    return Predicate(fn)
