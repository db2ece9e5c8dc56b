"""Strips in plain torch, for what the flash kernel cannot do: soft caps, dropout, gradients of biases.

The arithmetic is `eager`'s, so nothing crosses a masked cell, on the rows and keys of a few strips at a time. The
backward runs them once more and differentiates them one by one: beside results and gradients nothing outlives a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truemask.backends.base import Inputs, wide
from truemask.backends.block_sparse.cells import Cells, Sparse, pieces
from truemask.backends.shared.autograd import Gradients, attention
from truemask.backends.shared.eager import cells_attention
from truemask.backends.shared.masked_matmul import no_autocast
from truemask.masks.core.mask import Mask

BIAS = 4  # the leaf that is a tensor with as many cells as scores
SCORE_BYTES = 1 << 22  # of the scores of one chunk; about eight tensors of this size live at once


class StripMath(NamedTuple):
    """One call without its tensors."""

    sparse: Sparse
    mask: Mask
    numbers: Inputs  # of which scale, soft cap, dropout, seed and a bias object count; its tensors are empty or None
    positions: tuple[Tensor, Tensor] | None
    name: str = "block_sparse"

    def results(self, *tensors: Any) -> tuple[Tensor, Tensor]:
        return _forward(self, Leaves.of(tensors))

    def gradients(self, tensors: Any, results: Any, output_grads: Any, needed: Any) -> Gradients:
        with no_autocast(tensors[0].device):
            return _backward(self, Leaves.of(tensors), output_grads, needed)


class Leaves(NamedTuple):
    """The tensors of one call; `parameters` are those of a bias object."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    parameters: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: tuple[Any, ...]) -> Leaves:
        """The leaves that stand in a row."""
        q, k, v, sinks, bias, *parameters = tensors
        return cls(q, k, v, sinks, bias, tuple(parameters))


def math_attention(call: StripMath, leaves: Leaves, *, grad: bool) -> tuple[Tensor, Tensor]:
    """`out [b, hq, q, dv]` and `lse [b, hq, q]`, differentiable once if `grad`."""
    with no_autocast(leaves.q.device):
        return attention(call, (*leaves[:5], *leaves.parameters), grad=grad)


def _forward(call: StripMath, leaves: Leaves) -> tuple[Tensor, Tensor]:
    (b, h, n, _), dv = leaves.q.shape, leaves.v.shape[-1]
    out = leaves.q.new_zeros(b, h, n, dv)
    lse = leaves.q.new_full((b, h, n), -torch.inf)
    for cells in _cells(call, leaves):
        source = leaves.bias if leaves.bias is not None else call.numbers.bias
        bias = None if source is None else cells.bias(source, call.positions)
        sinks = None if leaves.sinks is None else leaves.sinks[cells.piece.heads]
        strip_out, strip_lse = _chunk(
            call, cells, (cells.take_rows(leaves.q), cells.take_keys(leaves.k), cells.take_keys(leaves.v)), sinks, bias
        )
        cells.put_rows(out, strip_out)
        cells.put_rows(lse[..., None], strip_lse[..., None])
    return out, lse


def _backward(
    call: StripMath, leaves: Leaves, grads: Sequence[Tensor | None], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of all leaves; None where nobody asked."""
    tensors = [*leaves[:5], *leaves.parameters]
    totals = [
        torch.zeros(x.shape, dtype=wide(x.dtype)) if x is not None and need else None
        for x, need in zip(tensors, needed, strict=True)
    ]
    for cells in _cells(call, leaves):
        output_grads = [None if x is None else cells.take_rows(x if x.ndim == 4 else x[..., None]) for x in grads]
        _add_gradients(call, cells, leaves, output_grads, totals)
    return tuple(
        total if total is None or x is None else total.to(x.dtype) for total, x in zip(totals, tensors, strict=True)
    )


def _add_gradients(
    call: StripMath, cells: Cells, leaves: Leaves, output_grads: list[Tensor | None], totals: list[Tensor | None]
) -> None:
    """Run one chunk again and add what it gives to the leaves' gradients."""
    with torch.enable_grad():
        qkv = [
            x.detach().requires_grad_()
            for x in (cells.take_rows(leaves.q), cells.take_keys(leaves.k), cells.take_keys(leaves.v))
        ]
        sinks = None if leaves.sinks is None else leaves.sinks.detach().requires_grad_()
        value = None
        if leaves.bias is not None:
            value = cells.bias(leaves.bias.detach(), None).requires_grad_()
        elif call.numbers.bias is not None:
            value = cells.bias(call.numbers.bias, call.positions)
        out, lse = _chunk(call, cells, qkv, None if sinks is None else sinks[cells.piece.heads], value)
        results = [out, lse[..., None]]
    pairs = [(x, g) for x, g in zip(results, output_grads, strict=True) if g is not None]
    sources = [*qkv, sinks, value if leaves.bias is not None else None, *leaves.parameters]
    wanted = [(i, x) for i, x in enumerate(sources) if x is not None and totals[i] is not None]
    gradients = torch.autograd.grad(
        [x for x, _ in pairs], [x for _, x in wanted], [g for _, g in pairs], allow_unused=True
    )
    grads: list[Tensor | None] = list(gradients)
    for (i, _), new in zip(wanted, grads, strict=True):
        total = totals[i]
        if new is not None and total is not None:
            _add(cells, i, total, new, leaves.bias)


def _add(cells: Cells, leaf: int, total: Tensor, new: Tensor, bias: Tensor | None) -> None:
    if leaf == 0:
        cells.put_rows(total, new)
    elif leaf < 3:
        cells.add_keys(total, new)
    elif leaf == BIAS and bias is not None:
        plane = cells.plane_of(total)
        _, rows, keys = cells.bias_place(bias)
        heads = torch.arange(len(plane)).view(-1, 1, 1, 1)
        plane.index_put_((heads, rows[None], keys[None]), new.movedim(0, 1).to(plane.dtype), accumulate=True)
    else:
        total += new


def _chunk(call: StripMath, cells: Cells, qkv: Any, sinks: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """out `[s, h, n, dv]` and lse `[s, h, n]` of some strips."""
    q = qkv[0]
    k, v = (x.to(q.dtype) for x in qkv[1:])
    shared = k.shape[1]

    def grouped(x: Tensor) -> Tensor:
        return x.unsqueeze(1) if x.shape[1] == 1 else x.unflatten(1, (shared, -1))

    allowed = cells.allowed(call.mask)
    keep = grouped(cells.kept(call.numbers)) if call.numbers.dropout else None
    added = None if bias is None else grouped(bias).to(q.dtype)
    column = None if sinks is None else sinks.view(shared, -1, 1)
    qkv = (q.unflatten(1, (shared, -1)), k, v)
    out, lse, _ = cells_attention(call.numbers, qkv, grouped(allowed), added, keep, column)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _cells(call: StripMath, leaves: Leaves) -> Iterator[Cells]:
    """All cells, a chunk at a time."""
    for piece in pieces(call.sparse, leaves.k.shape[1], leaves.q, apart=True):
        heads = piece.heads.stop - piece.heads.start
        for group in piece.groups:
            nbytes = heads * group.height * group.width * leaves.q.element_size()
            for part in group.parts(max(1, SCORE_BYTES // nbytes)):
                yield Cells(piece, group, part)
