"""One mask for each head, or for each sample; and the same mask for chosen heads and samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.real_tensors import remembered
from truemask.errors import MaskError
from truemask.geometry.logic import MIXED, States
from truemask.geometry.slabs.normal_form import NormalForm
from truemask.geometry.slabs.slabs import Flags, Region
from truemask.geometry.tiles.tile_map import Ints, Rectangles
from truemask.masks.core.construction import operand
from truemask.masks.core.data import Data, integers
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.lookup import look_up, low_high, within
from truemask.masks.core.mask import Mask
from truemask.masks.core.unparse import ATOM, call, method
from truemask.masks.core.value import ANY, Written


@dataclass(frozen=True, eq=False, repr=False)
class _Choice(Mask):
    """One mask for each entry of an axis; equal ones are asked once."""

    masks: tuple[Mask, ...]
    _reads_query: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.masks:
            raise MaskError(f"{self.kind} needs a mask for each {self.axis}, got none")
        super().__post_init__()

    axis: ClassVar[str]

    @remembered
    def _distinct(self) -> tuple[tuple[Mask, ...], np.ndarray]:
        order = {mask: place for place, mask in enumerate(dict.fromkeys(self.masks))}
        return tuple(order), np.array([order[mask] for mask in self.masks])

    def _tables(self) -> dict[str, Tensor]:
        return {"which": torch.from_numpy(self._distinct[1])}

    def _bind(self, device: torch.device) -> Mask:
        new = super()._bind(device)
        distinct, place = self._distinct
        vars(new)["_distinct"] = tuple(mask.bound(device) for mask in distinct), place
        return new

    def _choose(self, entry: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        which = look_up(self.table("which"), entry, entry)
        parts = [(which == i) & mask._truth(b, h, q, k) for i, mask in enumerate(self._distinct[0])]
        return reduce(torch.logical_or, parts)

    def _entry(self, b: int, h: int) -> tuple[int, Mask]:
        """The distinct mask of a sample and head, and its number."""
        distinct, place = self._distinct
        which = int(place[min((b, h)[self.axis == "head"], len(place) - 1)])
        return which, distinct[which]

    def _form(self, r: Region) -> NormalForm:
        return self._entry(r.b, r.h)[1].form_in(r)

    def _plane(self, r: Region) -> Flags:
        return self._entry(r.b, r.h)[1]._plane(r)

    def _distinct_key(self, b: int, h: int) -> Hashable:
        which, mask = self._entry(b, h)
        return which, mask._distinct_key(b, h)

    def _sort(self, entry: np.ndarray, r: Rectangles) -> States:
        distinct, place = self._distinct
        which = place[np.minimum(entry, len(place) - 1)]
        return np.select([which == i for i in range(len(distinct))], [m._tile(r) for m in distinct], MIXED).astype(
            np.int8
        )

    def kv_len_for(self, q_len: int) -> int:
        return max(mask.kv_len_for(q_len) for mask in self.masks)

    def _write(self) -> Written:
        return f"{self.kind}([{', '.join(m.text for m in self.masks)}])", ATOM


class PerHead(_Choice):
    """A mask for each query head."""

    kind: ClassVar[str] = "per_head"
    axis: ClassVar[str] = "head"

    @remembered
    def head_count(self) -> int:
        if any(mask.head_count > 1 and mask.head_count != len(self.masks) for mask in self.masks):
            raise MaskError(
                f"per_head got {len(self.masks)} masks, one of which holds data for another number of heads"
            )
        return len(self.masks)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._choose(h, b, h, q, k)

    def _tile(self, r: Rectangles) -> States:
        return self._sort(r.h, r)


class PerSample(_Choice):
    """A mask for each sample of the batch."""

    kind: ClassVar[str] = "per_sample"
    axis: ClassVar[str] = "sample"

    @remembered
    def batch_size(self) -> int:
        if any(mask.batch_size > 1 and mask.batch_size != len(self.masks) for mask in self.masks):
            raise MaskError(
                f"per_sample got {len(self.masks)} masks, one of which holds data for another number of samples"
            )
        return len(self.masks)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._choose(b, b, h, q, k)

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        """Each sample's own positions, `[b, n]`."""
        pairs = [mask._logical(q, k) for mask in self.masks]
        if all(pair is None for pair in pairs):
            return None
        rows = [pair or (q, k) for pair in pairs]
        first, second = (
            torch.stack([side[min(b, len(side) - 1)] if side.ndim == 2 else side for b, side in enumerate(sides)])
            for sides in zip(*rows, strict=True)
        )
        return first, second

    def _tile(self, r: Rectangles) -> States:
        return self._sort(r.b, r)


