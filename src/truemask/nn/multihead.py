"""`MultiheadAttention`: torch's module of that name, computed by `attend`, with mask expressions besides its own masks.

Shapes: b batch, q queries, k keys, e features, h heads, d features of a head, m keys that the module adds.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from truemask.attention.attend import attend
from truemask.attention.call import AttendArgs, read_call
from truemask.attention.run import new_seed, run
from truemask.common.formatting import describe
from truemask.common.real_tensors import cannot_look, traceable
from truemask.errors import MaskError
from truemask.masks.compose.boolean import conjunction, everything
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.importers import from_torch_mha
from truemask.masks.formats.as_mask import from_text, not_a_mask
from truemask.masks.leaves.bands import causal
from truemask.nn.torch_masks import hidden_and_bias, says_causal


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` (2.13), in its place: same arguments, parameters, state dict and initial weights.

    It is one of torch's, so that `isinstance`, `load_state_dict` and what reads its attributes go on working; only
    `forward` differs:

    * a query that may attend to nothing gets zeros from the attention, so `out_proj`'s bias, where torch gives NaN;
    * what is masked cannot reach an output or a gradient, NaN included (law 6 in docs/conventions.md);
    * `mask=` takes an expression, True = may attend, ANDed with torch's own two masks, whose True is masked OUT;
    * with `need_weights=False` it costs what the masks let through. The default, True as in torch, makes all weights
      besides; a backward for them is only run if they are used;
    * `net.backend = "reference"` (any name of `backends()`) says who computes it, for second derivatives, say;
    * `is_causal=True` is causal, with and without an `attn_mask`; one that shows later keys contradicts it, an error;
    * dropout drops the cells that every backend of this library drops for a seed, not those that torch drops;
    * a nested tensor is taken for self-attention with any masks, also in training.

    `nn.TransformerEncoderLayer` in evaluation would read the weights and bypass the module. It does so only if the
    attribute `_qkv_same_embed_dim` is True; here it is False always, so that assigning to `layer.self_attn` does what
    it says. The shape of the weights is told by `in_proj_weight`, which is None if `kdim` or `vdim` differ. A
    `nn.TransformerEncoder` made of such layers warns of it, unless it is told `enable_nested_tensor=False`.

    >>> from truemask.masks.leaves.bands import window
    >>> net = MultiheadAttention(16, 2, batch_first=True)
    >>> x = torch.randn(3, 5, 16)
    >>> out, weights = net(x, x, x, mask=causal & window(2))
    >>> out.shape, weights[0, 4].ne(0).tolist()
    (torch.Size([3, 5, 16]), [False, False, False, True, True])
    """

    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if embed_dim > 0 and num_heads > 0 and embed_dim % num_heads:
            raise ValueError(
                f"MultiheadAttention: embed_dim={embed_dim} is no multiple of num_heads={num_heads}: every head has "
                "embed_dim / num_heads features"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"MultiheadAttention: dropout is the share of weights to drop, in [0, 1), got {dropout}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._qkv_same_embed_dim = False  # what torch's encoder layer asks before it bypasses the module

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """A module that takes over the parameters of torch's: the same tensors, so optimizers keep working.

        >>> layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"from_torch takes a torch.nn.MultiheadAttention, got {describe(module)}")
        if is_parametrized(module):
            raise ValueError("from_torch: the module is parametrized: use torch's remove_parametrizations first")
        given = dict(module.named_parameters(recurse=False))
        new = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            "in_proj_bias" in given,
            module.bias_k is not None,
            module.add_zero_attn,
            module.kdim,
            module.vdim,
            module.batch_first,
            device="meta",
        )
        for name, parameter in given.items():
            setattr(new, name, parameter)
        new.out_proj = module.out_proj
        return new.train(module.training)

    def _reset_parameters(self) -> None:
        same, self._qkv_same_embed_dim = self._qkv_same_embed_dim, self._weights()[0] is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = same

    @traceable
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: `[q, b, e]`, or `[b, q, e]` with `batch_first`, or `[q, e]`; key and value likewise, of features
                `kdim` and `vdim`.
            key_padding_mask: `[b, k]`, or `[k]` without a batch; True = masked OUT, or floats that are added.
            need_weights: also return the weights, which makes them all: b h q k numbers.
            attn_mask: `[q, k]` or `[b * h, q, k]`; True = masked OUT, or floats that are added. Floats at or below half
                of their dtype's lowest hide, as in `from_additive`.
            average_attn_weights: the mean of the heads, or each head's.
            is_causal: query i may attend to keys 0 to i.
            mask: an expression or its text, True = may attend.

        Returns:
            The output in the layout of `query`, and None or the weights `[b, q, k + m]`, `[b, h, q, k + m]` for each
            head, without b if there is no batch: after dropout, the m keys that `add_bias_kv` and `add_zero_attn` add
            last.

        Raises:
            ValueError, TypeError, MaskError: sizes that do not fit, and masks that contradict each other.
        """
        check_tensors(query, key, value)
        expression: Mask | None = from_text(mask)
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, expression)
        self._check_inputs(query, key, value)
        batched, axis = query.ndim == 3, 0 if self.batch_first else 1
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(axis), k.unsqueeze(axis), v.unsqueeze(axis)
        q, k, v = (self._heads(x) for x in (q, k, v))  # b h q d
        seen, bias = self._masks(key_padding_mask, attn_mask, is_causal, expression, q, k, batched)
        k, v, seen, bias, extra = self._with_extra_keys(k, v, seen, bias)
        drop = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = attend_and_weigh(q, k, v, seen, bias, drop, self.backend)
            weights = torch.cat((weights[..., extra:], weights[..., :extra]), dim=-1) if extra else weights
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out, weights = attend(q, k, v, seen, bias=bias, dropout=drop, backend=self.backend), None
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        out = self.out_proj(out.flatten(2))
        if batched:
            return out, weights
        return out.squeeze(axis), None if weights is None else weights.squeeze(0)

    def _weights(self) -> tuple[Tensor | None, Tensor | None]:
        """The weight of all three projections, None if they have one each, and their bias."""
        return cast("Tensor | None", self.in_proj_weight), cast("Tensor | None", self.in_proj_bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, in one product where the inputs are one."""
        e, (weight, bias) = self.embed_dim, self._weights()
        if weight is not None and query is key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        bq, bk, bv = (None, None, None) if bias is None else bias.chunk(3)
        if weight is None:
            wq, wk, wv = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            wq, wk, wv = weight.chunk(3)
        if weight is not None and key is value:
            k, v = F.linear(key, weight[e:], None if bias is None else bias[e:]).chunk(2, dim=-1)
        else:
            k, v = F.linear(key, wk, bk), F.linear(value, wv, bv)
        return F.linear(query, wq, bq), k, v

    def _heads(self, x: Tensor) -> Tensor:
        """Features `[b, n, e]` or `[n, b, e]` to `[b, h, n, d]`."""
        x = x.unflatten(-1, (self.num_heads, -1))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _with_extra_keys(
        self, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Mask, Tensor | None, int]:
        """The learned key and the key of zeros, before the others and seen by all; and how many they are."""
        b, h, _, d = k.shape
        more = []
        if self.bias_k is not None and self.bias_v is not None:
            more.append(tuple(x.view(1, h, 1, d).expand(b, -1, -1, -1) for x in (self.bias_k, self.bias_v)))
        if self.add_zero_attn:
            more.append((k.new_zeros(b, h, 1, d), v.new_zeros(b, h, 1, d)))
        if not more:
            return k, v, mask, bias, 0
        keys, values = zip(*more, strict=True)
        k, v = torch.cat((*(x.to(k.dtype) for x in keys), k), 2), torch.cat((*(x.to(v.dtype) for x in values), v), 2)
        mask = mask if mask is everything else mask.prepended(k=len(more))
        return k, v, mask, None if bias is None else F.pad(bias, (len(more), 0)), len(more)

    # -- the masks -----------------------------------------------------------------------------------------------------

    def _masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        mask: Mask | None,
        q: Tensor,
        k: Tensor,
        batched: bool,
    ) -> tuple[Mask, Tensor | None]:
        """All masks as one expression, and what is a bias: floats that broadcast to `[b, h, q, k]`."""
        self._check_masks(key_padding_mask, attn_mask, mask, len(q), q.shape[2], k.shape[2], batched)
        attn_hidden, attn_bias = hidden_and_bias(attn_mask)
        pad_hidden, pad_bias = hidden_and_bias(key_padding_mask)
        terms = []
        if is_causal:
            terms.append(causal)
            if attn_mask is not None and says_causal(attn_mask, attn_hidden, q.shape[2], k.shape[2]):
                attn_hidden = None
        if attn_hidden is not None or pad_hidden is not None:
            terms.append(from_torch_mha(attn_hidden, pad_hidden, num_heads=self.num_heads))
        if mask is not None:
            terms.append(mask)
        seen = conjunction(*terms)
        if attn_bias is not None and attn_bias.ndim == 3:
            attn_bias = attn_bias.unflatten(0, (-1, self.num_heads))
        if pad_bias is not None:
            pad_bias = pad_bias.view(-1, 1, 1, k.shape[2])
            attn_bias = pad_bias if attn_bias is None else attn_bias + pad_bias
        return seen, attn_bias

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
        mask: Mask | None,
    ) -> tuple[Tensor, None]:
        """Self-attention of samples of different lengths, as torch's encoder passes them on."""
        if not (query is key is value and self.batch_first) or need_weights or key_padding_mask is not None:
            raise ValueError(
                "MultiheadAttention: a nested tensor is taken for self-attention only, with batch_first=True, "
                "need_weights=False and without key_padding_mask, which it replaces; pad it with "
                "`.to_padded_tensor(0.0)` and pass key_padding_mask for everything else"
            )
        parts = query.unbind()
        x = query.to_padded_tensor(0.0)  # b q e
        sizes = torch.tensor([len(part) for part in parts], device=x.device)
        hidden = torch.arange(x.shape[1], device=x.device) >= sizes[:, None]
        out, _ = self(x, x, x, hidden, False, attn_mask, is_causal=is_causal, mask=mask)
        return torch.nested.as_nested_tensor([row[: len(part)] for row, part in zip(out, parts, strict=True)]), None

    # -- what the caller passes ----------------------------------------------------------------------------------------

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        tensors = {"query": query, "key": key, "value": value}
        layout = "[batch, length, features]" if self.batch_first else "[length, batch, features]"
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            raise ValueError(
                f"MultiheadAttention: query, key and value are {layout} (batch_first={self.batch_first}), or [length, "
                f"features] without a batch, all alike; got {_shapes(tensors)}"
            )
        for (name, x), size in zip(tensors.items(), (self.embed_dim, self.kdim, self.vdim), strict=True):
            if x.shape[-1] != size:
                raise ValueError(f"MultiheadAttention: {name} must have {size} features, got {_shapes(tensors)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"MultiheadAttention: each key needs its value, got {_shapes(tensors)} as {layout}")
        axis = 0 if self.batch_first else 1
        if query.ndim == 3 and query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"MultiheadAttention: {query.shape[axis]} samples of queries and {key.shape[axis]} of keys: "
                f"{_shapes(tensors)} as {layout}; is batch_first={self.batch_first} what you mean?"
            )

    def _check_masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        mask: Mask | None,
        b: int,
        q: int,
        k: int,
        batched: bool,
    ) -> None:
        h = self.num_heads
        expected = {"attn_mask": ((q, k), (b * h, q, k)), "key_padding_mask": ((b, k),) if batched else ((k,),)}
        for name, value in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if isinstance(value, Mask):
                raise TypeError(f"MultiheadAttention: {name} is an expression, `{value}`: pass it as mask=")
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"MultiheadAttention: {name} must be a tensor or None, got {describe(value)}")
            if value is not None and tuple(value.shape) not in expected[name]:
                shapes = " or ".join(str(list(shape)) for shape in expected[name])
                raise MaskError(
                    f"MultiheadAttention: {name} must be {shapes} for {b} samples, {h} heads, {q} queries and {k} "
                    f"keys, got {describe(value)}"
                )
        if mask is not None and not isinstance(mask, Mask):
            rule = "MultiheadAttention: mask= takes an expression, such as `causal & window(64)`, or its text"
            if isinstance(mask, Tensor):
                raise TypeError(
                    f"{rule}, got {describe(mask)}. A bool tensor says True = masked out as attn_mask=, and True = "
                    "may attend as mask=dense(tensor)"
                )
            raise TypeError(not_a_mask(rule, mask))


def attend_and_weigh(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """`attend` with its weights `[b, h, q, k]`, by two calls that drop the same cells.

    The output then takes the fast way, and weights that nobody differentiates (most callers throw them away) cost no
    backward.
    """
    if backend == "reference" or cannot_look():
        return attend(q, k, v, mask, bias=bias, dropout=dropout, backend="reference", return_weights=True)
    args = AttendArgs(bias=bias, dropout=dropout, backend=backend)
    weigh = read_call(q, k, v[..., :1], mask, args._replace(backend=None, return_weights=True))
    seed = new_seed() if dropout else None
    out = run(read_call(q, k, v, mask, args), seed).out
    return out, cast("Tensor", run(weigh, seed).weights)


def _shapes(tensors: dict[str, Tensor]) -> str:
    """What was given, for a message: only made for one, since a graph of many lengths cannot hold its text."""
    return ", ".join(f"{name} {describe(x)}" for name, x in tensors.items())


def check_tensors(query: object, key: object, value: object) -> None:
    """Raise unless all three are tensors of floats."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"MultiheadAttention: {name} must be a tensor of floats, got {describe(x)}")
