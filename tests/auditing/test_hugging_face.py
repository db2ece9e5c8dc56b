"""Models of transformers: what they claim is read from them, sound ones are clean, planted faults are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.auditing.test_faults import picture, serious
from tests.support.audited_models import SIZES, ids, tiny
from truemask.auditing.audit import assert_no_leak, audit
from truemask.auditing.subject import AuditError
from truemask.errors import MaskError
from truemask.interop.use import use
from truemask.masks.compose.boolean import everything
from truemask.masks.leaves.bands import blocks, causal, window
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.per_token import prefix

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

N = 10
LEFT = torch.arange(N) >= torch.tensor([[0], [4]])
RIGHT = torch.arange(N) < torch.tensor([[N], [6]])
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]] * 2)

TWO_FIRST = causal & (window(2) | prefix(2))

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama": ("Llama", {}, "`causal`"),
    "Llama, eager": ("Llama", {"attn_implementation": "eager"}, "`causal`"),
    "Mistral": ("Mistral", {"sliding_window": 3}, "`window(3)`"),
    "Gemma 3": (
        "Gemma3",
        {"sliding_window": 3, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "`window(3)` then `causal`",
    ),
    "BERT": ("Bert", {}, "`everything`"),
    "BERT as a decoder": ("Bert", {"is_decoder": True}, "`causal`"),
}


@pytest.mark.parametrize("name", MODELS)
def test_sound_models_are_clean(name: str) -> None:
    kind, keywords, claimed = MODELS[name]
    model = tiny(kind, **keywords)
    report = audit(model, ids(2, N))
    assert serious(report) == [], str(report)
    assert f"held to {claimed} (the configuration of {type(model).__name__}), through 2 layers" in report.title
    assert torch.equal(report.visible, report.reach)


@pytest.mark.parametrize("flags", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_padding_does_not_matter(kind: str, flags: Tensor) -> None:
    batch = {"input_ids": ids(2, N), "attention_mask": flags.int()}
    if kind == "Bert":  # its positions are absolute
        batch["position_ids"] = (flags.int().cumsum(-1) - 1).clamp(min=0)
    report = audit(tiny(kind), batch)
    assert serious(report) == [], str(report)
    assert not (report.visible & flags[:, :, None] & ~flags[:, None, :]).any(), "no real output sees padding"
    assert torch.equal(report.judged, flags)


def test_left_padding_without_positions_matters() -> None:
    batch = {"input_ids": ids(2, N), "attention_mask": LEFT.int()}
    report = audit(tiny("GPT2"), batch)
    assert serious(report) == ["padded-differs"]
    assert "position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)" in report.findings[0].fix
    assert audit(tiny("GPT2"), {**batch, "position_ids": (LEFT.int().cumsum(-1) - 1).clamp(min=0)}).ok


def test_padding_that_the_model_is_not_told_of() -> None:
    """A model that drops its attention_mask: the batch says what is padding, and it is seen."""
    model = tiny("Llama")
    forward = model.model.forward
    model.model.forward = lambda *args, **keywords: forward(*args, **{**keywords, "attention_mask": None})
    report = audit(model, {"input_ids": ids(2, N), "attention_mask": LEFT.int()})
    assert serious(report) == ["padding-matters", "padded-differs"]


def test_packed_documents_mix_unless_transformers_looks_for_them() -> None:
    """It looks only without an attention_mask and without a cache; an all-ones mask turns it off silently."""
    model, batch = tiny("Llama"), {"input_ids": ids(2, N), "position_ids": PACKED, "use_cache": False}
    clean = audit(model, batch)
    assert serious(clean) == [], str(clean)
    assert "causal.packed(" in clean.title
    mixed = audit(model, {**batch, "attention_mask": torch.ones(2, N, dtype=torch.int64)})
    assert serious(mixed) == ["documents-mix"]
    assert serious(audit(model, {**batch, "use_cache": True})) == ["documents-mix"]


def leaky(model: Any, size: float) -> Any:
    """Plant a look at the next position in the second attention of a Llama."""
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def ahead(hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        outputs, weights = forward(hidden_states, *args, **keywords)
        shifted = torch.nn.functional.pad(hidden_states[:, 1:], (0, 0, 0, 1))
        return outputs + size * shifted, weights

    attention.forward = ahead
    return model


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_a_future_leak_planted_in_a_llama(size: float) -> None:
    report = audit(leaky(tiny("Llama"), size), ids(2, N), cache=False)
    assert serious(report) == ["future-leak"]
    later = torch.eye(N, dtype=torch.bool).roll(1, 1).triu(1)
    assert picture(report.leaks[0]) == picture(later)
    with pytest.raises(AssertionError, match="future-leak"):
        assert_no_leak(leaky(tiny("Llama"), size), {"input_ids": ids(1, N)})


def test_an_attention_that_lost_its_mask() -> None:
    """What one wrong letter in a registered name does: no mask at all, no error."""
    model = tiny("Llama", attn_implementation="eager")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, forward=forward, **k: forward(*a, **{**k, "attention_mask": None})
    report = audit(model, ids(2, N))
    assert serious(report) == ["future-leak", "cached-differs"]
    assert report.visible.all()


def test_a_window_of_another_size_than_stated() -> None:
    model = tiny("Mistral", sliding_window=3)
    assert serious(audit(model, ids(2, N), "window(2)")) == ["leak"]
    assert serious(audit(model, ids(2, N), "window(4)")) == ["blind-spots"]


def test_a_4d_mask_is_the_whole_mask() -> None:
    cells = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.6
    cells = cells.tril() | torch.eye(N, dtype=torch.bool)
    report = audit(tiny("Llama"), {"input_ids": ids(2, N), "attention_mask": cells.expand(2, 1, N, N)})
    assert serious(report) == [], str(report)
    assert "the 4-D attention_mask" in report.title
    biased = torch.where(cells, 0.3, torch.finfo(torch.float32).min).expand(2, 1, N, N)  # no mask can be read from it
    batch = {"input_ids": ids(2, N), "attention_mask": biased}
    assert serious(audit(tiny("Llama"), batch, dense(cells))) == []
    with pytest.raises(MaskError, match="from_additive"):
        audit(tiny("Llama"), batch)


def test_a_model_that_does_not_say_is_judged_by_its_name() -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    torch.manual_seed(1)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    report = audit(model, ids(2, N), cache=False)
    assert serious(report) == [], str(report)
    assert report.notes == ("MambaForCausalLM does not say whether it is causal; by its name it was held to `causal`",)


def test_encoder_decoders() -> None:
    config = transformers.T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    torch.manual_seed(1)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(AuditError, match=r"pass decoder_input_ids in the batch.*get_encoder\(\)"):
        audit(model, ids(2, N))
    decoder = audit(model, {"input_ids": ids(2, 4), "decoder_input_ids": ids(2, N, seed=9)})
    assert serious(decoder) == []
    assert torch.equal(decoder.visible, decoder.reach)
    same = audit(model, {"input_ids": ids(2, N), "decoder_input_ids": ids(2, N)})
    assert torch.equal(same.visible, decoder.visible), "the encoder's embedding is not taken for the decoder's"
    assert "held to `everything`" in audit(model.get_encoder(), ids(2, N)).title


def test_the_layers_of_a_decoder_are_its_own() -> None:
    sizes: dict[str, Any] = {"vocab_size": 31, "d_model": 16, "max_position_embeddings": 32}
    for side, layers in (("encoder", 3), ("decoder", 2)):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    torch.manual_seed(1)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)).eval()
    batch = {"input_ids": ids(2, 4), "decoder_input_ids": ids(2, N)}
    assert "through 2 layers" in audit(model, batch).title
    assert "leak" in serious(audit(model, batch, window(2)))
    with pytest.raises(AuditError, match="5 masks were given, one for each layer, and the model has 2 layers"):
        audit(model, batch, [causal] * 5)


def test_several_tokens_may_end_a_text() -> None:
    assert audit(tiny("Llama", eos_token_id=[2, 3]), ids(2, N)).ok


def test_a_mask_in_use_for_each_sample_is_no_fault_of_the_padding() -> None:
    model = tiny("Llama")
    with use(model, causal & (window(3) | prefix([1, 2]))):
        report = audit(model, {"input_ids": ids(2, N), "attention_mask": LEFT.int()})
    assert serious(report) == [], str(report)
    assert any("could not be run without their padding: MaskError" in note for note in report.notes)


def test_a_model_that_gives_no_cache_has_no_fault_in_it() -> None:
    model = tiny("Llama")
    model.activation_checkpointing_enable()
    report = audit(model, ids(2, N), train=True)
    assert serious(report) == [], str(report)
    assert any("the model returned none" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:.* keys that the model's own rule")
def test_packed_documents_may_be_told_by_the_mask_in_use() -> None:
    model, batch = tiny("Llama"), {"input_ids": ids(2, N), "position_ids": PACKED}
    assert serious(audit(model, batch)) == ["documents-mix"]
    for mask in (causal.packed([4, 3, 3]), TWO_FIRST.packed([4, 3, 3])):
        with use(model, mask):
            assert audit(model, batch).ok
            assert audit(model, {**batch, "use_cache": False}).ok


def test_pictures_are_audited_at_their_patches() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=12, patch_size=4)).eval()
    batch = {"pixel_values": torch.randn(2, 3, 12, 12)}
    report = audit(model, batch)
    assert serious(report) == [], str(report)
    assert report.title.startswith("audit of ViTModel, 2 samples of 10 positions: held to `everything` (the configurat")
    assert report.visible.all()
    assert "leak" in serious(audit(model, batch, blocks(5)))
    with use(model, blocks(5)):
        assert serious(audit(model, batch)) == []


@pytest.mark.filterwarnings("ignore:.* keys that the model's own rule")
@pytest.mark.parametrize(
    ("mask", "pairs"),
    [(window(8) | prefix(4), 64), (causal | prefix(6), 151), (window(12), 58), (window(4), 0)],
    ids=str,
)
def test_what_was_asked_for_and_dropped_is_noted(mask: Any, pairs: int) -> None:
    """The pairs are those of a mask without the model's own window of 8, and with `replace=True` nothing is dropped."""
    model, n = tiny("Mistral", sliding_window=8), 24
    with use(model, mask):
        notes = [note for note in audit(model, ids(1, n), cache=False).notes if "own rule `window(8)` hides" in note]
    assert len(notes) == bool(pairs)
    assert int((mask - window(8)).count(n, n).sum()) == pairs
    assert all(f"removed {pairs} of its pairs at length {n}" in note and "replace=True" in note for note in notes)
    with use(model, mask, replace=True):
        assert not any("own rule" in note for note in audit(model, ids(1, n), cache=False).notes)


