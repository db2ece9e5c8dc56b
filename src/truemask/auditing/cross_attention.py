"""What cross-attention reads: a context whose padding must not matter, and which should matter to somebody.

Names are those of transformers' encoder-decoders (`input_ids` and `attention_mask` beside `decoder_input_ids`), of
x-transformers and truemask (`context`, `context_mask`), and of torch (`memory`, `memory_key_padding_mask`). Pictures
and sound beside the audited tokens are replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from truemask.auditing.distances import Distances
from truemask.auditing.multimodal import SIGNAL_KEYWORDS
from truemask.auditing.subject import SEED, AuditedModel
from truemask.common.finding import Finding

CONTEXT_PADDING = {  # the context, its padding, and what that says of real tokens
    "context": ("context_mask", True),
    "memory": ("memory_key_padding_mask", False),
    "encoder_hidden_states": ("encoder_attention_mask", True),
}
ENCODER_PADDING = {"input_ids": ("attention_mask", True), "inputs_embeds": ("attention_mask", True)}


class Context(NamedTuple):
    """A keyword `name` with tokens `[b, m]` or vectors `[b, m, d]`; which are real, bool `[b, m]`, says `padding`."""

    name: str
    value: Tensor
    real: Tensor
    padding: str = ""

    @property
    def is_signal(self) -> bool:
        """Whether it is a picture or sound, of which an encoder makes vectors first."""
        return self.name in SIGNAL_KEYWORDS


def context_of(subject: AuditedModel) -> Context | None:
    """What the audited call gives to cross-attention, if that is a sequence for each sample; or a picture or sound."""
    keywords = subject.keywords
    names = CONTEXT_PADDING | (ENCODER_PADDING if str(subject.name).startswith("decoder_") else {})
    for name, (padding, means) in names.items():
        value, flags = keywords.get(name), keywords.get(padding)
        if isinstance(value, Tensor) and value.ndim in (2, 3) and len(value) == subject.batch:
            real = torch.ones(value.shape[:2], dtype=torch.bool)
            if isinstance(flags, Tensor) and flags.shape == real.shape and not flags.is_floating_point():
                real = flags.cpu().bool() == means
            return Context(name, value, real, padding)
    for name in SIGNAL_KEYWORDS:
        value = keywords.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return Context(name, value, torch.ones(value.shape[:2], dtype=torch.bool))
    return None


def context_findings(subject: AuditedModel, distances: Distances, reach: Tensor, seeds: int) -> Iterator[Finding | str]:
    """Padded context that matters, context that matters to other samples or too early, or that matters to nobody."""
    context = context_of(subject)
    if context is None:
        return
    whole = torch.ones_like(context.real)
    by_all = _moved(subject, distances, context, whole, seeds)
    if not bool((by_all > distances.floor).any()):
        yield Finding(
            "context-ignored",
            "warning",
            f"`{context.name}`",
            f"no output moved when all of `{context.name}` was replaced ({seeds} seeds): evidence, not proof",
            "look for cross-attention that is missing, or hides everything",
        )
    if context.is_signal:
        yield f"`{context.name}` was replaced as a whole only: what makes vectors of it lies outside this audit"
    yield from _by_padding(_moved(subject, distances, context, ~context.real, seeds), distances, context)
    if bool(subject.signal_places.any()):
        yield from _too_early(subject, distances, context, by_all, reach)
    elif len(context.value) == subject.batch > 1:
        first = torch.zeros_like(whole)
        first[0] = True
        yield from _by_others(_moved(subject, distances, context, first, seeds)[1:], distances, context)


def _by_padding(movement: Tensor, distances: Distances, context: Context) -> Iterator[Finding]:
    if bool((movement > distances.floor).any()):
        yield Finding(
            "padding-matters",
            "error",
            f"`{context.name}`",
            f"outputs moved by {float(movement.max()):.2g} when the padding of `{context.name}` was replaced, which "
            "proves that cross-attention, or the encoder, sees it",
            "hide padded keys of the context from every query: its mask goes to cross-attention in every layer",
        )


def _by_others(movement: Tensor, distances: Distances, context: Context) -> Iterator[Finding]:
    if bool((movement > distances.floor).any()):
        yield Finding(
            "batch-neighbours",
            "error",
            f"`{context.name}` of sample 0",
            f"outputs of other samples moved by {float(movement.max()):.2g} when that was replaced, which proves "
            "that they depend on it",
            "look for a reshape that mixes samples with heads or positions, and for a context that is not repeated as "
            "its samples are",
        )


def _too_early(
    subject: AuditedModel, distances: Distances, context: Context, movement: Tensor, reach: Tensor
) -> Iterator[Finding]:
    """Outputs that moved with the pictures although the mask shows them no place of one."""
    early = (movement > distances.floor) & ~(reach & subject.signal_places[:, None, :]).any(dim=-1)
    if bool(early.any()):
        b, q = (int(i) for i in early.nonzero()[0])
        yield Finding(
            "leak",
            "error",
            f"sample {b}, output {q}, `{context.name}`",
            f"output {q} depends on `{context.name}`, although no place of it may reach it ({int(early.sum())} such "
            f"outputs): replacing it moved the output by {float(movement[b, q]):.2g}, which proves it",
            "look for a mask that opens the places of images to everybody, or pictures that lie in another sample",
        )


def _moved(subject: AuditedModel, distances: Distances, context: Context, places: Tensor, seeds: int) -> Tensor:
    """How far outputs move, at most, when the context is replaced at `places`, bool `[b, m]`: float64 `[b, n]`."""
    movement = torch.zeros(subject.batch, subject.length, dtype=torch.float64)
    for seed in range(seeds) if places.any() else ():
        generator = torch.Generator().manual_seed(SEED + seed)
        changed = subject.other_context(context.value, places, generator)
        with torch.no_grad():
            outputs = subject.outputs(**{context.name: changed})
        movement = torch.maximum(movement, distances.moved(outputs))
    return movement
