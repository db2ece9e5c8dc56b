"""Where tokens stand: what a forward says of it in several ways is compared, and models count from where they do."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.interop.models import assert_same, model_of
from truemask.errors import ConventionWarning
from truemask.interop.positions import first_position
from truemask.interop.use import use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def after_padding(name: str, pad: int = 1) -> Any:
    """A model whose positions begin after its padding's."""
    extra = {"Esm": {"position_embedding_type": "absolute", "token_dropout": False, "mask_token_id": 3}}.get(name, {})
    config = getattr(transformers, f"{name}Config")(**SMALL, **extra, pad_token_id=pad, initializer_range=0.3)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config).eval()


# -- models that count from somewhere else -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Camembert", "Esm", "MPNet", "Longformer", "Data2VecText"])
def test_the_first_position_of_models_that_keep_one_for_padding(name: str) -> None:
    model = after_padding(name)
    assert first_position(model) == 2
    ids = torch.tensor([[8, 9, 10, 11]])
    given = {"position_ids": torch.arange(2, 6)[None]}
    assert_same(model(ids, **given).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "bart", "t5", "modernbert"])
def test_the_first_position_of_others_is_zero(name: str) -> None:
    assert first_position(model_of(name)) == 0


def test_positions_before_the_first_are_told_once() -> None:
    model = after_padding("XLMRoberta")
    batch = tm.PackCollator(7, mask=tm.everything)([{"input_ids": [8, 9, 10, 11]}, {"input_ids": [5, 6, 7]}])
    ids, places = batch["input_ids"], batch["position_ids"]
    with torch.no_grad():
        alone = [model(torch.tensor([each])).last_hidden_state[0] for each in ([8, 9, 10, 11], [5, 6, 7])]
        with use(model, batch["mask"]), pytest.warns(ConventionWarning, match="from 2 .* first_position=2") as told:
            model(ids, position_ids=places)
            model(ids, position_ids=places)
        assert len(told) == 1
        assert told[0].filename == __file__
        with use(model, batch["mask"]):
            assert_same(model(ids, position_ids=places + 2).last_hidden_state[0], torch.cat(alone))


def test_positions_of_padding_are_no_tokens() -> None:
    """RoBERTa itself gives its padding the position before the first; `pad` is 0 or 1."""
    for pad in (0, 1):
        model = after_padding("Roberta", pad)
        ids = torch.tensor([[8, 9, 10, pad, pad]])
        places = torch.tensor([[1, 2, 3, 0, 0]]) + pad
        with use(model):
            model(ids, position_ids=places)