def test_embeddings_in_and_hidden_states_out() -> None:
    model = tiny("Llama")
    assert audit(model.model, ids(2, N), causal).ok
    assert audit(model, {"inputs_embeds": model.get_input_embeddings()(ids(2, N)).detach()}).ok
    single = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    with pytest.raises(AuditError, match=r"gave float32 \[2, 2\]; the audit needs a float output for each position"):
        audit(single.eval(), ids(2, N))


IN_USE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "anded": ("Llama", {}, {"mask": TWO_FIRST}, f"`{TWO_FIRST}`"),
    "in the place of its own": ("Llama", {}, {"mask": everything, "replace": True}, "`everything`"),
    "in one layer": ("Llama", {}, {"mask": window(3), "layers": [1]}, "`causal` then `window(3)`"),
    "with its window": ("Mistral", {"sliding_window": 4}, {"mask": blocks(5)}, "`window(4) & blocks(5)`"),
}


@pytest.mark.filterwarnings("ignore:.* keys that the model's own rule")
@pytest.mark.parametrize("name", IN_USE)
def test_a_model_in_use_is_held_to_what_it_was_given(name: str) -> None:
    """By its configuration alone it would leak or be blind; tokens count from the first that is real (law 2)."""
    kind, keywords, given, claimed = IN_USE[name]
    model = tiny(kind, **keywords)
    with use(model, **given):
        plain = audit(model, ids(2, N))
        padded = audit(model, {"input_ids": ids(2, N), "attention_mask": LEFT.int()})
    assert f"held to {claimed} (the configuration of {type(model).__name__}, and tm.use)" in plain.title
    assert serious(plain) == serious(padded) == [], f"{plain}\n{padded}"
    assert torch.equal(plain.visible, plain.reach)


