"""Caches of transformers that forget what their masks let them forget. To the model each looks as if it kept all.

A layer tells transformers the number of tokens that it has read, and gives the model keys of that many that hold no
memory: masks, positions and relative biases come out as with a cache that keeps all. Our attention then reads the keys
that are there, from the layer, and asks the mask about their places.

Shapes: b batch, g key heads, n keys, e features of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from truemask.common.formatting import counted, memory
from truemask.errors import MaskError
from truemask.interop.huggingface.inputs import GRAPH_BREAK_REASON
from truemask.interop.huggingface.kept_keys import Kept, Needs, all_keys
from truemask.interop.huggingface.layers import scoped_layer_of
from truemask.interop.huggingface.sized_cache import SizedCache, SizedLayer
from truemask.interop.layer_masks import AttentionLayer

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
        if self._apart is not None:
            return self._apart
        assert self.keys is not None
        assert self.values is not None
        stop = self.kept.count(self.total)
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def advance(self, needs: Needs) -> None:
        """Take over what the call brought; when the memory is full, forget what is needed no more."""
        self.past, self.new, self._shown = self.total, 0, None
        if self._apart is not None or (self.keys is not None and self.kept.count(self.past) == self.keys.shape[2]):
            self._forget(needs)

    def _forget(self, needs: Needs) -> None:
        held = self._apart if self._apart is not None else (self.keys, self.values)
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

    def _fitting(self, needs: Needs, queries: list[int], held: Any) -> tuple[Any, Kept]:
        """What is needed from the earliest query on for which it fits into the memory."""
        assert self.tokens is not None
        if self.keys is None:
            capacity = needs.capacity(self.tokens)
            self._set_aside(held, capacity + SLACK + max(capacity // 2, LEAST_ROOM))
        assert self.keys is not None
        full = self.past == self.tokens  # nothing comes any more
        for query in queries:
            which, kept = self.kept.left(needs, self.past, query)
            if len(which) + (not full) <= self.keys.shape[2]:
                return which, kept
        raise MaskError(
            f"the static cache has room for {self.keys.shape[2]} keys, as its mask allowed at first, and now "
            f"`{needs.mask}` needs {len(which)}: make another one with `tm.cache_for`, or static=False"
        )

    def _set_aside(self, held: Any, room: int) -> None:
        room = room if self.tokens is None else min(room, self.tokens)
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], room, states.shape[3])) for states in held
        )
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
                f"crop takes minus the number of tokens to remove, of {self.past} that were read; got {tokens_to_remove}"
            )
        if not self._whole_from(stays):
            raise MaskError(
                f"crop: the first {stays} tokens cannot be gone on from: keys that later queries see are forgotten. The "
                f"last {SLACK} tokens can always be taken back, after `cache.activate_past_recording()` the last {DRAFTS} of "
                "what comes; a DynamicCache keeps every key"
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


class Expected:
    """For which attention layers a cache is, and the masks under which it forgets: by layer, as `tm.use` has them."""

    def __init__(self, name: str, layers: Mapping[nn.Module, AttentionLayer]) -> None:
        self.name = name
        self.layers = weakref.WeakKeyDictionary(layers)
        self._places = {id(module): _index(module) for module in layers}

    def __deepcopy__(self, _: object) -> Expected:
        return self

    def place_of(self, module: nn.Module) -> int:
        """The number of a layer's memory. Raises MaskError if the layer is of another model."""
        if module not in self.layers:
            raise MaskError(
                f"the cache was made for a {self.name}, and is read by a {type(module).__name__} of another model, to "
                "which its keys mean nothing: make one with `tm.cache_for(model)` for each model"
            )
        return self._places[id(module)]

    def check(self, model: nn.Module) -> None:
        """Raise if a model is another one, or runs under other masks."""
        mine = [(module, layer) for module, layer in self.layers.items()]
        if not any(part is mine[0][0] for part in model.modules()):
            raise MaskError(
                f"the cache was made for another model ({self.name}), whose keys mean nothing to this "
                f"{type(model).__name__}: make one with `tm.cache_for(model)` for each model"
            )
        for module, layer in mine:
            scoped = scoped_layer_of(module)
            used = None if scoped is None else scoped.here()
            found = (None, False) if used is None else (used.mask, used.replace)
            if found != (layer.mask, layer.replace):
                raise MaskError(
                    f"the cache forgets what `{layer.path}` may not see under `{_written(layer.mask, layer.replace)}`, "
                    f"and in use is `{_written(*found)}`: make the cache with the same mask, layers= and replace= as "
                    "`tm.use`, or inside the block without a mask"
                )


