"""The checks of `attend` and `plan`: what was given, what was expected and the likely cause, before anything runs."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from truemask.biases import Bias
from truemask.common.formatting import counted, describe
from truemask.common.torch_internals import is_batched
from truemask.errors import MaskError, PlanError
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import from_text, not_a_mask
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.predicate import current

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_POSITIVE = torch.finfo(torch.float32).tiny  # below it, dividing by a number gives NaN
MAX_WEIGHT_BYTES = 8 << 30  # bytes of `return_weights` that are surely a mistake


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q is `[b, hq, q, d]`, k `[b, hkv, k, d]`, v `[b, hkv, k, dv]`, of one float dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attend: {name} must be a tensor [batch, heads, length, head size], got {describe(x)}")
        if x.is_nested:
            raise TypeError(
                f"attend: {name} is a nested tensor: pad the sequences to one length and mask what is no token "
                "(`padding(lengths=[...])`), or lay them end to end and use `mask.packed([...])`"
            )
        if x.ndim != 4 or x.layout != torch.strided:
            raise ValueError(_wrong_rank(name, x))
    (b, hq, _, d), (bk, hk, nk, dk), (bv, hv, nv, dv) = q.shape, k.shape, v.shape
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(_wrong_dtypes(q, k, v))
    if not q.device == k.device == v.device:
        raise ValueError(f"attend: q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if not (b == bk == bv and nk == nv and hk == hv and d == dk and d and dv and hk and hq and hq % hk == 0):
        raise ValueError(_wrong_sizes(q, k, v))


def _wrong_rank(name: str, x: Tensor) -> str:
    text = f"attend: {name} must be a dense tensor [batch, heads, length, head size], got {describe(x)}"
    if x.ndim == 3:
        return (
            f"{text}: likely without its head axis. For one head use `{name}.unsqueeze(1)`; for a projection "
            f"[b, n, h * d] use `{name}.unflatten(-1, (heads, -1)).transpose(1, 2)`"
        )
    return f"{text}: likely without its batch axis, `{name}.unsqueeze(0)`" if x.ndim == 2 else text


def _wrong_dtypes(q: Tensor, k: Tensor, v: Tensor) -> str:
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    text = f"attend: q, k and v must have one dtype of {names}; got {q.dtype}, {k.dtype} and {v.dtype}"
    if not all(x.is_floating_point() for x in (q, k, v)):
        return f"{text}: integers are likely token ids that were not embedded, complex numbers are not supported"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"{text}: likely a cache or a projection kept in another dtype; convert with `.to(q.dtype)`"
    return text


def _wrong_sizes(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which of the sizes disagree, the likeliest cause first."""
    (b, hq, _, d), (bk, hk, nk, dk), (bv, hv, nv, dv) = q.shape, k.shape, v.shape
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    head = f"attend: {shapes} as [batch, heads, length, head size]: "
    if not b == bk == bv:
        return (
            f"{head}batch sizes {b}, {bk} and {bv} differ; to share keys among samples use `k.expand({b}, -1, -1, -1)`"
        )
    if d != dk:
        return f"{head}q's head size {d} is not k's {dk}, and scores are products of the two; was `.mT` taken of one?"
    if not (d and dv and hq and hk):
        return f"{head}heads and head sizes must be at least 1"
    if hk != hv:
        return f"{head}k has {counted(hk, 'head')} and v {hv}, and each key head needs its value head"
    if nk != nv:
        return f"{head}k has {counted(nk, 'key')} and v {nv}, and each key needs its value"
    are = "is" if hq == 1 else "are"
    heads = f"{counted(hq, 'query head')} {are} no multiple of {counted(hk, 'key head')}"
    return f"{head}{heads}{layout_hint(q, k)}"


def layout_hint(q: Tensor, k: Tensor) -> str:
    """A guess that the axes of length and heads are the wrong way round."""
    if q.shape[2] == k.shape[2] or q.shape[1] > q.shape[2]:
        return (
            "; likely the layout is [batch, length, heads, head size]: use `.transpose(1, 2)` on q, k and v"
            f" (and on the result), which makes q {list(q.transpose(1, 2).shape)}"
        )
    return ""


# -- the mask ----------------------------------------------------------------------------------------------------------


