"""The stacks: `Decoder` (causal) and `Encoder`, under x-transformers' names.

Shapes: b batch, n rows of this call, j keys, d features.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from truemask.common.formatting import describe
from truemask.common.real_tensors import traceable
from truemask.masks.core.mask import Mask
from truemask.nn.attention import Attention, LayerCache
from truemask.nn.config import LayersConfig, reject_keywords
from truemask.nn.feedforward import FeedForward
from truemask.nn.forward_mask import Layout, agreed, combine, positions_with_registers, read_masks, token_positions
from truemask.nn.layer_masks import LayerMasks
from truemask.nn.norms import LayerNorm, RMSNorm
from truemask.nn.positions import RotaryEmbedding, Rotation
from truemask.nn.x_transformers_names import LAYERS_CALL


class Cache(Protocol):
    """Keys and values of all layers; the layers append, the owner advances."""

    @property
    def begun(self) -> bool:
        """Whether something was read, so that registers and memories are there."""
        ...

    @property
    def past(self) -> int:
        """How many tokens were read, those included whose keys are not kept any more."""
        ...

    @property
    def mask(self) -> Mask | None:
        """The mask of every call, if it decides what is kept."""
        ...

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer."""
        ...

    def check_call(self, layers: AttentionLayers, batch: int, new: int, registers: int) -> None:
        """Raise ValueError if `new` tokens of `batch` samples cannot be read by these layers into this cache."""
        ...

    def placed(self, mask: Mask, new: int, layer: int = 0) -> Mask:
        """The mask of all keys as one of those that a layer keeps, and of the new ones."""
        ...


class Block(nn.Module):
    """Attention and feedforward, each behind its norm and added to the stream (pre-norm)."""

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config)
        self.ff_norm = make_norm(config)
        self.ff = FeedForward(config.dim, config.ff)

    def forward(self, x: Tensor, mask: Mask, rotation: Rotation | None, cache: LayerCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), mask, rotation, cache)  # b n d
        return x + self.ff(self.ff_norm(x))  # b n d


def make_norm(config: LayersConfig) -> LayerNorm | RMSNorm:
    """The norm that the config names."""
    norm = RMSNorm if config.use_rmsnorm else LayerNorm
    return norm(config.dim, unit_offset=config.norm_add_unit_offset)


