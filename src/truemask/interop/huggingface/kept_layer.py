"""One layer of a cache that forgets: memory for what is kept, and for the model the look of a layer that keeps all.

A layer tells transformers the number of tokens that it has read, and gives the model keys of that many that hold no
memory: masks, positions and relative biases come out as with a cache that keeps all. Our attention then reads the keys
that are there, from the layer, and asks the mask about their places.

Shapes: b batch, g key heads, n keys, e features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from truemask.common.formatting import counted
from truemask.errors import MaskError
from truemask.geometry.tiles.tile_map import Ints
from truemask.interop.huggingface.inputs import GRAPH_BREAK_REASON
from truemask.interop.huggingface.kept_keys import Kept, Needs, all_keys
from truemask.interop.huggingface.sized_cache import SizedLayer

LEAST_ROOM = 32  # keys that fit behind the kept ones: moving is for many steps at once
SLACK = 32  # the last tokens, which can be taken back whatever was forgotten
DRAFTS = 256  # as many where drafts may be rejected


class KeptLayer(SizedLayer, DynamicLayer):
    """One layer: keys and values in memory that grows, or of a size that is found at the first call and stays.

    What a call brings waits behind what is there, and counts when attention has read it.
    """

    is_compileable = False

    def __init__(self, tokens: int | None, static: bool, admitted: Callable[[], bool], scratch: Scratch) -> None:
        super().__init__()
        self.tokens, self.static = tokens, static
        self._admitted, self._scratch = admitted, scratch
        self.record_past = False  # drafts may be rejected
        self._begin()

    def _begin(self) -> None:
        self.past, self.new = 0, 0
        self.kept: Kept = all_keys()
        self._apart: tuple[Tensor, Tensor] | None = None  # kept and new, where the memory has no room for both
        self._shown: Tensor | None = None

    # -- as transformers sees it -------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens that were read."""
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if all were kept."""
        return self.past + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is set aside when the mask is known."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    @torch.compiler.disable(reason=GRAPH_BREAK_REASON)
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a call behind what is there; what is returned stands for all, and holds none."""
        self._check(key_states)
        self.lazy_initialization(key_states, value_states)
        held, self.new = self.kept.count(self.past), key_states.shape[2]
        stop = held + self.new
        if self.keys is None or self.values is None:
            self._apart = key_states, value_states
        elif stop > self.keys.shape[2]:
            before = self.keys[:, :, :held], self.values[:, :, :held]
            self._apart = torch.cat((before[0], key_states), 2), torch.cat((before[1], value_states), 2)
        else:
            self._apart = None
            self.keys[:, :, held:stop] = key_states
            self.values[:, :, held:stop] = value_states
        shown, values = (_shown(states, self.total) for states in (key_states, value_states))
        self._shown = shown
        return shown, values

    def _check(self, keys: Tensor) -> None:
        if not self._admitted():
            raise MaskError(
                "a cache of `tm.cache_for` is read by the attention of `tm.use`: run the model inside "
                "`with tm.use(model, mask):`"
            )
        if keys.requires_grad:
            raise MaskError("a cache of `tm.cache_for` keeps no gradients: run the model under torch.no_grad()")
        if self.keys is not None and self.past and keys.shape[0] != self.keys.shape[0]:
            raise MaskError(
                f"the cache holds {counted(self.keys.shape[0], 'sample')}, and the call brings {keys.shape[0]}: make "
                "one with `tm.cache_for` for each batch"
            )
        if self.tokens is not None and self.past + keys.shape[2] > self.tokens:
            raise MaskError(
                f"the cache is for tokens={self.tokens}, pads included, {self.past} of them are read, and the call "
                f"brings {keys.shape[2]}: make it with `tm.cache_for(..., tokens=...)` for all that will come"
            )

    # -- as our attention reads it -----------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Tokens in all, those of the call included."""
        return self.past + self.new

    @property
    def bytes(self) -> int:
        """What the keys and values take."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def full_bytes(self) -> int:
        """What those of all tokens that were read would take."""
        if self.keys is None or self.values is None:
            return 0
        return self.bytes // self.keys.shape[2] * self.past

    def gave(self, key: Tensor) -> bool:
        """Whether these are the keys that `update` returned."""
        return self._shown is not None and key.shape == self._shown.shape and key.data_ptr() == self._shown.data_ptr()

    def read(self) -> tuple[Tensor, Tensor]:
        """The keys and values that there are, those of the call included."""
        stop = self.kept.count(self.total)
        keys, values = self._there()
        return keys[:, :, :stop], values[:, :, :stop]

    def _there(self) -> tuple[Tensor, Tensor]:
        """Where they lie: in the layer's memory, or apart."""
        if self._apart is not None:
            return self._apart
        assert self.keys is not None, "attention reads what `update` has written"
        assert self.values is not None
        return self.keys, self.values

    def advance(self, needs: Needs) -> None:
        """Take over what the call brought; when the memory is full, forget what is needed no more."""
        self.past, self.new, self._shown = self.total, 0, None
        if self._apart is not None or (self.keys is not None and self.kept.count(self.past) == self.keys.shape[2]):
            self._forget(needs)

    def _forget(self, needs: Needs) -> None:
        held = self._there()
        slack = max(0, self.past - (DRAFTS if self.record_past else SLACK))
        if self.static:
            which, kept = self._fitting(needs, [slack, max(0, self.past - SLACK), self.past], held)
        else:
            which, kept = self.kept.left(needs, self.past, slack)
            room = self.keys.shape[2] if self.keys is not None else 0
            if len(which) + LEAST_ROOM // 2 > room or 3 * (len(which) + LEAST_ROOM) < room:
                self.keys = self.values = None
                self._set_aside(held, len(which) + max(len(which) // 2, LEAST_ROOM))
        index = torch.from_numpy(which).to(self.device)
        for memory_, states in zip((self.keys, self.values), held, strict=True):
            self._scratch.move(states, index, memory_)
        self.kept, self._apart = kept, None

    def _fitting(self, needs: Needs, queries: list[int], held: tuple[Tensor, Tensor]) -> tuple[Ints, Kept]:
        """What is needed from the earliest query on for which it fits into the memory."""
        assert self.tokens is not None
        if self.keys is None:
            capacity = needs.capacity(self.tokens)
            self._set_aside(held, capacity + SLACK + max(capacity // 2, LEAST_ROOM))
        assert self.keys is not None
        room = self.keys.shape[2] - (self.past < self.tokens)  # one is for what comes
        for query in queries:
            which, kept = self.kept.left(needs, self.past, query)
            if len(which) <= room:
                return which, kept
        raise MaskError(
            f"the static cache has room for {self.keys.shape[2]} keys, as its mask allowed at first, and now "
            f"`{needs.mask}` needs more: make another one with `tm.cache_for`, or static=False"
        )

    def _set_aside(self, held: tuple[Tensor, Tensor], room: int) -> None:
        room = room if self.tokens is None else min(room, self.tokens)
        self.keys, self.values = (states.new_empty((*states.shape[:2], room, states.shape[3])) for states in held)
        self.batch_size = held[0].shape[0]

    # -- other ends, other samples -----------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Drafts may be rejected: from now on more tokens can be taken back."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise if these last tokens cannot be taken back."""
        stays = self.past + tokens_to_remove
        if tokens_to_remove > 0 or stays < 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, of {self.past} read ones; got {tokens_to_remove}"
            )
        if not self._whole_from(stays):
            raise MaskError(
                f"crop: the first {stays} tokens cannot be gone on from: keys that later queries see are forgotten. "
                f"The last {SLACK} tokens can always be taken back, and the last {DRAFTS} of what comes after "
                "`cache.activate_past_recording()`; a DynamicCache keeps every key"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: minus their number."""
        self.check_crop(tokens_to_remove)
        self._leave_call()
        self.past += tokens_to_remove
        self.kept = self.kept.cut(self.past)

    def leave(self, past: int) -> bool:
        """Give up a call that was broken off, and what it brought; whether that could be."""
        self._leave_call()
        whole = self._whole_from(past)
        if self.past > past and whole:
            self.past, self.kept = past, self.kept.cut(past)
        return whole

    def _whole_from(self, past: int) -> bool:
        """Whether all that queries from there on need is there."""
        needs = self.kept.needs
        return past >= self.kept.query or (needs is not None and self.kept.lost(needs, past) is None)

    def _leave_call(self) -> None:
        self.new, self._apart, self._shown = 0, None, None

    def reset(self) -> None:
        """Nothing was read; memory of a fixed size stays where it is."""
        self._begin()
        if not self.static:
            self.keys = self.values = None
            self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sample i goes on as sample `beam_idx[i]` was; the memory stays where it is."""
        held = self.kept.count(self.past)
        for memory_ in (self.keys, self.values):
            if memory_ is not None and held:
                rows = beam_idx.to(memory_.device)
                others = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
                memory_[others, :, :held] = memory_[rows[others], :, :held]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample several times, one behind the other."""
        self._take_samples(lambda memory_: memory_.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These samples alone."""
        self._take_samples(lambda memory_: memory_[indices.to(memory_.device)])

    def _take_samples(self, take: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = take(self.keys), take(self.values)
            self.batch_size, self.kept = self.keys.shape[0], self.kept.of_other_samples()


class Scratch:
    """Memory through which kept keys move, one for all layers of a cache of a fixed size."""

    def __init__(self, static: bool) -> None:
        self.static, self._memory = static, torch.empty(0)

    def move(self, states: Tensor, which: Tensor, to: Tensor | None) -> None:
        """Copy the keys `which` of `states` to the front of a memory, which may be the same."""
        assert to is not None
        if not self.static or states.data_ptr() != to.data_ptr():
            to[:, :, : len(which)] = states.index_select(2, which)
            return
        if self._memory.numel() < to.numel() or self._memory.dtype != to.dtype:
            self._memory = to.new_empty(to.numel())
        shape = (*to.shape[:2], len(which), to.shape[3])
        moved = self._memory[: torch.Size(shape).numel()].view(shape)
        torch.index_select(states, 2, which, out=moved)
        to[:, :, : len(which)] = moved


def _shown(states: Tensor, length: int) -> Tensor:
    """What the model sees of so many keys: NaN, so that whoever computes with it hears of it."""
    return states.new_full((), float("nan")).expand(*states.shape[:2], length, states.shape[3])
