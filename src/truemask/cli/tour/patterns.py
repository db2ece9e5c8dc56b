"""Act 3: the patterns, each as one expression with its picture, formula, price and plan."""

from __future__ import annotations

from truemask.attention.planning.plan import plan
from truemask.cli.tour.stage import SMALL_LENGTH, Act, Stage
from truemask.common.formatting import percent
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, local, window
from truemask.masks.leaves.patterns import random
from truemask.masks.leaves.per_token import global_tokens, prefix

LENGTH = 2048
Pattern = tuple[str, str, Mask, Mask]  # name, formula, the mask drawn at SMALL, the mask counted at LENGTH


def gallery() -> list[Pattern]:
    """Name, formula, a small version to draw and a real one to count."""
    return [
        ("local", "|q - k| <= r", local(3), local(128)),
        ("blocks", "q // s = k // s", blocks(6), blocks(128)),
        (
            "between blocks",
            "q // s - 1 <= k // s <= q // s + 1",
            blocks(4, back=1, ahead=1),
            blocks(128, back=1, ahead=1),
        ),
        ("random", "hash(seed, q // s, k // s) < rate", random(0.2, block=2, seed=1), random(0.1, block=64, seed=1)),
        (
            "a mix (BigBird)",
            "near, or random, or a global token",
            blocks(3, back=1, ahead=1) | random(0.1, block=3, seed=4) | global_tokens([0, 1]),
            blocks(64, back=1, ahead=1) | random(0.05, block=64, seed=4) | global_tokens([0, 1]),
        ),
        (
            "sinks and a window",
            "k <= q, and q - k < w or k < 4",
            causal & (window(6) | prefix(2)),
            causal & (window(256) | prefix(4)),
        ),
        (
            "packed",
            "the same at positions that restart",
            (causal & (window(6) | prefix(2))).packed([7, 12, 5]),
            (causal & (window(256) | prefix(4))).packed([500, 1100, 448]),
        ),
    ]


def play(stage: Stage) -> None:
    stage.say(
        f"Drawn at {SMALL_LENGTH} tokens; counted and planned at {LENGTH}. Ink: the query (down) may see the key "
        "(across)."
    )
    for name, formula, small, real in gallery():
        count = int(real.count(LENGTH).double().mean())
        forecast = plan(real, LENGTH)
        stage.picture_beside(
            small,
            [
                (name, "bold"),
                f"\n{formula}\n",
                (str(real), "code"),
                f"\n{count:,} pairs of {LENGTH**2:,} ({percent(count, LENGTH**2)})\n",
                f"tiles of 128: {_tiles(real)}\n",
                f"plan: {forecast.backend}, {forecast.costs[forecast.backend] * 1e3:.2g} ms forecast",
            ],
        )


def _tiles(mask: Mask) -> str:
    counts = mask.tiles(LENGTH).counts
    return f"{counts.empty} empty, {counts.mixed} mixed, {counts.full} full"


ACT = Act("patterns", "The patterns", play)
