"""The keys and values of one layer of a transformers model, as few as its masks allow.

New keys are written behind the kept ones; when the memory is full, what later queries may still see moves to its front,
as in the caches of our own models (`generation/kv_cache.py`). Which keys those are is asked of the mask of all tokens,
read and to come, that a layer's last call ran under. The keys that stay keep their positions: `Places`.

Shapes: b batch, g key heads, n new tokens, j keys, e features of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from truemask.generation.retention import Retention
from truemask.masks.core.mask import Mask

TAKEN_BACK = 32  # tokens that may be cropped at any time, such as rejected drafts: what they need is kept as well
LEAST_ROOM = 32  # keys that fit behind the kept ones: moving is for many steps at once
MARK = "_truemask_kept"  # on the tensor of a call's keys
TABLE = 256  # positions of keys to come are told in pieces of so many: masks of padded batches have data that far


class Places:
    """Which tokens a layer's keys are of: `kept` ones, increasing, and all from token `since` on."""

    def __init__(self, kept: Tensor, since: int, tokens: int) -> None:
        self.kept, self.since, self._tokens = kept, since, tokens
        self._table: Tensor | None = None
        self._taken: tuple[Mask, int, Mask] | None = None

    @property
    def all_there(self) -> bool:
        """Whether no key is missing."""
        return len(self.kept) == self.since

    def positions(self, keys: int) -> Tensor:
        """Those of the first so many keys, int64 `[keys]`."""
        if keys <= len(self.kept):
            return self.kept[:keys]
        return torch.cat((self.kept, torch.arange(self.since, self.since + keys - len(self.kept))))

    def of(self, mask: Mask, q_start: int, k_start: int, keys: int) -> Mask:
        """A mask of all tokens for rows from `q_start` on and the first so many keys that are here."""
        if self.all_there:
            return mask.at(q_start=q_start, k_start=k_start)
        if self._table is None or len(self._table) < keys:
            most = len(self.kept) + self._tokens - self.since
            self._table, self._taken = self.positions(min(most, -(-keys // TABLE) * TABLE)), None
        if self._taken is None or self._taken[:2] != (mask, k_start):
            self._taken = mask, k_start, mask.at(k_start=k_start).take(k=self._table)
        return self._taken[2].at(q_start=q_start)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and self.since == other.since and torch.equal(self.kept, other.kept)

    __hash__ = object.__hash__


class KeptKeys:
    """Keys and values of a layer: `past` tokens were read, `count` keys are kept, those of a call wait for `settle`.

    `shared` gives layers with equal places the same object, so that they share masks.
    """

    def __init__(self, tokens: int, fixed: bool, shared: Callable[[Places], Places]) -> None:
        self.tokens, self._fixed, self._shared = tokens, fixed, shared
        self.memory: tuple[Tensor, Tensor] | None = None  # b g room e
        self._waiting: tuple[Tensor, Tensor] | None = None  # b g j e: kept and new
        self._retention: Retention | None = None
        self.forget_all()

    def forget_all(self) -> None:
        """As before the first call; memory that is there stays."""
        self.past = self.count = 0
        self.places = self._shared(Places(torch.empty(0, dtype=torch.int64), 0, self.tokens))
        self._waiting = None

    @property
    def room(self) -> int:
        """How many keys fit."""
        return 0 if self.memory is None else self.memory[0].shape[2]

    @property
    def batch(self) -> int | None:
        """How many samples are here; None before the first call."""
        return None if self.memory is None or not self.past else self.memory[0].shape[0]

    @property
    def bytes(self) -> int:
        """What the memory takes."""
        return 0 if self.memory is None else sum(part.nbytes for part in self.memory)

    @property
    def full_bytes(self) -> int:
        """What the keys and values of all tokens that were read would take."""
        return 0 if not self.room else self.bytes // self.room * self.past

    @property
    def positions(self) -> Tensor:
        """Which tokens the kept keys are of."""
        return self.places.positions(self.count)

    # -- a call ------------------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a call, `[b, g, j, e]`: the kept ones, and the new ones `[b, g, n, e]` behind them."""
        self._check(k)
        stop = self.count + k.shape[2]
        if self.memory is None or not self.count and self.memory[0].shape[0] != k.shape[0]:
            self.memory, self._waiting = None, (k, v)
        elif stop > self.room:
            held = [part[:, :, : self.count] for part in self.memory]
            self._waiting = torch.cat((held[0], k), 2), torch.cat((held[1], v), 2)
        else:
            for part, new in zip(self.memory, (k, v), strict=True):
                part[:, :, self.count : stop] = new
            self._waiting = self.memory[0][:, :, :stop], self.memory[1][:, :, :stop]
        setattr(self._waiting[0], MARK, self)
        return self._waiting

    def _check(self, k: Tensor) -> None:
        """Raise ValueError if a call's keys cannot be read, before any of it is."""
        if self.batch not in (None, k.shape[0]):
            raise ValueError(
                f"the cache holds {self.batch} samples, and the call brings {k.shape[0]}: make a cache for each batch, "
                "or reset() it"
            )
        if self.past + k.shape[2] > self.tokens:
            raise ValueError(
                f"the cache is for {self.tokens} tokens, {self.past} of them read, and the call brings {k.shape[2]}: "
                "make it with cache_for(model, mask, tokens=...) for all that will come"
            )
        if k.requires_grad and torch.is_grad_enabled():
            raise ValueError("a cache sized by a mask overwrites its keys, which gradients need: use torch.no_grad()")

    def settle(self, retention: Callable[[], Retention | None]) -> None:
        """Behind the attention: keep what the call appended, and move what is needed if there is no room for more."""
        if self._waiting is None:
            return
        keys, values = self._waiting
        new, self._waiting = keys.shape[2] - self.count, None
        in_place = self.memory is not None and keys.shape[2] <= self.room
        self.past, self.count = self.past + new, keys.shape[2]
        if in_place and (self.count < self.room or self.past == self.tokens):
            return
        self._retention = retention()
        self._hold(self._needed(), keys, values)

    def _needed(self) -> Tensor:
        """Which of the keys queries to come may see, some being taken back."""
        positions = self.positions.numpy()
        first = max(0, self.past - TAKEN_BACK)
        if self._retention is None:
            return torch.arange(self.count)
        keep = self._retention.needed(positions, first, self.past) | (positions >= first)
        return torch.from_numpy(np.flatnonzero(keep))

    def _hold(self, which: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep these of the keys of a call."""
        kept, room = len(which), self._room_for(len(which))
        memory = self.memory
        if memory is None or room > self.room:
            memory = tuple(part.new_empty((*part.shape[:2], room, part.shape[3])) for part in (keys, values))  # type: ignore[assignment]
        assert memory is not None
        for part, held in zip(memory, (keys, values), strict=True):
            move(held, which, part)
        self.places = self._shared(Places(self.positions[which], self.past, self.tokens))
        self.memory, self.count = memory, kept

    def _room_for(self, kept: int) -> int:
        """How many keys there must be memory for: more than there is only where it may grow."""
        if self.memory is not None and kept + min(LEAST_ROOM, self.tokens - self.past) <= self.room:
            return self.room
        capacity = self.tokens if self._retention is None else self._retention.capacity
        if not self._fixed:
            return min(self.tokens, kept + max(min(kept, capacity) // 2, LEAST_ROOM) + TAKEN_BACK)
        room = min(self.tokens, 2 * (capacity + TAKEN_BACK))
        if self.memory is not None and room > self.room:
            raise ValueError(
                f"the static cache has memory for {self.room} keys of a layer, and this batch needs {capacity} and some "
                "room: its padding is another one than that of the first call. Make a cache for it, or static=False"
            )
        return max(room, self.room)

    # -- other ends, other samples -----------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`. Raises ValueError if a key that those need is not there any more."""
        kept = self.positions.numpy()
        if length < self.places.since and self._retention is not None:
            lost = self._retention.lost(kept, length)
            if lost is not None:
                least = self._retention.least(kept, self.places.since)
                raise ValueError(
                    f"crop: the first {length} of {self.past} tokens cannot be gone on from: key {lost[0]}, which "
                    f"queries up to {lost[1]} see, was overwritten. At least the first {least} stay (always all but "
                    f"the last {TAKEN_BACK}); transformers' DynamicCache keeps every key"
                )
        self.count = int((kept < length).sum())
        if length < self.places.since:
            self.places = self._shared(Places(self.places.kept[self.places.kept < length], length, self.tokens))
        self.past, self._waiting = length, None

    def select(self, rows: Tensor) -> None:
        """Go on with these samples, in this order; in the same memory if there are as many."""
        if self.memory is None or not self.past:
            return
        if len(rows) != self.memory[0].shape[0] and self._fixed:
            raise ValueError(
                f"a static cache keeps its memory, of {self.memory[0].shape[0]} samples, and {len(rows)} were chosen: "
                "static=False goes on with any number"
            )
        taken = [part[:, :, : self.count].index_select(0, rows.to(part.device)) for part in self.memory]
        if len(rows) != self.memory[0].shape[0]:
            self.memory = (  # as much room for each
                taken[0].new_empty((len(rows), *self.memory[0].shape[1:])),
                taken[1].new_empty((len(rows), *self.memory[1].shape[1:])),
            )
        for part, held in zip(self.memory, taken, strict=True):
            part[:, :, : self.count] = held


def kept_keys_of(key: Tensor) -> KeptKeys | None:
    """Where the keys of a call are kept, if they come from a cache that is sized by a mask."""
    return getattr(key, MARK, None)


def move(held: Tensor, which: Tensor, to: Tensor) -> None:
    """Copy some keys, increasing, to the front of a memory, which they may lie in: run by run, from the front on."""
    ends = [0, *(torch.nonzero(which.diff() != 1)[:, 0] + 1).tolist(), len(which)]
    for at, end in zip(ends, ends[1:], strict=False):
        if at == end:
            continue
        first = int(which[at])
        run = held[:, :, first : first + end - at]
        same = run.untyped_storage().data_ptr() == to.untyped_storage().data_ptr()
        if same and first == at:
            continue
        to[:, :, at:end] = run.clone() if same and first < end else run
