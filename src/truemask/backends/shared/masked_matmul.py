"""One sum seen from three sides: the matrix products of attention, in which nothing crosses a masked cell (law 6).

With `w [g, n, m]`, `a [g, n, d]` and `c [m, d]`, and only over cells that `allowed [g, n, m]` lets through, the sum

    T(w, a, c) = sum over g, n, m, d of  w[g, n, m] * a[g, n, d] * c[m, d]

is linear in each of the three, and its derivatives with respect to them are

    outer(a, c)   [g, n, m]   scores from queries and keys, and the gradient of the weights
    gather(w, c)  [g, n, d]   each row's mixture of the keys that it may see
    scatter(w, a) [m, d]      what reaches each key from the rows that may see it

so each one's derivatives are the other two: three autograd functions that use each other have derivatives of every
order, backward, forward (`jvp`) and under `vmap`. A plain matrix product would not do, because 0 * NaN is NaN: here a
masked cell contributes nothing whatever it holds. `g` (query heads per key head) is a part of `n` in the products, so
shared keys are never repeated. All tensors may have further axes in front, which broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from truemask.backends.base import batched_refusal
from truemask.common.torch_internals import is_older_batch

Grads = tuple[Tensor | None, Tensor | None, None]


def outer(a: Tensor, c: Tensor, allowed: Tensor) -> Tensor:
    """`w[g, n, m] = sum over d of a[g, n, d] * c[m, d]` on allowed cells, 0 elsewhere."""
    _refuse_older_batches(a, c)
    return Outer.apply(a, c, allowed)  # pyright: ignore[reportReturnType]


def gather(w: Tensor, c: Tensor, allowed: Tensor) -> Tensor:
    """`a[g, n, d] = sum over allowed m of w[g, n, m] * c[m, d]`."""
    _refuse_older_batches(w, c)
    return Gather.apply(w, c, allowed)  # pyright: ignore[reportReturnType]


def scatter(w: Tensor, a: Tensor, allowed: Tensor) -> Tensor:
    """`c[m, d] = sum over allowed g, n of w[g, n, m] * a[g, n, d]`."""
    _refuse_older_batches(w, a)
    return Scatter.apply(w, a, allowed)  # pyright: ignore[reportReturnType]


def _refuse_older_batches(*tensors: Tensor) -> None:
    if any(is_older_batch(x) for x in tensors):
        raise batched_refusal("reference")


def _folded(x: Tensor) -> Tensor:
    """`[..., g, n, m]` as `[..., g * n, m]`."""
    return x.flatten(-3, -2)


def _unfolded(x: Tensor, like: Tensor) -> Tensor:
    """`[..., g * n, m]` as `[..., g, n, m]`, with the g and n of `like`."""
    return x.unflatten(-2, like.shape[-3:-1])


def contained_product(w: Tensor, x: Tensor, allowed: Callable[[], Tensor]) -> Tensor:
    """`w @ x`, where `w` is 0 on cells that are not allowed and such a cell adds 0 even if `x` is not finite there.

    What is not finite in `x` is taken out of the product and counted apart, by products of zeros and ones: an allowed
    NaN, or an infinity times 0, gives NaN, and infinities give theirs by sign.
    """
    if bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all()):
        return w @ x
    cells = allowed()
    total = w @ torch.where(torch.isfinite(x), x, 0)
    up, down, zero = (side.to(x.dtype) for side in (w > 0, w < 0, cells & (w == 0)))
    high, low, wrong = (places.to(x.dtype) for places in (x == torch.inf, x == -torch.inf, x.isnan()))
    for weight, place, reached in (
        (torch.inf, high, up),
        (torch.inf, low, down),
        (-torch.inf, low, up),
        (-torch.inf, high, down),
        (torch.nan, high + low, zero),
        (torch.nan, wrong, cells.to(x.dtype)),
    ):
        total = torch.where(reached @ place > 0, total + weight, total)
    return total


def no_autocast(device: torch.device) -> torch.autocast | nullcontext[None]:
    """Keeps autocast from rounding the products of a computation whose dtype is chosen."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _outer(a: Tensor, c: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed, _unfolded(_folded(a) @ c.mT, a), 0)


