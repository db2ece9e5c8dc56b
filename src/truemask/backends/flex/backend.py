"""The backend over torch's FlexAttention: compiled on CUDA, where it skips EMPTY blocks; on the CPU by name only.

* On CUDA every call runs compiled. No run on a GPU stands behind this yet: `truemask doctor --gpu` makes the report.
* On the CPU FlexAttention has no backward, and without compiling it holds every score. It is here to be compared with,
  and so that what a GPU would run is tested. `TRUEMASK_FLEX_COMPILE=1` in the environment compiles there too (forward,
  without the log-sum-exp), which needs a C++ compiler and takes seconds.

Compiling happens once for each structure of mask: the lists of blocks, the lengths, the mask's numbers and its data are
inputs of the compiled function. Data is padded to few sizes, because torch 2.13 writes wrong C++ where the size of a
captured tensor is a symbol, and lists of one row or column to two, because a size of 1 is compiled by itself.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.fx.experimental import _config as shape_config
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from truemask.backends.backend import Backend, Capabilities, Proposal
from truemask.backends.base import Inputs, Job, Lowered, Request, Result, wide
from truemask.backends.costs.model import table
from truemask.backends.costs.prediction import seconds
from truemask.backends.flex.score_mod import ScoreMod, score_mod_of, static_data, table_bytes
from truemask.backends.shared.cpu_flash import finite
from truemask.backends.shared.eager import beside_sink, eager_attention
from truemask.common.formatting import memory
from truemask.common.torch_internals import with_constant_sizes
from truemask.masks.core.block_mask import MaskBlocks, MaskMod, block_mask_of
from truemask.masks.core.mask import Mask
from truemask.masks.structure.data import is_drawn

COMPILE_ON_CPU = os.environ.get("TRUEMASK_FLEX_COMPILE") == "1"
MAX_SCORE_BYTES = 4 << 30  # bytes of scores that are too many
KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
LN_2 = 0.6931471805599453
MAX_VARIANTS = 64  # compiled for one structure: directions, dtypes, numbers of heads, head sizes


class FlexProposal(Proposal):
    """FlexAttention, compiled or not."""

    @property
    def cost(self) -> float:
        job, r = self.job, self.job.request
        if r.device.type != "cuda":
            return 2 * seconds(table().reference, r, r.cells)
        empty, mixed, full = job.tiles.counts
        return 1.5 * seconds(table().sdpa, r, r.cells * (mixed + full) / max(1, empty + mixed + full))

    @property
    def description(self) -> str:
        job = self.job
        if not compiles(job):
            return f"FlexAttention without compiling: every score, {memory(_score_bytes(job.request))}"
        empty, mixed, full = job.tiles.counts
        return f"compiled FlexAttention, {mixed + full} of {empty + mixed + full} blocks"

    def lower(self) -> Lowered:
        job, r = self.job, self.job.request
        if not compiles(job):
            return Lowered(MaskMod(job.mask, r.device))
        blocks = compact(block_mask_of(job.mask, job.tiles, r.device))
        return Lowered(blocks, sum(x.nbytes for x in blocks.lists().values()) + table_bytes(blocks.mask_mod))


class Flex(Backend):
    """Torch's FlexAttention."""

    name = "flex"
    devices: ClassVar = {
        "cpu": Capabilities(frozenset(("bias", "bias_grad", "softcap", "sinks", "return_lse"))),
        "cuda": Capabilities(frozenset(("grad", "bias", "softcap", "sinks", "return_lse")), dtypes=KERNEL_DTYPES),
    }
    tolerance: ClassVar = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    words: ClassVar = {
        "device": "{device.type}: FlexAttention is run on the CPU and on CUDA only",
        "grad": "gradients: FlexAttention has no backward on the CPU",
        "return_weights": "return_weights: FlexAttention never gives the weights",
        "dropout": "dropout: FlexAttention has none",
        "bias_grad": "the gradient of a bias: FlexAttention's has not been checked",
        "transform": "{transform}: FlexAttention has no rule for it",
        "dtype": "{dtype}: FlexAttention's kernels compute in fp32 at most",
    }

    @property
    def last_resort(self) -> bool:
        """Without CUDA it is chosen by name only; with it, its cost keeps it from the CPU's calls."""
        return not torch.cuda.is_available()

    def propose(self, job: Job) -> Proposal | list[str]:
        return self.lacking(job.request) + _limits(job) or FlexProposal(job)

    def run(self, lowered: Lowered, inputs: Inputs, job: Job) -> Result:
        r = job.request
        cpu = r.device.type == "cpu"
        if 0 in (r.batch, r.q_len, r.kv_len) or (cpu and not finite(inputs.q, inputs.k, inputs.v)):
            result = eager_attention(inputs, job.mask)  # masked cells add nothing there, not even a NaN (law 6)
            return result._replace(lse=result.lse if r.return_lse else None)
        data = lowered.data
        with torch.autocast(r.device.type, enabled=False):
            score_mod = score_mod_of(inputs, job)
            if isinstance(data, BlockMask):
                out, lse = _compiled(inputs, data, score_mod, r)
            else:
                out, lse = _eagerly(inputs, data, score_mod)
        if inputs.sink_logits is not None:
            assert lse is not None
            out = out.to(lse.dtype) * beside_sink(lse, inputs.sink_logits.to(lse.dtype)[:, None])[..., None]
        return Result(out.to(r.dtype), lse if r.return_lse else None)