def as_mask(mask: object, batch: int, heads: int, q_len: int, kv_len: int) -> Mask:
    """What the caller gave as a mask, as one: None is `everything`, text is parsed, a bool tensor is `dense`."""
    if mask is None:
        return everything
    if isinstance(mask, Mask) and mask.batch_size != 1 and batch == 0:
        mask._check(q_len, kv_len)
        return everything  # there is no sample whose rows it could hide
    if isinstance(mask, Mask):
        return current(mask) if mask.functions else mask
    if isinstance(mask, str):
        return from_text(mask)
    if not isinstance(mask, Tensor):
        raise MaskError(not_a_mask("attend: mask must be a mask expression, its text, a bool tensor or None", mask))
    sizes = (batch, heads, q_len, kv_len)
    check_mask_tensor(mask, *sizes)
    if mask.is_meta:
        raise MaskError(
            f"attend: the mask is a meta tensor ({describe(mask)}), which has no values, and what a mask lets through "
            "is asked before anything runs: give an expression (`causal & window(64)`), or the tensor on a device"
        )
    if is_batched(mask):
        raise PlanError(
            "attend: a mask tensor that vmap maps over has no values of its own to plan with, whatever the backend: "
            "give all of them as the samples of one call, `[b, h, q, k]` outside of vmap, or loop over them"
        )
    if mask.ndim == 2:
        return dense(mask)
    return dense(mask.expand(-1, -1, q_len, kv_len)) if batch else everything


def check_mask_tensor(mask: Tensor, batch: int, heads: int, q_len: int, kv_len: int) -> None:
    """Raise unless it is bool and `[q, k]` or `[b, h, q, k]`, 1 where it does not vary."""
    if mask.dtype != torch.bool:
        raise MaskError(_not_bool(mask))
    sizes = (batch, heads, q_len, kv_len)
    four = mask.ndim == 4 and all(length in (1, size) for length, size in zip(mask.shape, sizes, strict=True))
    two = mask.ndim == 2 and all(length == size for length, size in zip(mask.shape, sizes[2:], strict=True))
    if not four and not two:
        raise MaskError(_wrong_mask_shape(mask, sizes))


def _not_bool(mask: Tensor) -> str:
    text = (
        f"attend: a mask is bool (True = may attend), got {describe(mask)}, which does not say what its numbers mean. "
    )
    if mask.is_floating_point():
        return (
            f"{text}For 0 and -inf (or the dtype's lowest) use `from_additive(mask)`; "
            "other numbers are a bias: `attend(..., bias=tensor)`"
        )
    return (
        f"{text}For 1 = real token and 0 = padding `[b, n]` use `from_huggingface_2d(mask)`; for 1 = may attend use "
        "`mask.bool()`; for torch's MultiheadAttention, where True is masked out, use `from_torch_mha(...)`"
    )


def _wrong_mask_shape(mask: Tensor, sizes: tuple[int, int, int, int]) -> str:
    b, h, q, k = sizes
    text = (
        f"attend: a bool mask is [q, k] = [{q}, {k}] or [b, h, q, k] = [{b}, {h}, {q}, {k}] (size 1 where it does not "
        f"vary), got {describe(mask)}"
    )
    shape = tuple(mask.shape)
    if shape in ((b, k), (1, k), (k,)):
        return f"{text}: likely key padding (True = real token), which is `keys(mask)`, as in `causal & keys(mask)`"
    if mask.ndim == 3:
        return (
            f'{text}, and three axes can be read two ways: `dense(mask, axes="bqk")` ({mask.shape[0]} samples) or '
            f'`dense(mask, axes="hqk")` ({mask.shape[0]} heads)'
        )
    if q != k and shape[-2:] == (k, q):
        return f"{text}: likely transposed, `mask.mT`"
    if shape[-2:] == (h, h) and h != q:
        return f"{text}: likely q is [batch, length, heads, head size]; use `.transpose(1, 2)` on q, k and v"
    return text


