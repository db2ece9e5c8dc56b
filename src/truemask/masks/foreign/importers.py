"""From the conventions of other libraries to a mask: one function for each, named after where the tensor comes from."""

from __future__ import annotations

from torch import Tensor

from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.masks.compose.boolean import conjunction, everything
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.tensors import (
    additive_visible,
    as_heads,
    boolean_hint,
    from_cells,
    key_visibility,
    module_visible,
    require_bool,
    require_tensor,
    split_heads,
    zeros_and_ones,
)
from truemask.masks.leaves.bands import causal


@deferrable
def from_torch_sdpa(attn_mask: Tensor) -> Mask:
    """The boolean `attn_mask` of `F.scaled_dot_product_attention`: True = attend, so nothing is flipped.

    `attn_mask`: bool (q, k), or (b, h, q, k) where size 1 broadcasts as in torch: (b, 1, 1, k) is key padding. A
    float one goes through `from_additive`. A 3-D one raises `MaskError`, because torch lines its first axis up with
    whatever stands there in the query. `is_causal=True` is `causal` (both align top-left). Source: the
    documentation of `torch.nn.functional.scaled_dot_product_attention`.

    >>> import torch
    >>> import truemask as tm
    >>> mask = tm.from_torch_sdpa(torch.tensor([[True, False, False], [True, True, False]]))
    >>> mask[1, 0], mask[0, 1]
    (True, False)
    """
    require_tensor("from_torch_sdpa", attn_mask)
    if attn_mask.is_floating_point():
        raise MaskError(
            f"from_torch_sdpa: attn_mask is {describe(attn_mask)}; torch adds a float mask to the scores. "
            f"Use from_additive(attn_mask){boolean_hint(attn_mask)}"
        )
    require_bool("from_torch_sdpa", "attn_mask", attn_mask)
    if attn_mask.ndim == 3:
        raise MaskError(
            f"from_torch_sdpa: attn_mask is {describe(attn_mask)}, and 3-D has two readings: "
            "attn_mask.unsqueeze(0) is (1, h, q, k), one mask for each head; "
            "attn_mask.unsqueeze(1) is (b, 1, q, k), one for each sample. Pass the one you mean"
        )
    return from_cells("from_torch_sdpa", "attn_mask", attn_mask)


@deferrable
def from_additive(bias: Tensor, axes: str | None = None) -> Mask:
    """A float mask that is added to the scores: 0 = attend, the lowest numbers = hidden.

    Exactly (law 1): 0 is visible; -inf and everything at or below *half of the dtype's lowest number* is hidden,
    which takes -inf, `finfo.min`, and what is left of it after a small number was added. Any other value is a bias,
    not a mask, and raises `MaskError`: -1e9 in float32 too, which hides nothing when all of a row has it.

    `bias`: float (q, k), (b, h, q, k) where size 1 broadcasts, (b, 1, 1, k) included, or 3-D with `axes="bqk"` or
    `"hqk"`. Sources: `F.scaled_dot_product_attention`, `nn.Transformer.generate_square_subsequent_mask`, Hugging
    Face's eager 4-D masks.

    >>> import torch
    >>> import truemask as tm
    >>> lowest = torch.finfo(torch.float32).min
    >>> mask = tm.from_additive(torch.tensor([[0.0, lowest], [0.0, 0.0]]))
    >>> mask[0, 0], mask[0, 1], mask[1, 1]
    (True, False, True)
    """
    return from_cells("from_additive", "the mask", additive_visible("from_additive", "the mask", bias), axes)


@deferrable
def from_torch_mha(
    attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None, *, num_heads: int | None = None
) -> Mask:
    """The masks of `nn.MultiheadAttention` and `nn.Transformer*`: True = masked OUT, so booleans are flipped here.

    `attn_mask`: (q, k), or (b * h, q, k) with sample b and head h in row b * num_heads + h, which needs
    `num_heads`. `key_padding_mask`: (b, k), or (k) without a batch. Each may be float instead, and then it is added
    to the scores, as in `from_additive`. Queries that see nothing are allowed (torch gives NaN for them, `attend`
    zeros). Source: the docstring of `torch.nn.MultiheadAttention.forward`.

    >>> import torch
    >>> import truemask as tm
    >>> hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)
    >>> padded = torch.tensor([[False, True, True], [False, False, False]])
    >>> mask = tm.from_torch_mha(hidden, padded)
    >>> mask.to_dense(3, batch=2).int().tolist()
    [[[[1, 0, 0], [1, 0, 0], [1, 0, 0]]], [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    """
    where = "from_torch_mha"
    if attn_mask is None and key_padding_mask is None:
        return everything
    parts: list[Mask] = []
    samples: int | None = None
    if attn_mask is not None:
        visible = module_visible(where, "attn_mask", attn_mask)
        if visible.ndim == 3:
            visible = split_heads(visible, num_heads)
            samples = visible.shape[0]
        elif visible.ndim != 2:
            raise MaskError(f"{where}: attn_mask is {describe(attn_mask)}; torch takes (q, k) or (b * num_heads, q, k)")
        parts.append(from_cells(where, "attn_mask", visible))
    if key_padding_mask is not None:
        visible = module_visible(where, "key_padding_mask", key_padding_mask)
        if visible.ndim not in (1, 2):
            raise MaskError(f"{where}: key_padding_mask is {describe(key_padding_mask)}; torch takes (b, k) or (k)")
        if samples is not None and visible.ndim == 2 and visible.shape[0] != samples:
            raise MaskError(
                f"{where}: attn_mask speaks of {samples} samples (its first size / num_heads={num_heads}) "
                f"and key_padding_mask of {visible.shape[0]}; check num_heads and the batch"
            )
        parts.append(key_visibility(visible))
    return conjunction(*parts)


