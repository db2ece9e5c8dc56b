"""The portable sparse backend: strips of rows with the keys that they may see, by torch's own operators on the CPU.

| the call has                              | each group of strips runs                                       |
|-------------------------------------------|-----------------------------------------------------------------|
| nothing special, sinks, a bias            | in the CPU flash kernel and its backward (`strip_kernel`)       |
| a soft cap, dropout, gradients of a bias  | in plain torch, recomputed in the backward (`strip_math`)       |

What is EMPTY never runs, what is FULL runs without a mask. Beside what the call itself reads and returns there are
chunks of a few megabytes; half precision is computed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truemask.backends.base import Inputs, Job, Lowered, Request, Result, looked_at
from truemask.backends.contain import flash_attention
from truemask.backends.costs import seconds, table
from truemask.backends.flash import same_width
from truemask.backends.groups import CALL_CELLS, planes
from truemask.backends.strip_cells import Sparse
from truemask.backends.strip_kernel import StripKernel
from truemask.backends.strip_math import Leaves, StripMath, math_attention
from truemask.geometry.strips import Strips, from_cells, from_tiles
from truemask.geometry.tiles import TileMap
from truemask.masks.biases import Bias

FEW = 16  # rows that are looked at cell by cell
KEYS = 64  # keys of a tile
HEIGHTS = {32: 0.6, 64: 0.78, 128: 0.82, 192: 1.0, 256: 1.0}  # rows of a strip, and the kernel's speed with so many
MATH = 3.0  # how many times longer plain torch takes


@dataclass(frozen=True)
class Choice:
    """How tall strips are, and what is known of them before they are made."""

    height: int
    rows: float  # of tiles, over samples and heads, that see anything
    cells: float  # that run, for one head
    calls: float
    cost: float


class BlockSparse:
    """Torch's fused attention on what is not EMPTY."""

    name = "block_sparse"
    last_resort = False

    def objections(self, job: Job) -> list[str]:
        r = job.request
        lacks = [
            (r.device.type != "cpu", f"the device {r.device.type}: the kernel that runs the strips is the CPU's"),
            (r.return_weights, "return_weights: the weights are never held at once"),
            (bool(r.transform), f"{r.transform}: the kernel has no rule for it"),
        ]
        return [reason for lacking, reason in lacks if lacking]

    def cost(self, job: Job) -> float:
        return choice(job).cost

    def way(self, job: Job) -> str:
        chosen, r = choice(job), job.request
        if not chosen.rows:
            return "nothing to run"
        width = chosen.cells / (chosen.rows * chosen.height)
        share = chosen.cells / max(1, job.mask_batch * job.mask_heads * r.q_len * r.kv_len)
        return f"strips of {chosen.height} rows x {width:.0f} keys, {min(share, 1.0):.0%} of all cells"

    def lower(self, job: Job) -> Lowered:
        r = job.request
        strips = strips_of(job)
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        dead = strips.dead()
        covered = int(strips.heights.sum()) == strips.shape[0] * strips.shape[1] * r.q_len
        sparse = Sparse(
            planes(strips, dtype, r.heads if job.mask_heads == 1 else 1),
            (job.mask_batch, job.mask_heads),
            covered,
            torch.from_numpy(dead) if dead.any() else None,
            bool((strips.pattern == -2).any()),
        )
        return Lowered(sparse, sparse.nbytes)

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        r, sparse = job.request, lowered.data
        positions = job.mask.positions(r.q_len, r.kv_len) if isinstance(inputs.bias, Bias) else None
        compute = torch.float64 if r.dtype == torch.float64 else torch.float32
        q, k, v = (x.to(compute) for x in inputs[:3])
        if needs_math(r):
            call = StripMath(sparse, job.mask, inputs, positions)
            out, lse = math_attention(call, _leaves(q, k, v, inputs), grad=r.grad)
        else:
            bias = inputs.bias.detach() if isinstance(inputs.bias, Tensor) else inputs.bias
            kernel = StripKernel(sparse, job.mask, inputs.scale, bias, positions)
            out, lse = flash_attention(kernel, *same_width(q, k, v), inputs.sink_logits, grad=r.grad)
            out = out if out.shape[-1] == r.value_dim else out[..., : r.value_dim]
        return Result(out.to(r.dtype), lse if r.return_lse else None)