def _gather(w: Tensor, c: Tensor, allowed: Tensor) -> Tensor:
    weights = _folded(torch.where(allowed, w, 0))
    return _unfolded(contained_product(weights, c, lambda: _folded(allowed.expand(w.shape))), w)


def _scatter(w: Tensor, a: Tensor, allowed: Tensor) -> Tensor:
    # A key that many rows see gets a long sum: in fp64 it loses nothing, and law 10 holds for gradients too. Other
    # devices add in blocks, and some lack fp64.
    wide = torch.float64 if w.device.type == "cpu" else w.dtype
    weights, rows = _folded(torch.where(allowed, w, 0)).to(wide), _folded(a).to(wide)
    return contained_product(weights.mT, rows, lambda: _folded(allowed.expand(w.shape)).mT).to(w.dtype)


class _Side(Function):
    """What the three functions share: saving, `jvp` as the product rule, and `vmap` as one more axis in front."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)


def _product_rule(form: Any, ctx: Any, dx: Tensor | None, dy: Tensor | None) -> Tensor | None:
    x, y, allowed = ctx.saved_tensors
    parts = [form(dx, y, allowed)] if dx is not None else []
    parts += [form(x, dy, allowed)] if dy is not None else []
    return reduce(torch.add, parts) if parts else None


def _batched(
    form: Any, sizes: tuple[int, int, int], in_dims: tuple[int | None, ...], *tensors: Tensor
) -> tuple[Tensor, int]:
    """`form` with the mapped axis of each tensor in front of all the others."""
    rank = max(x.ndim - (dim is not None) - axes for x, dim, axes in zip(tensors, in_dims, sizes, strict=True))
    moved: list[Tensor] = []
    for x, dim, axes in zip(tensors, in_dims, sizes, strict=True):
        x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
        moved.append(x.reshape(x.shape[0], *[1] * (rank + axes + 1 - x.ndim), *x.shape[1:]))
    return form(*moved), 0


class Outer(_Side):
    """`outer`, with its derivatives."""

    @staticmethod
    def forward(a: Tensor, c: Tensor, allowed: Tensor) -> Tensor:
        return _outer(a, c, allowed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Grads:
        (grad,) = grads
        if grad is None:
            return None, None, None
        a, c, allowed = ctx.saved_tensors
        need_a, need_c, _ = ctx.needs_input_grad
        with no_autocast(grad.device):
            return gather(grad, c, allowed) if need_a else None, scatter(grad, a, allowed) if need_c else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        return _product_rule(outer, ctx, tangents[0], tangents[1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _batched(outer, (3, 2, 3), in_dims, *tensors)


class Gather(_Side):
    """`gather`, with its derivatives."""

    @staticmethod
    def forward(w: Tensor, c: Tensor, allowed: Tensor) -> Tensor:
        return _gather(w, c, allowed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Grads:
        (grad,) = grads
        if grad is None:
            return None, None, None
        w, c, allowed = ctx.saved_tensors
        need_w, need_c, _ = ctx.needs_input_grad
        with no_autocast(grad.device):
            return outer(grad, c, allowed) if need_w else None, scatter(w, grad, allowed) if need_c else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        return _product_rule(gather, ctx, tangents[0], tangents[1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _batched(gather, (3, 2, 3), in_dims, *tensors)


class Scatter(_Side):
    """`scatter`, with its derivatives."""

    @staticmethod
    def forward(w: Tensor, a: Tensor, allowed: Tensor) -> Tensor:
        return _scatter(w, a, allowed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Grads:
        (grad,) = grads
        if grad is None:
            return None, None, None
        w, a, allowed = ctx.saved_tensors
        need_w, need_a, _ = ctx.needs_input_grad
        with no_autocast(grad.device):
            return outer(a, grad, allowed) if need_w else None, gather(w, grad, allowed) if need_a else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        return _product_rule(scatter, ctx, tangents[0], tangents[1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _batched(scatter, (3, 3, 3), in_dims, *tensors)
