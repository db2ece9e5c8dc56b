"""Pictures and sound: what an audit can see of them is audited, what it cannot is said, and nothing passes unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.auditing.test_faults import serious
from tests.support.audited_models import DIM, Sums, ids
from truemask.auditing.audit import audit
from truemask.auditing.subject import AuditError

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

SOUND = torch.randn(2, 200, generator=torch.Generator().manual_seed(4))
SHORTER = torch.arange(200) < torch.tensor([[200], [120]])  # real samples of a sound


def wav2vec2(**keywords: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    near = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 10}
    torch.manual_seed(1)
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **convolutions, **near, **keywords)).eval()


def encodec() -> Any:
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 32, "sampling_rate": 400}
    rest = {"upsampling_ratios": [4, 2], "num_lstm_layers": 1, "target_bandwidths": [1.5]}
    return transformers.EncodecModel(transformers.EncodecConfig(**sizes, **rest)).eval()


def dac() -> Any:
    sizes = {"encoder_hidden_size": 8, "decoder_hidden_size": 16, "hidden_size": 16, "downsampling_ratios": [2, 2]}
    codes = {"n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4}
    return transformers.DacModel(transformers.DacConfig(**sizes, **codes)).eval()


def mimi() -> Any:
    sizes = {"num_filters": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "upsampling_ratios": [4, 2], "upsample_groups": 16}
    codes = {"codebook_size": 16, "codebook_dim": 8, "num_quantizers": 2, "num_semantic_quantizers": 1}
    rates = {"vector_quantization_hidden_dimension": 8, "sampling_rate": 200, "frame_rate": 12.5}
    return transformers.MimiModel(transformers.MimiConfig(**sizes, **heads, **codes, **rates)).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (encodec, r"audio_values float32 \[2, 1, 320\].*Audit a part that takes a vector for each position"),
        (dac, r"quantized_representation float32 \[2, 16, 80\]"),
        (mimi, r"audio_values float32 \[2, 1, 320\].*the part that attends \(model.encoder.encoder_transformer, "),
    ],
)
def test_an_audio_codec_is_no_model_of_one_position(make: Any, message: str) -> None:
    with pytest.raises(AuditError, match=f"takes input_values and gives .*{message}"):
        audit(make(), {"input_values": torch.randn(2, 1, 320)})


@pytest.mark.parametrize("batch", [torch.randn(2, 1, 320), ids(2, 1), {"x": ids(2, 1)}], ids=["sound", "ids", "named"])
def test_one_position_shows_nothing_and_is_an_error(batch: Any) -> None:
    with pytest.raises(AuditError, match=r"a single position: .* Expected 2 positions or more"):
        audit(Sums().eval(), batch)


def test_the_part_of_a_codec_that_attends_can_be_audited() -> None:
    part = mimi().encoder.encoder_transformer
    report = audit(part, torch.randn(2, 6, 16), "window(250)", layers=1)
    assert serious(report) == [], str(report)
    assert torch.equal(report.visible, torch.ones(2, 6, 6).tril().bool())
    assert "leak" in serious(audit(part, torch.randn(2, 6, 16), "window(2)", layers=1))


def test_convolutions_before_the_attention_are_named_and_the_vectors_after_them_audited() -> None:
    report = audit(wav2vec2(), {"input_values": SOUND})
    assert serious(report) == [], str(report)
    assert report.visible.all()
    assert report.notes[0] == (
        "`input_values` was changed as the vectors that `feature_projection` is given; the convolutions before them "
        "(`feature_extractor.conv_layers.0.conv`, `feature_extractor.conv_layers.1.conv`) mix neighbouring places and "
        "what stands in padding, which lies outside this audit"
    )
    assert "leak" in serious(audit(wav2vec2(), {"input_values": SOUND}, "local(1)", layers=2))


@pytest.mark.parametrize("forgets", [False, True])
def test_padding_of_sound_is_held_at_the_vectors(forgets: bool) -> None:
    """The attention_mask counts samples of sound; the model says how many vectors come of them."""
    model = wav2vec2()
    if forgets:
        forward = model.encoder.forward
        model.encoder.forward = lambda x, attention_mask=None, **rest: forward(x, **rest)
    report = audit(model, {"input_values": SOUND, "attention_mask": SHORTER.long()})
    assert report.judged.sum(dim=1).tolist() == [19, 11]
    assert ("padding-matters" in serious(report)) == forgets, str(report)


def whisper() -> Any:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "vocab_size": 31}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(1)
    config = transformers.WhisperConfig(**sizes, **tokens, max_source_positions=12, max_target_positions=20)
    return transformers.WhisperForConditionalGeneration(config).eval()


def speech2text() -> Any:
    sizes: dict[str, Any] = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 31}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2}
    sizes |= {"input_feat_per_channel": 8, "conv_channels": 16, "conv_kernel_sizes": (3, 3), "num_conv_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(1)
    config = transformers.Speech2TextConfig(**sizes, **tokens, max_source_positions=60, max_target_positions=20)
    return transformers.Speech2TextForConditionalGeneration(config).eval()


FEATURES = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(5))
FRAMES = torch.arange(40) < torch.tensor([[40], [24]])
HEARD: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "whisper": (whisper, {"input_features": FEATURES[:, :24].mT}, "`conv1`, `conv2`"),
    "speech2text": (
        speech2text,
        {"input_features": FEATURES, "attention_mask": FRAMES.long()},
        "`conv.conv_layers.0`, `conv.conv_layers.1`",
    ),
}


@pytest.mark.parametrize("name", HEARD)
def test_encoders_of_sound_name_their_convolutions(name: str) -> None:
    make, batch, named = HEARD[name]
    report = audit(make().get_encoder(), batch)
    assert serious(report) == [], str(report)
    assert f"({named}) mix neighbouring places" in report.notes[0]


def test_an_attention_mask_of_other_places_that_nobody_explains_is_said() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, DIM)

        def forward(self, input_values: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(input_values.unflatten(1, (-1, 4)))

    flags = torch.ones(2, 20, dtype=torch.int64)
    report = audit(Pools(), {"input_values": torch.randn(2, 20), "attention_mask": flags}, "local(0)")
    assert any(
        "does not say which of the 5 vectors are padding: none was taken for it" in note for note in report.notes
    )
