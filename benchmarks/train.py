"""Steps of training: truemask's Decoder beside x-transformers' of the same make and weights, plain and with flash.

    python benchmarks/train.py [--quick] [--json FILE] [--plot FILE] [--lengths 1024 8192] [--limit SECONDS]

A byte-level model with rotary positions: dim 256, depth 4, 8 heads of 64, b 1, fp32. A step is forward, loss, backward
and AdamW. `attn_max_attend_past=256` lets a token read 256 before itself and itself: that is `window(257)`, and the
first table shows that both compute the same. A contestant's memory is the peak of a process of its own, which may not
take more than `MEMORY` and whose steps may not take longer than `--limit`. Then those who are left take turns, unless
one step of each takes more than a minute together: then that step is the measurement. Medians; a peer ten times slower
than the fastest runs once. Bars compare with the better of the peer's two ways.
`--plot` draws the speeds into an .svg or .png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from curves import INK_OF_OTHERS, Line, draw
from harness import STATUS, Table, Timing, clock, finish, megabytes, memory_now, options, race, timing, verdict
from torch import Tensor, nn
from torch.nn import functional as F

import truemask as tm
from truemask.benchmarking.timing import Run
from truemask.viz.picture import INK

LENGTHS, QUICK_LENGTH = (1024, 2048, 4096, 8192, 16384, 32768), 300
TOKENS, PAST = 256, 256
SHAPE: dict[str, Any] = {"dim": 256, "depth": 4, "rotary_pos_emb": True}  # heads: 8 of 64 features, both defaults
PLAIN, FLASH, OURS = "x-transformers", "its flash", "truemask"
CAUSAL, WINDOW = "causal", f"causal & window({PAST + 1})"
MASKS: dict[str, tuple[tm.Mask, dict[str, int]]] = {  # what a Decoder is called with, what the peer's is built with
    CAUSAL: (tm.everything, {}),
    WINDOW: (tm.window(PAST + 1), {"attn_max_attend_past": PAST}),
}
BAR_SPEED, BAR_MEMORY = {(CAUSAL, 1024): 1.2, (WINDOW, 8192): 6.0}, {(WINDOW, 8192): 1 / 3}
MEMORY, SPARE = 20 * 2**30, 2 * 2**30  # bytes a contestant may have; what stays free for the rest of the machine
SECONDS, TURNS, STARTING = 6.0, 60.0, 30.0
OUT_OF_MEMORY = "out of memory"
SAME = 1e-4  # of the largest gradient


class Alone(NamedTuple):
    """A contestant in a process of its own: seconds of its steps and peak bytes, or why there are none."""

    seconds: list[float]
    peak: float | None
    failed: str = ""


class Found(NamedTuple):
    """A contestant at one length under one mask: tokens a second, 0 for who could not, and why not."""

    timing: Timing | None
    speed: float
    peak: float | None
    failed: str


# -- the contestants ---------------------------------------------------------------------------------------------------


def model(who: str, mask: str) -> nn.Module:
    """A contestant's model, always with the same weights."""
    torch.manual_seed(0)
    if who == OURS:
        return tm.TransformerWrapper(num_tokens=TOKENS, max_seq_len=0, attn_layers=tm.Decoder(**SHAPE))
    import x_transformers

    layers = x_transformers.Decoder(**SHAPE, **MASKS[mask][1], attn_flash=who == FLASH, verbose=False)
    return x_transformers.TransformerWrapper(num_tokens=TOKENS, max_seq_len=0, attn_layers=layers)


def loss(who: str, net: nn.Module, mask: str, ids: Tensor) -> Tensor:
    """The cross-entropy of the next token."""
    given = {"mask": MASKS[mask][0]} if who == OURS else {}
    return F.cross_entropy(net(ids[:, :-1], **given).flatten(0, 1), ids[:, 1:].flatten())


def tokens(n: int) -> Tensor:
    """A row of n tokens and the one after."""
    return torch.randint(TOKENS, (1, n + 1), generator=torch.Generator().manual_seed(0))


def training(who: str, mask: str, n: int) -> Run:
    """One step of a contestant's training, to be run again and again."""
    net, ids = model(who, mask).train(), tokens(n)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(who, net, mask, ids).backward()
        optimizer.step()

    return step


