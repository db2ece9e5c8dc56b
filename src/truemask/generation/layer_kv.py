"""The memory of one layer's keys and values: written behind what is kept, read as one piece.

Shapes: b batch, g key heads, n new rows, j keys stored and new, e features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerKV:
    """Keys and values of one layer: `length` are kept, those up to `stop` were appended and wait for `advance`."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # 2 b g room e
        self.length = 0
        self.stop = 0
        self._apart: Tensor | None = None  # 2 b g j e: kept and new, where the memory has no room for both

    @property
    def room(self) -> int:
        """How many keys fit."""
        return self.memory.shape[3]

    @property
    def bytes(self) -> int:
        """What the memory takes."""
        return self.memory.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (b, g, n, e) behind the kept ones; return all of them (b, g, j, e)."""
        self.stop = stop = self.length + k.shape[2]
        if stop > self.room:
            self._apart = held = self.memory.new_empty((*self.memory.shape[:3], stop, self.memory.shape[4]))
            held[:, :, :, : self.length] = self.memory[:, :, :, : self.length]
        else:
            self._apart, held = None, self.memory
        held[0, :, :, self.length : stop] = k
        held[1, :, :, self.length : stop] = v
        return held[0, :, :, :stop], held[1, :, :, :stop]

    def keep(self, which: Tensor) -> None:
        """Keep these of the keys that are there, in this order, at the front."""
        held = self.memory if self._apart is None else self._apart
        self.memory[:, :, :, : len(which)] = held.index_select(3, which.to(held.device))
        self.length = self.stop = len(which)
        self._apart = None

    def select(self, rows: Tensor) -> None:
        """Keep these samples, in this order; what waits for `advance` is dropped."""
        held, rows = self.memory[:, :, :, : self.length], rows.to(self.memory.device)
        if len(rows) != self.memory.shape[1]:
            self.memory = self.memory.new_empty((2, len(rows), *self.memory.shape[2:]))
            self.memory[:, :, :, : self.length] = held.index_select(1, rows)
        else:
            others = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]  # the rest is in its place
            held.index_copy_(1, others, held.index_select(1, rows[others]))
        self.stop, self._apart = self.length, None

    def move(self, sample: int, places: list[int], to: list[int]) -> None:
        """Bring keys of one sample, those that wait for `advance` included, to other places."""
        held = self.memory if self._apart is None else self._apart
        held[:, sample, :, to] = held[:, sample, :, places]

    def keep_each(self, which: Tensor) -> None:
        """Keep of each sample these of the keys that are there, [b, m], in this order, at the front."""
        held = self.memory if self._apart is None else self._apart
        places = which.to(held.device)[None, :, None, :, None].expand(2, -1, held.shape[2], -1, held.shape[4])
        self.memory[:, :, :, : which.shape[1]] = held.gather(3, places)
        self.length = self.stop = which.shape[1]
        self._apart = None
