"""A run of `truemask train` as a text model: a token is a byte."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from truemask.generation.kv_cache import KVCache
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.textmodels.text_model import Reader, TextModel, Tokens, Writing, Written
from truemask.train.checkpoint import load_model, read_checkpoint
from truemask.train.config import BOUNDARY
from truemask.train.model import build_model
from truemask.train.sample import as_text, bytes_behind


class ByteModel(TextModel):
    """The newest checkpoint of a run, or the one that is named."""

    def __init__(self, where: str) -> None:
        checkpoint = read_checkpoint(where)
        self.name = where
        self.own_mask = self.trained_mask = checkpoint.config.expression()
        self.model = build_model(checkpoint.config)
        load_model(checkpoint, self.model)
        self.model.eval()

    def tokens(self, text: str) -> Tokens:
        content = text.encode()
        return Tokens(torch.tensor([BOUNDARY, *content]), torch.arange(len(content) + 1))

    @contextmanager
    def reading(self, mask: Mask | None, tokens: int) -> Iterator[Reader]:
        cache = self._cache(self.trained_mask if mask is None else mask, tokens)

        def read(ids: Tensor) -> Tensor:
            logits = self.model.net(ids[None], cache=cache)
            cache.advance()
            return logits[0]

        yield read

    def write(self, prompt: str, mask: Mask | None, how: Writing, show: Callable[[str], None]) -> Written:
        mask, start, content = self.trained_mask if mask is None else mask, time.perf_counter(), bytearray()
        options = {"temperature": how.temperature, "top_k": how.top_k, "seed": how.seed}

        def made() -> Iterator[int]:
            for byte in bytes_behind(self.model, mask, prompt, how.tokens, **options):
                content.append(byte)
                yield byte

        for piece in as_text(made()):
            show(piece)
        seconds, tokens = time.perf_counter() - start, len(prompt.encode(errors="replace")) + how.tokens
        full = KVCache(self.model.net, batch=1, tokens=tokens)
        return Written(len(content), seconds, self._cache(mask, tokens).bytes, full.bytes)

    def _cache(self, mask: Mask, tokens: int) -> KVCache:
        return KVCache(self.model.net, batch=1, tokens=tokens, mask=causal & mask)