def sameness_table() -> Table:
    """Every contestant under the same weights: the same parameters, loss and gradients, or nothing here compares."""
    n = PAST + 44
    header = ("mask", "beside", "parameters", OURS, "loss", OURS, "gradients differ by", "at most", "")
    table = Table(f"The same model, {n} tokens", header)
    for mask in MASKS:
        for who in (PLAIN, FLASH):
            theirs, ours = model(who, mask), model(OURS, mask)
            with torch.no_grad():
                for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                    own.copy_(other)
            counts = [sum(p.numel() for p in net.parameters()) for net in (theirs, ours)]
            lost = [loss(name, net, mask, tokens(n)) for name, net in ((who, theirs), (OURS, ours))]
            apart = gradients_apart(lost, [theirs, ours])
            losses = [x.item() for x in lost]
            if counts[0] != counts[1] or apart > SAME:
                raise RuntimeError(f"{who} under {mask} is another model: parameters {counts}, gradients {apart:.1e}")
            table.add(
                *(mask, who, f"{counts[0]:,}", f"{counts[1]:,}", *(f"{x:.6f}" for x in losses)),
                *(f"{apart:.1e}", f"{SAME:.0e}", verdict(apart, SAME)),
                mask=mask, who=who, parameters=counts, losses=losses, apart=apart,
            )  # fmt: skip
    return table


def gradients_apart(losses: Sequence[Tensor], nets: Sequence[nn.Module]) -> float:
    """The largest difference of two models' gradients, as a share of the largest gradient."""
    theirs, ours = (torch.autograd.grad(x, list(net.parameters())) for x, net in zip(losses, nets, strict=True))
    largest = max(float(x.abs().max()) for x in theirs)
    return max(float((x - y).abs().max()) for x, y in zip(theirs, ours, strict=True)) / largest


# -- measuring ---------------------------------------------------------------------------------------------------------


def allowed() -> int:
    """Bytes that a contestant may have, so that the machine never swaps."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(MEMORY, free - SPARE)


def steps_here(who: str, mask: str, n: int) -> Alone:
    """A first step, one more if that was short, and the highest that this process ever was."""
    try:
        step = training(who, mask, n)
        seconds = [clock(step)]
        if seconds[0] < SECONDS:
            seconds = [clock(step)]
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return Alone([], None, OUT_OF_MEMORY)
    return Alone(seconds, float(memory_now("VmHWM")) if STATUS.exists() else None)


def steps_alone(who: str, mask: str, n: int, given: argparse.Namespace) -> Alone:
    """The same in a process of its own, within bounds of memory and time; at `--quick`, in this one."""
    if given.quick:
        return steps_here(who, mask, n)
    case = json.dumps([who, mask, n])
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--alone", case], capture_output=True, text=True, timeout=given.limit + STARTING
        )
    except subprocess.TimeoutExpired:
        return Alone([], None, f"over {given.limit:.0f} s")
    if done.returncode:
        raise RuntimeError(f"{case} ended with {done.returncode}: {done.stderr[-2000:]}")
    found = Alone(*json.loads(done.stdout.splitlines()[-1]))
    return Alone([], None, f"over {given.limit:.0f} s") if max(found.seconds, default=0.0) > given.limit else found


def within_bounds(who: str, mask: str, n: int) -> None:
    """What the process of its own does: take no more memory than is allowed, and print what was found."""
    if STATUS.exists():
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (allowed(), allowed()))
    print(json.dumps(steps_here(who, mask, n)))


def measured(mask: str, n: int, given: argparse.Namespace) -> dict[str, Found]:
    """Each contestant alone; then those who could, in turns."""
    alone = {who: steps_alone(who, mask, n, given) for who in (PLAIN, FLASH, OURS)}
    able = {who: one.seconds[0] for who, one in alone.items() if one.seconds}
    timings = {who: timing([took]) for who, took in able.items()}
    if sum(able.values()) < TURNS:
        runs = {who: training(who, mask, n) for who in able}
        seconds, least = (0.0, 1) if given.quick else (SECONDS, 3 if max(able.values()) < SECONDS else 1)
        timings = race(runs, seconds, least=least, most=25, outsiders=[PLAIN, FLASH])
    speeds = {who: n / timing.median for who, timing in timings.items()}
    return {who: Found(timings.get(who), speeds.get(who, 0.0), one.peak, one.failed) for who, one in alone.items()}


def speed_table(mask: str, given: argparse.Namespace) -> Table:
    """All lengths under one mask."""
    header = (
        *("tokens", PLAIN, FLASH, OURS, "spread", "faster", "bar", ""),
        *("memory", FLASH, OURS, "share", "bar", "", "backend"),
    )
    table = Table(f"Training, {mask}: tokens/s", header)
    table.note = f"a process may take {MEMORY / 2**30:.0f} GiB, or what is free less {SPARE / 2**30:.0f} GiB"
    for n in given.lengths:
        found = measured(mask, n, given)
        backend = tm.plan(tm.causal & MASKS[mask][0], n, n, heads=8, head_dim=64, grad=True).backend
        ours = found[OURS].timing
        table.add(
            *(f"{n:,}", *(one.failed or f"{one.speed:,.0f}" for one in found.values())),
            *(spread(ours), *judged_speed(mask, n, found)),
            *(one.failed or megabytes(one.peak) for one in found.values()),
            *(*judged_memory(mask, n, found), backend),
            mask=mask, n=n, backend=backend, found={who: as_numbers(one) for who, one in found.items()},
        )  # fmt: skip
    return table


def spread(found: Timing | None) -> str:
    """Half the distance of the quartiles, where there was more than one run."""
    return "-" if found is None else f"{found.spread:.0%}" if found.runs > 1 else "1 run"


def as_numbers(one: Found) -> dict[str, Any]:
    """For the JSON."""
    return one._asdict() | {"timing": one.timing and one.timing._asdict()}


def judged_speed(mask: str, n: int, found: dict[str, Found]) -> tuple[str, str, str]:
    """How many times faster than the better of the peer's ways, bar, verdict."""
    best, ours, bar = max(found[PLAIN].speed, found[FLASH].speed), found[OURS].speed, BAR_SPEED.get((mask, n))
    faster = ours / best if best else inf
    text = f"{faster:.2f} x" if best and ours else "-"
    return (text, "", "") if bar is None else (text, f"{bar} x", verdict(faster, bar, at_least=True))


