"""The report of a GPU: for masks and dtypes, how far each backend is from the reference, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.attention.attend import attend
from truemask.attention.planning.plan import plan
from truemask.cli.machine import version_of
from truemask.masks.core.mask import Mask
from truemask.masks.formats.parse import parse

LENGTH = 4096
SECONDS = 90.0  # after which nothing new begins
RUNS = 7
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
BACKENDS = ("sdpa", "flex")
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the largest number


class Check(NamedTuple):
    """One mask in one dtype, by every backend."""

    mask: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.mask}, {str(self.dtype).removeprefix('torch.')}, by {' and '.join(BACKENDS)}"


MASKS = (
    "causal & window(256)",
    "causal.packed([700, 1200, 300, 996, 900])",
    "causal & (window(256) | prefix(4))",
    "causal",
    "blocks(64, back=1, ahead=1) | global_tokens([0, 1, 2])",
)
CHECKS = tuple(Check(mask, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16) for mask in MASKS)


class Line(NamedTuple):
    """A line of the report, and whether it is as it should be."""

    text: str
    good: bool = True


def gpu_facts() -> list[tuple[str, str]]:
    """What the GPU is, and what its kernels need."""
    properties = torch.cuda.get_device_properties(0)
    return [
        (
            "GPU",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}",
        ),
        ("CUDA of torch", str(torch.version.cuda)),
        ("triton", version_of("triton")),
    ]


def report(device: torch.device, checks: Sequence[Check], length: int, seconds: float) -> Iterator[Line]:
    """The lines of the report, one by one; when the time is over, what is left is named and not run."""
    start = time.perf_counter()
    yield Line(f"{length:,} tokens, {HEADS} heads of {HEAD_DIM} ({KV_HEADS} of k and v); errors relative to float64")
    for check in checks:
        yield Line(f"\n{check.mask}, {str(check.dtype).removeprefix('torch.')}")
        mask, inputs = parse(check.mask), _inputs(device, check.dtype, length)
        want: list[Tensor] | None = None
        for backend in BACKENDS:
            if time.perf_counter() - start > seconds:
                yield Line(f"  {backend:<6} not run: the time is over", good=False)
                continue
            grad, reasons = _willing(inputs, mask, backend)
            if reasons:
                yield Line(f"  {backend:<6} cannot: {'; '.join(reasons)}")
                continue
            try:
                want = want or _results([x.double() for x in inputs], mask, "reference", grad=True)
                yield _checked(inputs, mask, backend, check.dtype, want, grad)
            except Exception as error:  # whatever a driver, a compiler or a kernel throws belongs in the report
                yield Line(f"  {backend:<6} {type(error).__name__}: {_first_line(error)}", good=False)


def _willing(inputs: list[Tensor], mask: Mask, backend: str) -> tuple[bool, list[str]]:
    """Whether the backend would train, and why it would not even run."""
    q, k, v = inputs
    training = plan(q, k, v, mask).objections[backend]
    with torch.no_grad():
        return not training, plan(q, k, v, mask).objections[backend]


def _checked(
    inputs: list[Tensor], mask: Mask, backend: str, dtype: torch.dtype, want: list[Tensor], grad: bool
) -> Line:
    """Errors and times of one backend."""
    start = time.perf_counter()
    got = _results(inputs, mask, backend, grad=grad)
    first = time.perf_counter() - start
    errors = [_error(a, b) for a, b in zip(got, want, strict=False)]
    good = max(errors) <= TOLERANCE[dtype]
    forward = _seconds(lambda: _results(inputs, mask, backend, grad=False))
    errors_text = f"error {errors[0]:.1e}" + (f", gradients {max(errors[1:]):.1e}" if grad else "")
    times = f"first call {first:.1f} s, forward {forward * 1e3:.3g} ms"
    if grad:
        times += f", with backward {_seconds(lambda: _results(inputs, mask, backend, grad=True)) * 1e3:.3g} ms"
    return Line(f"  {backend:<6} {'agrees' if good else 'DIFFERS'}: {errors_text}; {times}", good)


def _inputs(device: torch.device, dtype: torch.dtype, length: int) -> list[Tensor]:
    """q, k and v, the same numbers every time."""
    torch.manual_seed(0)
    shapes = ((1, heads, length, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def _results(inputs: list[Tensor], mask: Mask, backend: str, *, grad: bool) -> list[Tensor]:
    """out, and with `grad` the gradients of its sum."""
    q, k, v = (x.detach().requires_grad_(grad) for x in inputs)
    out = attend(q, k, v, mask, backend=backend)
    return [out.detach(), *(torch.autograd.grad(out.sum(), (q, k, v)) if grad else ())]


def _error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number; NaN counts as infinite."""
    error = float((got.double() - want).abs().max() / want.abs().max())
    return error if error == error else float("inf")


def _seconds(run: Callable[[], object]) -> float:
    """The median of a few runs, each waited for."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
