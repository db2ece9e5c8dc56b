"""The libraries of act 2, each as a function of the input and one boolean matrix, called as its own manual says.

`given` is what the caller hands over, made for a library with the opposite convention: the mistake of act 2.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truemask.attention.attend import attend
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.nn.layers import Decoder

DIM, HEADS = 32, 4
Run = Callable[[Tensor], Tensor]  # x [1, n, DIM] to an output of the same shape


@dataclass(frozen=True)
class Peer:
    """A library's way to take a mask: `given` says what it was handed; `needs` is a package that may be missing."""

    name: str
    given: str
    build: Callable[[int], Run]
    needs: str = ""
    causal: bool = False  # by itself, so that under the inverted mask no row has a key

    @property
    def missing(self) -> bool:
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None


def _lower(n: int) -> Tensor:
    """True where the key is not in the future."""
    return torch.ones(n, n, dtype=torch.bool).tril()


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, DIM // HEADS)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _multihead(need_weights: bool) -> Callable[[int], Run]:
    def build(n: int) -> Run:
        module = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        return lambda x: module(x, x, x, attn_mask=_lower(n), need_weights=need_weights)[0]

    return build


def _encoder_layer(n: int) -> Run:
    module = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True)
    return lambda x: module(x, src_mask=_lower(n))


def _encoder_layer_eval(n: int) -> Run:
    module = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True).eval()
    return torch.no_grad()(lambda x: module(x, src_mask=_lower(n)))


def _sdpa(n: int) -> Run:
    return lambda x: _flat(F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x), attn_mask=~_lower(n)))


def _additive(n: int) -> Run:
    bias = torch.zeros(n, n).masked_fill(_lower(n), -math.inf)
    return lambda x: _flat(F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x), attn_mask=bias))


def _x_transformers(flash: bool) -> Callable[[int], Run]:
    def build(n: int) -> Run:
        from x_transformers import Decoder as Theirs

        module = Theirs(dim=DIM, depth=1, heads=HEADS, attn_dim_head=DIM // HEADS, attn_flash=flash)
        return lambda x: module(x, attn_mask=~_lower(n))

    return build


def _attend(n: int) -> Run:
    return lambda x: _flat(attend(_heads(x), _heads(x), _heads(x), ~_lower(n)))


def _decoder(given: Callable[[int], Mask | Tensor]) -> Callable[[int], Run]:
    def build(n: int) -> Run:
        module = Decoder(dim=DIM, depth=1, heads=HEADS, attn_dim_head=DIM // HEADS)
        return lambda x: module(x, attn_mask=given(n))

    return build


PEERS = (
    Peer("nn.MultiheadAttention", "True = attend", _multihead(need_weights=True)),
    Peer("nn.MultiheadAttention, no weights", "True = attend", _multihead(need_weights=False)),
    Peer("nn.TransformerEncoderLayer", "True = attend", _encoder_layer),
    Peer("nn.TransformerEncoderLayer, eval", "True = attend", _encoder_layer_eval),
    Peer("torch SDPA, bool mask", "True = out", _sdpa),
    Peer("torch SDPA, additive mask", "-inf for 0", _additive),
    Peer("x-transformers Decoder", "True = out", _x_transformers(flash=False), "x_transformers", causal=True),
    Peer("x-transformers Decoder, flash", "True = out", _x_transformers(flash=True), "x_transformers", causal=True),
    Peer("truemask attend", "True = out", _attend),
    Peer("truemask Decoder", "True = out", _decoder(lambda n: ~_lower(n)), causal=True),
    Peer("truemask Decoder", "~causal", _decoder(lambda _n: ~causal), causal=True),
)
