"""From a mask to the tensors that other libraries take: one function for each, named after who takes it."""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import expression


def to_torch_sdpa(
    mask: Mask | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A mask for `F.scaled_dot_product_attention(attn_mask=...)`: bool (b|1, h|1, q, k), True = attend.

    >>> import truemask as tm
    >>> tm.to_torch_sdpa(tm.causal, 2, 3)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0]]
    """
    mask = expression("to_torch_sdpa: mask", mask)
    return mask.to_dense(q_len, kv_len, batch=batch, heads=heads, device=device)


def to_additive(
    mask: Mask | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A mask to add to scores: (b|1, h|1, q, k) of `dtype`, 0 where the query may attend and -inf where not.

    It is -inf and not the lowest number, because a row of lowest numbers averages everything. A plain softmax of a
    row without keys is NaN; torch's fused attention and `attend` give zeros there.

    >>> import truemask as tm
    >>> tm.to_additive(tm.causal, 2)[0, 0].tolist()
    [[0.0, -inf], [0.0, 0.0]]
    """
    mask = expression("to_additive: mask", mask)
    if not dtype.is_floating_point:
        raise MaskError(f"to_additive: dtype is {dtype}; an additive mask is made of floats, e.g. dtype=torch.float32")
    visible = mask.to_dense(q_len, kv_len, batch=batch, heads=heads, device=device)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def to_torch_mha(
    mask: Mask | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The `attn_mask` of `nn.MultiheadAttention`: bool, True = masked OUT. It includes the padding: pass no other mask.

    (q, k) if the mask is the same for all samples and heads; otherwise (batch * num_heads, q, k), and then both
    numbers must be known: from the mask's own data, or given.

    >>> import truemask as tm
    >>> tm.to_torch_mha(tm.causal, 2).tolist()
    [[False, True], [False, False]]
    >>> tm.to_torch_mha(tm.padding(lengths=[1, 2], on="keys"), 2, num_heads=3).shape
    torch.Size([6, 2, 2])
    """
    mask = expression("to_torch_mha: mask", mask)
    visible = mask.to_dense(q_len, kv_len, batch=batch, heads=num_heads, device=device)
    b, h, q, k = visible.shape
    if b == h == 1:
        return ~visible[0, 0]
    for name, number, size in (("batch", batch, b), ("num_heads", num_heads, h)):
        if number is None and size == 1:
            raise MaskError(
                f"to_torch_mha: the mask varies (over {b} samples and {h} heads), so nn.MultiheadAttention wants "
                f"(batch * num_heads, q, k), and {name} is not known: pass {name}="
            )
    samples, heads = b if batch is None else batch, h if num_heads is None else num_heads
    return ~visible.expand(samples, heads, q, k).reshape(samples * heads, q, k)


def to_huggingface_2d(
    mask: Mask | str, kv_len: int, *, batch: int | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """The 2-D `attention_mask` of Hugging Face: int64 (b|1, k), 1 = a key that may be seen.

    Only for a mask that says the same to every query and head; otherwise `MaskError` (a causal model adds causality
    itself: pass the padding alone).

    >>> import truemask as tm
    >>> tm.to_huggingface_2d(tm.padding(lengths=[2, 3], on="keys"), 3).tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    mask = expression("to_huggingface_2d: mask", mask)
    rows = max(1, kv_len) if mask.varies_with_query else 1
    visible = mask.to_dense(rows, kv_len, batch=batch, device=device)
    for name, first in (("head", visible[:, :1]), ("query", visible[:, :, :1])):
        if not bool((visible == first).all()):
            raise MaskError(
                f"to_huggingface_2d: {mask} varies with the {name}, and a 2-D mask has one flag for each key. "
                "Pass only the padding (the model adds causality), or export 4-D with to_torch_sdpa"
            )
    samples = visible.shape[0] if batch is None else batch
    return visible[:, 0, 0].long().expand(samples, kv_len).clone()


def to_x_transformers(
    mask: Mask | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The `attn_mask` of x-transformers: bool, True = attend, (q, k) or (b|1, h|1, q, k), never the ambiguous 3-D.

    >>> import truemask as tm
    >>> tm.to_x_transformers(tm.causal, 2).tolist()
    [[True, False], [True, True]]
    """
    mask = expression("to_x_transformers: mask", mask)
    visible = mask.to_dense(q_len, kv_len, batch=batch, heads=heads, device=device)
    return visible[0, 0] if visible.shape[:2] == (1, 1) else visible


def to_keras(
    mask: Mask | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The `attention_mask` of Keras: bool (b|1, q, k), True = attend; (b|1, h, q, k) if the mask varies over heads.

    >>> import truemask as tm
    >>> tm.to_keras(tm.causal, 2).tolist()
    [[[True, False], [True, True]]]
    """
    mask = expression("to_keras: mask", mask)
    visible = mask.to_dense(q_len, kv_len, batch=batch, heads=heads, device=device)
    return visible[:, 0] if visible.shape[1] == 1 else visible
