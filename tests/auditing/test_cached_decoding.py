"""Decoding in steps: what is forgotten once a cache is there, and what does not follow the beams, is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.auditing.test_faults import serious
from tests.auditing.test_multimodal import FEATURES, FRAMES, speech2text, whisper
from tests.support.audited_models import TOKENS, ids, tiny
from truemask.auditing.audit import audit

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT, SPOKEN = ids(2, 9), ids(2, 7, seed=9)
REAL = torch.arange(9) < torch.tensor([[9], [5]])
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def t5() -> Any:
    sizes = {"vocab_size": TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(1)
    config = transformers.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> Any:
    sizes: dict[str, Any] = {"vocab_size": TOKENS, "d_model": 16, "max_position_embeddings": 32, **TOKEN_IDS}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    torch.manual_seed(1)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)).eval()


class Wraps(nn.Module):
    """A model whose keywords pass through `changed`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **given: Any) -> Any:
        return self.model(**self.changed(given))

    def changed(self, given: dict[str, Any]) -> dict[str, Any]:
        return given


class Forgets(Wraps):
    """The padding of the context is dropped once there is a cache."""

    def changed(self, given: dict[str, Any]) -> dict[str, Any]:
        return given | ({"attention_mask": None} if given.get("past_key_values") is not None else {})


MODELS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "T5": (t5, {"input_ids": TEXT, "attention_mask": REAL.long()}),
    "BART": (bart, {"input_ids": TEXT, "attention_mask": REAL.long()}),
    "Speech2Text": (speech2text, {"input_features": FEATURES, "attention_mask": FRAMES.long()}),
    "Whisper": (whisper, {"input_features": FEATURES[:, :24].mT}),
}
FORGETFUL = [name for name in MODELS if name != "Whisper"]  # whose decoder is never told of padding


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_sound_encoder_decoders_are_decoded_and_clean(name: str, wrapped: bool) -> None:
    make, heard = MODELS[name]
    report = audit(Wraps(make()) if wrapped else make(), {**heard, "decoder_input_ids": SPOKEN})
    assert serious(report) == [], str(report)
    assert not any("decoding" in note for note in report.notes)


@pytest.mark.parametrize("name", FORGETFUL)
def test_padding_that_a_cached_step_forgets_is_found(name: str) -> None:
    make, heard = MODELS[name]
    report = audit(Forgets(make()), {**heard, "decoder_input_ids": SPOKEN})
    assert serious(report) == ["cached-differs"], str(report)
    assert report.findings[0].where.startswith("sample 1, output "), "the padded one"
    assert "the padding of the context must go to every step" in report.findings[0].fix


@pytest.mark.parametrize("flags", [None, torch.ones_like(REAL).long()], ids=["none", "all real"])
@pytest.mark.parametrize("make", [t5, bart])
def test_it_is_found_in_a_batch_without_padding_too(make: Any, flags: Tensor | None) -> None:
    batch = {"input_ids": TEXT, "decoder_input_ids": SPOKEN} | ({} if flags is None else {"attention_mask": flags})
    report = audit(Forgets(make()), batch)
    assert serious(report) == ["cached-differs"], str(report)
    assert "step by step, with padding in the context) the output differs" in report.findings[0].message
    assert serious(audit(make(), batch)) == []


def test_a_step_at_a_wrong_place_is_found_in_whisper() -> None:
    class Restarts(Wraps):
        """Positions begin again once there is a cache."""

        def changed(self, given: dict[str, Any]) -> dict[str, Any]:
            new = torch.arange(given["decoder_input_ids"].shape[1])[None]
            return given | ({"decoder_position_ids": new} if given.get("past_key_values") is not None else {})

    make, heard = MODELS["Whisper"]
    assert serious(audit(Restarts(make()), {**heard, "decoder_input_ids": SPOKEN})) == ["cached-differs"]


class Remembers(Wraps):
    """Something of the earlier tokens is kept beside the cache, and does not follow the beams."""

    last: Tensor | None = None

    def forward(self, **given: Any) -> Any:
        tokens = given["decoder_input_ids" if "decoder_input_ids" in given else "input_ids"]
        cached, result = given.get("past_key_values") is not None, self.model(**given)
        before = self.last if cached and self.last is not None else tokens[:, :1] * 0
        shifted = torch.cat((before, tokens[:, :-1]), dim=1)
        self.last = tokens[:, -1:]
        result.logits = result.logits + 0.01 * shifted[..., None]
        return result


@pytest.mark.parametrize("name", [*MODELS, "Llama"])
def test_what_does_not_follow_the_beams_is_found(name: str) -> None:
    make, heard = MODELS.get(name, (lambda: tiny("Llama"), {}))
    batch = {**heard, "decoder_input_ids": SPOKEN} if heard else {"input_ids": SPOKEN}
    report = audit(Remembers(make()), batch)
    assert serious(report) == ["cached-differs"], str(report)
    assert "with beams" in report.findings[0].message


@pytest.mark.parametrize("flags", [REAL, REAL.flip(1)], ids=["right", "left"])
def test_a_padded_context_is_compared_with_none(flags: Tensor) -> None:
    """T5 counts distances, so left padding is nothing to it; BART counts from the first row."""
    batch = {"input_ids": TEXT, "attention_mask": flags.long(), "decoder_input_ids": SPOKEN}
    assert serious(audit(t5(), batch)) == []
    expected = [] if flags[1, 0] else ["padded-differs"]
    report = audit(bart(), batch)
    assert serious(report) == expected, str(report)
    assert all("without padded context" in finding.message for finding in report.findings if finding.severity != "note")


def test_tokens_and_context_are_cut_each_by_their_own_padding() -> None:
    """As many tokens are read as are written, and both are padded, at other places."""
    spoken = torch.arange(9) < torch.tensor([[6], [9]])
    batch = {"input_ids": TEXT, "attention_mask": REAL.long(), "decoder_input_ids": ids(2, 9, seed=9)}
    for make in (t5, bart):
        report = audit(make(), {**batch, "decoder_attention_mask": spoken.long()})
        assert serious(report) == [], str(report)
        assert not any("could not be run" in note or "were not run" in note for note in report.notes), report.notes


def test_a_decoder_of_x_transformers_reads_its_context_in_every_step() -> None:
    peer: Any = pytest.importorskip("x_transformers", reason="x-transformers is not installed")
    torch.manual_seed(1)
    stack = peer.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, cross_attend=True, verbose=False)
    model = peer.TransformerWrapper(num_tokens=TOKENS, max_seq_len=16, attn_layers=stack).eval()
    batch = {"x": SPOKEN, "context": torch.randn(2, 9, 16), "context_mask": REAL}
    report = audit(model, batch)
    assert serious(report) == [], str(report)
    assert not any("decoding" in note for note in report.notes)

    forward = model.forward
    model.forward = lambda x, cache=None, context_mask=None, **rest: forward(
        x, cache=cache, context_mask=context_mask if cache is None else None, **rest
    )
    assert serious(audit(model, batch)) == ["cached-differs"]