def test_a_stated_mask_counts_real_tokens_and_a_tensor_rows() -> None:
    model, batch = tiny("Llama"), {"input_ids": ids(2, N), "attention_mask": LEFT.int()}
    with use(model, TWO_FIRST):
        assert serious(audit(model, batch, TWO_FIRST)) == []
        assert "leak" in serious(audit(model, batch, TWO_FIRST.to_dense(N)[0, 0]))


@pytest.mark.parametrize(
    ("kind", "keywords", "suggested"),
    [
        ("Llama", {}, "`causal.packed(lengths)`; transformers looks for documents in position_ids only without"),
        ("Mistral", {"sliding_window": 30}, "`window(30).packed(lengths)`; transformers looks"),
        ("Bert", {}, "`everything.packed(lengths)`"),
    ],
)
def test_documents_are_kept_apart_by_the_mask_of_the_model(kind: str, keywords: dict[str, Any], suggested: str) -> None:
    report = audit(tiny(kind, **keywords), {"input_ids": ids(2, N), "position_ids": PACKED})
    mixed = next(finding for finding in report.findings if finding.code == "documents-mix")
    assert mixed.fix.startswith(f"keep documents apart with {suggested}")
    assert ("transformers looks" in mixed.fix) == (kind != "Bert")


@pytest.mark.parametrize("name", ["Roberta", "MPNet"])
def test_positions_from_zero_are_told_where_a_model_counts_from_its_padding(name: str) -> None:
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**SIZES, pad_token_id=1)
    ).eval()
    places = torch.arange(N).expand(2, N)
    told = audit(model, {"input_ids": ids(2, N), "position_ids": places})
    assert serious(told) == ["positions-too-small"], str(told)
    assert "counts positions from 2" in told.findings[0].message
    assert told.findings[0].fix == "pass position_ids + 2"
    for batch in ({}, {"position_ids": places + 2}):
        assert serious(audit(model, {"input_ids": ids(2, N), **batch})) == []
    assert serious(audit(tiny("Bert"), {"input_ids": ids(2, N), "position_ids": places})) == []


def test_padding_may_have_the_place_before_the_first() -> None:
    """The advice for left padding counts from where the model counts, and heeding it is clean."""
    torch.manual_seed(1)
    model = transformers.RobertaModel(transformers.RobertaConfig(**SIZES, pad_token_id=1)).eval()
    batch = {"input_ids": ids(2, N), "attention_mask": LEFT.int()}
    advice = next(finding.fix for finding in audit(model, batch).findings if finding.code == "padded-differs")
    assert advice.endswith("position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0) + 2")
    places = (LEFT.int().cumsum(-1) - 1).clamp(min=0) + 2
    assert serious(audit(model, {**batch, "position_ids": places})) == []
    assert serious(audit(model, {**batch, "position_ids": torch.where(LEFT, places, 1)})) == []
