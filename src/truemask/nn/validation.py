"""What a caller passes to the modules: tensors become masks, or an error says what was given, expected and meant.

True = may attend everywhere. Shapes: b batch, h heads, n positions (cached ones included), q rows, k keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.real_tensors import is_late
from truemask.common.warning import warn
from truemask.errors import MaskError
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.per_token import keys, queries


def require_bool(name: str, value: Tensor, like: Tensor) -> None:
    """Raise unless `value` is a bool tensor on the device of `like`."""
    if value.is_floating_point():
        raise MaskError(
            f"{name}= is {describe(value)}; a mask is bool and True means may attend. If it is added to scores "
            f"(0 and -inf), pass from_additive({name}); if it holds 0.0 and 1.0, {name}.bool()"
        )
    if value.dtype != torch.bool:
        raise MaskError(
            f"{name}= is {describe(value)}; a mask is bool and True means may attend. If 1 is a real token, 0 padding, "
            f"as in Hugging Face, pass {name}.bool() or from_huggingface_2d({name})"
        )
    if value.device != like.device:
        raise MaskError(
            f"{name}= is {describe(value)} and the input is on {like.device}: pass {name}.to({str(like.device)!r})"
        )


def read_padding(mask: Tensor, x: Tensor, batch: int, n: int, registers: int = 0) -> Mask:
    """The mask of a `(b, n)` bool tensor, True = a real token.

    A key that is padding is hidden and a query that is padding sees nothing (x-transformers' meaning), so its row of
    the attention's output is zeros. A `(1, n)` tensor is for all samples.
    """
    require_bool("mask", mask, x)
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != n:
        raise MaskError(_padding_shape(mask, batch, n, registers))
    if is_late(mask):
        return keys(mask) & queries(mask)
    if bool(mask.all()):
        return everything
    if mask.shape == (1, n) and bool(mask[0, 0]) and int(mask.sum()) == 1:
        _warn_one_key(n)
    flags = mask[0] if mask.shape[0] == 1 else mask
    return keys(flags) & queries(flags)


def _padding_shape(mask: Tensor, batch: int, n: int, registers: int) -> str:
    text = f"mask= is {describe(mask)}; key padding is bool [{batch}, {n}], (batch, positions). "
    if mask.ndim == 2 and tuple(mask.shape) == (n, n):
        return text + "A (q, k) matrix goes into attn_mask="
    if mask.ndim == 2 and registers and mask.shape[1] == n + registers:
        return text + f"The {registers} registers are added for you and seen by all: leave them out of the mask"
    if mask.ndim == 2 and mask.shape[1] > n:
        return text + f"It is {mask.shape[1] - n} longer than the input: cut it, mask[:, :{n}]"
    if mask.ndim == 2 and mask.shape[0] in (1, batch):
        return text + "With a cache it speaks of the cached positions too"
    if mask.ndim == 1 and mask.shape[0] == n:
        return text + "For all samples alike pass mask[None]"
    if mask.ndim > 2:
        return text + "A mask with queries and keys goes into attn_mask="
    return text + "Is another batch meant?"


def _warn_one_key(n: int) -> None:
    warn(
        f"mask= is [1, {n}] and keeps exactly one key, the first: a (1, n) tensor is key padding, not a triangle, and "
        f"`~torch.ones(1, {n}).bool().triu(1)` has a single row. A Decoder is causal already, so pass no mask; for a "
        "matrix of your own pass attn_mask= (q, k), or an expression such as mask=tm.causal & tm.window(256)"
    )


def read_matrix(attn_mask: Tensor, x: Tensor, batch: int, heads: int, n: int) -> Mask:
    """The mask of a bool tensor `(q, k)`, `(h, q, k)` or `(b, h, q, k)`, in which size 1 broadcasts.

    It speaks of all n positions, rows and keys. A 3-D tensor is x-transformers' `(h, q, k)`, and an error where its
    first size could also be, or can only be, samples.
    """
    require_bool("attn_mask", attn_mask, x)
    shape = tuple(attn_mask.shape)
    if attn_mask.ndim == 3:
        attn_mask = _read_three_axes(attn_mask, batch, heads)
    if attn_mask.ndim == 2:
        attn_mask = attn_mask[None, None]
    fits = attn_mask.ndim == 4 and all(
        size in (1, full) for size, full in zip(attn_mask.shape, (batch, heads, n, n), strict=True)
    )
    if not fits:
        hint = " (b, n) key padding goes into mask=" if shape == (batch, n) != (n, n) else ""
        raise MaskError(
            f"attn_mask= is {describe(attn_mask)}; expected (q, k) = [{n}, {n}] or (b, h, q, k) = "
            f"[{batch}, {heads}, {n}, {n}] with 1 where it does not vary.{hint}"
        )
    return dense(attn_mask.expand(-1, -1, n, n))


def _read_three_axes(attn_mask: Tensor, batch: int, heads: int) -> Tensor:
    first = attn_mask.shape[0]
    if first == 1 or (first == heads and first != batch):
        return attn_mask[None]
    both = "it fits both" if first == heads == batch else f"the model has {heads} heads and the input {batch} samples"
    raise MaskError(
        f"attn_mask= is {describe(attn_mask)}, and a 3-D one has two readings: per head, (h, q, k), which is "
        f"x-transformers' and is said by attn_mask[None], or per sample, (b, q, k), by attn_mask[:, None]; {both}. "
        "Pass the one that you mean"
    )
