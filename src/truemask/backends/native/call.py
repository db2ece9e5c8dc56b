"""One call of the native kernel: the mask as it reads it, and its structure filled from tensors that stay in place."""

from __future__ import annotations

import math
from ctypes import c_int64
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from truemask.backends.base import Inputs, JobSlabs
from truemask.backends.native.abi import (
    ALIBI,
    ALL,
    ARRAYS,
    DTYPES,
    ENDS,
    RELATIVE,
    SIZES_AND_ARRAYS,
    SLABS,
    TENSOR,
    TILE,
    ArrayStruct,
    CallStruct,
)
from truemask.backends.native.library import run
from truemask.backends.shared.autograd import Gradients
from truemask.biases import Alibi, Relative
from truemask.geometry.logic import MIXED
from truemask.geometry.tiles.tile_map import TileMap
from truemask.masks.hashing import threshold

THREAD_WORK = 1 << 23  # additions and multiplications that are worth a thread
THREAD_BYTES = 1 << 19  # bytes of keys and values: few queries wait for those


class Ends(NamedTuple):
    """The slabs of all samples and heads, as the kernel works out a row's ends from them."""

    first: NDArray[np.int64]  # [samples * heads * rows of tiles]: the slab of the first row of each
    rows: NDArray[np.int64]  # [slabs + 1 of each]
    starts: NDArray[np.int64]
    low: NDArray[np.int64]  # [runs]: 2 * the place on row 0 + whether it moves
    high: NDArray[np.int64]

    @classmethod
    def of(cls, exact: JobSlabs | None, rows_of_tiles: int) -> Ends:
        """Laid end to end; empty without an exact form."""
        if exact is None:
            return cls(*[np.zeros(1, np.int64)] * 5)
        top = np.arange(rows_of_tiles) * TILE
        slabs, runs = 0, 0
        first, starts = [], []
        for part in exact.slabs:
            first.append(slabs + np.searchsorted(part.rows, top, "right") - 1)
            starts.append(runs + part.starts)
            slabs, runs = slabs + len(part.rows), runs + part.runs
        rows = np.concatenate([part.rows for part in exact.slabs])
        low, high = np.concatenate([part.lines for part in exact.slabs], axis=1)
        return cls(np.stack(first)[exact.which].ravel(), rows, np.concatenate(starts), low.copy(), high.copy())


class Tiles(NamedTuple):
    """A mask as the kernel reads it: of every row of tiles the runs of key tiles, and the cells of MIXED ones."""

    shape: tuple[int, int]  # samples and heads that the mask tells apart
    starts: NDArray[np.int64]  # [samples * heads * rows of tiles + 1]
    runs: NDArray[np.int32]  # [runs, 3]: first tile, end, number of the pattern or ALL or SLABS
    words: NDArray[np.uint64]  # [patterns, 64]: bit j of word i is cell (i, j)
    order: NDArray[np.int64]  # rows of tiles, the longest first
    ends: Ends
    total: int  # tiles that run in the distinct samples and heads
    template: CallStruct  # with what says the mask filled in; every call starts from a copy

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (*self[1:5], *self.ends))


def tiles_of(map_: TileMap, exact: JobSlabs | None) -> Tiles:
    """The tile map; cells of MIXED tiles are asked of the exact form, or else stored, each pattern once."""
    if exact is None:
        starts, runs, words = _stored(map_)
    else:
        kinds = np.where(map_.runs[:, 2] == MIXED, SLABS, ALL)
        starts, words = map_.row_starts, np.zeros((1, TILE), np.uint64)
        runs = np.concatenate([map_.runs[:, :2], kinds[:, None]], axis=1)
    lengths = np.diff(np.append(0, np.cumsum(runs[:, 1] - runs[:, 0]))[starts])
    order = np.argsort(-lengths.reshape(math.prod(map_.shape[:2]), map_.shape[2]).sum(0), kind="stable")
    ends = Ends.of(exact, map_.shape[2])
    runs = np.ascontiguousarray(runs, np.int32)
    starts = np.ascontiguousarray(starts)
    template = CallStruct(mask_b=map_.shape[0], mask_h=map_.shape[1])
    arrays = zip(("starts", "runs", "words", "order", *ENDS), (starts, runs, words, order, *ends), strict=True)
    for name, array in arrays:
        setattr(template, name, array.ctypes.data)
    return Tiles(map_.shape[:2], starts, runs, words, order, ends, int(lengths.sum()), template)


