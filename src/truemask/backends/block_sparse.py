"""The portable sparse backend: strips of rows with the keys that they may see, by torch's own operators on the CPU.

| the call has                              | each group of strips runs                                       |
|-------------------------------------------|-----------------------------------------------------------------|
| nothing special, sinks, a bias            | in the CPU flash kernel and its backward (`strip_kernel`)       |
| a soft cap, dropout, gradients of a bias  | in plain torch, recomputed in the backward (`strip_math`)       |

What is EMPTY never runs, what is FULL runs without a mask. Beside what the call itself reads and returns there are
chunks of a few megabytes; half precision is computed in fp32.
"""

from __future__ import annotations

import math
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
from truemask.geometry.slab_strips import from_slabs
from truemask.geometry.slabs import Slabs
from truemask.geometry.strips import ASKED, CAUSAL, Strips, from_cells
from truemask.geometry.tile_strips import from_tiles, rough
from truemask.geometry.tiles import TileMap
from truemask.masks.biases import Bias

STRIPS, CHOICE = "block_sparse strips", "block_sparse choice"  # in a job's notes
FEW = 16  # rows that are looked at cell by cell
KEYS = 64  # keys of a tile
HEIGHTS = (64, 96, 128, 192, 256)  # rows of a strip that are tried, the first only without gradients
# Rows of a strip, and the kernel's speed with so many, forward and backward.
SPEED_AT = (1, 16, 32, 64, 96, 128, 192, 512)
SPEED = (0.1, 0.55, 0.7, 0.8, 0.81, 0.84, 0.97, 1.0)
SPEED_BACKWARD = (0.1, 0.3, 0.5, 0.72, 0.88, 0.95, 1.0, 1.0)
FLAG = 512  # columns beyond the diagonal that the causal flag runs
MATH = 3.0  # how many times longer plain torch takes
MANY = 1 << 17  # rows, in all samples and heads, beyond which strips are made for one height only
MOST_ENDS = 1 << 14  # of runs that are cut into strips; others are tiled


@dataclass(frozen=True)
class Choice:
    """How tall strips are, what they cost, and what they are in words."""

    height: int
    cost: float
    words: str


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
        return choice(job).words

    def lower(self, job: Job) -> Lowered:
        r = job.request
        strips = strips_of(job)
        job.notes.pop(STRIPS, None)  # what is lowered is all that stays
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        heads = r.heads if job.mask_heads == 1 else 1
        dead = strips.dead()
        covered = int(strips.heights.sum()) == strips.shape[0] * strips.shape[1] * r.q_len
        sparse = Sparse(
            planes(strips, dtype, heads, heads * (r.head_dim + r.value_dim) * dtype.itemsize),
            (job.mask_batch, job.mask_heads),
            covered,
            torch.from_numpy(dead) if dead.any() else None,
            bool((strips.pattern == ASKED).any()),
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
    """The strips that a job runs, made once."""
    r = job.request
    few = r.q_len <= FEW or not r.kv_len
    if STRIPS not in job.notes and not few:
        height = choice(job).height  # which may have made them
        if STRIPS not in job.notes:
            return _made(job, height)
    return job.notes[STRIPS] if STRIPS in job.notes else from_cells(_few(job).numpy())


def choice(job: Job) -> Choice:
    """The height that costs least, worked out once."""
    if CHOICE not in job.notes:
        few = job.request.q_len <= FEW or not job.request.kv_len
        job.notes[CHOICE] = _choice(job, job.request.q_len, strips_of(job)) if few else _least(job)
    return job.notes[CHOICE]


def _few(job: Job) -> Tensor:
    """The cells of few rows."""
    if job.small is not None:
        return job.small
    return looked_at(job.mask, job.mask_batch, job.mask_heads, job.request.q_len, job.request.kv_len)


def _least(job: Job) -> Choice:
    """Strips of several heights are made if the mask has an exact form and they are few; or else tiles are counted."""
    r = job.request
    some = HEIGHTS[1:] if r.grad else HEIGHTS
    heights = [height for height in some if height <= max(r.q_len, some[0])]
    exact = job.mask_batch * job.mask_heads * r.q_len <= MANY and slabs_of(job) is not None
    found = [(height, _made(job, height) if exact else rough(_tiles(job, height))) for height in heights]
    choices = [_choice(job, *pair) for pair in found]
    best = min(range(len(found)), key=lambda i: choices[i].cost)
    if exact:
        job.notes[STRIPS] = found[best][1]
    return choices[best]


def _choice(job: Job, height: int, strips: Strips) -> Choice:
    r = job.request
    rows, area = int(strips.heights.sum()), int(np.dot(strips.heights, strips.widths))
    share = area / max(1, math.prod(strips.shape) * r.q_len * r.kv_len)
    words = f"strips of up to {height} rows x {area / max(1, rows):.0f} keys, {share:.0%} of all cells"
    return Choice(height, cost_of(strips, job), words)


def _made(job: Job, height: int) -> Strips:
    r, slabs = job.request, slabs_of(job)
    if slabs is None:
        return from_tiles(_tiles(job, height))
    return from_slabs(slabs, r.q_len, r.kv_len, (job.mask_batch, job.mask_heads), height)


def _tiles(job: Job, height: int) -> TileMap:
    r = job.request
    return job.mask.tiles(r.q_len, r.kv_len, (height, KEYS), batch=r.batch, heads=r.heads)


def slabs_of(job: Job) -> list[tuple[int, int, Slabs]] | None:
    """The exact form of every sample and head, those that are the same as one object; None if there is none."""
    r, left = job.request, MOST_ENDS
    members, which = job.mask._variants(job.mask_batch, job.mask_heads)
    found: list[Slabs] = []
    for b, h in members:
        slabs = job.mask._exact(b, h, r.q_len, r.kv_len)
        if slabs is None or slabs.ends.shape[1] > left:
            return None
        left -= slabs.ends.shape[1]
        found.append(slabs)
    return [(b, h, found[which[b, h]]) for b, h in np.ndindex(*which.shape)]


def cost_of(strips: Strips, job: Job) -> float:
    """Predicted seconds."""
    r, rates = job.request, table().block_sparse
    samples, heads = r.batch // max(1, strips.shape[0]), r.heads // max(1, strips.shape[1])
    heights, widths = strips.heights, strips.widths
    causal = strips.pattern == CAUSAL
    cells = heights * np.where(causal, np.minimum(widths, (widths + FLAG) / 2), widths) * (samples * heads)
    times = MATH if needs_math(r) else 1.0
    cost = seconds(rates, r._replace(grad=False), float((cells / np.interp(heights, SPEED_AT, SPEED)).sum()) * times)
    kinds = len(np.unique(np.stack([strips.b, strips.h, strips.pattern, widths]), axis=1).T)
    calls = min(kinds, 1 + cells.sum() / CALL_CELLS) * samples
    shared = max(1, r.kv_heads // max(1, strips.shape[1]))
    gathered = 4 * samples * shared * (r.head_dim + r.value_dim) * float(widths[np.diff(strips.starts) > 1].sum())
    if r.grad:
        slow = float((cells / np.interp(heights, SPEED_AT, SPEED_BACKWARD)).sum()) * times
        both = seconds(rates, r, slow) - seconds(rates, r._replace(grad=False), slow)
        cost, calls, gathered = cost + both, 2 * calls, 4 * gathered
    if r.bias:
        cost += float(cells.sum()) * 8 / rates.join
    return cost + calls * rates.call_group + gathered / rates.copy
