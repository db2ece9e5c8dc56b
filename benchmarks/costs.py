"""Measure the constants of `src/truemask/backends/costs.py` and print them beside those in use; under a minute.

    python benchmarks/costs.py

One thread, the least processor time of several runs. Rates are doubled, because the table speaks of two such cores; the
seconds of a call, which no second core shortens, are not. Rates come from b 1, h 4, d 64, n 512 without a mask, less
the seconds of a call; calls from b 1, h 4, d 32, n 16 under a window, with the plan cached; the rate of joining from a
fp32 bias tensor of n 512 that meets a mask.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

import truemask as tm
from truemask.backends.costs import BACKWARD_PRODUCTS, DOUBLES, JOIN_RATE, REFERENCE, SDPA, Rates

CORES = 2  # the table's; one is measured
SECONDS = 1.5  # for each number


def least(run: Callable[[], object]) -> float:
    """The least processor time of many runs, in seconds."""
    run()
    found, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(found) < 5:
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def forward_and_backward(backend: str, mask: tm.Mask, n: int, d: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of the forward without gradients, and of what training adds to it."""
    q, k, v = (torch.randn(1, 4, n, d, dtype=dtype) for _ in range(3))
    forward = least(lambda: tm.attend(q, k, v, mask, backend=backend))
    x, y, z = leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    arriving = torch.randn_like(q)

    def train() -> object:
        return torch.autograd.grad(tm.attend(x, y, z, mask, backend=backend), leaves, arriving)

    return forward, least(train) - forward


def rates(backend: str) -> tuple[Rates, float]:
    """The backend's constants, and how many times longer fp64 takes."""
    call, call_backward = forward_and_backward(backend, tm.window(5), 16, 32, torch.float32)
    n, d = 512, 64
    forward, backward = forward_and_backward(backend, tm.everything, n, d, torch.float32)
    doubles, _ = forward_and_backward(backend, tm.everything, n, d, torch.float64)
    work = CORES * 2 * 4 * n * n * 2 * d
    found = Rates(
        work / max(forward - call, 1e-9),
        BACKWARD_PRODUCTS * work / max(backward - call_backward, 1e-9),
        call,
        call_backward,
    )
    return found, (doubles - call) / (forward - call)


def join_rate() -> float:
    """Bytes a second at which a bias and a mask become one dense tensor, all copies counted."""
    n = 512
    q = torch.randn(1, 4, n, 8)
    bias = torch.randn(4, n, n)
    mask = tm.window(64)
    plain, biased = (least(lambda b=b: tm.attend(q, q, q, mask, bias=b, backend="sdpa")) for b in (None, bias))
    return CORES * (n * n + bias.numel()) * 4 / max(biased - plain, 1e-9)


def machine() -> str:
    """Which processor and which torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{names[0] if names else platform.machine()}, {capability}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}"
    )


def row(name: str, found: Rates, used: Rates) -> str:
    """A backend's line: measured, and in brackets what the table says."""
    cells = [f"{found.forward / 1e9:6.0f} ({used.forward / 1e9:.0f})", f"{found.backward / 1e9:6.0f}"]
    cells[1] += f" ({used.backward / 1e9:.0f})"
    cells += [f"{found.call * 1e6:6.0f} ({used.call * 1e6:.0f})"]
    cells += [f"{found.call_backward * 1e6:6.0f} ({used.call_backward * 1e6:.0f})"]
    return f"{name:<10} " + " ".join(f"{cell:>16}" for cell in cells)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{machine()}; measured on 1 core, given for {CORES}; in brackets: backends/costs.py")
    heads = ("forward GFLOP/s", "backward GFLOP/s", "call us", "and backward us")
    print(f"{'':<10} " + " ".join(f"{head:>16}" for head in heads))
    longer = 0.0
    for name, used in (("sdpa", SDPA), ("reference", REFERENCE)):
        found, doubles = rates(name)
        longer = longer or doubles
        print(row(name, found, used))
    print(f"fp64 takes {longer:.1f} times as long ({DOUBLES})")
    print(f"a bias is joined at {join_rate() / 1e9:.1f} GB/s ({JOIN_RATE / 1e9:.1f})")


if __name__ == "__main__":
    main()
