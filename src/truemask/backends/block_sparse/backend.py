"""The portable sparse backend: strips of rows with the keys that they may see, by torch's own operators on the CPU.

| the call has                              | each group of strips runs                                       |
|-------------------------------------------|-----------------------------------------------------------------|
| nothing special, sinks, a bias            | in the CPU flash kernel and its backward (`flash_path`)         |
| a soft cap, dropout, gradients of a bias  | in plain torch, recomputed in the backward (`math_path`)        |

What is EMPTY never runs, what is FULL runs without a mask. Beside what the call itself reads and returns there are
chunks of a few megabytes; half precision is computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from truemask.backends.backend import Backend, Capabilities, Proposal
from truemask.backends.base import Inputs, Job, Lowered, Request, Result, evaluated_cells
from truemask.backends.block_sparse.batching import CALL_CELLS, planes
from truemask.backends.block_sparse.cells import Sparse
from truemask.backends.block_sparse.flash_path import StripKernel
from truemask.backends.block_sparse.from_slabs import from_slabs
from truemask.backends.block_sparse.from_tiles import estimated, from_tiles
from truemask.backends.block_sparse.math_path import Leaves, StripMath, math_attention
from truemask.backends.block_sparse.strips import CAUSAL, FROM_MASK, Strips, from_cells
from truemask.backends.costs.model import table
from truemask.backends.costs.prediction import BACKWARD_PRODUCTS, Blocks, blocks_of, flash_seconds, paces
from truemask.backends.costs.rates import Pace
from truemask.backends.shared.containment import flash_attention
from truemask.backends.shared.cpu_flash import fitted
from truemask.biases import Bias
from truemask.common.real_tensors import remembered
from truemask.geometry.slabs.slabs import Slabs
from truemask.geometry.tiles.tile_map import TileMap

DIRECT_ROWS = 16  # rows that are looked at cell by cell
TILE_KEYS = 64  # keys of a tile
HEIGHTS = (64, 96, 128, 192, 256)  # rows of a strip that are tried
FLAG_COLUMNS = 512  # columns beyond the diagonal that the causal flag runs
MATH_SLOWDOWN = 3.0  # how many times longer plain torch takes
MAX_ROWS_CUT = 1 << 17  # rows, in all samples and heads, beyond which strips are made for one height only
MAX_CUT_RUNS = 1 << 14  # of runs that are cut into strips; others are tiled


@dataclass(frozen=True)
class StripHeight:
    """How tall strips are, what they cost, and what they are in words."""

    height: int
    cost: float
    words: str


class BlockSparse(Backend):
    """Torch's fused attention on what is not EMPTY."""

    name = "block_sparse"
    devices: ClassVar = {
        "cpu": Capabilities(frozenset(("grad", "bias", "bias_grad", "softcap", "sinks", "dropout", "return_lse")))
    }
    tolerance: ClassVar = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    words: ClassVar = {
        "device": "the device {device.type}: the kernel that runs the strips is the CPU's",
        "return_weights": "return_weights: the weights are never held at once",
        "transform": "{transform}: the kernel has no rule for it",
    }

    def propose(self, job: Job) -> Proposal | list[str]:
        return self.lacking(job.request) or StripsProposal(job)

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        r, sparse = job.request, lowered.data
        positions = job.positions if r.bias_object else None
        compute = r.compute_dtype
        q, k, v = inputs[:3]
        later = sparse.few_keys and not r.grad  # converting a whole cache would take longer than a step of decoding
        if needs_math(r):
            q, k, v = q.to(compute), k if later else k.to(compute), v if later else v.to(compute)
            out, lse = math_attention(_math(sparse, inputs, job, positions), _leaves(q, k, v, inputs), grad=r.grad)
        else:
            bias = inputs.bias.detach() if isinstance(inputs.bias, Tensor) else inputs.bias
            kernel = StripKernel(sparse, job.mask, inputs.scale, bias, positions)
            width = max(r.head_dim, r.value_dim)
            q = fitted(q, width, compute)
            k, v = (k, v) if later else (fitted(x, width, compute) for x in (k, v))
            out, lse = flash_attention(kernel, q, k, v, inputs.sink_logits, grad=r.grad)
            out = out if width == r.value_dim else out[..., : r.value_dim]
        return Result(out.to(r.dtype), lse if r.return_lse else None)


