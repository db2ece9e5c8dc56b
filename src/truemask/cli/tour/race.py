"""Act 5: five masks, trained on, in fp32 and bf16: SDPA with the mask against `attend`, here, while you watch."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from html import escape

import torch
from rich.live import Live
from rich.text import Text
from torch import Tensor

from truemask.attention.planning.plan import plan
from truemask.benchmarking.timing import clock
from truemask.benchmarking.workloads import Workload, by_truemask, masked_sdpa, race_masks
from truemask.cli.console import needs_ascii
from truemask.cli.tour.curve import INK, LEVEL
from truemask.cli.tour.stage import Act, Part, Stage
from truemask.common.formatting import duration, percent
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal

HEADS, HEAD_DIM = 4, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEATS = {"fp32": 1, "bf16": 2}  # by what the length is divided: without AMX, SDPA's training in bf16 takes minutes
SDPA, OURS = "SDPA", "truemask"
CLEAR_RATIO = 1.05  # a ratio below that is no difference
COLUMNS = 60  # of the longest bar
ROW, WIDTH = 22, 640  # of the SVG


@dataclass
class Lane:
    """One mask's race: seconds of those who have arrived, and who is on the way since when."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    running: tuple[str, float] | None = None

    def so_far(self) -> dict[str, float]:
        """Seconds, of the one who is on the way too."""
        if self.running is None:
            return self.seconds
        who, start = self.running
        return {**self.seconds, who: time.perf_counter() - start}

    @property
    def ratio(self) -> float:
        """How many times faster truemask was."""
        return self.seconds[SDPA] / self.seconds[OURS]

    @property
    def outcome(self) -> Part:
        """The ratio in words."""
        if max(self.ratio, 1 / self.ratio) < CLEAR_RATIO:
            return "as fast"
        faster = self.ratio > 1
        return (f"{self.ratio:.1f} x faster", "good") if faster else (f"{1 / self.ratio:.1f} x slower", "bad")

    def run(self, who: str, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Let somebody run, on the clock."""
        results: list[tuple[Tensor, ...]] = []
        self.running = (who, time.perf_counter())
        took = clock(lambda: results.append(call()))
        self.seconds[who], self.running = took, None
        return results[0]


@dataclass
class Bars:
    """The lanes as bars on one scale; drawn anew whenever the terminal asks, so a bar grows while its owner runs."""

    lanes: list[Lane]
    ascii: bool = False

    def __rich__(self) -> Text:
        longest = max((took for lane in self.lanes for took in lane.so_far().values()), default=1.0)
        return Text("\n").join(self.lane(lane, longest) for lane in self.lanes)

    def lane(self, lane: Lane, longest: float) -> Text:
        """A mask's name and its bars."""
        text = Text(f"{lane.name}\n", "bold")
        for who, took in lane.so_far().items():
            bar = ("#" if self.ascii else "█") * max(1, round(COLUMNS * took / longest))
            text.append(f"  {who:<9}", "not bold").append(
                bar, "not bold yellow" if who == SDPA else "not bold bright_blue"
            )
            text.append(f" {duration(took)}\n", "not bold")
        return text


def play(stage: Stage) -> None:
    stage.say(
        f"Forward and backward, {HEADS} heads of {HEAD_DIM}, one run each. SDPA gets the mask "
        "as a dense tensor, made before its clock starts, and computes every pair; ",
        ("attend", "code"),
        " gets the expression, and planning is on its clock. The shorter bar is better.",
    )
    for dtype, share in HEATS.items():
        _heat(stage, dtype, stage.race_length // share)
    stage.say("The differences are those of outputs and gradients, absolute.")


def _heat(stage: Stage, dtype: str, length: int) -> None:
    """All masks in one dtype: the bars, the table, what came of it."""
    stage.say((f"{length} tokens in {dtype}", "bold"))
    workload, lanes, rows = Workload.of(length, HEADS, HEAD_DIM, dtype=DTYPES[dtype]), [], []
    bars = Bars(lanes, needs_ascii(stage.console))
    for warm in (masked_sdpa(causal, workload.shortened()), by_truemask(causal)):
        workload.shortened().result(warm)  # threads and libraries start outside the race
    live = stage.console.is_terminal
    screen: AbstractContextManager[object] = Live(bars, console=stage.console) if live else nullcontext()
    with screen:
        for name, mask in race_masks(length).items():
            lanes.append(Lane(name))
            rows.append(_raced(lanes[-1], mask, workload))
            if not live:
                stage.console.print(bars.lane(lanes[-1], max(lanes[-1].seconds.values())))
    stage.figure(svg_bars(lanes), f"seconds of forward and backward at {length} tokens in {dtype}")
    stage.table(["mask", "pairs", "SDPA", "truemask", "", "backend", "largest difference"], rows)
    stage.say(verdict(lanes, dtype))


def _raced(lane: Lane, mask: Mask, workload: Workload) -> list[Part]:
    """Both run; the row of the table."""
    dense = masked_sdpa(mask, workload)
    sdpa_results = lane.run(SDPA, lambda: workload.result(dense))
    own_results = lane.run(OURS, lambda: workload.result(by_truemask(mask)))
    differences = (float((a - b).abs().max()) for a, b in zip(sdpa_results, own_results, strict=True))
    n, dtype = workload.q.shape[2], workload.q.dtype
    backend = plan(mask, n, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, grad=True).backend
    return [
        lane.name,
        percent(int(mask.count(n)), n * n),
        duration(lane.seconds[SDPA]),
        duration(lane.seconds[OURS]),
        lane.outcome,
        backend,
        f"{max(differences):.0e}",
    ]


def verdict(lanes: list[Lane], dtype: str) -> str:
    """What came of it, in one sentence."""
    won = [lane for lane in lanes if lane.ratio >= CLEAR_RATIO]
    best = max(lanes, key=lambda lane: lane.ratio)
    if not won:
        return f"Here truemask was nowhere faster than SDPA in {dtype}."
    return (
        f"In {dtype} truemask was faster under {len(won)} of {len(lanes)} masks, "
        f"{best.ratio:.1f} times under `{best.name}`."
    )


def svg_bars(lanes: list[Lane]) -> str:
    """The same bars for the report."""
    longest = max(took for lane in lanes for took in lane.seconds.values())
    parts, y = [], 0
    for lane in lanes:
        parts.append(f'<text x="0" y="{y + 15}" font-weight="bold">{escape(lane.name)}</text>')
        for i, (who, took) in enumerate(lane.seconds.items(), 1):
            top, wide, ink = y + i * ROW, max(1.0, (WIDTH - 170) * took / longest), LEVEL if who == SDPA else INK
            parts.append(
                f'<text x="8" y="{top + 15}">{escape(who)}</text>'
                f'<rect x="80" y="{top + 3}" width="{wide:.1f}" height="{ROW - 7}" fill="{ink}"/>'
                f'<text x="{86 + wide:.1f}" y="{top + 15}">{duration(took)}</text>'
            )
        y += 3 * ROW + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="race" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" font-size="12" font-family="system-ui, sans-serif" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


ACT = Act("race", "The race", play)
