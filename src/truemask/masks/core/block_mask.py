"""From a mask to FlexAttention's `BlockMask`: lists of blocks from the tile map, the mask's own `truth` as `mask_mod`.

`torch.nn.attention.flex_attention.create_block_mask` evaluates every (query, key). Here the lists come from the exact
tile map, and nothing is evaluated but what `TileMap.refine` must.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from truemask.geometry.tiles.block_lists import block_lists
from truemask.geometry.tiles.tile_map import TileMap


@dataclass(frozen=True)
class MaskMod:
    """`mask.truth` as FlexAttention calls it, with the mask's numbers and data on one device.

    It is an object and not a function so that it pickles, and so that `torch.compile` takes its numbers and data as
    inputs: another window or other documents are no new compilation.
    """

    mask: Any
    device: torch.device

    def __post_init__(self) -> None:
        vars(self)["bound"] = self.mask.bound(self.device)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = vars(self)["bound"]._truth(b, h, q, k)
        if torch.compiler.is_compiling():
            return allowed
        return allowed.expand(torch.broadcast_tensors(b, h, q, k)[0].shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskMod, (self.mask, self.device)

    def __repr__(self) -> str:
        return f"`{self.mask}`"


class MaskBlocks(BlockMask):
    """A `BlockMask` whose `mask_mod` moves with it; a `DataLoader` can make it in a worker and pin it."""

    def to(self, device: torch.device | str) -> MaskBlocks:
        """The lists, and the numbers and data of the mask, on another device.

        Pinned lists are copied without waiting for the copy.
        """
        place = torch.device(device)
        new = self.with_lists(lambda x: x.to(place, non_blocking=place.type != "cpu"))
        if isinstance(self.mask_mod, MaskMod):
            new.mask_mod = MaskMod(self.mask_mod.mask, place)
        return new

    def pin_memory(self) -> MaskBlocks:
        """The lists in pinned memory; this is what `DataLoader(pin_memory=True)` looks for."""
        return self.with_lists(Tensor.pin_memory)

    def lists(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: tensor for name in self._TENSOR_ATTRS if (tensor := getattr(self, name)) is not None}

    def with_lists(self, change: Callable[[Tensor], Tensor]) -> MaskBlocks:
        """The same block mask with each of its lists changed."""
        new = copy.copy(self)
        vars(new).update({name: change(tensor) for name, tensor in self.lists().items()})
        return new


def block_mask_of(mask: Any, tiles: TileMap, device: torch.device | str | None = None) -> MaskBlocks:
    """The block mask of a mask whose tiles are `tiles`; `device=None` is the CPU, also in a worker."""
    place = torch.device("cpu" if device is None else device)
    lists = (torch.from_numpy(numbers).to(place) for numbers in block_lists(tiles.refine()))
    return MaskBlocks((tiles.q_len, tiles.kv_len), *lists, BLOCK_SIZE=tiles.block, mask_mod=MaskMod(mask, place))
