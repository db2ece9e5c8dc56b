"""Parts that compute with their mask: those left out keep their attention, the others are told what to do."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import model_of, tokens
from truemask.errors import MaskError
from truemask.interop.huggingface.mask_functions import Lifted
from truemask.interop.huggingface.masks import ModelMask
from truemask.interop.use import use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

UNARY: dict[str, Any] = {
    "bool": bool,
    "len": len,
    "iter": iter,
    "list": list,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "~": operator.invert,
    "-": operator.neg,
    "+": operator.pos,
    "abs": abs,
    "round": round,
    "format": "{:>9}".format,
    "[0]": lambda mask: mask[0],
    "[:, :, -1] = 0": lambda mask: operator.setitem(mask, 0, 0),
    "in": lambda mask: 0 in mask,
    "torch.where": lambda mask: torch.where(mask, 0, 1),
    "torch.as_tensor": torch.as_tensor,
    ".masked_fill": lambda mask: mask.masked_fill(mask, 0),
    ".sum": lambda mask: mask.sum(),
}
NAMES = ["eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "add", "sub", "mul", "matmul", "truediv", "floordiv"]
NAMES += ["mod", "pow", "lshift", "rshift", "iand", "ior", "iadd"]


@pytest.fixture
def mask() -> ModelMask:
    return ModelMask(Lifted(tm.causal), (1, 4, 4))


@pytest.mark.parametrize("name", UNARY)
def test_whoever_reads_the_mask_hears_what_to_do(mask: ModelMask, name: str) -> None:
    with pytest.raises((MaskError, AttributeError), match=r"Leave that part out with layers="):
        UNARY[name](mask)


@pytest.mark.parametrize("other", [0, 0.5, None, torch.zeros(4, 4)], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_no_operator_answers_silently(mask: ModelMask, name: str, other: object) -> None:
    for pair in ((mask, other), (other, mask)):
        if name in ("iand", "ior", "iadd") and pair[0] is None:
            continue
        with pytest.raises(MaskError, match="Leave that part out"):
            getattr(operator, name)(*pair)


def test_a_mask_can_be_kept_and_looked_for(mask: ModelMask) -> None:
    kept, other = {mask: "mine", "full_attention": mask}, ModelMask(Lifted(tm.causal), (1, 4, 4))
    assert kept[mask] == "mine"
    assert kept["full_attention"] is mask
    assert other not in kept
    assert mask in [mask]
    assert "[1, 1, 4, 4]" in f"{mask}"
    assert copy.copy(mask).shape == mask.shape
    assert hasattr(mask, "shape")
    assert not hasattr(mask, "sum")


# -- parts left out ----------------------------------------------------------------------------------------------------


def with_sound() -> Any:
    """A Gemma 4 that hears; its audio tower computes attention itself, with its mask as a tensor of floats."""
    from transformers.models.gemma4 import configuration_gemma4 as configs
    from transformers.models.gemma4 import modeling_gemma4 as models

    audio = configs.Gemma4AudioConfig()
    audio.hidden_size, audio.num_hidden_layers, audio.num_attention_heads, audio.output_proj_dims = 32, 2, 2, 32
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
    vision = configs.Gemma4VisionConfig(**small, num_hidden_layers=1, num_key_value_heads=2)
    text = {"vocab_size": 100, "vocab_size_per_layer_input": 100, "global_head_dim": 16, "num_kv_shared_layers": 0}
    text |= {"hidden_size_per_layer_input": 8, "sliding_window": 8, "num_hidden_layers": 2, "num_key_value_heads": 1}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    tokens_of = {"image_token_id": 90, "audio_token_id": 91, "video_token_id": 92}
    parts = {"text_config": configs.Gemma4TextConfig(**small, **text), "vision_config": vision, "audio_config": audio}
    torch.manual_seed(0)
    return models.Gemma4ForConditionalGeneration(configs.Gemma4Config(**parts, **tokens_of)).eval()


HEARD = {
    "input_ids": torch.tensor([[5, 6] + [91] * 16 + [7, 8]]),
    "input_features": torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0)),
    "input_features_mask": torch.ones(1, 64).bool(),
    "use_cache": False,
}


def test_a_tower_that_computes_attention_itself_keeps_it() -> None:
    model = with_sound()
    with torch.no_grad():
        plain = model(**HEARD).logits
        with use(model):
            assert_same(model(**HEARD).logits, plain)
            assert model.config.audio_config._attn_implementation == "eager"
            assert model.config.vision_config._attn_implementation == "truemask"
        with use(model, tm.causal & tm.window(6), layers="language_model"):
            assert not torch.allclose(model(**HEARD).logits, plain, atol=1e-3)
            assert model.config.vision_config._attn_implementation == "sdpa"  # nor is the other tower meant
        assert_same(model(**HEARD).logits, plain)
    assert {config._attn_implementation for config in (model.config, model.config.text_config)} == {"sdpa"}


@pytest.mark.parametrize("name", ["nemotron_asr_streaming_encoder", "lasr_encoder"])
def test_an_encoder_that_inverts_its_mask_says_so(name: str) -> None:
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    more = {"subsampling_factor": 8, "subsampling_conv_channels": 8} if name.startswith("nemotron") else {}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = CONFIG_MAPPING[name](**sizes, num_mel_bins=80, conv_kernel_size=3, **more)
    model = MODEL_MAPPING[type(config)](config).eval()
    with torch.no_grad(), use(model), pytest.raises(MaskError, match="computes with its mask: `~mask`"):
        model(input_features=torch.randn(2, 160, 80), attention_mask=torch.ones(2, 160).long())


def test_a_side_that_is_not_meant_keeps_its_attention() -> None:
    model = model_of("t5", "sdpa")
    given = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 7, seed=5)}
    with torch.no_grad():
        with use(model, tm.window(3), layers="decoder"):
            found = model(**given).logits
            assert model.encoder.config._attn_implementation == "sdpa"
        with use(model, layers={"decoder": tm.window(3), "encoder": tm.everything}):
            assert_same(found, model(**given).logits)
