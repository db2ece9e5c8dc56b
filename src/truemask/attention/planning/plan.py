"""The public question: which backend would run a call, and why (law 8)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from truemask.attention.call import AttendArgs, Call, read_call
from truemask.attention.planning.cache import CACHE
from truemask.attention.planning.selection import Plan
from truemask.attention.validation import check_flag, checked_length
from truemask.common.arguments import whole
from truemask.common.formatting import describe, suggest
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import from_text, not_a_mask


@overload
def plan(
    mask: Mask | Tensor | str | None,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    grad: bool = False,
    backend: str | None = None,
    **keywords: Any,
) -> Plan: ...


@overload
def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | str | None = None,
    *,
    backend: str | None = None,
    **keywords: Any,
) -> Plan: ...


def plan(*args: Any, backend: str | None = None, **keywords: Any) -> Plan:
    """Which backend would run a call, why, and at what predicted cost: `plan(mask, q_len)` or `plan(q, k, v, mask)`.

    Both take `attend`'s keywords (`bias`, `softcap`, `sink_logits`, `dropout`, `return_lse`, ...) and touch no data.

    Args:
        mask: as `attend` takes it.
        q_len: queries; then `kv_len`, keys (default: as many as positions have passed).
        batch: samples, and `heads`, `kv_heads` (default: heads), `head_dim=64`, `dtype=torch.float32`, `device="cpu"`.
            By default one sample and 8 heads, or as many as the mask holds data for.
        grad: whether the backward counts.
        q, k, v: tensors instead of sizes; on the meta device they stand for such tensors on the CPU.

    Raises:
        MaskError: the mask cannot answer for the sizes. PlanError: no backend, or not the one named, can run the call.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> plan(causal, q_len=1024, return_weights=True).backend
    'reference'
    >>> plan(causal & window(64), 512, softcap=30.0).objections["sdpa"]
    ['softcap: the kernel has no soft cap']
    """
    tensors = _speaks_of_tensors(args, keywords)
    call = (_from_tensors if tensors else _from_sizes)(**_by_name(args, keywords, tensors), backend=backend)
    entry = CACHE.entry(call.mask, call.request, call.backend)
    entry.proposal.forget()  # nobody may ever run it
    return entry.plan


def _speaks_of_tensors(args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether the arguments are those of `plan(q, k, v, mask)`; otherwise they are those of `plan(mask, q_len)`."""
    if not keywords.keys().isdisjoint("qkv"):
        return True
    if len(args) == 1:
        return isinstance(args[0], Tensor) and args[0].ndim == 4 and args[0].is_floating_point()
    return len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor)


def _by_name(args: tuple[Any, ...], keywords: dict[str, Any], tensors: bool) -> dict[str, Any]:
    """All arguments by name, checked against the names of their form."""
    form, other, places, needs = SIZES_FORM, TENSORS_FORM, ("mask", "q_len", "kv_len"), ("mask", "q_len")
    if tensors:
        form, other, places, needs = TENSORS_FORM, SIZES_FORM, ("q", "k", "v", "mask"), ("q", "k", "v")
    if len(args) > len(places):
        raise TypeError(f"plan takes ({', '.join(places)}) by place and the rest by name, got {len(args)} by place")
    named = dict(zip(places, args, strict=False))
    for name in keywords:
        if name in named:
            raise TypeError(f"plan was given {name} twice, by place and by name")
        if tensors and name in other and name not in form:
            raise TypeError(f"plan: sizes, dtype, device and grad come from the tensors: leave out {name!r}")
        if name not in form:
            raise TypeError(f"plan: there is no keyword {name!r}{suggest(name, form)}")
    named.update(keywords)
    for name in needs:
        if name not in named:
            raise TypeError(f"plan takes (mask, q_len, ...) or (q, k, v, mask, ...): {name} is missing")
    return named


def _from_tensors(q: Tensor, k: Tensor, v: Tensor, mask: object = None, **keywords: Any) -> Call:
    return read_call(q, k, v, mask, AttendArgs(**keywords))


def _from_sizes(
    mask: Mask | Tensor | str | None,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    grad: bool = False,
    **keywords: Any,
) -> Call:
    mask = from_text(mask)
    if isinstance(mask, (list, tuple)):
        raise MaskError(not_a_mask("plan: mask must be a mask expression, its text, a bool tensor or None", mask))
    if isinstance(q_len, Tensor) or not (mask is None or isinstance(mask, (Mask, Tensor))):
        first_two = f"{describe(mask)} and {describe(q_len)}"
        raise MaskError(f"plan takes (mask, q_len, ...) or (q, k, v, mask), got {first_two} first")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"plan: dtype must be a torch.dtype, got {describe(dtype)}")
    q_len, head_dim = whole(q_len, "q_len"), whole(head_dim, "head_dim", 1)
    if kv_len is None:
        kv_len = mask.kv_len_for(q_len) if isinstance(mask, Mask) else _keys_of(mask, q_len)
    if mask is not None:
        samples, mask_heads = (mask.batch_size, mask.head_count) if isinstance(mask, Mask) else _four_axes(mask)
        batch = _held(samples) if batch is None else batch
        heads = _held(mask_heads) if heads is None else heads
    batch, heads = 1 if batch is None else whole(batch, "batch"), 8 if heads is None else whole(heads, "heads", 1)
    kv_heads = heads if kv_heads is None else whole(kv_heads, "kv_heads", 1)
    q = torch.empty(batch, heads, q_len, head_dim, dtype=dtype, device="meta")
    k = torch.empty(batch, kv_heads, whole(kv_len, "kv_len"), head_dim, dtype=dtype, device="meta")
    call = read_call(q, k, k, mask, AttendArgs(**keywords), device=torch.device(device))
    checked_length(call.mask, batch, heads, q_len, k.shape[2], tensors=False)
    return call._replace(request=call.request._replace(grad=check_flag("grad", grad) or call.request.grad))


def _four_axes(mask: Tensor) -> tuple[int, int]:
    """The samples and heads of a bool tensor `[q, k]` or `[b, h, q, k]`."""
    return (mask.shape[0], mask.shape[1]) if mask.ndim == 4 else (1, 1)


def _keys_of(mask: Tensor | None, q_len: int) -> int:
    return mask.shape[-1] if mask is not None and mask.ndim else q_len


def _held(size: int) -> int | None:
    """For how many samples or heads a mask holds data, or None."""
    return size if size > 1 else None


def _names(*functions: Callable[..., Any]) -> frozenset[str]:
    names = (parameter for function in functions for parameter in inspect.signature(function).parameters)
    return frozenset(names) - {"keywords"}


PLANNED_KEYWORDS = frozenset(AttendArgs._fields) - {"backend", "preferred"}
SIZES_FORM, TENSORS_FORM = _names(_from_sizes) | PLANNED_KEYWORDS, _names(_from_tensors) | PLANNED_KEYWORDS
