"""A model of transformers as a text model: a folder of safetensors, a GGUF file, or one that is loaded already."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from truemask.interop.cache_for import cache_for
from truemask.interop.use import use
from truemask.masks.core.mask import Mask
from truemask.textmodels.text_model import Reader, TextModel, TextModelError, Tokens, Writing, Written

LEARNED_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_emb(ed)?)$")


class HuggingFaceModel(TextModel):
    """A decoder of transformers with its tokenizer, in evaluation mode."""

    own_mask = None

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        if _learned_positions(model):
            self.most_tokens = model.config.get_text_config(decoder=True).max_position_embeddings

    @classmethod
    def open(cls, path: Path) -> HuggingFaceModel:
        """Load a folder (config.json, safetensors, a tokenizer) or a GGUF file; nothing is fetched, no pickle is read.

        Raises:
            TextModelError: transformers cannot load it; the message has its reason.
        """
        logging.set_verbosity_error()
        one_file = path.suffix == ".gguf"
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent if one_file else path)}
        where |= {"local_files_only": True, **({"gguf_file": path.name} if one_file else {})}
        weights: dict[str, Any] = {"dtype": torch.float32} if one_file else {"dtype": "auto", "use_safetensors": True}
        try:
            with redirect_stderr(io.StringIO()):  # progress bars that no setting turns off
                model = AutoModelForCausalLM.from_pretrained(**where, **weights)
                return cls(str(path), model, AutoTokenizer.from_pretrained(**where))
        except Exception as error:  # a broken file shows in many ways, struct.error among them
            raise TextModelError(
                f"transformers cannot load {path}: {' '.join(str(error).split())}\n"
                "A folder needs config.json, weights in safetensors, and the files of the tokenizer"
            ) from error

    def tokens(self, text: str) -> Tokens:
        fast = self.tokenizer.is_fast
        encoded = self.tokenizer(text, return_offsets_mapping=fast)
        ids = torch.tensor(encoded.input_ids, dtype=torch.int64)
        if fast:
            sizes = torch.tensor([0, *(len(sign.encode()) for sign in text)]).cumsum(0)
            ends = sizes[torch.tensor([stop for _, stop in encoded.offset_mapping], dtype=torch.int64)]
            return Tokens(ids, ends.cummax(0).values)  # a token that stands for no text ends at 0
        pieces = (self.tokenizer.decode([token], skip_special_tokens=True) for token in encoded.input_ids)
        return Tokens(ids, torch.tensor([len(piece.encode()) for piece in pieces], dtype=torch.int64).cumsum(0))

    @contextmanager
    def reading(self, mask: Mask | None, tokens: int) -> Iterator[Reader]:
        with use(self.model, mask):
            cache = cache_for(self.model, tokens=tokens)

            def read(ids: Tensor) -> Tensor:
                return self.model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0]

            yield read

    def write(self, prompt: str, mask: Mask | None, how: Writing, show: Callable[[str], None]) -> Written:
        ids = torch.tensor([self.tokenizer(prompt).input_ids], dtype=torch.int64)
        if not ids.numel():
            raise TextModelError(f"the prompt is empty, and {self.name} puts nothing before a text: pass --prompt")
        self.check_tokens(ids.shape[1] + how.tokens - 1)
        streamer = _Shown(self.tokenizer, show)
        start = time.perf_counter()
        with use(self.model, mask), torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            cache = cache_for(self.model, tokens=ids.shape[1] + how.tokens)
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                streamer=streamer,
                max_new_tokens=how.tokens,
                **_choice(how),
            )
        return Written(streamer.tokens, time.perf_counter() - start, cache.bytes, cache.full_bytes)


class _Shown(TextStreamer):
    """Text of whole words as it comes, and how many tokens did."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.tokens = show, 0

    def put(self, value: Any) -> None:
        self.tokens += 0 if self.next_tokens_are_prompt else value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def _choice(how: Writing) -> dict[str, Any]:
    """As transformers calls it; what the model's own settings say besides does not count."""
    if how.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, "temperature": how.temperature, "top_k": how.top_k or 0, "top_p": 1.0}


def _learned_positions(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding) and LEARNED_POSITIONS.search(name) for name, module in model.named_modules()
    )
