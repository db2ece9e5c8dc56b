"""The jobs that are measured to calibrate, and which constants each of them shows.

They come in an order in which each constant shows where the earlier ones are known: calls by a job of nearly nothing,
full speed by long rows, then what few rows, many short samples, dense masks and long caches take beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.attention.attend import attend
from truemask.backends.base import Job, Request
from truemask.backends.costs.rates import PARTS
from truemask.backends.native.library import isa
from truemask.backends.native.parts import forced
from truemask.benchmarking.timing import Run
from truemask.benchmarking.workloads import Workload
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.per_token import prefix

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
SPARSE = window(256) | prefix(4)
Shows = dict[str, tuple[str, ...]]  # by backend, the constants that are multiplied alike


class Probe(NamedTuple):
    """A job to be measured; `rows` of queries, as many as keys if it is 0."""

    mask: Mask
    n: int
    heads: int = 8
    d: int = 64
    dtype: str = "fp32"
    grad: bool = False
    batch: int = 1
    rows: int = 0
    kv_heads: int = 0
    in_parts: bool = False  # native: as sums of bf16

    def job(self) -> Job:
        """What backends are asked about."""
        rows, kv_heads = self.rows or self.n, self.kv_heads or self.heads
        sizes = (self.batch, self.heads, kv_heads, rows, self.n, self.d, self.d)
        return Job(self.mask, Request(*sizes, DTYPES[self.dtype], torch.device("cpu"), self.grad))

    def run(self, backend: str) -> Run:
        """The job as a function to be timed."""
        r = self.job().request
        q = torch.randn(r.batch, r.heads, r.q_len, r.head_dim).to(r.dtype)
        k, v = (torch.randn(r.batch, r.kv_heads, r.kv_len, r.head_dim).to(r.dtype) for _ in range(2))

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with forced(self.in_parts):
                return attend(q, k, v, self.mask, backend=backend)

        return Workload(q, k, v, torch.randn(q.shape).to(r.dtype)).run(attention, self.grad)

    def __str__(self) -> str:
        rows = f"{self.rows} queries, " if self.rows else ""
        sizes = f"{rows}{self.batch} x {self.n} tokens, {self.heads} heads of {self.d}"
        dtype = f"{self.dtype}{' as sums of bf16' if self.in_parts else ''}"
        return f"{sizes}, {dtype}, {'forward and backward' if self.grad else 'forward'}, {self.mask}"


class Measure(NamedTuple):
    """A probe and what it shows."""

    probe: Probe
    shows: Shows


class Sizes(NamedTuple):
    """How large the probes are: tokens of the small and the large ones, keys of the long cache, samples of the many."""

    small: int = 16
    few: tuple[int, int] = (160, 512)  # rows that torch's kernel takes 32 and 64 at a time
    full: int = 1024
    sparse: int = 2048
    cache: int = 8192
    many: int = 8


def measures(sizes: Sizes) -> Iterator[Measure]:
    """All that the model needs, in the order in which it is worked out."""
    for grad, way in ((False, "forward"), (True, "backward")):
        yield from _calls(sizes, grad)
        for dtype in DTYPES:
            yield from _full_speed(sizes, dtype, grad, way)
        if isa().startswith("amx"):
            yield from _in_parts(sizes, grad, way)
        for dtype in ("fp32", "bf16"):
            yield from _few_rows(sizes, dtype, grad, way)
    yield from _others(sizes)


def _calls(sizes: Sizes, grad: bool) -> Iterator[Measure]:
    call = "call_backward" if grad else "call"
    plain: Shows = dict.fromkeys(("sdpa", "native", "reference"), (call,))
    yield Measure(Probe(causal, sizes.small, 1, 8, grad=grad), plain)
    groups = () if grad else ("call_group",)
    yield Measure(Probe(window(5) | prefix(1), sizes.small, 4, 32, grad=grad), {"block_sparse": (call, *groups)})


def _full_speed(sizes: Sizes, dtype: str, grad: bool, way: str) -> Iterator[Measure]:
    """Both head sizes where the choice is close; elsewhere what one shows is taken for the other."""
    for d in (64, 128) if dtype in ("fp32", "bf16") else (64,):
        shown = (
            (f"{dtype}.{way}.d{d}",) if dtype in ("fp32", "bf16") else tuple(f"{dtype}.{way}.d{x}" for x in (64, 128))
        )
        names = ["sdpa"] if dtype == "fp64" else ["sdpa", "native"]
        yield Measure(Probe(everything, sizes.full, d=d, dtype=dtype, grad=grad), dict.fromkeys(names, shown))
    both = tuple(f"{dtype}.{way}.d{d}" for d in (64, 128))
    yield Measure(Probe(everything, sizes.few[1], d=64, dtype=dtype, grad=grad), {"reference": both})
    for d in (64, 128) if dtype == "fp32" else (64,):
        shown = (f"{dtype}.{way}.d{d}",) if dtype == "fp32" else both
        yield Measure(Probe(SPARSE, sizes.sparse, d=d, dtype=dtype, grad=grad), {"block_sparse": shown})


def _in_parts(sizes: Sizes, grad: bool, way: str) -> Iterator[Measure]:
    for dtype, d in (("fp32", 64), ("fp32", 128), ("fp16", 64)):
        shown = tuple(f"{dtype}{PARTS}.{way}.d{x}" for x in ((64, 128) if dtype == "fp16" else (d,)))
        probe = Probe(everything, sizes.full, d=d, dtype=dtype, grad=grad, in_parts=True)
        yield Measure(probe, {"native": shown})


def _few_rows(sizes: Sizes, dtype: str, grad: bool, way: str) -> Iterator[Measure]:
    """What short samples lose; fp64 and fp16 lose as much as fp32."""
    alike = ("fp32", "fp64", "fp16") if dtype == "fp32" else (dtype,)

    def shown(name: str, of: tuple[str, ...] = alike) -> tuple[str, ...]:
        return tuple(f"{one}.{way}.{name}" for one in of)

    natives = shown("step", ("fp32", "fp16") if dtype == "fp32" else (dtype,))
    packed = sizes.small if grad else 3 * sizes.small  # fewer rows would read keys as they lie
    for n, steps in ((2 * sizes.small, {"sdpa": shown("step")}), (packed, {"native": natives})):
        yield Measure(Probe(causal, n, dtype=dtype, grad=grad, batch=sizes.many), steps)
    if dtype == "fp32":  # in which strips are computed
        strips = Probe(causal & window(sizes.small), 8 * sizes.small, grad=grad, batch=sizes.many)
        yield Measure(strips, {"block_sparse": shown("step", tuple(DTYPES))})
    for rows, name in zip(sizes.few, ("rows32", "rows64"), strict=True):
        yield Measure(Probe(everything, rows, dtype=dtype, grad=grad), {"sdpa": shown(name)})


def _others(sizes: Sizes) -> Iterator[Measure]:
    """Dense masks, MIXED tiles, and long caches read by one query and by some."""
    yield Measure(Probe(SPARSE, sizes.full), {"sdpa": ("masked",)})
    yield Measure(Probe(SPARSE, sizes.sparse), {"native": ("mixed",)})
    for dtype, halves in (("fp32", ""), ("bf16", "_halves")):
        alike = ("fp32", "fp64", "fp16") if dtype == "fp32" else (dtype,)
        rows1 = tuple(f"{one}.{way}.rows1" for one in alike for way in ("forward", "backward"))
        decoding = Probe(everything, sizes.cache, 32, 128, dtype, rows=1, kv_heads=8)
        yield Measure(decoding, {"sdpa": rows1, "native": (f"read{halves}",)})
        waiting: Shows = {} if halves else {"sdpa": ("read",)}
        some = Probe(everything, sizes.sparse, d=128, dtype=dtype, rows=16)
        yield Measure(some, {"native": (f"few{halves}",), **waiting})
        yield Measure(Probe(everything, sizes.sparse, dtype=dtype, rows=48), {"native": (f"pack{halves}",)})
