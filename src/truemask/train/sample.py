"""Text from a trained model, as it is made."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

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
    """Pieces of text that follow `prompt` at the start of a document; it ends early where the document does.

    At most `tokens` bytes. A character of several bytes comes when its last byte does; bytes that are no UTF-8 come as
    the replacement character.
    """
    start = torch.tensor([[BOUNDARY, *prompt.encode("utf-8", errors="replace")]])
    generator = torch.Generator().manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    steps = model.stream(
        start, tokens, temperature=temperature, top_k=top_k, eos_token=BOUNDARY, mask=mask, generator=generator
    )
    for token in steps:
        if int(token) == BOUNDARY:
            break
        piece = decoder.decode(bytes([int(token)]))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
