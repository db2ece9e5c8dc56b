"""What cross-attention reads: a context whose padding must not matter, and which should matter to somebody.

Names are those of transformers' encoder-decoders (`input_ids` and `attention_mask` beside `decoder_input_ids`), of
x-transformers and truemask (`context`, `context_mask`), and of torch (`memory`, `memory_key_padding_mask`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.auditing.models import SEED, Subject
from truemask.auditing.ruler import Ruler
from truemask.diagnosis.finding import Finding

NAMES = {  # the context, its padding, and what that says of real tokens
    "context": ("context_mask", True),
    "memory": ("memory_key_padding_mask", False),
    "encoder_hidden_states": ("encoder_attention_mask", True),
}
ENCODED = {"input_ids": ("attention_mask", True), "inputs_embeds": ("attention_mask", True)}


class Context(NamedTuple):
    """A keyword `name` with tokens `[b, m]` or vectors `[b, m, d]`, and which of them are real, bool `[b, m]`."""

    name: str
    value: Tensor
    real: Tensor


def context_of(subject: Subject) -> Context | None:
    """What the audited call gives to cross-attention, if that is a sequence for each sample."""
    given = subject.keywords
    names = NAMES | (ENCODED if str(subject.name).startswith("decoder_") else {})
    for name, (padding, means) in names.items():
        value, flags = given.get(name), given.get(padding)
        if isinstance(value, Tensor) and value.ndim in (2, 3) and len(value) == subject.batch:
            real = torch.ones(value.shape[:2], dtype=torch.bool)
            if isinstance(flags, Tensor) and flags.shape == real.shape and not flags.is_floating_point():
                real = flags.cpu().bool() == means
            return Context(name, value, real)
    return None


def context_findings(subject: Subject, ruler: Ruler, seeds: int) -> Iterator[Finding]:
    """Padded context that matters, other samples' context that matters, and context that matters to nobody."""
    context = context_of(subject)
    if context is None:
        return
    whole, first = torch.ones_like(context.real), torch.zeros_like(context.real)
    first[0] = True
    by_padding = _moved(subject, ruler, context, ~context.real, seeds)
    by_first = _moved(subject, ruler, context, first, seeds)[1:] if subject.batch > 1 else by_padding[:0]
    by_all = _moved(subject, ruler, context, whole, seeds)
    if bool((by_padding > ruler.floor).any()):
        yield Finding(
            "padding-matters",
            "error",
            f"`{context.name}`",
            f"outputs moved by {float(by_padding.max()):.2g} when the padding of `{context.name}` was replaced, which "
            "proves that cross-attention, or the encoder, sees it",
            "hide padded keys of the context from every query: its mask goes to cross-attention in every layer",
        )
    if bool((by_first > ruler.floor).any()):
        yield Finding(
            "batch-neighbours",
            "error",
            f"`{context.name}` of sample 0",
            f"outputs of other samples moved by {float(by_first.max()):.2g} when that was replaced, which proves "
            "that they depend on it",
            "look for a reshape that mixes samples with heads or positions, and for a context that is not repeated as "
            "its samples are",
        )
    if not bool((by_all > ruler.floor).any()):
        yield Finding(
            "context-ignored",
            "warning",
            f"`{context.name}`",
            f"no output moved when all of `{context.name}` was replaced ({seeds} seeds): evidence, not proof",
            "look for cross-attention that is missing, or hides everything",
        )


def _moved(subject: Subject, ruler: Ruler, context: Context, places: Tensor, seeds: int) -> Tensor:
    """How far each sample's outputs move, at most, when the context is replaced at `places`, bool `[b, m]`: `[b]`."""
    moved = torch.zeros(subject.batch, dtype=torch.float64)
    for seed in range(seeds) if places.any() else ():
        generator = torch.Generator().manual_seed(SEED + seed)
        changed = subject.other_context(context.value, places, generator)
        with torch.no_grad():
            outputs = subject.outputs(**{context.name: changed})
        moved = torch.maximum(moved, ruler.moved(outputs).amax(dim=1))
    return moved
