"""`attend`: check, plan, run.

>>> import torch
>>> from truemask.masks.leaves.bands import causal
>>> q = k = v = torch.ones(1, 2, 5, 8)
>>> out, lse = attend(q, k, v, causal, scale=0.0, return_lse=True)
>>> lse.exp()[0, 0]  # how many keys each row may see
tensor([1., 2., 3., 4., 5.])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from truemask.attention.call import AttendArgs, read_call
from truemask.attention.compiled import attend_traced
from truemask.attention.decomposition import attend_plain
from truemask.attention.run import run
from truemask.backends.base import Result
from truemask.biases import Bias
from truemask.common.real_tensors import is_recorded
from truemask.masks.core.mask import Mask

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The keywords that do not change what `attend` returns."""

    bias: Tensor | Bias | None
    scale: float | None
    softcap: float | None
    sink_logits: Tensor | None
    dropout: float
    backend: str | None


Masked = Mask | Tensor | str | None


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Masked = None, **options: Unpack[Options]) -> Tensor: ...


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Masked = None, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Masked = None, *, return_weights: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Masked = None,
    *,
    return_lse: Literal[True],
    return_weights: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Masked = None,
    *,
    return_lse: bool = False,
    return_weights: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, ...]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Masked = None,
    *,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention under a mask, by the cheapest correct way to run it.

    With s = scale * q.k; s = softcap * tanh(s / softcap); s + bias; the mask; softmax with `sink_logits` as one more
    column; dropout: `out [b, hq, q, dv]` is that times v.

    Args:
        q: `[b, hq, q, d]`, any of float32, bfloat16, float16 and float64, like k and v.
        k: `[b, hkv, k, d]`; hq is a multiple of hkv, and query heads share key heads in blocks, as in LLaMA.
        v: `[b, hkv, k, dv]`.
        mask: a mask expression or its text (`"causal & window(256)"`), a bool tensor `[q, k]` or `[b, h, q, k]` (True =
            may attend), or None for everything.
            Row i of q is the mask's query i: if q continues earlier rows, say `mask.at(q_start=...)`.
        bias: added to the scores: floats that broadcast to `[b, hq, q, k]`, `alibi(...)`, `relative(...)`.
        scale: default 1 / sqrt(d).
        softcap: bounds scores to (-softcap, softcap); None does not.
        sink_logits: `[hq]`, a logit that takes part in each row's softmax and has no value.
        dropout: the share of weights dropped, in [0, 1). `torch.manual_seed` repeats it; every backend drops the same.
        backend: a name from `backends()`; None lets the plan choose (`plan(q, k, v, mask, ...)` says which and why).
        return_lse: also `[b, hq, q]`, the natural log of the sum of exp(s) over visible keys, without the sink;
            fp64 for doubles, else fp32.
        return_weights: also `[b, hq, q, k]`, what was multiplied by v: after sinks and dropout.

    Returns:
        out, or the tuple (out[, lse][, weights]). A query that may attend to nothing gets zeros, lse -inf and zero
        gradients (law 5); what it may not see cannot reach it, NaN included (law 6).

    Raises:
        MaskError: the mask cannot mean these sizes. PlanError: no backend can run the call. ValueError and TypeError:
        other arguments. A `ConventionWarning` says when a look-back mask is likely misaligned.

    >>> import torch
    >>> from truemask.masks.leaves.bands import causal, window
    >>> q = k = v = torch.ones(1, 2, 5, 8)
    >>> attend(q, k, v, causal & window(3)).shape
    torch.Size([1, 2, 5, 8])
    """
    args = AttendArgs(
        bias=bias, scale=scale, softcap=softcap, sink_logits=sink_logits, dropout=dropout, backend=backend,
        return_lse=return_lse, return_weights=return_weights,
    )  # fmt: skip
    result = results(q, k, v, mask, args)
    return tuple([x for x in result if x is not None]) if return_lse or return_weights else result.out


def results(q: Tensor, k: Tensor, v: Tensor, mask: Masked, args: AttendArgs) -> Result:
    """`attend` with its options as one value: out, and lse and weights where they were asked for."""
    if torch.compiler.is_dynamo_compiling():
        return attend_traced(q, k, v, mask, args)
    if is_recorded():
        return attend_plain(q, k, v, mask, args)
    return run(read_call(q, k, v, mask, args))