@deferrable
def from_huggingface_2d(attention_mask: Tensor) -> Mask:
    """The 2-D `attention_mask` of Hugging Face: 1 = a real token, 0 = padding. It speaks of keys only.

    `attention_mask`: int or bool (b, k); padding may be on the right, on the left or inside. The result is
    `keys(flags)`, which answers for k keys and no more. Causality is the model's business there, so write
    `causal & from_huggingface_2d(m)`. Left padding shifts the positions as well: where the mask next to it counts
    positions (`prefix`, `blocks`), use `mask.padded(starts)`. Source: the glossary of transformers, "attention mask";
    4-D masks go through `from_torch_sdpa` (bool) or `from_additive` (float).

    >>> import torch
    >>> import truemask as tm
    >>> right = tm.from_huggingface_2d(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    >>> right
    keys([[True, True, False], [True, True, True]])
    >>> right.equivalent(tm.padding(lengths=[2, 3], on="keys"), 3)
    yes
    """
    where = "from_huggingface_2d"
    require_tensor(where, attention_mask)
    if attention_mask.ndim != 2:
        raise MaskError(
            f"{where}: attention_mask is {describe(attention_mask)}; a 2-D one is (b, k). "
            "A 4-D bool mask goes through from_torch_sdpa, a 4-D float one through from_additive"
        )
    return key_visibility(zeros_and_ones(where, "attention_mask", attention_mask))


@deferrable
def from_x_transformers(
    mask: Tensor | None = None, attn_mask: Tensor | None = None, *, heads: int | None = None
) -> Mask:
    """The masks of x-transformers' `Encoder`, `Decoder` and `Attention`: True = attend in both; they are ANDed.

    `mask`: bool (b, k), the real tokens (as in `from_huggingface_2d`;
    there it also zeroes the outputs of padded queries, which is no matter of attention). `attn_mask`: bool (q, k),
    (h, q, k) - the first axis is *heads*, not samples - or (b, h, q, k) where size 1 broadcasts. With `heads`
    given, a 3-D mask of another first size raises `MaskError`. Source: `Attention.forward` of x-transformers
    2.31.10.

    >>> import torch
    >>> import truemask as tm
    >>> mask = tm.from_x_transformers(attn_mask=torch.ones(2, 3, 3, dtype=torch.bool).tril())
    >>> mask.to_dense(3, heads=2).shape
    torch.Size([1, 2, 3, 3])
    """
    where = "from_x_transformers"
    parts: list[Mask] = []
    if attn_mask is not None:
        require_tensor(where, attn_mask)
        require_bool(where, "attn_mask", attn_mask)
        if attn_mask.ndim == 3:
            attn_mask = as_heads(where, attn_mask, heads)
        parts.append(from_cells(where, "attn_mask", attn_mask))
    if mask is not None:
        require_tensor(where, mask)
        require_bool(where, "mask", mask)
        if mask.ndim != 2:
            raise MaskError(f"{where}: mask is {describe(mask)}; it is (b, k), the real tokens. Is it an attn_mask?")
        parts.append(key_visibility(mask))
    return conjunction(*parts)


@deferrable
def from_keras(attention_mask: Tensor | None = None, use_causal_mask: bool = False) -> Mask:
    """The masks of Keras' `MultiHeadAttention`: True = attend, ANDed with a top-left causal one if asked.

    `attention_mask`: bool or 0/1, (b, q, k); (q, k) and (b, h, q, k) broadcast, as they do there. Source: the
    documentation of `keras.layers.MultiHeadAttention`, call arguments.

    >>> import torch
    >>> import truemask as tm
    >>> mask = tm.from_keras(torch.ones(2, 3, 3), use_causal_mask=True)
    >>> mask.select(samples=[0])[0, 1], mask.select(samples=[0])[1, 0]
    (False, True)
    """
    if attention_mask is None:
        return causal if use_causal_mask else everything
    require_tensor("from_keras", attention_mask)
    flags = zeros_and_ones("from_keras", "attention_mask", attention_mask, floats=True)
    mask = from_cells("from_keras", "attention_mask", flags, "bqk" if flags.ndim == 3 else None)
    return causal & mask if use_causal_mask else mask
