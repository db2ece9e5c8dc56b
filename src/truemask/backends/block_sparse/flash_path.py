"""Strips run by torch's CPU flash kernel, strips side by side in its batch: a `Kernel` that `containment` can hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from truemask.backends.base import wide
from truemask.backends.block_sparse.cells import Cells, Sparse, folds, pieces
from truemask.backends.block_sparse.gather_scatter import put
from truemask.backends.shared.cpu_flash import Grads, fitted
from truemask.biases import Bias
from truemask.common.torch_internals import cpu_flash, cpu_flash_backward
from truemask.masks.core.mask import Mask

COPIED_BYTES = 1 << 24  # of what one call copies or makes


class StripKernel:
    """One call; see `Kernel`."""

    name = "block_sparse"

    def __init__(
        self,
        sparse: Sparse,
        mask: Mask,
        scale: float,
        bias: Tensor | Bias | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.sparse, self.mask, self.scale, self.bias = sparse, mask, scale, bias
        self.dead: Tensor | None = sparse.dead
        self._finds_dead = sparse.from_mask or bias is not None
        self._positions = positions

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self._results(q)
        dead = torch.ones(q.shape[:3], dtype=torch.bool) if self._finds_dead else None
        for cells in self._cells(k.shape[1], q, k, v, out, lse):
            additive = self._additive(cells, lse.dtype)
            strip_out, strip_lse = cpu_flash(
                cells.take_rows(q),
                _keys(cells, k, q),
                _keys(cells, v, q),
                0.0,
                cells.group.causal,
                attn_mask=additive,
                scale=self.scale,
            )
            cells.put_rows(out, strip_out)
            cells.put_rows(lse[..., None], strip_lse[..., None])
            if dead is not None:
                lost = torch.zeros(()) if additive is None else additive
                lost = (lost == -torch.inf).all(-1).expand(strip_lse.shape)
                cells.put_rows(dead[..., None], lost[..., None])
        if dead is not None:
            self.dead = dead if bool(dead.any()) else None
        return out, lse

    def _results(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse, to be filled; zeros for rows in no strip."""
        (b, h, n, d), dtype = q.shape, wide(q.dtype)
        new = torch.empty if self.sparse.covered else torch.zeros
        if b > 1 and folds(q):
            return new(b, h, n, d, dtype=q.dtype), new(b, h, n, dtype=dtype)
        return new(b, n, h, d, dtype=q.dtype).transpose(1, 2), new(b, n, h, dtype=dtype).transpose(1, 2)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Grads:
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        new = torch.empty if self.sparse.covered else torch.zeros
        dq = new(q.shape, dtype=q.dtype)
        dk, dv = torch.zeros(k.shape, dtype=k.dtype), torch.zeros(v.shape, dtype=v.dtype)
        for cells in self._cells(k.shape[1], q, k, v, out, lse, dout):
            gradients = cpu_flash_backward(
                cells.take_rows(dout),
                cells.take_rows(q),
                _keys(cells, k, q),
                _keys(cells, v, q),
                cells.take_rows(out),
                cells.take_rows(lse[..., None]).squeeze(-1),
                0.0,
                cells.group.causal,
                attn_mask=self._additive(cells, lse.dtype),
                scale=self.scale,
            )
            cells.put_rows(dq, gradients[0])
            cells.add_keys(dk, gradients[1])
            cells.add_keys(dv, gradients[2])
        return dq, dk, dv

    def sees(self, keys: Tensor, rows: int) -> Tensor:
        reached = torch.zeros(*keys.shape[:2], rows, dtype=torch.bool)
        for piece in pieces(self.sparse, keys.shape[1], keys, apart=True):
            bad, hit = piece.of(keys), piece.of(reached)
            for group in piece.groups:
                for part in group.parts(max(1, COPIED_BYTES // (8 * group.height * group.width))):
                    bad_keys = bad[:, group.key_index(part)].transpose(0, 1)  # strips, heads, keys
                    if bool(bad_keys.any()):
                        rows_reached = self._reached(Cells(piece, group, part), bad_keys)
                        put(
                            hit[..., None],
                            None,
                            group.row_index(slice(0, group.size)),
                            part,
                            group.real,
                            rows_reached[..., None],
                        )
        return reached

    def _reached(self, cells: Cells, there: Tensor) -> Tensor:
        """Which rows of strips see the keys named by `there [strips, heads, width]`: `[strips, heads, height]`."""
        if cells.group.causal and self.bias is None:
            return there.cumsum(-1) > 0
        additive = self._additive(cells, torch.float32)
        if additive is None:
            return there.any(-1, keepdim=True).expand(*there.shape[:2], cells.group.height)
        return ((additive != -torch.inf).float() @ there.float()[..., None]).squeeze(-1) > 0

    def _cells(self, kv_heads: int, *tensors: Tensor) -> Iterator[Cells]:
        """All cells, as many strips at a time as the chunk's bytes allow."""
        q = tensors[0]
        vector = q.shape[-1] * q.element_size()
        for piece in pieces(self.sparse, kv_heads, *tensors, apart=self._finds_dead):
            folded = len(q) if piece.sample is None else 1
            heads = (piece.heads.stop - piece.heads.start) * folded
            shared = (piece.kv_heads.stop - piece.kv_heads.start) * folded
            for group in piece.groups:
                area = group.height * group.width * 8
                masks = heads * area if self.bias is not None else area if group.from_mask else 0
                nbytes = 2 * (group.height * heads + group.width * shared) * vector + 2 * masks
                for part in group.parts(max(1, COPIED_BYTES // nbytes)):
                    yield Cells(piece, group, part)

    def _additive(self, cells: Cells, dtype: torch.dtype) -> Tensor | None:
        """The additive mask of some strips with the bias in it, `[1 or strips, 1 or heads, height, width]`."""
        group = cells.group
        if self.bias is None:
            if group.masking is not None:
                return group.masking.additive(cells.part, group.height, group.width, dtype)
            return _floats(cells.allowed(self.mask), dtype) if group.from_mask else None
        bias = torch.where(
            cells.allowed(self.mask), cells.bias(self.bias, self._positions).detach().to(dtype), -torch.inf
        )
        return bias.expand(*bias.shape[:2], group.height, group.width)


def _floats(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(allowed, torch.zeros((), dtype=dtype), -torch.inf)


def _keys(cells: Cells, x: Tensor, q: Tensor) -> Tensor:
    """The keys that strips take of k or v, as the kernel takes them beside q."""
    return fitted(cells.take_keys(x), q.shape[-1], q.dtype)
