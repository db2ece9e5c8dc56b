"""Which tokens' keys the layers of one mask hold, and where: what their mask is asked about.

A cache has one of these for each distinct mask of its layers, since layers that see alike forget alike.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from truemask.generation.layer_kv import LayerKV
from truemask.generation.retention import Retention
from truemask.masks.core.mask import Mask


class KeptTokens:
    """What some layers keep of up to `tokens` tokens, behind `fixed` keys that stand before all of them.

    `mask` sizes them, as `retention` says; None: every key is kept. `free` keys should fit behind the kept ones.
    """

    def __init__(
        self,
        layers: list[LayerKV],
        mask: Mask | None,
        retention: Retention | None,
        *,
        tokens: int,
        fixed: int,
        free: int,
    ) -> None:
        self.layers, self.mask, self.retention, self.tokens, self.fixed = layers, mask, retention, tokens, fixed
        self.free = free
        self.capacity = capacity_of(retention, tokens)
        self.moves = 0  # how often keys were moved
        self._kept, self._since = torch.empty(0, dtype=torch.int64), 0  # kept by the last move; all later ones follow
        self._ahead: Tensor | None = None  # the places of all keys until the next move
        self._reach = 0  # of how many tokens these are
        self._begins = 0  # without them: the first key, of all that follow it
        self._placed: tuple[Mask, Mask] | None = None  # a mask, and the same at these places

    @property
    def length(self) -> int:
        """How many keys each layer holds, fixed ones included."""
        return self.layers[0].length

    def positions(self, stop: int) -> Tensor:
        """Which of `stop` tokens the layers hold keys of, int64 `[n]`, increasing."""
        return torch.cat((self._kept, torch.arange(self._since, stop)))

    def placed(self, mask: Mask, past: int, new: int) -> Mask:
        """The mask for the keys that a call with `new` tokens reads; fixed ones come first in both."""
        if self._ahead is None:
            return mask.at(k_start=self._begins) if self._begins else mask
        fits = past + new <= self._reach
        if not fits or torch.compiler.is_dynamo_compiling():
            return mask.take(k=self._ahead if fits else self._places(past + new))
        if self._placed is None or self._placed[0] != mask:
            self._placed = mask, mask.take(k=self._ahead)
        return self._placed[1]

    def advance(self, before: int, past: int) -> None:
        """Keep what the last call appended, which made `before` tokens `past`."""
        for layer in self.layers:
            layer.length = layer.stop
        if self.length >= self.layers[0].room + (past == self.tokens):
            self._forget(before, past)

    def _forget(self, before: int, past: int) -> None:
        """Move what is needed to the front; if it fits, what queries from `before` on need: calls may be cut."""
        assert self.retention is not None, "a cache without a mask has room for all"
        held = self.positions(past)
        positions = held.numpy()
        room = self.layers[0].room - self.fixed
        keep = self.retention.needed(positions, before, past) | (positions >= before)
        if keep.sum() + self.free // 2 > room:
            keep = self.retention.needed(positions, past, past)
        which = torch.from_numpy(np.flatnonzero(keep))
        self._begin(held[which], past)
        for layer in self.layers:
            layer.keep(torch.cat((torch.arange(self.fixed), which + self.fixed)))

    def _begin(self, kept: Tensor, since: int) -> None:
        """From token `since` on, keys stand behind those of the `kept` positions."""
        self._kept, self._since, self._placed = kept, since, None
        self.moves += 1
        self._reach = min(self.tokens, since + self.layers[0].room - self.fixed - len(kept))
        in_a_row = since - len(kept)  # where keys that leave out none begin
        is_row = not len(kept) or int(kept[0]) == in_a_row
        self._begins = in_a_row if is_row and not self.fixed else 0
        self._ahead = None if in_a_row == self._begins else self._places(self._reach)

    def _places(self, stop: int) -> Tensor:
        """Positions among fixed keys and tokens."""
        return torch.cat((torch.arange(self.fixed), self.positions(stop) + self.fixed))

    def check_truncate(self, length: int, past: int) -> None:
        """Raise ValueError if a query after the first `length` of `past` tokens would need a key that is gone."""
        kept = self.positions(past).numpy()
        lost = self.retention.lost(kept, length) if self.retention is not None and length < self._since else None
        if lost is not None and self.retention is not None:
            raise ValueError(
                f"truncate: the first {length} tokens cannot be gone on from: key {lost[0]}, which queries up to "
                f"{lost[1]} see under `{self.mask}`, was overwritten. After {past} tokens at least the first "
                f"{self.least(past)} stay; a cache without mask= keeps every key"
            )

    def least(self, past: int) -> int:
        """To how many of `past` tokens it can be cut."""
        return 0 if self.retention is None else self.retention.least(self.positions(past).numpy(), self._since)

    def truncate(self, length: int, past: int) -> None:
        """Hold the first `length` of `past` tokens only."""
        stored = int((self.positions(past) < length).sum()) + self.fixed
        if length < self._since:
            self._begin(self._kept[self._kept < length], length)
        for layer in self.layers:
            layer.length = layer.stop = min(stored, layer.length)

    def other_samples(self, mask: Mask | None) -> None:
        """The mask is another one, of other samples."""
        self.mask, self._placed = mask, None


def capacity_of(retention: Retention | None, tokens: int) -> int:
    """How many keys a single new token reads at most, its own included."""
    return tokens if retention is None else retention.capacity