@deferrable
def per_head(masks: Any) -> Mask:
    """A mask for each query head, in order.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> per_head([causal, window(2)]).to_dense(3).int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [0, 1, 1]]]]
    """
    return PerHead(_masks(masks, "per_head"))


@deferrable
def per_sample(masks: Any) -> Mask:
    """A mask for each sample of the batch, in order.

    >>> from truemask.masks.compose.boolean import everything, nothing
    >>> per_sample([everything, nothing]).count(3).tolist()
    [[9], [0]]
    """
    return PerSample(_masks(masks, "per_sample"))


def _masks(masks: Any, name: str) -> tuple[Mask, ...]:
    if isinstance(masks, Mask) or not hasattr(masks, "__iter__"):
        raise MaskError(f"{name} takes a list of masks, got {describe(masks)}")
    return tuple(operand(name, mask) for mask in masks)


@dataclass(frozen=True, eq=False, repr=False)
class Select(Mask):
    """`base` for chosen samples and heads."""

    base: Mask
    samples: Data | None
    heads: Data | None
    kind: ClassVar[str] = "select"
    _reads_query: ClassVar[bool] = False

    @classmethod
    def make(cls, *args: Any) -> Mask:
        base, samples, heads = args
        sides = [
            None if x is None else integers(x, name, (1,), "[n]", late=True)
            for x, name in ((samples, "samples"), (heads, "heads"))
        ]
        return cls(base, *sides)

    def __post_init__(self) -> None:
        if self.samples is None and self.heads is None:
            raise MaskError("select needs indices: `select(samples=[...])`, `select(heads=[...])` or both")
        for name, side, own in (
            ("samples", self.samples, self.base.batch_size),
            ("heads", self.heads, self.base.head_count),
        ):
            low, high = low_high(side)
            if low < 0 or (own > 1 and high >= own):
                size = f"holds {own}" if own > 1 else "numbers them from 0"
                raise MaskError(f"select: {name} {side.text if side else ''} are out of range, the mask {size}")
        super().__post_init__()

    @remembered
    def batch_size(self) -> int:
        return _chosen(self.base.batch_size, self.samples)

    @remembered
    def head_count(self) -> int:
        return _chosen(self.base.head_count, self.heads)

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b = b if self.samples is None else look_up(self.table("samples"), b, b)
        h = h if self.heads is None else look_up(self.table("heads"), h, h)
        return self.base._truth(b, h, q, k)

    def _plane(self, r: Region) -> Flags:
        b, h = self._places(r.b, r.h)
        return self.base._plane(r._replace(b=b, h=h))

    def _tile(self, r: Rectangles) -> States:
        return self.base._tile(r.moved(b=_pick(self.samples, r.b), h=_pick(self.heads, r.h)))

    def _places(self, b: int, h: int) -> tuple[int, int]:
        """The base's sample and head."""
        return int(_pick(self.samples, np.array(b))), int(_pick(self.heads, np.array(h)))

    def _form(self, r: Region) -> NormalForm:
        b, h = self._places(r.b, r.h)
        return self.base.form_in(r._replace(b=b, h=h))

    def _distinct_key(self, b: int, h: int) -> Hashable:
        return self.base._distinct_key(*self._places(b, h))

    def _tile_key(self, r: Rectangles) -> Sequence[Ints]:
        return self.base._tile_key(r.moved(b=_pick(self.samples, r.b), h=_pick(self.heads, r.h)))

    def kv_len_for(self, q_len: int) -> int:
        return self.base.kv_len_for(q_len)

    def _logical(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        pair = self.base._logical(q, k)
        if pair is None or self.samples is None:
            return pair
        entries = self.samples.tensor
        first, second = (x if x.ndim == 1 else x[within(entries, x.shape[0])] for x in pair)
        return first, second

    def _write(self) -> Written:
        return method(self.base, call("select", samples=self.samples, heads=self.heads)[0])


def _chosen(size: int, entries: Data | None) -> int:
    return size if entries is None or size == 1 else (entries.tensor.shape[0] or ANY)


def _pick(entries: Data | None, index: np.ndarray) -> np.ndarray:
    return index if entries is None else entries.array[np.minimum(index, len(entries.array) - 1)]