# -- the other arguments -----------------------------------------------------------------------------------------------


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    """`value` as a finite float, or an error that names the argument."""
    if type(value) is float and math.isfinite(value) and (not positive or value >= MIN_POSITIVE):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _finite(value):
        if isinstance(value, Tensor):
            raise TypeError(f"attend: {name} must be a number, got {describe(value)}: take `.item()` of a tensor")
        raise ValueError(f"attend: {name} must be a finite number, got {describe(value)}")
    if positive and not float(value) >= MIN_POSITIVE:
        tiny = f", and {MIN_POSITIVE:.2g} at least" if float(value) > 0 else ""
        raise ValueError(f"attend: {name} must be above 0{tiny}, got {value}; None means none")
    return float(value)


def _finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def check_dropout(value: object) -> float:
    """`value` as a probability below 1."""
    if type(value) is float and value == 0:
        return value
    rate = check_number("dropout", value)
    if not 0 <= rate < 1:
        likely = f"; did you mean {rate / 100}?" if 1 < rate < 100 else ""
        raise ValueError(f"attend: dropout must be in [0, 1), the share of weights to drop, got {value}{likely}")
    return rate


def check_flag(name: str, value: object) -> bool:
    """`value`, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"attend: {name} must be True or False, got {describe(value)}")
    return value


def check_bias(bias: object, sizes: tuple[int, int, int, int], device: torch.device | None) -> Tensor | Bias | None:
    """A float tensor with four axes that broadcasts to `[b, h, q, k]`, or a bias object for so many heads.

    `device` is that of q; None if q is a meta tensor, which stands for one elsewhere.
    """
    if bias is None:
        return None
    if isinstance(bias, Bias):
        if bias.head_count not in (1, sizes[1]):
            raise ValueError(
                f"attend: {bias!r} holds numbers for {counted(bias.head_count, 'head')}, but q has {sizes[1]}"
            )
        return bias
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"attend: bias must be a float tensor, `alibi(...)`, `relative(...)` or None, got {describe(bias)}"
        )
    if bias.dtype == torch.bool:
        raise TypeError(f"attend: bias is added to the scores, but got {describe(bias)}: a bool tensor is a mask")
    if not bias.is_floating_point():
        raise TypeError(f"attend: bias must be floats, got {describe(bias)}")
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if bias.ndim > 4 or any(length not in (1, size) for length, size in zip(shape, sizes, strict=True)):
        raise ValueError(f"attend: bias must broadcast to [b, h, q, k] = {list(sizes)}, got {describe(bias)}")
    if device is not None and bias.device != device:
        raise ValueError(f"attend: bias is on {bias.device}, but q is on {device}")
    return bias.view(shape)


def check_sinks(sinks: object, heads: int, device: torch.device | None) -> Tensor | None:
    """One float for each query head; `device` as for a bias."""
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point() or tuple(sinks.shape) != (heads,):
        raise ValueError(f"attend: sink_logits must be a float tensor [query heads] = [{heads}], got {describe(sinks)}")
    if device is not None and sinks.device != device:
        raise ValueError(f"attend: sink_logits are on {sinks.device}, but q is on {device}")
    return sinks


def check_weights(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Raise if the weights would not fit in any reasonable memory."""
    nbytes = math.prod(sizes) * dtype.itemsize
    if nbytes > MAX_WEIGHT_BYTES:
        raise ValueError(
            f"attend: return_weights=True would hold {nbytes / 2**30:.0f} GiB ({list(sizes)}): ask for some rows, "
            "`attend(q[:, :, a:b], k, v, mask.at(q_start=a), return_weights=True)`"
        )


def checked_length(mask: Mask, batch: int, heads: int, q_len: int, kv_len: int, *, tensors: bool = True) -> None:
    """Raise if the mask cannot answer for the sizes of the call (law 3), with those sizes in the message.

    Without `tensors` there is none whose axes could be the wrong way round, and the number of heads may be a default.
    """
    try:
        mask.check(q_len, kv_len, batch=batch, heads=heads)
    except MaskError as error:
        swapped = "; if heads and length are the wrong way round, use `.transpose(1, 2)`"
        sizes = [counted(batch, "sample"), counted(heads, "head"), counted(q_len, "query"), counted(kv_len, "key")]
        raise MaskError(
            f"{error} (the call has {', '.join(sizes[:3])} and {sizes[3]}"
            f"{swapped if tensors and heads > q_len > 1 else ''})"
        ) from None