def needs_math(r: Request) -> bool:
    """Whether a call asks for what the flash kernel cannot do."""
    return r.softcap or r.dropout or r.bias_grad


def _leaves(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Leaves:
    bias = inputs.bias
    if isinstance(bias, Bias):
        return Leaves(q, k, v, inputs.sink_logits, None, bias.parameters)
    return Leaves(q, k, v, inputs.sink_logits, bias, ())


# -- how tall the strips are -------------------------------------------------------------------------------------------


def strips_of(job: Job) -> Strips:
    """The strips that a job runs."""
    r = job.request
    if r.q_len <= FEW or not r.kv_len:
        return from_cells(_few(job).numpy())
    return from_tiles(_tiles(job, choice(job).height))


def _few(job: Job) -> Tensor:
    """The cells of few rows."""
    if job.small is not None:
        return job.small
    return looked_at(job.mask, job.mask_batch, job.mask_heads, job.request.q_len, job.request.kv_len)


def _tiles(job: Job, height: int) -> TileMap:
    r = job.request
    return job.mask.tiles(r.q_len, r.kv_len, (height, KEYS), batch=r.batch, heads=r.heads)


def choice(job: Job) -> Choice:
    """The height that costs least, worked out once for each job."""
    if "strips" not in job.notes:
        job.notes["strips"] = _choose(job)
    return job.notes["strips"]


def _choose(job: Job) -> Choice:
    r = job.request
    if r.q_len <= FEW or not r.kv_len:
        cells = _few(job)
        widths = cells.any(2).sum(-1).flatten().numpy()
        return _considered(job, max(r.q_len, 1), widths, 0.4)
    tallest = max(r.q_len, min(HEIGHTS))
    return min(
        (
            _considered(job, height, _widths(_tiles(job, height)), speed)
            for height, speed in HEIGHTS.items()
            if height <= tallest
        ),
        key=lambda found: found.cost,
    )


def _widths(tiles: TileMap) -> np.ndarray:
    """Keys that each row of tiles runs."""
    sizes = np.minimum(tiles.runs[:, 1] * tiles.block[1], tiles.kv_len) - tiles.runs[:, 0] * tiles.block[1]
    sums = np.concatenate([[0], np.cumsum(sizes)])
    return sums[tiles.row_starts[1:]] - sums[tiles.row_starts[:-1]]


def _considered(job: Job, height: int, widths: np.ndarray, speed: float) -> Choice:
    """What strips of a height would cost, given how many keys each of them runs."""
    r, rates = job.request, table().block_sparse
    rows, cells = int((widths > 0).sum()), float(widths.sum()) * height
    samples = r.batch // max(1, job.mask_batch)
    heads = r.heads // max(1, job.mask_heads)
    most = len(np.unique(widths[widths > 0])) * job.mask_batch * job.mask_heads
    calls = max(1.0, min(most, 1 + cells * heads / CALL_CELLS)) * samples
    slower = (MATH if needs_math(r) else 1.0) / speed
    copied = 2 * float(widths.sum()) * samples * r.kv_heads / max(1, job.mask_heads) * (r.head_dim + r.value_dim) * 4
    cost = seconds(rates, r, cells * samples * heads * slower) + calls * rates.call_group
    if r.bias:
        cost += cells * samples * heads * 8 / rates.join
    if r.grad:
        cost += calls * rates.call_group
        copied *= 3
    return Choice(height, rows, cells, calls, cost + copied / rates.copy)
