"""The key/value cache: memory set aside once, written by attention, advanced by its owner, as small as the mask allows.

A cache that is sized by a mask has memory for what the mask keeps and about as much again. New keys are written behind
the kept ones; when the memory is full, what is still needed moves to its front. So attention always reads one
contiguous piece, a step of decoding copies nothing but its own key, and every key that is kept moves once in as many
steps as the mask keeps. (A ring would copy less and give attention two pieces, or keys in another order in every step;
moving at every step would copy all in every step.) What waits to be overwritten is hidden by the mask, which is asked
about the positions of the keys that are there: `mask.take(k=positions)`, made once for all steps between two moves, or
`mask.at(k_start=first)` where they follow each other.

A call that brings more keys than there is room for reads the kept ones and its own from memory of its own; `advance`
takes over what is needed. Layers under one mask share what they keep; where a model has masks of its layers, those of
each distinct one have memory of their own size, and positions of their own.

What is kept is in `kept_tokens.py`, the memory in `layer_kv.py`, what a mask lets a cache forget in `retention.py`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.formatting import counted, memory
from truemask.errors import MaskError
from truemask.generation.kept_tokens import KeptTokens, capacity_of
from truemask.generation.layer_kv import LayerKV
from truemask.generation.retention import Retention, check_cacheable
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import from_text, not_a_mask
from truemask.nn.layers import AttentionLayers
from truemask.nn.wrappers import TransformerWrapper

LEAST_ROOM = 32  # keys that fit behind the kept ones: moving is for many steps at once


class CacheCost(NamedTuple):
    """What a cache takes: how many keys of tokens each layer needs at most, bytes, and bytes if it kept all keys."""

    capacities: tuple[int, ...]
    bytes: int
    full_bytes: int

    def __str__(self) -> str:
        counts = Counter(self.capacities)
        (first, layers), *rest = counts.items()
        kinds = [f"{first:,} keys in {counted(layers, 'layer')}", *(f"{keys:,} in {n}" for keys, n in rest)]
        return f"{', '.join(kinds)}; {memory(self.bytes)} (all keys: {memory(self.full_bytes)})"


class KVCache:
    """Keys and values of every layer of a model, for a batch of `batch` sequences of up to `tokens` tokens.

    Pass it to the model and advance it after each call; a call brings only the tokens that are not in it yet. Masks
    and positions keep speaking of the whole sequence. The cache holds the model's registers and memory keys too.

    `mask=` makes it as small as a causal mask allows: a key that no later query sees, in any sample or head, is
    overwritten. Every call then runs under this mask and need not repeat it; another one is an error. Of a mask whose
    forgetting would take long to find out (a function, random cells, of very many tokens) all is kept. Without `mask=`
    all is kept, and calls may pass any. Under `mask=`, layers with masks of their own (`layer_masks`) keep what both
    let them, each in memory of its own size; `mask=tm.causal` is enough for that.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> from truemask.masks.leaves.per_token import prefix
    >>> from truemask.nn.layers import Decoder
    >>> decoder = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    >>> net = TransformerWrapper(num_tokens=11, max_seq_len=7, attn_layers=decoder).eval()
    >>> ids, cache = torch.tensor([[3, 1, 4, 1, 5]]), KVCache(net, batch=1, tokens=5)
    >>> with torch.no_grad():
    ...     for chunk in ids.split(2, dim=1):
    ...         logits = net(chunk, cache=cache)
    ...         cache.advance()
    ...     torch.allclose(logits[:, -1], net(ids)[:, -1], atol=1e-5)
    True
    >>> KVCache(net, batch=1, tokens=1_000_000, mask=causal & (window(256) | prefix(4))).capacity
    260
    """

    def __init__(self, net: TransformerWrapper, *, batch: int, tokens: int, mask: Mask | str | None = None) -> None:
        config, weight = net.attn_layers.config, net.token_emb.weight
        device_type = weight.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        self.batch, self.tokens = whole(batch, "batch"), whole(tokens, "tokens")
        self.mask = None if mask is None else _read(mask)
        self._layer_masks = net.attn_layers.masks
        self._registers = net.num_memory_tokens
        self._fixed = config.attn.num_mem_kv + self._registers  # keys that stand before all tokens
        self._layers: list[LayerKV] = []
        retentions = [self._retention_of(own, config.heads) for own in self._masks()]
        for index in self._layer_masks.which:
            capacity = capacity_of(retentions[index], self.tokens)
            room = min(self.tokens, capacity + max(capacity, LEAST_ROOM))
            shape = (2, self.batch, config.kv_heads, self._fixed + room, config.attn.dim_head)  # keys and values
            self._layers.append(LayerKV(self._memory(shape, dtype, weight.device)))
        self._parts = [
            KeptTokens(self._of(term), own, retentions[term], tokens=self.tokens, fixed=self._fixed, free=LEAST_ROOM)
            for term, own in enumerate(self._masks())
        ]
        self._owner: weakref.ref[AttentionLayers] | None = weakref.ref(net.attn_layers)
        self.past = 0
        self._samples_moved = 0
        self._base = self.mask  # that of the first batch, whose samples `_rows` are here now
        self._rows = torch.arange(self.batch)

    @staticmethod
    def _memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    @staticmethod
    def cost(net: TransformerWrapper, *, batch: int, tokens: int, mask: Mask | str | None = None) -> CacheCost:
        """What such a cache would take, without taking it; the arguments and errors are those of `KVCache`.

        >>> from truemask.nn.layers import Decoder
        >>> masks = {"L": "window(64)", "G": "causal"}
        >>> layers = Decoder(dim=16, depth=6, heads=2, attn_dim_head=8, layer_masks=masks, layer_pattern="LLG")
        >>> net = TransformerWrapper(num_tokens=11, max_seq_len=0, attn_layers=layers)
        >>> print(KVCache.cost(net, batch=1, tokens=1_000_000, mask="causal"))
        64 keys in 4 layers, 1,000,000 in 2; 244 MiB (all keys: 732 MiB)
        """
        priced = _Priced(net, batch=batch, tokens=tokens, mask=mask)
        room = priced._fixed + priced.tokens
        full = sum(layer.bytes // layer.room * room for layer in priced._layers)
        return CacheCost(priced.capacities, priced.bytes, full)

    def _masks(self) -> Sequence[Mask | None]:
        """What sizes the layers under each of the model's distinct masks."""
        return [None] * len(self._layer_masks.terms) if self.mask is None else self._layer_masks.each(self.mask)

    def _of(self, term: int) -> list[LayerKV]:
        return [layer for layer, own in zip(self._layers, self._layer_masks.which, strict=True) if own == term]

    def _retention_of(self, mask: Mask | None, heads: int) -> Retention | None:
        if mask is None:
            return None
        check_cacheable(mask, self.tokens, self.batch, heads)
        return Retention(mask, self.tokens, self.batch, heads)

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """How many keys the first layer holds now, registers and memories included; others if masks differ."""
        return self._layers[0].length

    @property
    def capacity(self) -> int:
        """How many keys of tokens a new token reads at most, its own included, in the layer that keeps most."""
        return max(self.capacities)

    @property
    def capacities(self) -> tuple[int, ...]:
        """The same of each layer."""
        return tuple(self._parts[term].capacity for term in self._layer_masks.which)

    @property
    def moves(self) -> int:
        """How often keys were moved, or samples: what is known of their places counts no more then."""
        return self._samples_moved + sum(part.moves for part in self._parts)

    @property
    def begun(self) -> bool:
        """Whether something was read, so that registers and memories are there."""
        return self.past > 0 or self.length > 0

    @property
    def positions(self) -> Tensor:
        """Which tokens some layer holds keys of, int64 `[n]`, increasing; the last ones may be visible no more."""
        held = [part.positions(self.past) for part in self._parts]
        return held[0] if len(held) == 1 else torch.cat(held).unique()

    def positions_of(self, layer: int) -> Tensor:
        """The same of one layer, counted from 0."""
        return self._parts[self._layer_masks.which[layer]].positions(self.past)

    @property
    def bytes(self) -> int:
        """What the keys and values take, in bytes."""
        return sum(layer.bytes for layer in self._layers)

    def layer(self, index: int) -> LayerKV:
        """The cache of one layer."""
        return self._layers[index]

    def __repr__(self) -> str:
        mask = "" if self.mask is None else f", mask={self.mask}"
        kinds = [
            f"{len(part.positions(self.past))} kept in {counted(len(part.layers), 'layer')}, capacity {part.capacity}"
            for part in self._parts
        ]
        return (
            f"KVCache(batch={self.batch}, tokens={self.tokens}{mask}): {counted(self.past, 'token')} read, "
            f"{'; '.join(kinds)}, {memory(self.bytes)}"
        )

    # -- a call ------------------------------------------------------------------------------------------------------

    def check_call(self, layers: AttentionLayers, batch: int, new: int, registers: int) -> None:
        """Raise ValueError if this call cannot be read into the cache, before anything of it is."""
        if not torch.compiler.is_dynamo_compiling() and self._owner is not None and self._owner() is not layers:
            raise ValueError(
                "the cache was made for another model, whose keys mean nothing to this one: make one with "
                "KVCache(net, batch=..., tokens=...) for each model"
            )
        if registers != self._registers:
            raise ValueError(
                f"the cache is for a model with {self._registers} registers, and the call says registers={registers}: "
                "call the TransformerWrapper, which passes its own"
            )
        if batch != self.batch or self.past + new > self.tokens:
            raise ValueError(
                f"the cache holds {self.tokens} tokens of {self.batch} samples, {self.past} of them taken; "
                f"the call brings {new} tokens of {batch} samples. Make it with KVCache(net, batch=..., tokens=...) "
                "for all tokens that will come"
            )

    def placed(self, mask: Mask, new: int, layer: int = 0) -> Mask:
        """The mask for the keys that a call with `new` tokens reads; registers and memories come first in both."""
        return self._parts[self._layer_masks.which[layer]].placed(mask, self.past, new)

    def advance(self) -> None:
        """Keep what the last call appended. Raises ValueError if the layers did not append the same rows."""
        brought = {layer.stop - max(layer.length, self._fixed) for layer in self._layers}
        if len(brought) != 1:
            raise ValueError(f"the layers appended different numbers of keys, {sorted(brought)}: run all of them")
        (new,) = brought
        if new < 0:
            return  # nothing was appended
        before, self.past = self.past, self.past + new
        for part in self._parts:
            part.advance(before, self.past)

    # -- other samples, other ends -----------------------------------------------------------------------------------

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """Sample i goes on as sample `indices[i]` was: beams that change places. As many as there are samples."""
        rows = self._read_samples(indices)
        if len(rows) != self.batch:
            raise ValueError(
                f"reorder: {len(rows)} indices for {self.batch} samples. To keep fewer, or to go on with more, "
                "use select(samples)"
            )
        self._take_samples(rows)

    def select(self, samples: Tensor | Sequence[int]) -> None:
        """Keep these samples, in this order; one may come several times. The batch has as many from now on.

        A mask that differs from sample to sample goes with them: `cache.mask` is that of the new batch.
        """
        self._take_samples(self._read_samples(samples))

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, such as rejected drafts.

        Raises ValueError if a query that comes then would need a key that is not kept any more.
        """
        length = whole(length, "length")
        if length > self.past:
            raise ValueError(f"truncate: {self.past} tokens were read, so there are no first {length} to keep")
        for part in sorted(self._parts, key=lambda part: -part.least(self.past)):  # what says the most comes first
            part.check_truncate(length, self.past)
        for part in self._parts:
            part.truncate(length, self.past)
        self.past = length

    def _read_samples(self, indices: Tensor | Sequence[int]) -> Tensor:
        rows = torch.as_tensor(indices, device="cpu")
        if rows.numel() == 0:
            raise ValueError("no samples are chosen, and a cache has at least one: drop the cache instead")
        if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise ValueError(f"samples are chosen by their indices, int64 [n]; got {rows.dtype} {list(rows.shape)}")
        if int(rows.min()) < 0 or int(rows.max()) >= self.batch:
            raise ValueError(f"samples {rows.tolist()} are not of 0 to {self.batch - 1}: the cache has {self.batch}")
        return rows.long()

    def _take_samples(self, rows: Tensor) -> None:
        before, self._rows = self._rows, self._rows[rows]
        others = self._base is not None and self._base.batch_size != 1 and not torch.equal(before, self._rows)
        self._samples_moved += others or len(rows) != self.batch
        self.batch = len(rows)
        if self._base is not None and others:
            self.mask = of_samples(self._base, self._rows.tolist())
            for part, own in zip(self._parts, self._masks(), strict=True):
                part.other_samples(own)
        for layer in self._layers:
            layer.select(rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_owner": None}  # whoever reads it back says for which model


class _Priced(KVCache):
    """A cache whose memory exists in name only."""

    @staticmethod
    def _memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")


def _read(mask: Mask | str) -> Mask:
    read = from_text(mask)
    if not isinstance(read, Mask):
        raise MaskError(not_a_mask("mask= of a cache must be a mask expression or its text", mask))
    return read


def of_samples(mask: Mask, rows: list[int]) -> Mask:
    """The mask of these samples: itself, if each is like the one whose place it takes."""
    same = mask.batch_size in (0, len(rows)) and all(
        mask._distinct_key(row, head) == mask._distinct_key(place, head)
        for head in range(max(1, mask.head_count))
        for place, row in enumerate(rows)
    )
    return mask if same else mask.select(samples=rows)
