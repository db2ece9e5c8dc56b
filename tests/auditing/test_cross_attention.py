"""What cross-attention reads: padding of the context that matters, samples that mix, a context that nobody reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.auditing.test_faults import serious
from tests.support.audited_models import DIM, TOKENS, ids
from truemask.auditing.audit import assert_no_leak, audit

REAL = torch.arange(6) < torch.tensor([[4], [6]])


def context() -> Tensor:
    return torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(2))


class Reads(nn.Module):
    """The tokens so far, and the mean of the context's real vectors; a fault may be planted in those."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fault, self.embedding = fault, nn.Embedding(TOKENS, DIM)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        if context.ndim == 2:
            context = self.embedding(context)
        weights = (torch.ones_like(context_mask) if self.fault == "padding" else context_mask).to(context.dtype)
        read = (context * weights[..., None]).sum(1, keepdim=True)
        read = {"batch": read.flip(0), "deaf": torch.zeros_like(read)}.get(self.fault, read)
        return self.embedding(x).cumsum(dim=1) + read


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(
    ("fault", "code"),
    [("", ""), ("padding", "padding-matters"), ("batch", "batch-neighbours"), ("deaf", "context-ignored")],
)
def test_each_fault_is_found_and_nothing_else(fault: str, code: str, tokens: bool) -> None:
    batch = {"x": ids(2, 5), "context": ids(2, 6, seed=8) if tokens else context(), "context_mask": REAL}
    report = audit(Reads(fault), batch)
    assert serious(report) == ([code] if code else []), str(report)
    assert all("context" in finding.where for finding in report.findings if finding.code == code)
    assert report.exit_code == bool(code)


def test_a_context_leak_is_a_leak() -> None:
    batch = {"x": ids(2, 5), "context": context(), "context_mask": REAL}
    assert_no_leak(Reads(), batch)
    with pytest.raises(AssertionError, match="the padding of `context` was replaced, which proves"):
        assert_no_leak(Reads("padding"), batch)


def test_sound_decoders_of_torch_and_x_transformers_are_clean() -> None:
    torch.manual_seed(1)
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, 16, batch_first=True), 2).eval()
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    batch: dict[str, Any] = {"tgt": torch.randn(2, 5, DIM), "memory": context(), "tgt_mask": later}
    assert serious(audit(theirs, {**batch, "memory_key_padding_mask": ~REAL}, "causal")) == []
    peer: Any = pytest.importorskip("x_transformers", reason="x-transformers is not installed")
    stack = peer.Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, cross_attend=True, verbose=False)
    model = peer.TransformerWrapper(num_tokens=TOKENS, max_seq_len=16, attn_layers=stack).eval()
    assert serious(audit(model, {"x": ids(2, 5), "context": context(), "context_mask": REAL})) == []


def test_transformers_encoder_decoders() -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(1)
    config = transformers.T5Config(vocab_size=TOKENS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": ids(2, 6), "attention_mask": REAL.int(), "decoder_input_ids": ids(2, 5, seed=9)}
    assert serious(audit(model, batch)) == []

    class Forgets(nn.Module):
        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return model(input_ids=input_ids, decoder_input_ids=decoder_input_ids).logits

    assert "padding-matters" in serious(audit(Forgets(), batch, "causal"))