def judged_memory(mask: str, n: int, found: dict[str, Found]) -> tuple[str, str, str]:
    """The share of the peer's memory, in whichever of its ways needs less; bar, verdict."""
    plain, flash, ours = (found[who].peak or inf for who in (PLAIN, FLASH, OURS))
    best, bar = min(plain, flash), BAR_MEMORY.get((mask, n))
    text = f"{ours / best:.2f}" if max(ours, best) < inf else "-"
    return (text, "", "") if bar is None else (text, f"{bar:.2f}", verdict(ours / best, bar))


# -- the picture -------------------------------------------------------------------------------------------------------


def lines(tables: Sequence[Table]) -> list[Line]:
    """Under each mask truemask and the better of the peer's ways; a line that ends early says why."""
    found = []
    for mask, rows in zip(MASKS, (table.numbers for table in tables), strict=True):
        for who, ways in ((PLAIN, (PLAIN, FLASH)), (OURS, (OURS,))):
            speeds = {row["n"]: max(row["found"][way]["speed"] for way in ways) for row in rows}
            able = {n: speed for n, speed in speeds.items() if speed}
            beyond = next((f"then {row['found'][ways[-1]]['failed']}" for row in rows if not speeds[row["n"]]), "")
            color = INK if who == OURS else INK_OF_OTHERS
            if able:
                found.append(Line(f"{who}, {mask}", list(able), list(able.values()), color, mask == CAUSAL, beyond))
    return found


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the tables."""
    lengths = {"type": int, "nargs": "+", "default": LENGTHS, "metavar": "N"}
    limit = {"type": float, "default": 180.0, "metavar": "SECONDS"}
    hidden = {"help": argparse.SUPPRESS}
    given = options(__doc__, arguments, alone=hidden, lengths=lengths, limit=limit, plot={"type": Path})
    if given.alone:
        within_bounds(*json.loads(given.alone))
        return ""
    given.lengths = (QUICK_LENGTH,) if given.quick else given.lengths
    same, speeds = sameness_table(), [speed_table(mask, given) for mask in MASKS]
    if given.plot:
        draw(lines(speeds), "Tokens trained on in a second", "tokens in the row", given.plot)
    return finish([same, *speeds], given)


if __name__ == "__main__":
    main()
