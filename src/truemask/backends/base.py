"""What a plan and the backends speak of, and the laws that bind every backend: requests, jobs, inputs, results.

A backend (see `backend`) is asked about a `Job`: a mask and a `Request` (sizes, kinds and flags, never tensors). It
makes a `Proposal`, or says in words why it cannot run the job; what it has `Lowered` is run with the tensors of each
call.

What `run` owes (the numbers are those of the laws in `docs/conventions.md`):

* 3: sizes were checked before. `q_len`, `kv_len` and `batch` may be zero; heads and head size may not.
* 5: a query that may attend to nothing, or whose visible scores are all -inf, gets zeros, lse -inf and zero gradients.
* 6: row q's results depend on row q, its incoming gradient and the keys it may see; what reaches a key comes from the
  rows that see it. On the CPU that holds with NaN, infinity and 3e38 planted anywhere, forward and backward.
* 7: `Bias` objects are asked about `job.mask.positions`, tensors are indexed by row and column.
* 9: everything in `inputs` is honoured. What a backend cannot honour it must object to. Derivatives that it lacks are
  refused with a message that names a backend that has them.
* 10: its error against fp64 stays within 1.5 times that of `F.scaled_dot_product_attention` in the same dtype.

Dropout drops the cells that `truemask.backends.shared.dropout.kept` names, whoever runs it and in both directions.
A new backend is one file and one entry in `registry.py`; `tests/backends/test_agree.py` holds it to what it declares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from truemask.biases import Bias
from truemask.common.memory import HoldsArrays, arrays_in
from truemask.common.real_tensors import remembered
from truemask.errors import PlanError
from truemask.geometry.slabs.slabs import Slabs
from truemask.geometry.tiles.tile_map import Ints, TileMap
from truemask.masks.compose.boolean import everything
from truemask.masks.core.exact_form import exact_slabs, variants
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.placement import offset

SMALL_CELLS = 1 << 16  # cells below which a mask is looked at whole rather than by tiles
MAX_PROOF_CELLS = 1 << 28  # cells that are worth evaluating for a proof: about a second
ZERO = torch.zeros(1, 1, 1, 1, dtype=torch.int64)


class Request(NamedTuple):
    """What a call asks, without its tensors and numbers: hashable, so that a plan can be found again."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    grad: bool = False
    bias: str = ""  # "", "tensor", "alibi", "relative", or "object": a bias of another class
    bias_shape: tuple[int, ...] = ()  # of the tensor, or [1, heads, q, k] of the object
    bias_grad: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    return_lse: bool = False
    return_weights: bool = False
    transform: str = ""  # "vmap or torch.func" or "forward mode": what the call stands inside of

    @property
    def bias_object(self) -> bool:
        """Whether there is a bias that is asked about positions."""
        return self.bias not in ("", "tensor")

    @property
    def options(self) -> set[str]:
        """Which of `OPTIONS` are asked for."""
        return {name for name in OPTIONS if getattr(self, name)}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of sums and of lse, whatever a kernel multiplies in."""
        return wide(self.dtype)

    @property
    def cells(self) -> int:
        """Scores of the whole call."""
        return self.batch * self.heads * self.q_len * self.kv_len


OPTIONS = tuple(name for name in Request._field_defaults if name != "bias_shape")


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp64 for doubles, fp32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    """The tensors and numbers of one call; shapes `b h q d`, `b h k d`, as they were checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None = None
    bias: Tensor | Bias | None = None  # a tensor has four axes here
    sink_logits: Tensor | None = None
    dropout: float = 0.0
    seed: int = 0


class Result(NamedTuple):
    """`out [b, hq, q, dv]`; `lse [b, hq, q]` and `weights [b, hq, q, k]` where they were asked for."""

    out: Tensor
    lse: Tensor | None = None
    weights: Tensor | None = None


class Lowered(NamedTuple):
    """A job worked out ahead of its tensors, how many bytes that holds, and which of its rows is the call's first."""

    data: Any = None
    nbytes: int = 0
    row: int = 0


class JobSlabs(NamedTuple):
    """Slabs of the samples and heads that a mask tells apart: `which [samples, heads]` of them each has."""

    slabs: tuple[Slabs, ...]
    which: Ints


