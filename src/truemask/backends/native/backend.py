"""The native kernel: `csrc/`, called on torch's memory. One pass over the tiles that a mask lets through.

What is EMPTY costs nothing, what is FULL runs without a mask. What a row sees of a MIXED tile is worked out from the
ends of its slab's runs, or else read: 64 words, identical tiles once. fp32, bf16 and fp16 are computed in fp32, or bf16
in products of pairs or tiles where the processor is quick at those, and the others as sums of bf16 (`parts.py`). Laws 5
and 6 hold inside: what is masked is selected away rather than multiplied by zero. Results are bit for bit the same
whatever the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from truemask.backends.backend import BIASES, Around, Backend, Capabilities, Proposal
from truemask.backends.base import Inputs, Job, Lowered, Request, Result
from truemask.backends.costs.model import is_doubtful, table
from truemask.backends.costs.prediction import BACKWARD_PRODUCTS, cell_seconds, spread
from truemask.backends.native.abi import TILE
from truemask.backends.native.call import THREAD_BYTES, THREAD_WORK, NativeCall, Repeated, tiles_of
from truemask.backends.native.library import isa, missing, passed_over
from truemask.backends.native.parts import in_parts, native_paces, or_forced
from truemask.backends.shared.autograd import attention, tensors_of
from truemask.common.formatting import memory
from truemask.common.real_tensors import remembered
from truemask.geometry.tiles.tile_map import TileCounts, TileMap
from truemask.masks.structure.data import cells_held
from truemask.masks.structure.placement import offset

UNPACKED_ROWS = 32  # up to which keys are read as they lie, for more they are packed before: `csrc/reading_cut.h`
LAID_OUT_BACKWARD = {
    4: 3,
    2: 7,
}  # times the bytes of keys and values, by those of a number: two layouts, fp32 gradients
MAX_WORD_BYTES = 1 << 28  # bytes of the cells of MIXED tiles


class Size(NamedTuple):
    """How many tiles there are of each state, and the bytes of the words of MIXED ones without an exact form."""

    counts: TileCounts
    words: int


class Work(NamedTuple):
    """What the kernel does of a job: scores (as of FULL tiles), rows of tiles, tasks, bytes of keys and values."""

    cells: float
    units: int
    tasks: float
    key_bytes: float
    packed: bool  # the keys are laid out first, as for many queries
    backward_cells: float  # scores of the backward, to which every head comes by itself


def has_tiles(r: Request) -> bool:
    """Whether the kernel multiplies such a call in tiles of bf16."""
    return isa().startswith("amx") and (r.dtype == torch.bfloat16 or or_forced(in_parts(r), r))


def unpacked_rows(r: Request) -> int:
    """Rows up to which keys are read as they lie: fewer where packing them is quick."""
    one_tile = r.dtype == torch.float32 and r.kv_len <= TILE
    return UNPACKED_ROWS // (4 if one_tile else 2 if has_tiles(r) else 1)


def lanes_of(r: Request) -> int:
    """Rows that the products of many queries have a multiple of: those of a vector, or of two tiles."""
    return 32 if has_tiles(r) else int(table().native.lanes)


def stacked_heads(job: Job) -> int:
    """Query heads whose rows lie side by side, since they share keys and a mask: `stacked_heads` of `csrc/strip.h`."""
    group = job.request.heads // job.request.kv_heads
    return group if job.mask_heads == 1 and group * job.request.q_len <= TILE else 1


def _computed_rows(rows: int, lanes: int) -> int:
    full, last = divmod(rows, TILE)
    return full * TILE + math.ceil(last / lanes) * lanes


class TilesProposal(Proposal):
    """One pass over the tiles that are not EMPTY."""

    @remembered
    def tiles(self) -> TileMap:
        """Of the samples and heads that the mask tells apart, as the kernel takes them; forgotten once lowered."""
        job = self.job
        return job.mask.tiles(job.request.q_len, job.request.kv_len, TILE, batch=job.mask_batch, heads=job.mask_heads)

    @remembered
    def size(self) -> Size:
        """Worked out without looking at cells."""
        return Size(self.tiles.counts, 0 if self.job.exact else self.tiles.cells_to_evaluate // 8)

    @property
    def cost(self) -> float:
        r, rates, work = self.job.request, table().native, self.work
        forward, backward = native_paces(rates, r)
        share, size = spread(rates, work.tasks), r.head_dim + r.value_dim
        step = forward.step if work.packed else rates.paces["fp32"].forward.step  # that of nothing but a beginning
        pack = rates.pack if r.dtype.itemsize == 4 else rates.pack_halves
        cost = rates.call + share * work.units * step / rates.threads
        if work.packed:
            cost += share * (work.cells * cell_seconds(forward, r) + work.key_bytes / pack)
        else:
            read, few = (rates.read, rates.few) if r.dtype.itemsize == 4 else (rates.read_halves, rates.few_halves)
            cost += share * (work.key_bytes / read + 2 * work.cells * size / few)
        if not r.grad:
            return cost
        cells = BACKWARD_PRODUCTS * work.backward_cells * cell_seconds(backward, r)
        cells += LAID_OUT_BACKWARD[r.dtype.itemsize] * work.key_bytes / pack
        return cost + rates.call_backward + share * (cells + work.units * backward.step / rates.threads)

    @property
    def work(self) -> Work:
        """What the kernel does of the job."""
        job, r, counts = self.job, self.job.request, self.size.counts
        planes = (r.batch // max(1, job.mask_batch)) * (r.heads // max(1, job.mask_heads))
        stacked, strips = stacked_heads(job), math.ceil(r.q_len / TILE)
        packed = r.grad or stacked * r.q_len > unpacked_rows(r)
        lanes = lanes_of(r) if packed else 1
        height = _computed_rows(stacked * r.q_len, lanes) / max(1, stacked * strips)  # of a head in a tile
        alone = _computed_rows(r.q_len, lanes) / max(1, strips)
        width = r.kv_len / max(1, math.ceil(r.kv_len / TILE)) if packed else TILE
        cells = (table().native.mixed * counts.mixed + counts.full) * height * width * planes
        seen = min(1.0, (counts.mixed + counts.full) * height * width * planes / max(1, r.cells))
        key_bytes = r.batch * r.kv_heads * r.kv_len * (r.head_dim + r.value_dim) * r.dtype.itemsize * seen
        units = r.batch * r.heads // stacked * strips
        worth = 2 * cells * (r.head_dim + r.value_dim) // THREAD_WORK
        tasks = min(units, worth) if packed else max(worth, key_bytes // THREAD_BYTES)
        return Work(cells, units, tasks, key_bytes, packed, cells * alone / max(1, height))

    @property
    def doubt(self) -> bool:
        """Whether the cost must not be held against torch's."""
        return is_doubtful(self.job.request)

    @property
    def description(self) -> str:
        counts = self.size.counts
        better = "".join(f"; not by {reason}" for reason in passed_over())
        how = ", as sums of bf16" if or_forced(in_parts(self.job.request), self.job.request) else ""
        return f"{counts.full} full and {counts.mixed} mixed tiles of {TILE} x {TILE}{how}{better}"

    def too_many_words(self) -> list[str]:
        """An objection if so many tiles differ that their cells do not fit: memory would grow with q x k.

        An eighth of the tensors that a mask holds is not too much to ask, whatever their size.
        """
        job, r = self.job, self.job.request
        if job.mask_batch * job.mask_heads * r.q_len * r.kv_len <= 8 * MAX_WORD_BYTES:
            return []
        most = MAX_WORD_BYTES + sum(
            held.tensor.nbytes // 8 for part in job.mask.walk() if (held := cells_held(part)) is not None
        )
        if self.size.words <= most:
            return []
        return [f"{memory(self.size.words)} of cells in tiles that differ: the limit is {memory(most)}"]

    def lower(self) -> Lowered:
        tiles = tiles_of(self.tiles, self.job.exact)
        return Lowered((tiles, in_parts(self.job.request)), tiles.nbytes)

    def around(self) -> Around | None:
        """The tiles of a row are those of its row of tiles, for every row and number of keys within."""
        job, r = self.job, self.job.request
        if r.q_len != 1 or r.grad or job.mask.functions:
            return None
        base, q_start, k_start = offset(job.mask)
        row = q_start % TILE
        mask = base.at(q_start=q_start - row, k_start=k_start)
        kv_len = math.ceil(r.kv_len / TILE) * TILE
        return Around(Job(mask, r._replace(q_len=TILE, kv_len=kv_len, bias="", bias_shape=())), row)

    def forget(self) -> None:
        vars(self).pop("tiles", None)


