"""A training step in bf16 under a window: truemask beside x-transformers' flash path, the same model and weights.

    python examples/bf16_training_step.py [--tokens 8192] [--window 512] [--steps 2]

Both are byte-level decoders with rotary positions (dim 256, depth 4, 8 heads of 64). The forward runs under autocast,
the parameters and AdamW stay in fp32. At 8,192 tokens on a processor without tiles for bf16 the peer takes half a
minute a step; without it (`pip install x-transformers`) truemask runs alone. `--steps 0` shows the first step only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import truemask as tm
from truemask.backends.costs.calibration_file import this_machine

BYTES = 256
SHAPE: dict[str, Any] = {"dim": 256, "depth": 4, "heads": 8, "rotary_pos_emb": True}
OURS, FLASH = "truemask", "x-transformers, flash"


def our_model() -> nn.Module:
    """A decoder; the window is told in the call."""
    torch.manual_seed(0)
    return tm.TransformerWrapper(num_tokens=BYTES, max_seq_len=0, attn_layers=tm.Decoder(**SHAPE))


def their_model(window: int) -> nn.Module:
    """The peer's of the same make: it counts only the keys before the query's own."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(**SHAPE, attn_flash=True, attn_max_attend_past=window - 1, verbose=False)
    return TransformerWrapper(num_tokens=BYTES, max_seq_len=0, attn_layers=layers)


class Trainer:
    """A model, its optimizer, and what its steps took and lost."""

    def __init__(self, net: nn.Module, **given: Any) -> None:
        self.net, self.given = net.train(), given
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: Tensor) -> None:
        """Forward in bf16, loss, backward, update."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.net(ids[:, :-1], **self.given)
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def trainers(window: int) -> dict[str, Trainer]:
    """Who takes part, with the same weights."""
    ours = our_model()
    found = {OURS: Trainer(ours, mask=tm.window(window))}
    try:
        theirs = their_model(window)
    except ModuleNotFoundError as error:
        print(f"{error}: {OURS} runs alone; pip install x-transformers to see both")
        return found
    with torch.no_grad():
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            own.copy_(other)
    return {**found, FLASH: Trainer(theirs)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Trainer]:
    """Take turns; the first step warms up and is timed only if it is the only one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("window", 512), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(arguments)
    ids = torch.randint(BYTES, (1, given.tokens + 1), generator=torch.Generator().manual_seed(0))
    running = trainers(given.window)
    mask = tm.causal & tm.window(given.window)
    print(f"{this_machine()}\n{given.tokens} tokens under `{mask}`, bf16 by autocast")
    for _ in range(1 + given.steps):
        for trainer in running.values():
            trainer.step(ids)
    took = {who: median(trainer.seconds[1:] or trainer.seconds) for who, trainer in running.items()}
    for who, trainer in running.items():
        print(f"{who:<22} {took[who]:8.3f} s a step, losses {', '.join(f'{x:.4f}' for x in trainer.losses)}")
    if FLASH in took:
        print(f"{OURS} is {took[FLASH] / took[OURS]:.1f} times as fast")
    return running


if __name__ == "__main__":
    main()
