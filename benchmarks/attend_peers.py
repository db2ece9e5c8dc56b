"""Who is raced by `attend.py`, what is asked of `attend` on which machine, and what a race says."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from harness import Timing, ms, race, verdict
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from truemask.attention.planning.cache import CACHE
from truemask.backends.base import Request
from truemask.backends.costs.prediction import pace_name
from truemask.backends.native import library
from truemask.backends.native.library import isa, missing
from truemask.benchmarking.workloads import Attention, Workload, by_truemask, masked_sdpa

BARE, MASKED, UNMASKED, FLEX, X_TRANSFORMERS = "SDPA, bare", "SDPA, mask", "SDPA, unmasked", "flex", "x-transformers"
PLANNED, PORTABLE, NATIVE = "attend", "portable", "native"
PORTABLE_BACKENDS = ("sdpa", "block_sparse")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECONDS = 2.0  # for each contestant
JUDGED_FROM = 8192  # tokens: shorter sparse rows are shown without a bar
BAR_BEST = 1.15


class Bars(NamedTuple):
    """What the kernel should reach, forward, and forward and backward (`[grad]`)."""

    plain: dict[str, tuple[float, float]]  # by dtype: times faster than SDPA without a mask, at heads of 64
    share: dict[str, tuple[float, float]]  # of the ideal
    large: dict[str, tuple[float, float]] | None = None  # `plain` from heads of 128 on, where it is another one
    unmasked: tuple[str, ...] = ()  # dtypes whose ideal is of SDPA's time without any mask
    flex: float | None = None  # times faster than compiled FlexAttention, forward

    def of_plain(self, r: Request, dtype: str) -> float:
        """What is asked of a call without a mask."""
        return ((r.head_dim >= 128 and self.large) or self.plain)[dtype][r.grad]


TILES = Bars(
    {"fp32": (1.5, 1.5), "bf16": (1.9, 4.0)},
    {"fp32": (1.3, 1.1), "bf16": (1.2, 1.7)},
    {"fp32": (1.5, 1.5), "bf16": (1.6, 2.9)},
    ("bf16",),
)
WIDE = Bars({"fp32": (1.25, 1.25), "bf16": (3.5, 2.2)}, dict.fromkeys(DTYPES, (1.7, 1.4)), flex=2.5)  # AVX-512
NARROW = Bars(dict.fromkeys(DTYPES, (1.0, 1.0)), dict.fromkeys(DTYPES, (0.77, 0.74)))  # AVX2: sparse in proportion
PORTABLE_BARS = Bars(dict.fromkeys(DTYPES, (0.95, 0.95)), dict.fromkeys(DTYPES, (0.6, 0.5)))  # torch's own operators


def bars() -> Bars:
    """Those of the kernel that is loaded."""
    return {"amx": TILES, "avx512_bf16": WIDE, "avx512": WIDE, "avx2": NARROW}.get(isa(), PORTABLE_BARS)


# -- contestants -------------------------------------------------------------------------------------------------------


def contestants(plan: tm.Plan, workload: Workload, given: argparse.Namespace) -> dict[str, Attention]:
    """Everybody who runs under this mask."""
    mask = plan.mask
    found: dict[str, Attention] = {PLANNED: by_truemask(mask), MASKED: masked_sdpa(mask, workload)}
    if mask in (tm.causal, tm.everything):
        found[BARE] = bare_sdpa(mask == tm.causal)
    elif pace_name(plan.request) in bars().unmasked:
        found[UNMASKED] = bare_sdpa(False)
    portable = portable_backend(plan)
    if portable not in ("", plan.backend):
        found[PORTABLE] = by_truemask(mask, portable)
    if plan.backend != NATIVE and not plan.objections[NATIVE]:
        found[NATIVE] = by_truemask(mask, NATIVE)
    if given.flex and not plan.request.grad:
        found[FLEX] = compiled_flex(mask, workload)
    if given.x_transformers:
        found[X_TRANSFORMERS] = x_transformers(mask, workload.q.shape[2])
    return found


def portable_backend(plan: tm.Plan) -> str:
    """Of the backends that are torch's own operators, the one that a plan without the kernel would take."""
    willing = [name for name in PORTABLE_BACKENDS if not plan.objections[name]]
    return min(willing, key=plan.costs.__getitem__, default="")


