"""Text from a trained model, as it is made."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

import torch

from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.masks.core.mask import Mask
from truemask.train.config import BOUNDARY


def continuation(
    model: AutoregressiveWrapper,
    mask: Mask,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of text that follow `prompt` at the start of a document; it ends early where the document does."""
    return as_text(bytes_behind(model, mask, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed))


def bytes_behind(
    model: AutoregressiveWrapper,
    mask: Mask,
    prompt: str,
    tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
    """At most `tokens` bytes that follow `prompt` at the start of a document, as far as the document goes."""
    start = torch.tensor([[BOUNDARY, *prompt.encode("utf-8", errors="replace")]])
    generator = torch.Generator().manual_seed(seed)
    steps = model.stream(
        start, tokens, temperature=temperature, top_k=top_k, eos_token=BOUNDARY, mask=mask, generator=generator
    )
    return (int(token) for token in steps if int(token) != BOUNDARY)


def as_text(content: Iterable[int]) -> Iterator[str]:
    """Bytes as pieces of text.

    A character of several bytes comes when its last byte does; bytes that are no UTF-8 come as the replacement
    character.

    >>> list(as_text("é!".encode()))
    ['é', '!']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for byte in content:
        piece = decoder.decode(bytes([byte]))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
