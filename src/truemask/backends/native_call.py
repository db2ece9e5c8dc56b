"""One call of the native kernel: the mask as it reads it, and its structure filled from tensors that stay in place."""

from __future__ import annotations

import math
from ctypes import c_int64
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from truemask.backends.base import Inputs
from truemask.backends.native_library import ArrayStruct, CallStruct, run
from truemask.geometry.logic import MIXED
from truemask.geometry.tiles import TileMap
from truemask.masks.biases import Alibi, Bias, Relative
from truemask.masks.hashing import threshold

TILE = 64  # queries and keys: what a row of a MIXED tile lets through is one 64-bit word
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TENSOR, ALIBI, RELATIVE = 1, 2, 3
FORK = 1 << 23  # additions and multiplications that are worth a thread


class Tiles(NamedTuple):
    """A mask as the kernel reads it: of every row of tiles the runs of key tiles, and the cells of MIXED ones."""

    shape: tuple[int, int]  # samples and heads that the mask tells apart
    starts: NDArray[np.int64]  # [samples * heads * rows of tiles + 1]
    runs: NDArray[np.int32]  # [runs, 3]: first tile, end, number of the pattern or -1: FULL
    words: NDArray[np.uint64]  # [patterns, 64]: bit j of word i is cell (i, j)
    order: NDArray[np.int64]  # rows of tiles, the longest first
    total: int  # tiles that run in the distinct samples and heads

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in self[1:5])


def tiles_of(map_: TileMap) -> Tiles:
    """The tile map with a run of its own for every MIXED tile, and each pattern of cells once."""
    mixed = map_.runs[:, 2] == MIXED
    sizes = np.where(mixed, map_.runs[:, 1] - map_.runs[:, 0], 1)
    starts = np.append(0, np.cumsum(sizes))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    first, last, state = (np.repeat(column, sizes) for column in map_.runs.T)
    runs = np.stack([first + within, np.where(state == MIXED, first + within + 1, last), np.full(len(first), -1)], 1)
    places = np.flatnonzero(state == MIXED)
    words: list[NDArray[np.uint64]] = [np.zeros((0, TILE), np.uint64)]
    known = 0
    for part in map_.patterns():
        count, height, width = part.cells.shape
        cells = np.zeros((count, TILE, TILE), bool)
        cells[:, :height, :width] = part.cells
        words.append(np.packbits(cells, axis=2, bitorder="little").view(np.uint64)[..., 0])
        runs[places[part.tiles], 2] = known + part.which
        known += count
    lengths = np.diff(np.append(0, np.cumsum(runs[:, 1] - runs[:, 0]))[starts[map_.row_starts]])
    order = np.argsort(-lengths.reshape(math.prod(map_.shape[:2]), map_.shape[2]).sum(0), kind="stable")
    total = int(lengths.sum())
    return Tiles(map_.shape[:2], starts[map_.row_starts], runs.astype(np.int32), np.concatenate(words), order, total)


class NativeCall:
    """What a call is without its tensors: the mask, numbers, and a bias in the kernel's terms."""

    name = "native"

    def __init__(self, tiles: Tiles, numbers: Inputs, bias: Tensor | Bias | None, positions: Any) -> None:
        self.tiles, self.bias = tiles, bias
        self.scale, self.softcap = numbers.scale, numbers.softcap or 0.0
        self.dropout, self.seed = numbers.dropout, numbers.seed
        self.positions = positions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """`out [b, hq, q, dv]` and `lse [b, hq, q]` over keys."""
        (b, h, n, _), dv = q.shape, v.shape[-1]
        out = torch.empty(b, n, h, dv, dtype=q.dtype).transpose(1, 2)
        lse = torch.empty(b, h, n)
        if not (out.numel() and k.shape[2]):
            return out.zero_(), lse.fill_(-torch.inf)
        call, held = self._described(q, k, v, out, lse)
        column = None if sinks is None else sinks.detach().float().contiguous()
        call.sinks = None if column is None else column.data_ptr()
        run("tm_forward", call)
        del held
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, extra: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv and `dout . out`; `lse` is that with the sinks, `extra` is added to the gradient of each score."""
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        delta = torch.zeros(lse.shape)
        if not (out.numel() and k.shape[2]):
            return dq.zero_(), dk.zero_(), dv.zero_(), delta
        call, held = self._described(q, k, v, out, lse)
        call.dout, call.dq, call.dk, call.dv_out = (_array(x) for x in (dout, dq, dk, dv))
        call.extra, call.delta = None if extra is None else extra.data_ptr(), delta.data_ptr()
        run("tm_backward", call)
        del held
        return dq, dk, dv, delta

    def _described(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[CallStruct, list[Any]]:
        """The structure, and what must outlive it."""
        (b, hq, nq, d), (_, hk, nk, dv) = q.shape, v.shape
        planes = b * hq // (self.tiles.shape[0] * self.tiles.shape[1])
        work = 2 * self.tiles.total * planes * min(nq, TILE) * TILE * (d + dv)
        threads = max(1, min(torch.get_num_threads(), work // FORK))
        call = CallStruct(b, hq, hk, nq, nk, d, dv, DTYPES[q.dtype], threads, self.scale, self.softcap)
        call.q, call.k, call.v, call.out = (_array(x) for x in (q, k, v, out))
        call.lse = lse.data_ptr()
        call.mask_b, call.mask_h = self.tiles.shape
        call.starts, call.runs, call.words, call.order = (x.ctypes.data for x in self.tiles[1:5])
        if self.dropout:
            call.drop_below, call.seed, call.keep_scale = threshold(self.dropout), self.seed, 1 / (1 - self.dropout)
        return call, self._bias(call)

    def _bias(self, call: CallStruct) -> list[Any]:
        """Fill in the bias; what must outlive the structure."""
        bias = self.bias
        if bias is None:
            return []
        if isinstance(bias, Tensor):
            numbers = bias.detach().float()
            call.bias_kind, call.bias = TENSOR, numbers.data_ptr()
            strides = [step if size > 1 else 0 for size, step in zip(numbers.shape, numbers.stride(), strict=True)]
            call.bias_strides = (c_int64 * 4)(*strides)
            return [numbers]
        numbers = bias.parameters[0].detach().float()
        if isinstance(bias, Alibi):
            call.bias_kind, numbers = ALIBI, numbers.contiguous().view(-1, 1)
        else:
            assert isinstance(bias, Relative)
            call.bias_kind, call.reach = RELATIVE, bias.reach
            zero, far = torch.zeros((), dtype=torch.int64), torch.arange(-bias.reach, bias.reach + 1)
            heads = torch.arange(bias.head_count)[:, None]
            numbers = bias.value(zero, heads, zero, far).detach().float().contiguous()
        call.bias = numbers.data_ptr()
        call.bias_strides = (c_int64 * 4)(0, numbers.stride(0) if len(numbers) > 1 else 0, 0, 0)
        sides = [side.to(torch.int64).contiguous() for side in self.positions]
        call.q_positions, call.k_positions = (side.data_ptr() for side in sides)
        call.q_stride, call.k_stride = (side.shape[1] if side.ndim == 2 and len(side) > 1 else 0 for side in sides)
        return [numbers, *sides]


def _array(x: Tensor) -> ArrayStruct:
    b, h, n, _ = x.stride()
    return ArrayStruct(x.data_ptr(), b, h, n)
