"""The cache of a model that reads drafts: every sample keeps what of its draft was right.

It is as small as the mask allows, as `KVCache` is: keys that no later query sees are overwritten, sample by sample.

Shapes: b samples, n nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from truemask.generation.layer_kv import LayerKV
from truemask.generation.retention import Retention
from truemask.generation.speculation.places import Places
from truemask.generation.speculation.trees import Nodes
from truemask.masks.core.mask import Mask
from truemask.nn.layers import AttentionLayers
from truemask.nn.wrappers import TransformerWrapper

LEAST_ROOM = 32  # keys that fit behind the kept ones: moving is for many steps at once


class RaggedCache:
    """Keys and values of `batch` samples that read drafts of up to `most` nodes, `tokens` tokens in all.

    `mask` is over all tokens. `retention` says what it lets the cache forget; None: nothing.
    """

    def __init__(
        self, net: TransformerWrapper, *, batch: int, tokens: int, most: int, mask: Mask, retention: Retention | None
    ) -> None:
        config, weight = net.attn_layers.config, net.token_emb.weight
        device_type = weight.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        self.mask, self.most, self._retention = mask, most, retention
        self.batch, self.tokens = batch, tokens
        self._registers = net.num_memory_tokens
        self._fixed = config.attn.num_mem_kv + self._registers  # keys that stand before all tokens
        needed = tokens if retention is None else retention.capacity + most
        self.room = min(tokens, needed + max(needed, LEAST_ROOM)) + most
        shape = (2, batch, config.kv_heads, self._fixed + self.room, config.attn.dim_head)  # keys and values
        self._layers = [LayerKV(torch.empty(shape, dtype=dtype, device=weight.device)) for _ in range(config.depth)]
        self.places = Places(batch, 0, tokens)
        self.begun = False
        self._nodes: Nodes | None = None
        self._sure = [0] * batch  # tokens that are not taken back any more
        self.moves = 0  # how often what lies in the places changed other than by reading

    @property
    def past(self) -> int:
        """One token in place of all: rows and keys are placed here, and samples have read different numbers of them."""
        return int(self.begun)

    @property
    def length(self) -> int:
        """How many keys each layer holds, registers, memories and gaps included."""
        return self._fixed + self.places.stop if self.begun else 0

    @property
    def bytes(self) -> int:
        """What the keys and values take, in bytes."""
        return sum(layer.bytes for layer in self._layers)

    def layer(self, index: int) -> LayerKV:
        """The cache of one layer."""
        return self._layers[index]

    # -- a call ------------------------------------------------------------------------------------------------------

    def expect(self, nodes: Nodes) -> None:
        """Make room for a call with these nodes; they speak of what is there now."""
        if self.places.stop + nodes.tokens.shape[1] > self.room:
            self._forget()
        self._nodes = nodes

    def check_call(self, layers: AttentionLayers, batch: int, new: int, registers: int) -> None:
        """Only the reader that owns it calls with it, and brings what it expects."""
        assert registers == self._registers
        assert self._nodes is None or (batch, new) == self._nodes.tokens.shape

    def placed(self, mask: Mask, new: int, layer: int = 0) -> Mask:
        """The mask of all tokens, of the call's rows and of what lies in the places and is new."""
        if self._nodes is None:
            return mask  # a prompt, whose rows are the first that there are
        first = self._registers + self.past  # the row that the layers think is the first of the call
        return self.places.mask(mask, self._nodes, rows=self._registers, keys=self._fixed, first=first)

    def begin(self, width: int) -> None:
        """Keep a prompt of so many tokens, which every sample has read."""
        batch = len(self.places.kept)
        self.places, self.begun, self._sure = Places(batch, width, self.places.tokens), True, [width] * batch
        for layer in self._layers:
            layer.length = layer.stop
        if width + self.most > self.room:
            self._forget()

    def accept(self, paths: Sequence[Sequence[int]], *, sure: bool) -> None:
        """Keep these nodes of what the last call brought; `sure`: they are not taken back."""
        for sample, places, to in self.places.accept(paths):
            for layer in self._layers:
                layer.move(sample, [self._fixed + at for at in places], [self._fixed + at for at in to])
        self._nodes = None
        self._settle()
        if sure:
            self._sure = list(self.places.read)

    def rewind(self, read: Sequence[int]) -> None:
        """Forget of each sample all tokens but the first `read`, which from now on are sure."""
        self.places.rewind(read)
        self._sure = list(self.places.read)
        self._settle()

    def select(self, samples: Sequence[int]) -> None:
        """Go on with these samples, in this order; one may come several times."""
        self.places.select(samples)
        self.batch = len(samples)
        self._sure = [self._sure[sample] for sample in samples]
        self.moves += 1
        for layer in self._layers:
            layer.select(torch.tensor(samples))

    def _settle(self) -> None:
        for layer in self._layers:
            layer.length = layer.stop = self._fixed + self.places.stop

    def _forget(self) -> None:
        """Move what is needed to the front."""
        assert self._retention is not None, "a cache without a mask has room for all"
        which = []
        for sample, sure in enumerate(self._sure):
            positions = self.places.positions[sample, : self.places.kept[sample]].numpy()
            which.append(
                torch.from_numpy(self._retention.needed(positions, sure, self.places.read[sample])).nonzero()[:, 0]
            )
        self.places.keep(which)
        rows = [torch.nn.functional.pad(row, (0, self.places.stop - len(row))) + self._fixed for row in which]
        fixed = torch.arange(self._fixed).expand(len(rows), -1)
        for layer in self._layers:
            layer.keep_each(torch.cat((fixed, torch.stack(rows)), dim=1))
        self.moves += 1
