"""`TransformerWrapper`: tokens in, logits out, around a `Decoder` or an `Encoder`.

Shapes: b batch, n tokens of this call, m registers, d features, v tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truemask.common.formatting import describe
from truemask.common.real_tensors import cannot_look, traceable
from truemask.masks.core.mask import Mask
from truemask.nn.config import LayersConfig, check_needs, check_rate, check_type, reject_keywords
from truemask.nn.forward_mask import agreed, read_masks, token_positions
from truemask.nn.layers import AttentionLayers, Cache, layers_from_config
from truemask.nn.positions import AbsolutePositionalEmbedding
from truemask.nn.x_transformers_names import WRAPPER, WRAPPER_CALL


class TransformerWrapper(nn.Module):
    """Tokens (b, n) to logits (b, n, v), around a `Decoder` or an `Encoder`.

    num_tokens         size of the vocabulary
    max_seq_len        how many positions the absolute embedding learns; with rotary or no positions it limits nothing
    attn_layers        the Decoder or Encoder
    num_memory_tokens  registers: learned rows before the tokens, which every row reads and no mask or position counts
                       (what they read themselves: `truemask.masks.structure.registers`); they are not in the output
    tie_embedding      the logits use the token embedding, scaled by tie_embedding_scale (default dim ** -0.5)
    use_abs_pos_emb    a learned vector per position, unless the layers are rotary or max_seq_len is 0 (the default is
                       True and rotary turns it off, as in x-transformers)
    emb_dropout        dropout on the embedded tokens

    The masks of a call are those of `AttentionLayers`: they speak of the n tokens, not of registers.

    >>> from truemask.nn.layers import Decoder
    >>> decoder = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    >>> net = TransformerWrapper(num_tokens=11, max_seq_len=7, attn_layers=decoder, num_memory_tokens=2)
    >>> net(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        num_memory_tokens: int | None = 0,
        tie_embedding: bool = False,
        tie_embedding_scale: float | None = None,
        use_abs_pos_emb: bool = True,
        emb_dropout: float = 0.0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        reject_keywords("TransformerWrapper", TransformerWrapper.__init__, unknown, WRAPPER)
        self._check_arguments(num_tokens, max_seq_len, attn_layers, num_memory_tokens)
        check_type("tie_embedding", tie_embedding, "bool")
        check_type("tie_embedding_scale", tie_embedding_scale, "float | None")
        check_type("use_abs_pos_emb", use_abs_pos_emb, "bool")
        check_type("emb_dropout", emb_dropout, "float")
        check_rate("emb_dropout", emb_dropout)
        check_needs("tie_embedding", tie_embedding, tie_embedding_scale=tie_embedding_scale)
        attn_layers.check_distances(None, num_memory_tokens or 0)
        dim = attn_layers.dim
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.num_memory_tokens = num_memory_tokens or 0
        self.tie_embedding = tie_embedding
        self.tie_embedding_scale = dim**-0.5 if tie_embedding_scale is None else tie_embedding_scale
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.kaiming_normal_(self.token_emb.weight)
        absolute = use_abs_pos_emb and max_seq_len > 0 and not attn_layers.config.rotary_pos_emb
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len) if absolute else None
        self.emb_dropout = nn.Dropout(emb_dropout)
        if self.num_memory_tokens:
            self.memory_tokens = nn.Parameter(torch.randn(self.num_memory_tokens, dim))
        self.attn_layers = attn_layers
        if not tie_embedding:
            self.project_out = nn.Linear(dim, num_tokens, bias=False)

    @traceable
    def forward(
        self,
        ids: Tensor,
        mask: Mask | Tensor | str | None = None,
        attn_mask: Mask | Tensor | str | None = None,
        *,
        causal: bool | None = None,
        pos: Tensor | None = None,
        cache: Cache | None = None,
        return_embeddings: bool = False,
        **unknown: Any,
    ) -> Tensor:
        reject_keywords("TransformerWrapper.forward", TransformerWrapper.forward, unknown, WRAPPER_CALL)
        self.check_ids(ids)
        registers = self.num_memory_tokens
        begins = cache is None or not cache.begun  # then registers and memories come first
        layout = self.attn_layers.layout(len(ids), ids.shape[1] + (registers if begins else 0), cache, registers)
        x = self.token_emb(ids)  # b n d
        user = read_masks(mask, attn_mask, layout, x)
        if cache is not None and cache.mask is not None:
            given = None if mask is None and attn_mask is None else user
            user = agreed(given, cache.mask, causal_too=self.attn_layers.causal if causal is None else causal)
        if self.pos_emb is not None:
            x = x + self.pos_emb(token_positions(user, layout, pos))  # b n d
        x = self.emb_dropout(x)
        if registers and begins:
            x = torch.cat((self.memory_tokens.expand(len(ids), -1, -1), x), dim=1)  # b m+n d
        told = self.pos_emb is not None and not self.attn_layers.config.alibi_pos_bias
        rest = None if told else pos  # absolute positions are already in x
        x = self.attn_layers(x, user, causal=causal, pos=rest, registers=registers, cache=cache)
        if registers and begins:
            x = x[:, registers:]  # b n d
        return x if return_embeddings else self.to_logits(x)

    def to_logits(self, x: Tensor) -> Tensor:
        """Features (..., d) to logits (..., v)."""
        if self.tie_embedding:
            return F.linear(x, self.token_emb.weight) * self.tie_embedding_scale
        return self.project_out(x)

    def to_dict(self) -> dict[str, Any]:
        """Everything that `from_dict` needs to build this model again, as JSON knows it; weights are not in it."""
        return {
            "num_tokens": self.num_tokens,
            "max_seq_len": self.max_seq_len,
            "num_memory_tokens": self.num_memory_tokens,
            "tie_embedding": self.tie_embedding,
            "tie_embedding_scale": self.tie_embedding_scale if self.tie_embedding else None,
            "use_abs_pos_emb": self.pos_emb is not None,
            "emb_dropout": self.emb_dropout.p,
            "attn_layers": self.attn_layers.config.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerWrapper:
        """An untrained model of the same make; the inverse of `to_dict`."""
        layers = layers_from_config(LayersConfig.from_dict(values["attn_layers"]))
        return cls(**{**values, "attn_layers": layers})

    def check_ids(self, ids: Tensor) -> None:
        """Raise ValueError unless these are tokens (b, n) that the model knows, on its device."""
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"ids are {describe(ids)}; expected whole numbers, int64 [batch, tokens]"
                + (". For one sequence pass ids[None]" if ids.ndim == 1 else "")
            )
        if ids.device != self.token_emb.weight.device:
            raise ValueError(
                f"ids are {describe(ids)} and the model is on {self.token_emb.weight.device}: move one with .to()"
            )
        readable = ids.device.type == "cpu" and not cannot_look()  # elsewhere, looking makes it wait
        if readable and ids.numel():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.num_tokens:
                raise ValueError(
                    f"token {low if low < 0 else high} is outside the vocabulary: num_tokens={self.num_tokens}, so ids "
                    f"are 0 to {self.num_tokens - 1}"
                )

    @staticmethod
    def _check_arguments(num_tokens: int, max_seq_len: int, attn_layers: object, registers: int | None) -> None:
        if not isinstance(attn_layers, AttentionLayers):
            raise TypeError(f"attn_layers= is {describe(attn_layers)}; expected a Decoder or an Encoder")
        check_type("num_tokens", num_tokens, "int")
        check_type("max_seq_len", max_seq_len, "int")
        check_type("num_memory_tokens", registers, "int | None")
        if num_tokens < 1 or max_seq_len < 0 or (registers or 0) < 0:
            raise ValueError(
                f"num_tokens={num_tokens} must be above 0, max_seq_len={max_seq_len} and "
                f"num_memory_tokens={registers} not below"
            )
