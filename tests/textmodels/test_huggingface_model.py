"""A Hugging Face model writes under a mask what it writes without a cache, in memory that the mask decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truemask.interop.use import use
from truemask.masks.formats.parse import parse
from truemask.textmodels import smollm
from truemask.textmodels.huggingface_model import HuggingFaceModel
from truemask.textmodels.opening import open_model
from truemask.textmodels.text_model import TextModelError, Writing

MASK = "causal & (window(5) | prefix(2))"


def test_text_is_that_of_greedy_steps_without_a_cache(llama: Path) -> None:
    model, pieces = open_model(str(llama)), []
    assert isinstance(model, HuggingFaceModel)
    written = model.write("the cat", parse(MASK), Writing(tokens=40, temperature=0.0), pieces.append)
    ids = model.tokens("the cat").ids[None]
    prompt = ids.shape[1]
    with use(model.model, parse(MASK)), torch.no_grad():
        for _ in range(40):
            ids = torch.cat([ids, model.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert "".join(pieces) == model.tokenizer.decode(ids[0, prompt:])
    assert written.tokens == 40
    assert len(pieces) > 1


def test_the_cache_is_as_small_as_the_mask(llama: Path) -> None:
    model = open_model(str(llama))
    small = model.write("the", parse(MASK), Writing(tokens=300, seed=3), lambda _: None)
    full = model.write("the", None, Writing(tokens=300, seed=3), lambda _: None)
    assert small.cache_bytes * 2 < small.full_bytes
    assert full.cache_bytes >= full.full_bytes == small.full_bytes


def test_a_seed_writes_the_same_text_and_leaves_the_generator(llama: Path) -> None:
    model, texts, before = open_model(str(llama)), [], torch.get_rng_state()
    for seed in (1, 1, 2):
        pieces: list[str] = []
        model.write("the", None, Writing(tokens=30, seed=seed), pieces.append)
        texts.append("".join(pieces))
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_written(llama: Path, gpt2: Path) -> None:
    with pytest.raises(TextModelError, match="the prompt is empty"):
        open_model(str(llama)).write("", None, Writing(), print)
    with pytest.raises(TextModelError, match="has learned 64 positions"):
        open_model(str(gpt2)).write("the", None, Writing(tokens=65), print)


@pytest.mark.slow
@pytest.mark.skipif(bool(smollm.missing()), reason=f"the move is the installer's: {smollm.INSTALL}")
def test_a_gguf_file_writes() -> None:
    model, pieces = open_model(str(smollm.weights())), []
    written = model.write("The capital of France is", parse(MASK), Writing(tokens=3, temperature=0.0), pieces.append)
    assert written.tokens == 3
    assert "Paris" in "".join(pieces)