def compiles(job: Job) -> bool:
    """Whether the job would run compiled."""
    r = job.request
    if r.device.type == "cuda":
        return True
    return COMPILE_ON_CPU and r.dtype in KERNEL_DTYPES and not (r.return_lse or r.sinks or _hashes(job.mask))


def _hashes(mask: Mask) -> bool:
    return any(map(is_drawn, mask.walk()))


def _limits(job: Job) -> list[str]:
    """What the kernels on CUDA refuse, and scores that do not fit where nothing is compiled."""
    r = job.request
    if r.device.type != "cuda":
        return _too_large(job)
    limits = [
        (min(r.head_dim, r.value_dim) < 16, "head sizes below 16: FlexAttention's kernels want more"),
        (_hashes(job.mask), "`random`: torch's code generator doubles its hash with every step"),
        (find_spec("triton") is None, "triton is not installed, and FlexAttention's kernels need it"),
    ]
    return [reason for beyond, reason in limits if beyond]


def _too_large(job: Job) -> list[str]:
    nbytes = _score_bytes(job.request)
    if compiles(job) or nbytes <= MAX_SCORE_BYTES:
        return []
    return [f"scores of {memory(nbytes)} without compiling: the limit is {memory(MAX_SCORE_BYTES)}"]


def _score_bytes(r: Request) -> int:
    return r.cells * r.compute_dtype.itemsize


# -- without compiling -------------------------------------------------------------------------------------------------


def _eagerly(inputs: Inputs, mask_mod: MaskMod, score_mod: ScoreMod | None) -> tuple[Tensor, Tensor]:
    """FlexAttention's own plain mathematics, in fp32 at least.

    The operator is called directly: torch's front end would trace it anew for every mask, and give up after eight.
    """
    dtype = wide(inputs.q.dtype)
    q, k, v = (x.detach().to(dtype) for x in inputs[:3])
    blocks = (*q.shape[2:3], *k.shape[2:3], *(None,) * 14, mask_mod)
    out, lse, _ = flex_operator(q, k, v, score_mod or _as_it_is, blocks, inputs.scale, {})
    return out, lse * LN_2  # the operator speaks in powers of two


def _as_it_is(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score


# -- compiled ----------------------------------------------------------------------------------------------------------


def _compiled(
    inputs: Inputs, blocks: BlockMask, score_mod: ScoreMod | None, r: Request
) -> tuple[Tensor, Tensor | None]:
    """The compiled kernel, made on the first call for a structure."""
    q, k, v = (_known_sizes(x) for x in inputs[:3])
    assert isinstance(blocks.mask_mod, MaskMod)
    structure = tuple(type(part) for part in blocks.mask_mod.mask.walk())
    # Sizes that happen to be equal are not the same size.
    with shape_config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
        return compiled_for(structure)(q, k, v, score_mod, blocks, inputs.scale, r.return_lse or r.sinks)


def _known_sizes(x: Tensor) -> Tensor:
    """The tensor with a note that its heads and head size do not change."""
    x = x.detach() if x.device.type == "cpu" else x.view_as(x)
    return with_constant_sizes(x, 1, 3)


@functools.lru_cache(maxsize=256)
def compiled_for(structure: tuple[type[Mask], ...]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """FlexAttention compiled for masks of one structure, with a count of compilations of its own."""
    options: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": MAX_VARIANTS}
    return torch.compile(_attention, dynamic=True, fullgraph=True, **options)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, blocks: BlockMask, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": blocks, "scale": scale, "enable_gqa": True}
    if want_lse:
        out, aux = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
        return out, aux.lse
    return flex_attention(q, k, v, **options), None


def compact(blocks: MaskBlocks) -> MaskBlocks:
    """The block mask in the form that is compiled once: data of few sizes, lists of at least two rows and columns."""
    new = blocks.with_lists(lambda x: pad(x, tuple(n for size in reversed(x.shape[2:]) for n in (0, max(0, 2 - size)))))
    new.mask_mod = static_data(blocks.mask_mod)
    return new