@dataclass(frozen=True)
class Job(HoldsArrays):
    """A mask and a request, and what geometry knows of the two, worked out once and only if somebody asks."""

    mask: Mask
    request: Request

    def arrays(self) -> Iterator[Tensor | np.ndarray]:
        """Those that were worked out; the mask counts its own."""
        held = dict(vars(self))  # in one step: another thread may be remembering something
        del held["mask"], held["request"]
        return arrays_in(held.values())

    def __getstate__(self) -> dict[str, Any]:
        """What was worked out stays behind: it holds functions, which do not pickle."""
        return {"mask": self.mask, "request": self.request}

    @remembered
    def tiles(self) -> TileMap:
        """The mask's tiles at the request's sizes."""
        r = self.request
        return self.mask.tiles(r.q_len, r.kv_len, batch=r.batch, heads=r.heads)

    @remembered
    def exact(self) -> JobSlabs | None:
        """The exact form of every sample and head; None if some of them has none."""
        r = self.request
        members, which = variants(self.mask, self.mask_batch, self.mask_heads)
        parts: list[Slabs] = []
        for b, h in members:
            slabs = exact_slabs(self.mask, b, h, r.q_len, r.kv_len)
            if slabs is None:
                return None
            parts.append(slabs)
        return JobSlabs(tuple(parts), which)

    @remembered
    def small(self) -> Tensor | None:
        """The mask as a bool tensor on the CPU, if it is so small that looking at it beats reasoning about it."""
        r = self.request
        if r.q_len * r.kv_len * self.mask_batch * self.mask_heads > SMALL_CELLS:
            return None
        return evaluated_cells(self.mask, self.mask_batch, self.mask_heads, r.q_len, r.kv_len)

    @remembered
    def pattern(self) -> str:
        """What the mask is proven to be at these sizes: "everything", "causal" or, without proof, "other"."""
        if self.small is not None:
            if self.small.all():
                return "everything"
            if self.request.q_len == 1:
                return "other"
            return "causal" if torch.equal(self.small, torch.ones_like(self.small).tril()) else "other"
        if self._is_same_as(everything):
            return "everything"
        return "causal" if self._is_same_as(causal) else "other"

    def _is_same_as(self, other: Mask) -> bool:
        """Whether the mask provably lets the same pairs through as `other`: by slabs, or by looking if that is cheap.

        The cells where they differ are `mask ^ other`. Without slabs, a FULL tile of that refutes, and MIXED ones are
        evaluated, after a few probes.
        """
        if self.mask == other:
            return True
        r = self.request
        differs = self.mask ^ other
        if self._probe(differs):
            return False
        tiles = differs.tiles(r.q_len, r.kv_len, block=1024, batch=self.mask_batch, heads=self.mask_heads)
        if tiles.exact or tiles.counts.full:
            return tiles.counts.mixed == tiles.counts.full == 0
        return tiles.cells_to_evaluate <= MAX_PROOF_CELLS and not any(part.cells.any() for part in tiles.patterns())

    @remembered
    def positions(self) -> tuple[Tensor, Tensor]:
        """The positions of rows and keys, which bias objects are asked about (law 7)."""
        return self.mask.positions(self.request.q_len, self.request.kv_len)

    @property
    def mask_batch(self) -> int:
        """Samples that the mask tells apart: 1 if it does not vary."""
        return 1 if self.mask.batch_size == 1 else self.request.batch

    @property
    def mask_heads(self) -> int:
        """Heads that the mask tells apart: 1 if it does not vary."""
        return 1 if self.mask.head_count == 1 else self.request.heads

    def _probe(self, differs: Mask, places: int = 16) -> bool:
        """Whether one of a few hundred cells, spread evenly and along the diagonal, is True."""
        r = self.request
        q = torch.linspace(0, r.q_len - 1, places).long()
        k = torch.linspace(0, r.kv_len - 1, places).long()
        diagonal = torch.stack([q, q + 1, q - 1], 1).clamp(0, r.kv_len - 1)
        keys = torch.cat([k.expand(places, places), diagonal], 1)
        zero = torch.zeros((), dtype=torch.int64)
        return bool(differs.truth(zero, zero, q[:, None], keys).any())


def evaluated_cells(mask: Mask, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    """The mask as a bool tensor on the CPU; an outermost `at` moves the indices and is not bound, as decoding wants."""
    base, q_start, k_start = offset(mask)
    b = ZERO if batch == 1 else torch.arange(batch).view(-1, 1, 1, 1)
    h = ZERO if heads == 1 else torch.arange(heads).view(1, -1, 1, 1)
    q = torch.arange(q_start, q_start + q_len).view(1, 1, -1, 1)
    k = torch.arange(k_start, k_start + kv_len).view(1, 1, 1, -1)
    return base.bound("cpu")._truth(b, h, q, k).expand(batch, heads, q_len, kv_len)


def batched_refusal(backend: str) -> PlanError:
    """What to say of gradients that arrive in batches: torch's own message is about some operation without a rule."""
    return PlanError(
        f"the backend {backend!r} differentiates one gradient at a time, not a batch of them (as `is_grads_batched`, "
        "`vectorize=True` or `vmap` make): loop over them, or use `torch.func.jacrev`, `jacfwd` or `vjp` with `vmap` "
        'on a function that calls attend(..., backend="reference") or runs under `tm.attention_backend("reference")`'
    )
