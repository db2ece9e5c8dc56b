"""Modules of torch look both ways unless a mask goes in; what is made of them is not taken for a language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.auditing.test_faults import serious
from tests.support.audited_models import DIM, TOKENS, ids
from truemask.auditing.audit import assert_no_leak, audit
from truemask.auditing.subject import AuditError

X = torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(0))
LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)
ADDED = torch.zeros(5, 5).masked_fill(LATER, -torch.inf)


def layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True)


def encoder(layers: int = 2) -> nn.Module:
    return nn.TransformerEncoder(layer(), layers, enable_nested_tensor=False).eval()


def attention(first: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return nn.MultiheadAttention(DIM, 2, batch_first=first).eval()


def recurrent(both: bool) -> nn.Module:
    torch.manual_seed(1)
    return nn.LSTM(DIM, DIM, batch_first=True, bidirectional=both).eval()


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (encoder(), X),
        (layer().eval(), X),
        (attention(), X),
        (attention(first=False), X),
        (attention(), {"query": X, "key": X, "value": X}),
        (recurrent(both=True), X),
        (encoder(), {"src": X, "src_key_padding_mask": torch.arange(5) > torch.tensor([[4], [2], [4]])}),
    ],
    ids=["encoder", "layer", "attention", "attention, n first", "query key value", "LSTM both ways", "padded"],
)
def test_modules_that_look_both_ways_are_not_held_to_causal(model: nn.Module, batch: Any) -> None:
    report = audit(model, batch)
    assert report.findings.codes in ([], ["poison-spreads"]), str(report)
    assert "held to `causal`" not in report.title
    assert report.visible.triu(1).any()


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (encoder(), {"src": X, "mask": LATER}),
        (encoder(), {"src": X, "mask": ADDED, "is_causal": True}),
        (layer().eval(), {"src": X, "src_mask": LATER}),
        (attention(), {"x": X, "attn_mask": LATER}),
        (attention(), {"x": X, "attn_mask": LATER.expand(6, 5, 5)}),
        (recurrent(both=False), X),
    ],
    ids=["encoder", "added", "layer", "attention", "for each head", "LSTM"],
)
def test_a_mask_that_goes_in_is_what_they_are_held_to(model: nn.Module, batch: Any) -> None:
    report = audit(model, batch)
    assert serious(report) == [], str(report)
    assert torch.equal(report.visible[0], ~LATER)
    assert torch.equal(report.reach[0], ~LATER)


def test_the_mask_of_as_many_samples_as_positions_is_no_padding() -> None:
    report = audit(encoder(), {"src": torch.randn(5, 5, DIM), "mask": LATER})
    assert serious(report) == [], str(report)
    assert report.judged.all()
    assert not any("taken for padding" in note for note in report.notes)


def test_a_decoder_without_its_mask_is_a_fault() -> None:
    torch.manual_seed(1)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, 16, batch_first=True), 2).eval()
    assert serious(audit(model, {"tgt": X, "memory": X})) == ["future-leak"]
    assert serious(audit(model, {"tgt": X, "memory": X, "tgt_mask": LATER})) == []


class Made(nn.Module):
    """A model of torch's encoder: tokens or vectors in, so many numbers out."""

    def __init__(self, outputs: int, tokens: bool = True, mask: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(TOKENS, DIM) if tokens else nn.Identity()
        self.encoder, self.head, self.mask = encoder(), nn.Linear(DIM, outputs), mask

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x), mask=self.mask))


def test_a_model_of_such_modules_is_not_held_to_causal_unless_it_writes_tokens() -> None:
    """A tagger may see all of its text; a language model whose mask was forgotten leaks the future."""
    for model, batch in ((Made(4), ids(2, 5)), (Made(4, tokens=False), X)):
        report = audit(model.eval(), batch)
        assert serious(report) == [], str(report)
        assert "held to `everything` (assumed)" in report.title
        assert any("since its nn.TransformerEncoder looks both ways" in note for note in report.notes)
    forgotten = audit(Made(TOKENS).eval(), ids(2, 5))
    assert serious(forgotten) == ["future-leak"]
    assert any("'everything', if it is meant to see the whole text" in note for note in forgotten.notes)
    with pytest.raises(AssertionError, match="future-leak"):
        assert_no_leak(Made(TOKENS).eval(), ids(2, 5))
    assert audit(Made(TOKENS).eval(), ids(2, 5), "everything").ok


def test_a_model_that_gives_them_a_mask_is_taken_to_look_back() -> None:
    assert "held to `causal` (assumed)" in audit(Made(4, mask=LATER).eval(), ids(2, 5)).title


def test_what_cannot_be_fed_is_said() -> None:
    turned = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 2, 16), 2, enable_nested_tensor=False).eval()
    with pytest.raises(AuditError, match=r"batch_first=False and takes \[n, b, d\].*build it with batch_first=True"):
        audit(turned, X)
    with pytest.raises(AuditError, match="self-attention is audited"):
        audit(attention(), {"query": X, "key": X.clone(), "value": X})
