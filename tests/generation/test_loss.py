"""The next-token loss: which tokens count, and that a sample costs the same alone, padded or packed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.equality import assert_same
from tests.support.nn_models import FEATURES, featured, ids
from truemask.errors import ConventionWarning, MaskError
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.documents import documents
from truemask.masks.leaves.per_token import padding, prefix

LENGTHS = [5, 3, 11]
DOCUMENTS = [ids(length, seed=length) for length in LENGTHS]
STARTS = [11 - length for length in LENGTHS]
TARGETS = sum(LENGTHS) - len(LENGTHS)


def model(feature: str = "rotary") -> AutoregressiveWrapper:
    return AutoregressiveWrapper(featured(feature))


def alone(wrapper: AutoregressiveWrapper, mask: Mask = everything) -> Tensor:
    """The mean over all targets of the documents, one at a time."""
    costs = [wrapper(document[None], mask=mask) * (len(document) - 1) for document in DOCUMENTS]
    return torch.stack(costs).sum() / TARGETS


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The documents as a batch, and the flags of their tokens."""
    rows, flags = torch.full((3, 11), 29), torch.zeros(3, 11, dtype=torch.bool)
    for b, document in enumerate(DOCUMENTS):
        place = slice(0, len(document)) if side == "right" else slice(11 - len(document), 11)
        rows[b, place], flags[b, place] = document, True
    return rows, flags


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    wrapper, tokens = model(), ids(3, 11)
    logits = wrapper.net(tokens[:, :-1])
    assert_same(wrapper(tokens), F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("feature", FEATURES)
def test_packed_documents_cost_what_they_cost_alone(feature: str) -> None:
    wrapper, mask = model(feature), causal & (window(3) | prefix(2))
    assert_same(wrapper(torch.cat(DOCUMENTS)[None], mask=mask.packed(LENGTHS)), alone(wrapper, mask))


@pytest.mark.parametrize("feature", FEATURES)
def test_left_padded_documents_cost_what_they_cost_alone(feature: str) -> None:
    wrapper, (rows, _) = model(feature), padded("left")
    assert_same(wrapper(rows, mask=window(4).padded(STARTS)), alone(wrapper, window(4)))


@pytest.mark.parametrize("feature", FEATURES)
def test_right_padding_by_flags_or_by_an_expression(feature: str) -> None:
    wrapper, (rows, flags) = model(feature), padded("right")
    assert_same(wrapper(rows, mask=flags), alone(wrapper))
    assert_same(wrapper(rows, mask=padding(lengths=LENGTHS)), alone(wrapper))
    assert_same(wrapper(rows, mask=flags, attn_mask=window(4)), alone(wrapper, window(4)))


def test_left_padding_by_flags() -> None:
    wrapper, (rows, flags) = model(), padded("left")
    assert_same(wrapper(rows, mask=flags), alone(wrapper))


def test_the_ignored_index_is_neither_read_nor_predicted() -> None:
    wrapper, (rows, flags) = model(), padded("right")
    assert_same(wrapper(rows.masked_fill(~flags, -100)), alone(wrapper))


def test_documents_that_do_not_restart_positions_count_their_first_tokens() -> None:
    wrapper, row = model(), torch.cat(DOCUMENTS)[None]
    mask = documents(LENGTHS)
    logits = wrapper.net(row[:, :-1], mask=mask)
    assert_same(wrapper(row, mask=mask), F.cross_entropy(logits[0], row[0, 1:]))


def test_labels_decide() -> None:
    wrapper, tokens = model(), ids(3, 11)
    labels = tokens.clone()
    labels[:, ::2] = -100
    logits = wrapper.net(tokens[:, :-1])
    expected = F.cross_entropy(logits[:, ::2].flatten(0, 1), tokens[:, 1::2].flatten())
    assert_same(wrapper(tokens, labels=labels), expected)
    assert_same(wrapper(tokens, mask=padding(lengths=[3, 11, 11]), labels=tokens * 0 - 100), torch.zeros_like(expected))


def test_no_target_at_all_costs_nothing_and_has_gradients() -> None:
    wrapper = model().train()
    loss = wrapper(ids(2, 5), mask=torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in wrapper.parameters())


def test_a_matrix_speaks_of_every_token() -> None:
    wrapper, tokens = model(), ids(3, 11)
    assert_same(wrapper(tokens, attn_mask=window(4).to_dense(11)), wrapper(tokens, mask=window(4)))
    with pytest.raises(MaskError, match=r"attn_mask= is bool \[10, 10\] .*the mask speaks of all n \+ 1 = 11 tokens"):
        wrapper(tokens, attn_mask=window(4).to_dense(10)[0, 0])
    with pytest.raises(MaskError, match=r"mask= is bool \[3, 10\] .*speaks of all n \+ 1 = 11 tokens"):
        wrapper(tokens, mask=torch.ones(3, 10, dtype=torch.bool))


def test_targets_that_the_mask_shows_are_noticed() -> None:
    wrapper, tokens, mask = model(), ids(3, 11), causal | prefix(4)
    with pytest.warns(ConventionWarning, match="lets 6 pairs look ahead, at the tokens that the loss asks for"):
        wrapper(tokens, mask=mask, causal=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper(tokens, mask=mask, causal=False, labels=tokens.index_fill(1, torch.arange(4), -100))


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        (ids(3, 1), None, "at least two tokens a row"),
        (ids(11), None, r"expected ids \[b, n \+ 1\]"),
        (torch.rand(3, 11), None, "tokens are float32"),
        (ids(3, 11), ids(3, 10), r"expected one for each token, \[3, 11\], not shifted"),
    ],
)
def test_tokens_and_labels_that_do_not_fit_are_refused(tokens: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model()(tokens, labels=labels)


def test_the_loss_of_a_half_precision_model_is_single() -> None:
    assert AutoregressiveWrapper(featured("rotary").bfloat16())(ids(3, 11)).dtype == torch.float32


def test_a_model_learns_a_simple_rule() -> None:
    """The whole of it, once: a row that counts is predicted after a few steps."""
    wrapper = AutoregressiveWrapper(featured("rotary").float().train())
    rows = (torch.arange(13)[None] + torch.arange(7)[:, None]) % 7
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        wrapper(rows, mask=window(3)).backward()
        optimizer.step()
    assert float(wrapper(rows, mask=window(3)).detach()) < 0.1
    answer = wrapper.generate(torch.tensor([3, 4]), 9, temperature=0.0, mask=window(3))
    assert answer.tolist() == [(5 + i) % 7 for i in range(9)]


def test_flags_of_what_the_model_reads_are_one_short() -> None:
    with pytest.raises(MaskError, match=r"mask= is bool \[2, 5\] .*the mask speaks of all n \+ 1 = 6 tokens"):
        model()(ids(2, 6), mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(MaskError, match=r"key padding is bool \[2, 6\]"):
        model()(ids(2, 6), mask=torch.ones(2, 4, dtype=torch.bool))


def test_one_key_of_a_matrix_still_broadcasts() -> None:
    wrapper, tokens = model(), ids(3, 2)
    assert_same(wrapper(tokens, attn_mask=torch.ones(2, 1, dtype=torch.bool)), wrapper(tokens))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"lens": None},
            r"forward\(\) has no keyword 'lens': x-transformers .*; pass the mask `padding\(lengths=lens\)`",
        ),
        ({"return_outputs": True}, "'return_outputs': x-transformers has it"),
        ({"label": None}, "did you mean 'labels'"),
    ],
)
def test_an_unknown_keyword_of_the_loss_names_what_was_meant(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model()(ids(3, 11), **keywords)


def test_unknown_keywords_and_types_of_the_wrapper_are_refused() -> None:
    with pytest.raises(TypeError, match="'mask_prob': x-transformers has it"):
        AutoregressiveWrapper(featured("rotary"), mask_prob=0.1)
    with pytest.raises(TypeError, match="no keyword 'pad_valu', did you mean 'pad_value'"):
        AutoregressiveWrapper(featured("rotary"), pad_valu=0)
    with pytest.raises(TypeError, match=r"pad_value is float 0.0; expected a whole number"):
        AutoregressiveWrapper(featured("rotary"), pad_value=0.0)  # pyright: ignore[reportArgumentType]