def bare_sdpa(causal: bool) -> Attention:
    """What somebody calls who needs no mask, or the flag."""
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def compiled_flex(mask: tm.Mask, workload: Workload) -> Attention:
    """FlexAttention compiled for this length, with the mask's own block mask; forward only on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    block_mask = mask.to_block_mask(workload.q.shape[2])
    compiled = torch.compile(flex_attention, fullgraph=True)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=block_mask)
        assert isinstance(out, Tensor)
        return out

    with torch.no_grad():
        attention(workload.q, workload.k, workload.v)  # compiling is nobody's first run
    return attention


def x_transformers(mask: tm.Mask, n: int) -> Attention:
    """Its flash attention with the same dense mask."""
    from x_transformers.attend import Attend

    module, dense = Attend(flash=True, causal=False), mask.to_dense(n)
    return lambda q, k, v: module(q, k, v, mask=dense)[0]


# -- what a race says --------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One mask at one length in one direction, measured."""

    plan: tm.Plan
    dtype: str
    density: float
    found: dict[str, Timing]

    def seconds(self, who: str) -> float:
        """Median seconds."""
        return self.found[who].median

    def shown(self, who: str) -> str:
        """Milliseconds, or nothing."""
        return ms(self.seconds(who)) if who in self.found else ""

    def pace(self, who: str) -> float:
        """Times faster than SDPA without a mask, or than SDPA at its own pace on the pairs that count."""
        all_pairs = UNMASKED if UNMASKED in self.found else MASKED
        rival = self.seconds(BARE) if BARE in self.found else self.seconds(all_pairs) * self.density
        return rival / self.seconds(who)

    def judged(self, who: str, asked: Bars) -> tuple[str, str, str]:
        """The pace, the bar and the verdict."""
        grad, plain = self.plan.request.grad, BARE in self.found
        bar = asked.of_plain(self.plan.request, self.dtype) if plain else asked.share[self.dtype][grad]
        told = f"{self.pace(who):.2f} {'x bare' if plain else 'of ideal'}"
        if not plain and self.plan.request.q_len < JUDGED_FROM:
            return told, "", ""
        return told, f"{bar}", verdict(self.pace(who), bar, at_least=True)

    def portable(self) -> str:
        """The same of the portable path, in one cell."""
        who = PORTABLE if PORTABLE in self.found else PLANNED
        told, _, judged = self.judged(who, PORTABLE_BARS)
        return f"{ms(self.seconds(who))}: {told.split()[0]} {judged}".strip()

    def beside_flex(self, asked: Bars) -> tuple[str, str, str]:
        """How much faster than compiled FlexAttention, the bar, the verdict."""
        if FLEX not in self.found:
            return "", "", ""
        ratio = self.seconds(FLEX) / self.seconds(PLANNED)
        if asked.flex is None or BARE in self.found:
            return f"{ratio:.1f} x", "", ""
        return f"{ratio:.1f} x", f"{asked.flex}", verdict(ratio, asked.flex, at_least=True)

    @property
    def chosen(self) -> str:
        """Whether the plan's choice is about as fast as the other ways that truemask has; who is faster."""
        best = min((who for who in (PLANNED, PORTABLE, NATIVE) if who in self.found), key=self.seconds)
        judged = verdict(self.seconds(PLANNED) / self.seconds(best), BAR_BEST)
        return judged if judged == "met" else f"{judged}: {best} {ms(self.seconds(best))}"

    @property
    def flops(self) -> float:
        """Additions and multiplications a second of the forward, of pairs that are let through."""
        r = self.plan.request
        return 2 * r.cells * self.density * (r.head_dim + r.value_dim) / self.seconds(PLANNED)


def measured(mask: tm.Mask, workload: Workload, grad: bool, given: argparse.Namespace) -> Row:
    """Race everybody."""
    _, heads, n, d = workload.q.shape
    CACHE.clear()  # of the last mask's dense form, among others
    plan = tm.plan(mask, n, n, heads=heads, head_dim=d, dtype=workload.q.dtype, grad=grad)
    runs = {who: workload.run(call, grad) for who, call in contestants(plan, workload, given).items()}
    rivals = [who for who in runs if who not in (PLANNED, MASKED, BARE, UNMASKED)]
    found = race(runs, 0.0 if given.quick else given.seconds, most=15, outsiders=rivals)
    return Row(plan, pace_name(plan.request), mask.density(n), found)


# -- the machine -------------------------------------------------------------------------------------------------------


class Peak(NamedTuple):
    """Additions and multiplications a second in a dtype, with all threads at once, and how that was found."""

    flops: float = 0.0
    source: str = ""


MEASURES = {  # what the kernel's own measure is of, by what it multiplies
    "floats": "of fused multiply-adds in registers",
    "pairs": "of products of pairs of bf16 in registers",
    "tiles": "of products of tiles",
}


def peak(dtype: str, quick: bool) -> Peak:
    """The kernel's own measure of what it computes this dtype with, else the best of torch's matrix product."""
    if not missing():
        halves = dtype == "bf16"
        found = library.peak(0.01 if quick else 0.5, halves)
        return Peak(found, MEASURES[library.products_of_bf16() if halves else "floats"])
    sizes = (64,) if quick else (512, 1024, 2048)
    paces = [_mm_pace(n, DTYPES[dtype], quick) for n in sizes]
    return Peak(max(paces), "of torch.mm's pace, the best of some sizes: below the peak")


def _mm_pace(n: int, dtype: torch.dtype, quick: bool) -> float:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / race({"mm": lambda: torch.mm(a, b)}, 0.0 if quick else 0.5)["mm"].least