def _stored(map_: TileMap) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """Runs with one of its own for every MIXED tile, and each pattern of cells once."""
    mixed = map_.runs[:, 2] == MIXED
    sizes = np.where(mixed, map_.runs[:, 1] - map_.runs[:, 0], 1)
    starts = np.append(0, np.cumsum(sizes))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    first, last, state = (np.repeat(column, sizes) for column in map_.runs.T)
    runs = np.stack([first + within, np.where(state == MIXED, first + within + 1, last), np.full(len(first), ALL)], 1)
    places = np.flatnonzero(state == MIXED)
    words: list[NDArray[np.uint64]] = [np.zeros((1, TILE), np.uint64)]
    number = 1
    for part in map_.patterns():
        count, height, width = part.cells.shape
        cells = part.cells
        if (height, width) != (TILE, TILE):
            cells = np.zeros((count, TILE, TILE), bool)
            cells[:, :height, :width] = part.cells
        words.append(np.packbits(cells, axis=2, bitorder="little").view(np.uint64)[..., 0])
        runs[places[part.tiles], 2] = number + part.which
        number += count
    return starts[map_.row_starts], runs, np.concatenate(words)


class NativeCall:
    """An `AttentionImpl`: the mask, numbers, and a bias in the kernel's terms."""

    name = "native"

    def __init__(self, tiles: Tiles, numbers: Inputs, positions: Any, grad: bool, in_parts: bool, row: int = 0) -> None:
        self.tiles, self.bias, self.grad, self.in_parts, self.row = tiles, numbers.bias, grad, in_parts, row
        self.scale, self.softcap = numbers.scale, numbers.softcap or 0.0
        self.dropout, self.seed = numbers.dropout, numbers.seed
        self.positions = positions

    def results(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, ...]:
        """`out [b, hq, q, dv]`, `lse [b, hq, q]` over keys, and for a backward its two parts in binary digits."""
        (b, h, n, _), dv = q.shape, v.shape[-1]
        out = torch.empty(b, n, h, dv, dtype=q.dtype).transpose(1, 2)
        lse = torch.empty(b, h, n)
        parts = (torch.empty(b, h, n), torch.empty(b, h, n)) if self.grad else ()
        if not (out.numel() and k.shape[2]):
            return out.zero_(), *(x.fill_(-torch.inf) for x in (lse, *parts))
        call, held = self.described(q, k, v, out, sinks)
        call.lse = lse.data_ptr()
        if parts:
            call.base, call.log_total = (x.data_ptr() for x in parts)
        run("tm_forward", call)
        del held
        return out, lse, *parts

    def gradients(self, tensors: Any, results: Any, output_grads: Any, needed: Any) -> Gradients:
        """Of q, k, v and the sinks."""
        (q, k, v, sinks), (out, lse, base, log_total), (dout, dlse) = tensors, results, output_grads
        dout = torch.zeros_like(out) if dout is None else dout if dout.stride(-1) == 1 else dout.contiguous()
        dead = lse == -torch.inf
        if dlse is not None:
            dlse = dlse.masked_fill(dead, 0).contiguous()
        if sinks is None:
            return *self._backward(q, k, v, out, base, log_total, dout, dlse, None)[:3], None
        column = sinks.float()[:, None] * math.log2(math.e) - base.masked_fill(dead, 0)
        merged = torch.logaddexp2(log_total, column).masked_fill(dead, -torch.inf)
        keys_log_total = None if dlse is None else log_total
        *grads, delta = self._backward(q, k, v, out, base, merged, dout, dlse, keys_log_total)
        reached = (-torch.exp2(column - merged) * delta).masked_fill(dead, 0)
        return *grads, reached.sum((0, 2)).to(sinks.dtype)

    def _backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        base: Tensor,
        log_total: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        keys_log_total: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """dq, dk, dv and `dout . out`; `log_total` is that with the sinks if there are some, the other without."""
        dq, dk, dv = (_laid_out_as(x) for x in (q, k, v))
        delta = torch.zeros(base.shape)
        if not (out.numel() and k.shape[2]):
            return dq.zero_(), dk.zero_(), dv.zero_(), delta
        call, held = self._described(q, k, v, out)
        call.base, call.log_total = base.data_ptr(), log_total.data_ptr()
        call.dout, call.dq, call.dk, call.dv_out = (ArrayStruct(*_array(x)) for x in (dout, dq, dk, dv))
        call.delta = delta.data_ptr()
        call.dlse, call.keys_log_total = (None if x is None else x.data_ptr() for x in (dlse, keys_log_total))
        run("tm_backward", call)
        del held
        return dq, dk, dv, delta

    def described(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sinks: Tensor | None
    ) -> tuple[CallStruct, list[Any]]:
        """The structure, and what must outlive it."""
        call, held = self._described(q, k, v, out)
        column = None if sinks is None else sinks.detach().float().contiguous()
        call.sinks = None if column is None else column.data_ptr()
        return call, [*held, column]

    def _described(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[CallStruct, list[Any]]:
        """The same without sinks, which a backward finds in the log-sum-exp."""
        (b, hq, nq, d), (_, hk, nk, dv) = q.shape, v.shape
        tiles = self.tiles.total * (b * hq // (self.tiles.shape[0] * self.tiles.shape[1]))
        work = 2 * tiles * min(nq, TILE) * TILE * (d + dv)
        reading = tiles * hk // hq * TILE * (d + dv) * q.element_size()
        threads = max(1, min(torch.get_num_threads(), max(work // THREAD_WORK, reading // THREAD_BYTES)))
        call = CallStruct.from_buffer_copy(self.tiles.template)
        numbers = b, hq, hk, nq, nk, d, dv, DTYPES[q.dtype], threads, self.in_parts, self.scale, self.softcap
        SIZES_AND_ARRAYS.pack_into(call, 0, *numbers, *_array(q), *_array(k), *_array(v), *_array(out))
        call.mask_row = self.row
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


class Repeated:
    """A call without gradients for more tensors: its structure is filled in once, and a copy pointed at each three."""

    def __init__(self, call: NativeCall, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
        self._call, self._sinks = call, sinks
        self._out, self._lse = (q.shape[0], q.shape[2], q.shape[1], v.shape[3]), q.shape[:3]
        self._struct, self._held = call.described(q, k, v, q, sinks)
        self._is_empty = not (q.numel() and k.shape[2])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out `[b, h, q, dv]`."""
        q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
        if self._is_empty:
            return self._call.results(q, k, v, self._sinks)[0]
        out, lse = torch.empty(self._out, dtype=q.dtype).transpose(1, 2), torch.empty(self._lse)
        call = CallStruct.from_buffer_copy(self._struct)
        ARRAYS.pack_into(call, CallStruct.q.offset, *_array(q), *_array(k), *_array(v), *_array(out), lse.data_ptr())
        run("tm_forward", call)
        return out


def _laid_out_as(x: Tensor) -> Tensor:
    """Room for its gradient, in its own layout: `[b, n, h, d]` in memory, if that is how a model made it."""
    room = torch.empty_like(x)
    return room if room.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype)


def _array(x: Tensor) -> tuple[int, ...]:
    """The fields of an `ArrayStruct`."""
    return (x.data_ptr(), *x.stride()[:3])