def needs_math(r: Request) -> bool:
    """Whether a call asks for what the flash kernel cannot do."""
    return r.softcap or r.dropout or r.bias_grad


def _math(sparse: Sparse, inputs: Inputs, job: Job, positions: tuple[Tensor, Tensor] | None) -> StripMath:
    """The call without its tensors: what a backward keeps of them it saves by autograd's own means."""
    none = inputs.q.new_empty(0)
    bias = inputs.bias if isinstance(inputs.bias, Bias) else None
    return StripMath(sparse, job.mask, inputs._replace(q=none, k=none, v=none, bias=bias, sink_logits=None), positions)


def _leaves(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Leaves:
    bias = inputs.bias
    if isinstance(bias, Bias):
        return Leaves(q, k, v, inputs.sink_logits, None, bias.parameters)
    return Leaves(q, k, v, inputs.sink_logits, bias, ())


# -- how tall the strips are -------------------------------------------------------------------------------------------


class StripsProposal(Proposal):
    """Strips of the height that costs least."""

    @remembered
    def choice(self) -> StripHeight:
        """The height, what it costs and what it is in words."""
        if self.is_short:
            return _priced(self.job, self.job.request.q_len, self.strips)
        return min((_priced(self.job, *pair) for pair in self._heights()), key=lambda one: one.cost)

    @property
    def cost(self) -> float:
        return self.choice.cost

    @property
    def description(self) -> str:
        return self.choice.words

    def lower(self) -> Lowered:
        job, r, strips = self.job, self.job.request, self.strips
        dtype = r.compute_dtype
        heads = r.heads if job.mask_heads == 1 else 1
        dead = strips.dead()
        covered = int(strips.heights.sum()) == strips.shape[0] * strips.shape[1] * r.q_len
        sparse = Sparse(
            planes(strips, dtype, heads, heads * (r.head_dim + r.value_dim) * dtype.itemsize),
            (job.mask_batch, job.mask_heads),
            covered,
            torch.from_numpy(dead) if dead.any() else None,
            bool((strips.pattern == FROM_MASK).any()),
            int(strips.widths.sum()) < strips.shape[0] * strips.shape[1] * r.kv_len,
        )
        return Lowered(sparse, sparse.nbytes)

    def forget(self) -> None:
        for name in ("strips", "tiles"):
            vars(self).pop(name, None)

    @property
    def is_short(self) -> bool:
        """Whether the rows are so few that they are looked at cell by cell."""
        return self.job.request.q_len <= DIRECT_ROWS or not self.job.request.kv_len

    @remembered
    def strips(self) -> Strips:
        """The strips that run, with their patterns; forgotten once lowered, as are tiles."""
        return from_cells(_direct_cells(self.job).numpy()) if self.is_short else self._cut(self.choice.height)

    @remembered
    def tiles(self) -> dict[int, TileMap]:
        """The tile maps that were asked for, by height."""
        return {}

    def _tiles(self, height: int) -> TileMap:
        job, r, tiles = self.job, self.job.request, self.tiles
        if height not in tiles:
            tiles[height] = job.mask.tiles(r.q_len, r.kv_len, (height, TILE_KEYS), batch=r.batch, heads=r.heads)
        return tiles[height]

    def _heights(self) -> Iterator[tuple[int, Strips]]:
        """Strips of several heights are cut if the mask has an exact form and they are few; or else tiles are counted.

        Where no tile of the lowest strips is EMPTY, none of higher ones is, and the highest cost least.
        """
        job, r = self.job, self.job.request
        lowest, *others = (height for height in HEIGHTS if height <= max(r.q_len, HEIGHTS[0]))
        if job.mask_batch * job.mask_heads * r.q_len <= MAX_ROWS_CUT and slabs_of(job) is not None:
            yield from ((height, self._cut(height, drawn=False)) for height in (lowest, *others))
            return
        tiles = self._tiles(lowest)
        yield lowest, estimated(tiles)
        for height in others if tiles.counts.empty else others[-1:]:
            yield height, estimated(self._tiles(height))

    def _cut(self, height: int, *, drawn: bool = True) -> Strips:
        job, r, slabs = self.job, self.job.request, slabs_of(self.job)
        if slabs is None:
            return from_tiles(self._tiles(height))
        return from_slabs(slabs, r.q_len, r.kv_len, (job.mask_batch, job.mask_heads), height, drawn=drawn)


def _direct_cells(job: Job) -> Tensor:
    """The cells of few rows."""
    if job.small is not None:
        return job.small
    return evaluated_cells(job.mask, job.mask_batch, job.mask_heads, job.request.q_len, job.request.kv_len)


def slabs_of(job: Job) -> list[tuple[int, int, Slabs]] | None:
    """The exact form of every sample and head, those that are the same as one object; None if there is none."""
    exact = job.exact
    if exact is None or sum(slabs.runs for slabs in exact.slabs) > MAX_CUT_RUNS:
        return None
    return [(b, h, exact.slabs[exact.which[b, h]]) for b, h in np.ndindex(*exact.which.shape)]


def _priced(job: Job, height: int, strips: Strips) -> StripHeight:
    r = job.request
    rows, area = int(strips.heights.sum()), int(np.dot(strips.heights, strips.widths))
    share = area / max(1, math.prod(strips.shape) * r.q_len * r.kv_len)
    words = f"strips of up to {height} rows x {area / max(1, rows):.0f} keys, {share:.0%} of all cells"
    return StripHeight(height, cost_of(strips, job), words)


def cost_of(strips: Strips, job: Job) -> float:
    """Predicted seconds."""
    r, rates = job.request, table().block_sparse
    samples, heads = r.batch // max(1, strips.shape[0]), r.heads // max(1, strips.shape[1])
    heights, widths = strips.heights, strips.widths
    causal = strips.pattern == CAUSAL
    cells = heights * np.where(causal, np.minimum(widths, (widths + FLAG_COLUMNS) / 2), widths) * (samples * heads)
    times = MATH_SLOWDOWN if needs_math(r) else 1.0
    forward, backward = (_as_torchs(pace, r, way) for way, pace in enumerate(paces(rates, r)))
    tasks = float(blocks_of(heights, 1).sum()) * samples * heads
    blocks = Blocks(heights, cells, float(blocks_of(heights, widths).sum()) * samples * heads, tasks)
    cost = rates.call + flash_seconds(rates, forward, r, blocks, times)
    kinds = len(np.unique(np.stack([strips.b, strips.h, strips.pattern, widths]), axis=1).T)
    calls = min(kinds, 1 + cells.sum() / CALL_CELLS) * samples
    shared = max(1, r.kv_heads // max(1, strips.shape[1]))
    gathered = 4 * samples * shared * (r.head_dim + r.value_dim) * float(widths[np.diff(strips.starts) > 1].sum())
    if r.grad:
        cost += rates.call_backward + flash_seconds(rates, backward, r, blocks, times * BACKWARD_PRODUCTS)
        calls, gathered = 2 * calls, 4 * gathered
    if r.bias:
        cost += float(cells.sum()) * 8 / rates.join
    return cost + calls * rates.call_group + gathered / rates.copy


def _as_torchs(pace: Pace, r: Request, way: int) -> Pace:
    """The pace with what few rows lose in torch's kernel, which computes in fp32 or fp64 here."""
    theirs = paces(table().sdpa, r._replace(dtype=r.compute_dtype))[way]
    return replace(theirs, d64=pace.d64, d128=pace.d128, step=pace.step)
