"""Encoders with keys in front that are no tokens, as peft's prefix tuning makes them: more keys than queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import model_of, tokens
from truemask.errors import MaskError
from truemask.interop.use import use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

VIRTUAL, ROWS = 10, 5
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
MASK = tm.local(1) | tm.prefix(VIRTUAL)


def front(model: Any) -> Any:
    """Keys and values of virtual tokens, as a cache."""
    from transformers import DynamicCache

    drawn, cache = torch.Generator().manual_seed(4), DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        pair = [torch.randn(2, 4, VIRTUAL, 8, generator=drawn) for _ in range(2)]
        cache.update(*pair, layer)
    return cache


def run(model: Any, attention_mask: Tensor | None = None) -> Tensor:
    flags = torch.cat([torch.ones(2, VIRTUAL), REAL], 1).long()
    given = {"attention_mask": flags if attention_mask is None else attention_mask, "past_key_values": front(model)}
    with torch.no_grad():
        return model(tokens(2, ROWS), **given).last_hidden_state[REAL == 1]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_rows_are_the_last_of_the_keys(name: str) -> None:
    model = model_of("bert") if name == "bert" else roberta()
    plain = run(model)
    flags = torch.cat([torch.ones(2, VIRTUAL), REAL], 1).bool()
    shown = MASK.to_dense(VIRTUAL + ROWS)[:, :, VIRTUAL:] & flags[:, None, None]
    expected = run(model, torch.where(shown, 0.0, torch.finfo(torch.float32).min))
    with use(model):
        assert_same(run(model), plain)
    for mask in (MASK, MASK.at(q_start=VIRTUAL), tm.dense(MASK.at(q_start=VIRTUAL).to_dense(ROWS, VIRTUAL + ROWS))):
        with use(model, mask):
            assert_same(run(model), expected)
    assert not torch.allclose(plain, expected, atol=1e-2)


def roberta() -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**sizes, num_hidden_layers=2, initializer_range=0.3, pad_token_id=0)
    return transformers.RobertaModel(config).eval()


def test_rows_that_nobody_places_take_masks_that_place_them() -> None:
    """Keys of another length than the rows, and no cache that says why."""
    from truemask.interop.huggingface.mask_functions import Lifted
    from truemask.interop.huggingface.masks import ModelMask
    from truemask.interop.positions import CallerPositions

    model_mask = ModelMask(Lifted(tm.everything), (2, ROWS, 13))
    model_mask.tell(CallerPositions())
    with pytest.raises(MaskError, match=r"5 rows and 13 keys does not say .* `\.at\(q_start=8\)`"):
        model_mask.combined_with(MASK)
    explicit = MASK.at(q_start=8)
    assert model_mask.combined_with(explicit) == explicit
    assert model_mask.combined_with(tm.prefix(3)) == tm.prefix(3)  # asks for no row