class AttentionLayers(nn.Module):
    """A stack of layers built from a `LayersConfig`; `Decoder` and `Encoder` are the two ways to get one.

    Called with `x` (b, n, d), it gives (b, n, d):

    * `mask`: bool (b, n), True = a real token: padding is not read, and reads nothing. Or a mask expression.
    * `attn_mask`: bool (q, k), (h, q, k) or (b, h, q, k), size 1 broadcasts. Or a mask expression. Both are ANDed.
    * `causal`: overrides, for this call, whether rows may read later keys; on every backend.
    * `pos`: int64 (n) or (b, n), positions for rotary; by default the mask's own, which restart in `packed` documents.
    * each layer ANDs its own of the config's `layer_masks` to that, at the same logical positions.
    * `registers`: the sequence begins with so many rows that masks and positions do not count and every row reads.
    * `cache`: `x` holds the rows after the cached ones; masks speak of both. The caller advances the cache.

    A row that may read nothing gets zeros from every attention (law 5 in docs/conventions.md). Raises MaskError on a
    mask that does not fit, ValueError on an `x` that does not.
    """

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.depth = config.depth
        self.causal = config.causal
        self.masks = LayerMasks(config.layer_masks, config.depth)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = make_norm(config)
        self.rotary = (
            RotaryEmbedding(
                config.rotary_dim,
                interpolation_factor=config.rotary_interpolation_factor or 1.0,
                base_rescale_factor=config.rotary_base_rescale_factor or 1.0,
            )
            if config.rotary_pos_emb
            else None
        )

    def layout(self, batch: int, rows: int, cache: Cache | None, registers: int = 0) -> Layout:
        """Where `rows` rows, registers included, lie among the tokens, given what the cache has read.

        Raises ValueError if they are not for this cache.
        """
        begun = cache is not None and cache.begun
        new = rows if begun else rows - registers
        if cache is not None:
            cache.check_call(self, batch, new, registers)
        return Layout(
            batch=batch,
            heads=self.config.heads,
            new=new,
            past=cache.past if cache is not None else 0,
            registers=registers,
            memories=self.config.attn.num_mem_kv,
            begun=begun,
        )

    @traceable
    def forward(
        self,
        x: Tensor,
        mask: Mask | Tensor | str | None = None,
        attn_mask: Mask | Tensor | str | None = None,
        *,
        causal: bool | None = None,
        pos: Tensor | None = None,
        registers: int = 0,
        cache: Cache | None = None,
        **unknown: Any,
    ) -> Tensor:
        reject_keywords(f"{type(self).__name__}.forward", AttentionLayers.forward, unknown, LAYERS_CALL)
        self._check_input(x, registers, cache)
        layout = self.layout(x.shape[0], x.shape[1], cache, registers)
        causal_too = self.causal if causal is None else causal
        self.check_distances(pos, registers)
        user = read_masks(mask, attn_mask, layout, x)
        if cache is not None and cache.mask is not None:
            given = None if mask is None and attn_mask is None else user
            user = agreed(given, cache.mask, causal_too=causal_too)
        full = self.combined(user, layout, causal_too=causal_too, cache=cache)  # n j, each
        rotation = None
        if self.rotary is not None:
            positions = positions_with_registers(token_positions(user, layout, pos), layout)  # (b) n
            rotation = self.rotary(positions.to(x.device), x.dtype)
        elif pos is not None:
            raise ValueError("pos= was given, but this model has no positions: make it with rotary_pos_emb=True")
        for index, layer in enumerate(self.layers):
            x = layer(
                x, full[self.masks.which[index]], rotation, None if cache is None else cache.layer(index)
            )  # b n d
        return self.final_norm(x)

    def combined(self, user: Mask, layout: Layout, *, causal_too: bool, cache: Cache | None) -> list[Mask]:
        """The masks of a call, one for each distinct mask of the layers; `user` is that of the call."""
        masks = []
        for term, mask in enumerate(self.masks.each(user)):
            layer = self.masks.which.index(term)
            placed = None if cache is None else partial(cache.placed, layer=layer)
            masks.append(combine(mask, layout, causal_too=causal_too, placed=placed))
        return masks

    def _check_input(self, x: Tensor, registers: int, cache: Cache | None) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes features (b, n, {self.dim}), got {describe(x)}"
                + ("; token ids go through a TransformerWrapper" if not x.is_floating_point() else "")
            )
        self._check_place(x)
        if registers and (cache is None or not cache.begun) and x.shape[1] < registers:
            raise ValueError(f"registers={registers}, but the input has only {x.shape[1]} rows")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache is for inference: call the model under torch.no_grad() or inference_mode()")

    def check_distances(self, pos: Tensor | None, registers: int) -> None:
        """Raise ValueError on what ALiBi has no distances of."""
        if self.config.alibi_pos_bias and pos is not None:
            raise ValueError(
                "pos= was given, and alibi_pos_bias counts distances by the mask: say what restarts by the mask, such "
                "as mask.packed(lengths) or mask.padded(starts)"
            )
        if self.config.alibi_pos_bias and registers:
            raise ValueError(
                f"registers={registers}, but alibi_pos_bias counts distances, and registers stand nowhere: use rotary "
                "or absolute positions with registers"
            )

    def _check_place(self, x: Tensor) -> None:
        """The device of `x` and, unless autocast chooses it, the dtype are the parameters'."""
        weight = next(self.parameters())
        if x.device != weight.device:
            raise ValueError(
                f"{type(self).__name__} is on {weight.device} and its input is {describe(x)}: pass "
                f"x.to({str(weight.device)!r}), or move the model with model.to({str(x.device)!r})"
            )
        if x.dtype != weight.dtype and not _autocasts(x.device.type):
            raise ValueError(
                f"{type(self).__name__} has {describe(weight).partition(' ')[0]} parameters and its input is "
                f"{describe(x)}: pass x.to({weight.dtype}), convert the model with model.to({x.dtype}), or run under "
                "torch.autocast"
            )


class Decoder(AttentionLayers):
    """A causal stack: row i reads keys up to i, ANDed with the masks of the call. See `AttentionLayers` for these.

    `attn_` keywords go to every attention, `ff_` ones to every feedforward; see `LayersConfig` for all of them.

    >>> decoder = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    >>> decoder(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, depth: int, heads: int = 8, **keywords: Any) -> None:
        super().__init__(_config("Decoder", True, dim=dim, depth=depth, heads=heads, **keywords))


class Encoder(AttentionLayers):
    """A stack in which every row reads every key that the masks of the call let through. See `AttentionLayers`.

    >>> encoder = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8, use_rmsnorm=True)
    >>> encoder(torch.randn(2, 5, 16), mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2])).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, depth: int, heads: int = 8, **keywords: Any) -> None:
        super().__init__(_config("Encoder", False, dim=dim, depth=depth, heads=heads, **keywords))


def _autocasts(kind: str) -> bool:
    """Whether autocast chooses dtypes on this kind of device; the meta device knows no autocast."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _config(caller: str, causal: bool, /, **keywords: Any) -> LayersConfig:
    if "causal" in keywords:
        raise TypeError(
            f"{caller}() has no keyword 'causal': a Decoder is causal and an Encoder is not; "
            "to change it for one call pass causal= in the call"
        )
    return LayersConfig.from_keywords(caller, causal=causal, **keywords)


def layers_from_config(config: LayersConfig) -> AttentionLayers:
    """The Decoder or Encoder that a config describes."""
    values = config.to_dict()
    return Decoder(**values) if values.pop("causal") else Encoder(**values)
