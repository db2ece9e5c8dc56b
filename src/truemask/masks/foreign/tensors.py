"""What the importers share: reading a tensor as "visible", with the name of the caller, and never by guessing."""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.real_tensors import is_late
from truemask.errors import MaskError
from truemask.masks.compose.per_axis import per_head
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.per_token import keys, queries


def require_tensor(where: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise MaskError(f"{where}: expected a torch tensor, got {describe(value)}; convert it with torch.as_tensor")


def require_bool(where: str, name: str, value: Tensor) -> None:
    if value.dtype != torch.bool:
        way = "from_additive" if value.is_floating_point() else f"{name}.bool() after checking which way round it is"
        raise MaskError(f"{where}: {name} is {describe(value)}, and it must be bool; use {way}{boolean_hint(value)}")


def boolean_hint(value: Tensor) -> str:
    """What to add to an error about numbers, if all of them are 0 or 1: then somebody wrote a boolean with numbers."""
    if is_late(value) or value.numel() == 0 or not bool(((value == 0) | (value == 1)).all()):
        return ""
    return (
        ". It holds only 0 and 1, so it looks like a boolean mask: from_torch_sdpa(m.bool()) if 1 = attend, "
        "from_torch_mha(m.bool()) if 1 = masked out, from_huggingface_2d(m.long()) if 1 = a real token (b, k)"
    )


def highest_hidden(dtype: torch.dtype) -> float:
    """The number added to scores at or below which a pair is hidden (law 1): half of the dtype's lowest.

    >>> highest_hidden(torch.float16)
    -32752.0
    """
    return torch.finfo(dtype).min / 2


def additive_visible(where: str, name: str, value: Tensor) -> Tensor:
    """Law 1 for floats: 0 is visible, at or below half of the lowest is hidden, and everything else is a bias."""
    require_tensor(where, value)
    if not value.is_floating_point():
        way = "from_torch_sdpa (True = attend) or from_torch_mha (True = masked out)"
        way = way if value.dtype == torch.bool else f"a float tensor of 0 and -inf{boolean_hint(value)}"
        raise MaskError(f"{where}: {name} is {describe(value)}, and an additive mask is float; use {way}")
    value = value.detach()
    visible = value == 0
    highest = highest_hidden(value.dtype)
    strange = ~(visible | (value <= highest))
    if not is_late(value) and bool(strange.any()):
        first = value[strange].flatten()[0].item()
        raise MaskError(
            f"{where}: {name} is {describe(value)} and holds {first:g}, which is a bias and not a mask: a mask holds 0 "
            f"(attend) and values at or below half of the dtype's lowest, {highest:g} (hidden). "
            f"Pass it to attend as bias=, or say what it hides: from_torch_sdpa(m > -1e4){boolean_hint(value)}"
        )
    return visible


def module_visible(where: str, name: str, value: Tensor) -> Tensor:
    """The convention of torch's modules: booleans are flipped, floats are additive, and the rest torch refuses too."""
    require_tensor(where, value)
    if value.is_floating_point():
        return additive_visible(where, name, value)
    require_bool(where, name, value)
    return ~value


def split_heads(visible: Tensor, num_heads: int | None) -> Tensor:
    size = visible.shape[0]
    if num_heads is None:
        raise MaskError(
            f"from_torch_mha: a 3-D attn_mask {list(visible.shape)} is (b * num_heads, q, k), and num_heads is not "
            "known: pass num_heads="
        )
    if num_heads < 1 or size % num_heads:
        raise MaskError(
            f"from_torch_mha: a 3-D attn_mask is (b * num_heads, q, k), and its first size {size} is not a multiple of "
            f"num_heads={num_heads}. One mask for each sample? Repeat it: m.repeat_interleave(num_heads, 0)"
        )
    return visible.unflatten(0, (size // num_heads, num_heads))


def as_heads(where: str, attn_mask: Tensor, heads: int | None) -> Tensor:
    if heads is not None and attn_mask.shape[0] not in (1, heads):
        raise MaskError(
            f"{where}: a 3-D attn_mask is (h, q, k) in x-transformers, and {list(attn_mask.shape)} does not have "
            f"{heads} heads. If its first axis is samples, pass attn_mask.unsqueeze(1), which is (b, 1, q, k)"
        )
    return attn_mask.unsqueeze(0)


def zeros_and_ones(where: str, name: str, value: Tensor, *, floats: bool = False) -> Tensor:
    """Flags from bool or 0/1 numbers; anything else is refused, with what it probably is."""
    if value.dtype == torch.bool:
        return value
    if value.is_floating_point() and not floats:
        raise MaskError(
            f"{where}: {name} is {describe(value)}, and it must be int or bool (1 = a real token). "
            f"If it is added to scores use from_additive; if it holds 0 and 1, {name}.long()"
        )
    flags = value == 1
    if not is_late(value) and not bool((flags | (value == 0)).all()):
        other = value[~flags & (value != 0)].flatten()[0].item()
        way = "documents(ids=...) or same(labels, none=0), if it numbers documents"
        way = "from_additive, if it is added to the scores" if value.is_floating_point() else way
        raise MaskError(f"{where}: {name} is {describe(value)} and holds {other}; expected only 0 and 1. Try {way}")
    return flags


def from_cells(where: str, name: str, visible: Tensor, axes: str | None = None) -> Mask:
    """(q, k), (b, h, q, k) or 3-D with `axes`; size 1 broadcasts: one row for all queries speaks of keys only."""
    cells = visible[None, None] if visible.ndim == 2 else visible
    if visible.ndim == 3 and axes in ("bqk", "hqk"):
        cells = visible.unsqueeze(1 if axes == "bqk" else 0)
    if cells.ndim == 4 and cells.numel() and bool(cells.shape[2] == 1) != bool(cells.shape[3] == 1):
        one_row = cells.shape[2] == 1
        read = key_visibility if one_row else queries
        heads = [read(line) for line in cells.squeeze(2 if one_row else 3).unbind(1)]
        return heads[0] if len(heads) == 1 else per_head(heads)
    try:
        return dense(visible, axes=axes)
    except MaskError as error:
        raise MaskError(f"{where}: {name} is {describe(visible)}: {error}") from None


def key_visibility(flags: Tensor) -> Mask:
    """The keys that are real; it answers for as many keys and samples as the tensor had (law 3)."""
    return keys(flags)
