"""What a model's own rule takes away of a mask that was asked for is said, once in a use, with numbers."""

from __future__ import annotations

import warnings

import pytest
import torch

import truemask as tm
from tests.support.huggingface_models import model_of, tokens
from truemask.errors import ConventionWarning
from truemask.interop.removed_pairs import removed_pairs
from truemask.interop.use import use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

OWN = tm.window(5)  # the model's
ASKING = [tm.window(5) | tm.prefix(4), tm.causal | tm.prefix(6), tm.window(12), tm.causal & tm.local(7), tm.blocks(9)]
RESTRICTING_KINDS = [
    None,
    tm.everything,
    tm.causal,
    tm.causal.packed([9, 14]),
    tm.documents([9, 14]),
    tm.causal & tm.keys([True] * 40),
    tm.dilated(2),
    tm.window(3),
    tm.window(5) & (tm.local(9) | tm.prefix(2)),
]


@pytest.mark.parametrize("mask", ASKING, ids=str)
def test_what_the_models_window_takes_away_is_counted(mask: tm.Mask) -> None:
    model, ids = model_of("mistral"), tokens(1)
    gone = (mask.to_dense(23) & ~OWN.to_dense(23))[0, 0]
    with torch.no_grad(), use(model, mask):
        with pytest.warns(ConventionWarning, match=rf"removed {int(gone.sum())} .* at length 23.*replace=True") as told:
            model(ids)
        assert len(told) == 1  # not for each layer
        assert told[0].filename == __file__
        model(ids)  # nor for each forward
        query, key = (
            int(word) for word in str(told[0].message).split("query ")[1].split(" among")[0].split(" and key ")
        )
        assert gone[query, key]
    with torch.no_grad(), use(model, mask, replace=True):
        model(ids)


@pytest.mark.parametrize("mask", RESTRICTING_KINDS, ids=str)
def test_masks_that_ask_for_nothing_of_their_own_are_no_news(mask: tm.Mask | None) -> None:
    model = model_of("mistral")
    with torch.no_grad(), use(model, mask):
        model(tokens(1))


def test_a_short_forward_does_not_silence_a_longer_one() -> None:
    model = model_of("mistral")
    with torch.no_grad(), use(model, tm.window(9)):
        model(tokens(1, 4))
        with pytest.warns(ConventionWarning, match="removed 1 .* at length 6, query 5 and key 0 among them"):
            model.generate(input_ids=tokens(1, 5), max_new_tokens=3, do_sample=False)


def test_each_use_says_it_anew() -> None:
    model = model_of("mistral")
    for _ in range(2):
        with torch.no_grad(), use(model, tm.window(9)), pytest.warns(ConventionWarning, match="removed"):
            model(tokens(1))


def test_a_causal_model_is_asked_for_later_keys_by_masks_that_speak_of_causality() -> None:
    model = model_of("llama")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ConventionWarning)
        for mask in (tm.local(4), tm.blocks(6), tm.prefix(4) | tm.window(3), tm.causal & tm.prefix(3)):
            with use(model, mask):
                model(tokens(1))
    with (
        use(model, tm.causal | tm.prefix(6)),
        pytest.warns(ConventionWarning, match="`causal` hides, which removed 15"),
    ):
        model(tokens(1))


def test_chunks_and_windows_of_both_sides_are_rules_too() -> None:
    with use(model_of("llama4"), tm.window(9)) as model, pytest.warns(ConventionWarning, match="rule .*blocks"):
        model(tokens(1))
    with use(model_of("modernbert"), tm.local(9)) as model, pytest.warns(ConventionWarning, match="rule `local"):
        model(tokens(1))


def test_padding_and_documents_do_not_count_as_removed() -> None:
    model, ids = model_of("mistral"), tokens()
    real = torch.ones_like(ids)
    real[0, :7] = 0
    with torch.no_grad(), use(model, tm.window(5)):
        model(ids, attention_mask=real)
        model(ids, position_ids=torch.tensor([[*range(9), *range(14)]] * 2), use_cache=False)
    with torch.no_grad(), use(model, tm.window(6)), pytest.warns(ConventionWarning, match="at length 14"):
        model(ids, position_ids=torch.tensor([[*range(9), *range(14)]] * 2), use_cache=False)


def test_masks_without_an_exact_form_are_looked_at_too() -> None:
    found = removed_pairs(tm.predicate(lambda b, h, q, k: q - k < 20), tm.window(8), 3000)
    assert found is not None
    assert (found.length, found.query, found.key) == (3000, 8, 0)
    assert removed_pairs(tm.predicate(lambda b, h, q, k: q - k < 3), tm.window(8) | ~tm.causal, 3000) is None


def test_heads_and_samples_are_counted_each() -> None:
    found = removed_pairs(tm.per_head([tm.window(3), tm.window(9)]) & tm.prefix([30, 2]), tm.window(5), 20, 2, 2)
    assert found is not None
    dense = tm.per_head([tm.window(3), tm.window(9)]) & tm.prefix([30, 2])
    assert found.pairs == int((dense.to_dense(20, batch=2, heads=2) & ~tm.window(5).to_dense(20)).sum())


def test_the_rule_of_an_x_transformers_layer_is_told_too() -> None:
    x_transformers = pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `test`)")
    layers = x_transformers.Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, attn_max_attend_past=4)
    model = x_transformers.TransformerWrapper(num_tokens=61, max_seq_len=64, attn_layers=layers).eval()
    with torch.no_grad():
        with use(model, tm.window(9)), pytest.warns(ConventionWarning, match=r"rule `window\(5\)`.*length 23") as told:
            model(tokens(1))
        assert len(told) == 1
        for mask, replace in ((tm.window(9), True), (tm.window(5), False), (tm.local(3) & tm.causal, False)):
            with use(model, mask, replace=replace):
                model(tokens(1))
