"""The key/value cache: memory set aside once, written by attention, advanced by its owner.

Shapes: b batch, g key heads, n new rows, j keys stored and new, e features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.nn.wrappers import TransformerWrapper


class KVCache:
    """Keys and values of every layer of a model, for a batch of `batch` sequences of up to `tokens` tokens.

    Pass it to the model and advance it after each call; a call brings only the tokens that are not in it yet. Masks
    and positions keep speaking of the whole sequence. The cache holds the model's registers and memory keys too.

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
    """

    def __init__(self, net: TransformerWrapper, *, batch: int, tokens: int) -> None:
        config, weight = net.attn_layers.config, net.token_emb.weight
        device_type = weight.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        capacity = config.attn.num_mem_kv + net.num_memory_tokens + tokens
        shape = (2, batch, config.kv_heads, capacity, config.attn.dim_head)  # keys and values
        self._layers = [LayerKV(torch.empty(shape, dtype=dtype, device=weight.device)) for _ in range(config.depth)]

    @property
    def length(self) -> int:
        """How many keys each layer holds, registers and memories included."""
        return self._layers[0].length

    def layer(self, index: int) -> LayerKV:
        """The cache of one layer."""
        return self._layers[index]

    def advance(self) -> None:
        """Keep what the last call appended. Raises ValueError if the layers did not append the same rows."""
        stops = {layer.stop for layer in self._layers}
        if len(stops) != 1:
            raise ValueError(f"the layers appended different numbers of keys, up to {sorted(stops)}: run all of them")
        for layer in self._layers:
            layer.length = layer.stop


class LayerKV:
    """Keys and values of one layer: `length` are kept, those up to `stop` were appended and wait for `advance`."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # 2 b g capacity e
        self.length = 0
        self.stop = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (b, g, n, e) behind the kept ones; return all of them (b, g, j, e)."""
        batch, _, rows, _ = k.shape
        _, own_batch, _, capacity, _ = self.memory.shape
        stop = self.length + rows
        if batch != own_batch or stop > capacity:
            raise ValueError(
                f"the cache holds {capacity} keys of {own_batch} samples, {self.length} of them taken; "
                f"the call brings {rows} keys of {batch} samples. Make it with KVCache(net, batch=..., tokens=...) "
                "for all tokens that will come"
            )
        self.memory[0, :, :, self.length : stop] = k
        self.memory[1, :, :, self.length : stop] = v
        self.stop = stop
        return self.memory[0, :, :, :stop], self.memory[1, :, :, :stop]