class KeptCache(SizedCache, DynamicCache):
    """A cache that keeps of each layer what its mask lets later queries see. Made by `tm.cache_for`."""

    def __init__(self, expected: Expected, depth: int, tokens: int | None, static: bool) -> None:
        self._expected, self.tokens, self.static = expected, tokens, static
        self._gate, scratch = Gate(), Scratch(static)
        layers: Any = [KeptLayer(tokens, static, self._gate.is_open, scratch) for _ in range(depth)]
        Cache.__init__(self, layers=layers)

    @property
    def _kept_layers(self) -> list[KeptLayer]:
        return [layer for layer in self.layers if isinstance(layer, KeptLayer)]

    @property
    def bytes(self) -> int:
        """What the keys and values take, in bytes; 0 before the first call, in which the memory is set aside."""
        return sum(layer.bytes for layer in self._kept_layers)

    @property
    def full_bytes(self) -> int:
        """What the keys and values of all tokens that were read would take."""
        return sum(layer.full_bytes for layer in self._kept_layers)

    def positions(self, layer_idx: int = 0) -> Tensor:
        """Of which tokens a layer has keys, int64 `[n]`, pads counted; the last ones may be visible no more."""
        layer = self._kept_layers[layer_idx]
        return torch.from_numpy(layer.kept.all_places(layer.past))

    def __repr__(self) -> str:
        kept = sorted({layer.kept.count(layer.past) for layer in self._kept_layers})
        numbers = str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
        return (
            f"KeptCache({self._expected.name}): {counted(self.get_seq_length(), 'token')} read, {numbers} kept in "
            f"{counted(len(self.layers), 'layer')}, {memory(self.bytes)} (all keys: {memory(self.full_bytes)})"
        )

    # -- a forward ---------------------------------------------------------------------------------------------------

    def admit(self, model: nn.Module) -> None:
        """Begin a forward: the model and its masks are those that the cache is for."""
        self._expected.check(model)
        lengths = {layer.past for layer in self._kept_layers}
        if len(lengths) > 1:
            raise MaskError(
                f"an earlier forward was broken off when layers had read {sorted(lengths)} tokens, and what they "
                "forgot is gone: `cache.reset()` begins again"
            )
        self._gate.past = lengths.pop()

    def finish(self) -> None:
        """End it; of one that was broken off nothing stays, where that can be."""
        past, self._gate.past = self._gate.past, None
        lengths = {layer.past for layer in self._kept_layers}
        if past is not None and len(lengths) > 1:
            for layer in self._kept_layers:
                layer.leave(past)

    def layer_of(self, module: nn.Module) -> SizedLayer:
        """The memory of an attention layer."""
        return self._kept_layers[self._expected.place_of(module)]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of all layers: minus their number. Raises before any is, if one cannot."""
        for layer in self._kept_layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)


class Gate:
    """Whether a forward that may use the cache runs: how many tokens were read when it began."""

    def __init__(self) -> None:
        self.past: int | None = None

    def is_open(self) -> bool:
        return self.past is not None


class KeptEncoderDecoderCache(EncoderDecoderCache):
    """The same for a model with an encoder: the decoder's self-attention forgets, what it reads of the encoder stays."""

    self_attention_cache: KeptCache

    @property
    def bytes(self) -> int:
        """What the decoder's own keys and values take, in bytes."""
        return self.self_attention_cache.bytes

    @property
    def full_bytes(self) -> int:
        """What those of all its tokens would take."""
        return self.self_attention_cache.full_bytes

    def positions(self, layer_idx: int = 0) -> Tensor:
        """Of which tokens a layer of the decoder has keys, int64 `[n]`."""
        return self.self_attention_cache.positions(layer_idx)


def _shown(states: Tensor, length: int) -> Tensor:
    """What the model sees of so many keys: NaN, so that whoever computes with it hears of it."""
    return states.new_full((), float("nan")).expand(*states.shape[:2], length, states.shape[3])


def _index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise MaskError(
            f"{type(module).__name__} does not say which number its keys have in a cache (`layer_idx`): use a "
            "DynamicCache"
        )
    return index


def _written(mask: object, replace: bool) -> str:
    return f"{'the model alone' if mask is None else mask}{', replace=True' if replace else ''}"