class Native(Backend):
    """The kernel of `csrc/`."""

    name = "native"
    devices: ClassVar = {
        "cpu": Capabilities(
            frozenset(("grad", "bias", "softcap", "sinks", "dropout", "return_lse")),
            biases=BIASES - {"object"},
        )
    }
    tolerance: ClassVar = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    words: ClassVar = {
        "device": "the device {device.type}: the kernel is the CPU's",
        "dtype": "float64: the kernel computes in float32",
        "bias": "a bias of another class than alibi and relative: the kernel cannot ask it",
        "bias_grad": "the gradient of a bias: the kernel has none",
        "return_weights": "return_weights: the weights are never held at once",
        "transform": "{transform}: the kernel has no rule for it",
    }

    def unavailable(self) -> str:
        why = missing()
        return why and f"there is no native kernel: {why}"

    def propose(self, job: Job) -> Proposal | list[str]:
        proposal = TilesProposal(job)
        return self.lacking(job.request) or proposal.too_many_words() or proposal

    def repeated(self, lowered: Lowered, inputs: Inputs, job: Job) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return Repeated(_call(lowered, inputs, job), *inputs[:3], inputs.sink_logits)

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        r = job.request
        call = _call(lowered, inputs, job)
        q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs[:3]]
        out, lse = attention(call, (q, k, v, inputs.sink_logits), tensors_of(inputs.bias), grad=r.grad)
        return Result(out, lse if r.return_lse else None)


def _call(lowered: Lowered, inputs: Inputs, job: Job) -> NativeCall:
    tiles, planned = lowered.data
    r = job.request
    positions = job.positions if r.bias_object else None
    return NativeCall(tiles, inputs, positions, r.grad, or_forced(planned, r), lowered.row)
