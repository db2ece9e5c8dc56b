"""What a text costs: the same as one forward over all of it says, however it is cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.textmodels.conftest import TEXT
from truemask.interop.use import use
from truemask.masks.formats.parse import parse
from truemask.textmodels.byte_model import ByteModel
from truemask.textmodels.huggingface_model import HuggingFaceModel
from truemask.textmodels.opening import open_model
from truemask.textmodels.perplexity import score
from truemask.textmodels.text_model import TextModelError

MASKS = [None, "causal", "causal & window(5)", "causal & (window(7) | prefix(2))", "causal & blocks(11)"]


@torch.no_grad()
def direct(path: Path, mask: str | None) -> float:
    """The nats of TEXT in one forward without a cache."""
    model, meant = open_model(str(path)), None if mask is None else parse(mask)
    ids = model.tokens(TEXT).ids
    if isinstance(model, ByteModel):
        logits = model.model.net(ids[None], mask=model.own_mask if meant is None else meant)[0]
    else:
        assert isinstance(model, HuggingFaceModel)
        with use(model.model, meant):
            logits = model.model(input_ids=ids[None], use_cache=False).logits[0]
    return float(F.cross_entropy(logits[:-1], ids[1:], reduction="sum"))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["run", "llama"])
def test_pieces_of_any_length_cost_what_the_whole_does(
    kind: str, mask: str | None, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    model, meant = open_model(str(path)), None if mask is None else parse(mask)
    text, expected = model.tokens(TEXT), direct(path, mask)
    for chunk in (1, 5, 7, 64, 1000):
        found = score(model, text, meant, chunk)
        assert found.nats == pytest.approx(expected, rel=1e-5)
        assert found.tokens == len(text.ids) - 1


def test_masks_cost_differently(llama: Path) -> None:
    model = open_model(str(llama))
    found = [score(model, model.tokens(TEXT), parse(mask), 16).nats for mask in ("causal", "causal & window(2)")]
    assert abs(found[0] - found[1]) > 1e-3 * found[0]


def test_measures_follow_from_nats_tokens_and_bytes(run: Path) -> None:
    model = open_model(str(run))
    found = score(model, model.tokens("née"), None, 2)
    assert (found.tokens, found.bytes) == (4, 4)
    assert found.perplexity == pytest.approx(math.exp(found.nats / 4))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / 4)
    assert found.mask == "causal & (window(7) | prefix(2))"


def test_the_progress_is_told_in_tokens(run: Path) -> None:
    model, told = open_model(str(run)), []
    score(model, model.tokens("0123456789"), None, 4, told.append)
    assert told == [4, 8, 10]


def test_positions_that_end_and_texts_without_a_question(gpt2: Path) -> None:
    model = open_model(str(gpt2))
    text = model.tokens(TEXT)
    assert score(model, text.first(65), None, 16).tokens == 64
    with pytest.raises(TextModelError, match=r"has learned 64 positions, and this takes \d+ tokens: pass --tokens"):
        score(model, text, None, 16)
    with pytest.raises(TextModelError, match="the first is only read"):
        score(model, text.first(1), None, 16)
