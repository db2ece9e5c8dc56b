"""Texts with places of images and sounds: these places are never touched, the rest is audited, and both is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.auditing.test_faults import serious
from truemask.auditing.audit import audit
from truemask.auditing.placeholders import placeholders

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

IMAGE, VIDEO, START, END = 50, 51, 52, 53
TEXT: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
SEES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ROWS = torch.tensor([[5, *[IMAGE] * 4, 7, 8, 9], [5, 6, *[IMAGE] * 4, 8, 9]])
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def llava(**keywords: Any) -> Any:
    eyes = transformers.CLIPVisionConfig(**SEES, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(
        vision_config=eyes, text_config=transformers.LlamaConfig(**TEXT), vision_feature_layer=-1, **keywords
    )
    torch.manual_seed(1)
    return transformers.LlavaForConditionalGeneration(config).eval()


def qwen() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    eyes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**eyes, "temporal_patch_size": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(1)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def hears() -> Any:
    ears = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = transformers.Qwen2AudioConfig(
        audio_config={**ears, "num_mel_bins": 8, "max_source_positions": 12},
        text_config={"model_type": "qwen2", **TEXT},
        audio_token_index=IMAGE,
    )
    torch.manual_seed(1)
    return transformers.Qwen2AudioForConditionalGeneration(config).eval()


def batches() -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """Models and what they are given: pictures for LLaVA, patches for Qwen2-VL, a spectrum for Qwen2-Audio."""
    row = torch.tensor([[5, START, *[IMAGE] * 4, END, 9, 8, 7]])
    patches = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    kinds = {"mm_token_type_ids": (row == IMAGE).long()}
    heard = {"input_ids": torch.tensor([[5, *[IMAGE] * 6, 7, 8, 9]]), "input_features": torch.randn(1, 8, 24)}
    return {
        "LLaVA": (lambda: llava(image_token_index=IMAGE), {"input_ids": ROWS, "pixel_values": PIXELS}),
        "LLaVA, image_token_id": (lambda: llava(image_token_id=IMAGE), {"input_ids": ROWS, "pixel_values": PIXELS}),
        "Qwen2-VL": (qwen, {"input_ids": row, **patches, **kinds}),
        "Qwen2-Audio": (hears, {**heard, "feature_attention_mask": torch.ones(1, 24, dtype=torch.int64)}),
    }


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", batches())
def test_places_of_images_are_never_touched(name: str, wrapped: bool) -> None:
    make, batch = batches()[name]
    model = make()
    held, given = torch.isin(batch["input_ids"], torch.tensor([*placeholders(model)])), []

    class Wraps(nn.Module):
        """Hands on what it is given, and has no configuration."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **keywords: Any) -> Any:
            return model(**keywords)

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.append(named["input_ids"])

    model.register_forward_pre_hook(note, with_kwargs=True)
    report = audit(Wraps() if wrapped else model, batch)
    assert serious(report) == [], str(report)
    places = int(held.sum())
    assert any(
        note.startswith(f"{places} places hold images, sounds or videos, by the tokens") for note in report.notes
    )
    assert not report.looked[held[:, None, :].expand_as(report.looked)].any(), "nothing is said of what was not changed"
    assert report.looked[~held[:, None, :].expand_as(report.looked)].any()
    whole = [ids for ids in given if ids.shape == held.shape]
    assert len(whole) > held.shape[1]
    assert all(torch.equal(torch.isin(ids, torch.tensor([*placeholders(model)])), held) for ids in whole)


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Qwen2-Audio"])
def test_they_are_decoded_with_a_cache_and_their_text_looks_back(name: str) -> None:
    """The tower that sees everything does not make the text do so."""
    make, batch = batches()[name]
    report = audit(make(), batch)
    assert "held to `causal` (the configuration of" in report.title
    assert not any("decoding" in note for note in report.notes), report.notes


def test_a_leak_between_the_places_is_found() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llava(image_token_index=IMAGE)

        def forward(self, **keywords: Any) -> Tensor:
            hidden = self.model(**keywords).logits
            return hidden + 0.01 * hidden.roll(-1, dims=1)

    report = audit(Peeks(), {"input_ids": ROWS, "pixel_values": PIXELS})
    assert "future-leak" in serious(report)


def test_pictures_that_reach_what_stands_before_them_are_found() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llava(image_token_index=IMAGE)

        def forward(self, pixel_values: Tensor, **keywords: Any) -> Tensor:
            hidden = self.model(pixel_values=pixel_values, **keywords).logits
            return hidden + pixel_values.mean(dim=(1, 2, 3))[:, None, None]

    report = audit(Early(), {"input_ids": ROWS, "pixel_values": PIXELS})
    assert serious(report) == ["leak"], str(report)
    assert "output 0 depends on `pixel_values`, although no place of it may reach it (3 such outputs)" in str(report)


def test_pictures_that_nobody_reads_are_said() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llava(image_token_index=IMAGE)

        def forward(self, pixel_values: Tensor, **keywords: Any) -> Tensor:
            return self.model(pixel_values=torch.zeros_like(pixel_values), **keywords).logits

    assert serious(audit(Blind(), {"input_ids": ROWS, "pixel_values": PIXELS})) == ["context-ignored"]


def test_tokens_of_parts_and_lists_of_tokens_are_read() -> None:
    config = transformers.LlavaConfig(image_token_index=IMAGE)
    config.text_config.audio_token_id = 7
    config.visual_indicator_token_ids = [8, 9]
    config.speech_token_id = None
    model = nn.Linear(1, 1)
    model.config = config  # pyright: ignore
    found = placeholders(model)
    assert set(found) == {IMAGE, 7, 8, 9}
    assert found[8] == "visual_indicator_token_ids"
