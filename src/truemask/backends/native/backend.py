"""The native kernel: `csrc/`, called on torch's memory. One pass over the tiles that a mask lets through.

What is EMPTY costs nothing, what is FULL runs without a mask. What a row sees of a MIXED tile is worked out from the
ends of its slab's runs, or else read: 64 words, identical tiles once. fp32, bf16 and fp16 are computed in fp32, or bf16
in products of pairs where the processor has them. Laws 5 and 6 hold inside: what is masked is selected away rather than
multiplied by zero. Results are bit for bit the same whatever the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from truemask.backends.base import Inputs, Job, Lowered, Result, reasons
from truemask.backends.costs.model import seconds, table
from truemask.backends.native.call import TILE, NativeCall, tiles_of
from truemask.backends.native.library import missing
from truemask.backends.shared.autograd import attention, tensors_of
from truemask.biases import Bias
from truemask.common.formatting import memory
from truemask.geometry.tiles.tile_map import TileCounts, TileMap
from truemask.masks.leaves.matrices import Dense

FEW = 8  # rows up to which keys are read as they lie; for more they are packed before
SIZE = "native size"  # in a job's notes
MOST_WORDS = 1 << 28  # bytes of the cells of MIXED tiles


class Native:
    """The kernel of `csrc/`."""

    name = "native"
    last_resort = False

    def objections(self, job: Job) -> list[str]:
        r = job.request
        lacks = [
            (r.device.type != "cpu", f"the device {r.device.type}: the kernel is the CPU's"),
            (bool(missing()), f"there is no native kernel: {missing()}"),
            (r.dtype == torch.float64, "float64: the kernel computes in float32"),
            (r.bias == "object", "a bias of another class than alibi and relative: the kernel cannot ask it"),
            (r.bias_grad, "the gradient of a bias: the kernel has none"),
            (r.return_weights, "return_weights: the weights are never held at once"),
            (bool(r.transform), f"{r.transform}: the kernel has no rule for it"),
        ]
        return reasons(lacks) or _too_many_words(job)

    def cost(self, job: Job) -> float:
        r, counts = job.request, _size(job).counts
        planes = (r.batch // max(1, job.mask_batch)) * (r.heads // max(1, job.mask_heads))
        cells = (counts.mixed + counts.full) * min(r.q_len, TILE) * TILE * planes
        rows = r.q_len * (r.heads // r.kv_heads if job.mask_heads == 1 else 1)
        keys = r.batch * r.kv_heads * r.kv_len * (r.head_dim + r.value_dim) * 4  # bytes, of all that might be read
        reading = keys * min(1, cells / max(1, r.cells)) * (1 if rows <= FEW else 2)
        return seconds(table().native, r, cells) + reading / table().native.read

    def way(self, job: Job) -> str:
        counts = _size(job).counts
        return f"{counts.full} full and {counts.mixed} mixed tiles of {TILE} x {TILE}"

    def lower(self, job: Job) -> Lowered:
        tiles = tiles_of(_tiles(job), job.exact)
        return Lowered(tiles, tiles.nbytes)

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        r = job.request
        positions = job.mask.positions(r.q_len, r.kv_len) if isinstance(inputs.bias, Bias) else None
        call = NativeCall(lowered.data, inputs, inputs.bias, positions)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs[:3])
        out, lse = attention(call, (q, k, v, inputs.sink_logits), tensors_of(inputs.bias), grad=r.grad)
        return Result(out, lse if r.return_lse else None)


def _tiles(job: Job) -> TileMap:
    r = job.request
    return job.mask.tiles(r.q_len, r.kv_len, TILE, batch=job.mask_batch, heads=job.mask_heads)


class Size(NamedTuple):
    """How many tiles there are of each state, and the bytes of the words of MIXED ones without an exact form."""

    counts: TileCounts
    words: int


def _size(job: Job) -> Size:
    """Worked out once, without looking at cells."""
    if SIZE not in job.notes:
        tiles = _tiles(job)
        job.notes[SIZE] = Size(tiles.counts, 0 if job.exact else tiles.cells_to_evaluate // 8)
    return job.notes[SIZE]


def _too_many_words(job: Job) -> list[str]:
    """An objection if so many tiles differ that their cells do not fit: memory would grow with q x k.

    An eighth of the tensors that a mask holds is not too much to ask, whatever their size.
    """
    r = job.request
    most = MOST_WORDS + sum(leaf.tensor.tensor.nbytes // 8 for leaf in job.mask.walk() if isinstance(leaf, Dense))
    if job.mask_batch * job.mask_heads * r.q_len * r.kv_len <= 8 * MOST_WORDS or _size(job).words <= most:
        return []
    return [f"{memory(_size(job).words)} of cells in tiles that differ: the limit is {memory(most)}"]
