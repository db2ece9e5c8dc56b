"""Several uses of transformers models at once, models inside wrappers, and what no mask reaches in a model."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import KINDS, TOKENS, model_of, other_of, tokens
from truemask.attention.planning.cache import CACHE
from truemask.errors import MaskError
from truemask.interop.huggingface.configs import ACCOUNTS
from truemask.interop.huggingface.coverage import check_selection
from truemask.interop.huggingface.layers import CROSS, attention_layers
from truemask.interop.use import enable, use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

MASK = tm.causal & tm.window(4)
OTHER = tm.causal & tm.window(9)


@pytest.fixture
def model() -> Any:
    return model_of("llama", "sdpa")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def under(model: Any, mask: tm.Mask) -> Tensor:
    with use(model, mask):
        return logits(model)


def twin_of(model: Any) -> Any:
    """The same weights again, with the very same config object."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


# -- uses end in any order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_uses_end_in_any_order_and_the_last_that_is_left_counts(model: Any, order: tuple[int, ...]) -> None:
    plain, masks = logits(model), [MASK, OTHER, tm.prefix(3) | tm.window(2)]
    expected = [under(model, mask) for mask in masks]
    uses = [enable(model.model, masks[0]), enable(model, masks[1]), use(model, masks[2])]
    uses[2].__enter__()
    left = [0, 1, 2]
    for ended in order:
        assert torch.equal(logits(model), expected[left[-1]])
        uses[ended].undo()
        left.remove(ended)
    assert torch.equal(logits(model), plain)
    assert model.config._attn_implementation == "sdpa"
    assert not [name for module in model.modules() for name in vars(module) if name in ("_truemask", "_truemask_uses")]
    assert id(model.config) not in ACCOUNTS


@pytest.mark.parametrize("first", [0, 1])
def test_models_that_share_a_config_object_keep_their_masks(model: Any, first: int) -> None:
    models, masks = [model, twin_of(model)], [MASK, OTHER]
    expected = [under(each, mask) for each, mask in zip(models, masks, strict=True)]
    uses = [enable(each, mask) for each, mask in zip(models, masks, strict=True)]
    assert all(torch.equal(logits(each), own) for each, own in zip(models, expected, strict=True))
    uses[first].undo()
    assert torch.equal(logits(models[1 - first]), expected[1 - first])
    with pytest.raises(MaskError, match=r"shares its config object.*`copy.deepcopy\(config\)`"):
        logits(models[first])
    uses[1 - first].undo()
    assert torch.equal(logits(models[first]), logits(models[1 - first]))
    assert model.config._attn_implementation == "sdpa"


def test_an_exception_inside_nested_uses_is_the_users_own(model: Any) -> None:
    with pytest.raises(ZeroDivisionError) as raised, use(model, MASK):
        fail_with(enable(model, OTHER))
    assert raised.value.__context__ is None
    assert torch.equal(logits(model), under(model, OTHER))  # it was enabled for good


def fail_with(_: object) -> None:
    raise ZeroDivisionError


def test_a_use_that_cannot_begin_leaves_nothing_behind(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[1].self_attn.config = type(model.config)(attn_implementation="eager")
    with pytest.raises(MaskError, match=r"`model.layers.1.self_attn` keeps its attention 'eager'") as raised:
        enable(model, MASK)
    assert model.config._attn_implementation == "sdpa"
    assert "_truemask" not in vars(model.model.layers[0].self_attn)
    assert id(model.config) not in ACCOUNTS
    assert raised.tb is not None  # the error lived till here, with all that its traceback remembers


def test_layers_that_come_before_the_block_begins_are_in_it(model: Any) -> None:
    later = use(model, MASK)
    model.model.layers.append(model_of("llama", "sdpa", seed=5).model.layers[1])
    model.model.layers[2].self_attn.layer_idx, model.config.num_hidden_layers = 2, 3
    model.model.layers[2].self_attn.config = model.config
    with later:
        assert "_truemask" in vars(model.model.layers[2].self_attn)
        assert torch.equal(logits(model), under(model, MASK))


# -- wrappers ----------------------------------------------------------------------------------------------------------


WRAPPERS: dict[str, Any] = {
    "compiled": functools.partial(torch.compile, backend="eager"),
    "parallel": nn.DataParallel,
    "sequence": nn.Sequential,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_inside_a_wrapper_is_used(model: Any, wrapper: str) -> None:
    wrapped, expected = WRAPPERS[wrapper](model), under(model, MASK)
    with use(wrapped, MASK) as same:
        assert same is wrapped
        assert torch.equal(logits(model), expected)
    enable(wrapped, OTHER)
    enable(model, MASK).undo()  # the same model: it took the place of the other
    assert model.config._attn_implementation == "sdpa"


def test_several_models_in_a_wrapper_are_named() -> None:
    pair = nn.ModuleDict({"student": model_of("llama"), "teacher": model_of("gpt2")})
    with pytest.raises(MaskError, match=r"several models .*`student` \(LlamaForCausalLM\), `teacher` \(GPT2LMHead"):
        use(pair, MASK)


def test_a_part_that_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(MaskError, match="LlamaDecoderLayer is a part of one: use the model"):
        use(model.model.layers[0], MASK)


# -- what a mask does not reach ----------------------------------------------------------------------------------------


HYBRIDS = {"jamba": "JambaMambaMixer", "lfm2": "Lfm2ShortConv", "recurrent_gemma": "RecurrentGemmaRecurrentBlock"}


@pytest.mark.parametrize("name", HYBRIDS)
def test_information_that_would_go_around_a_mask_is_told(name: str) -> None:
    model, mask = other_of(name), tm.causal.packed([11, 12])
    plain = logits(model)
    with pytest.raises(MaskError, match=rf"{HYBRIDS[name]}\) carries information between tokens without attention"):
        use(model, mask)
    with use(model):
        assert_same(logits(model), plain)
    kind = next(layer.names[1] for layer in attention_layers(model).values() if not layer.own_way)
    with use(model, mask, layers=kind):  # this says that it is meant
        assert not torch.allclose(logits(model), plain, atol=1e-2)


def test_a_mixer_beside_attention_does_not_forbid_its_number() -> None:
    model = other_of("falcon_h1")
    with use(model, MASK, layers=[0]), pytest.raises(MaskError, match="FalconH1Mixer"):
        use(model, MASK, layers="model")
    with use(model, MASK, layers="hybrid"):
        found = logits(model)
    with use(model, MASK, layers=[0, 1]):
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize(("name", "what"), [("minimax_m3", "selects keys"), ("deepseek_v32", "selects keys")])
def test_models_that_select_keys_themselves_are_refused(name: str, what: str) -> None:
    with pytest.raises(MaskError, match=f"cannot run under `tm.use`: its .*Attention {what}"):
        use(other_of(name))


class WithSinks(nn.Module):
    """An attention that passes on what it is not known by, as Inkling2's does."""

    def forward(self, query: Tensor) -> dict[str, Tensor]:
        return dict(query=query, sinks=query)  # noqa: C408


def test_sinks_of_another_name_are_refused_at_the_door(model: Any) -> None:
    with pytest.raises(MaskError, match="its WithSinks passes `sinks=`"):
        check_selection(model, WithSinks())


@pytest.mark.parametrize("option", ["block_indices", "indices"])
def test_keys_that_are_selected_for_each_query_are_refused(model: Any, option: str) -> None:
    with use(model), pytest.raises(MaskError, match=f"passes `{option}=`"):
        model(tokens(), **{option: torch.zeros(1)})


def test_masks_that_no_layer_uses_cost_nothing() -> None:
    """Qwen2-MoE asks for a sliding window of no size, which none of its layers reads."""
    model = other_of("qwen2_moe")
    plain = logits(model)
    with use(model):
        assert_same(logits(model), plain)


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_kind_of_several_parts_is_named_with_its_part() -> None:
    model = model_of("t5")
    with pytest.raises(MaskError, match=r"'full_attention' could mean any .* decoder.full_attention, .*encoder.full_"):
        use(model, tm.window(3), layers="full_attention")
    given = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 7, seed=5)}
    with use(model, tm.window(3), layers="decoder"):
        expected = model(**given).logits
    with use(model, tm.window(3), layers="decoder.full_attention"):
        assert torch.equal(model(**given).logits, expected)


def test_a_kind_of_one_part_is_named_with_it_or_alone() -> None:
    model, masks = model_of("gemma3"), [tm.window(3), tm.window(4)]
    with use(model, layers=dict(zip(KINDS, masks, strict=True))):
        expected = logits(model)
    with use(model, layers={f"model.{kind}": mask for kind, mask in zip(KINDS, masks, strict=True)}):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "path", ["decoder.layer.0.encoder_decoder_attention.attention", "x_attn", "layers.0.final_attn_token_to_image"]
)
def test_cross_attention_has_many_names(path: str) -> None:
    assert CROSS.search(path)
    assert not CROSS.search("decoder.layers.0.self_attn")


def test_a_layer_that_attends_to_something_else_takes_no_mask_of_positions() -> None:
    """A layer that is not known as cross-attention says so by its sizes."""
    model = model_of("bart")
    given = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 7, seed=5)}
    with use(model, MASK, layers="decoder"):
        for layer in model.model.decoder.layers:
            vars(layer.encoder_attn)["_truemask"] = vars(layer.self_attn)["_truemask"]
        with pytest.raises(MaskError, match=r"does not say which positions the rows have.*something else"):
            model(**given)


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, tm.causal & (tm.window(6) | tm.prefix(2)), tm.documents([9, 40])], ids=str)
def test_steps_behind_pads_share_a_plan(model: Any, mask: tm.Mask | None) -> None:
    """And what they compute is what the tokens compute alone."""
    real = (torch.arange(TOKENS) < torch.tensor([[17], [TOKENS]])).long()
    ids, new = tokens(), tokens(2, 6, seed=9)
    with torch.no_grad(), use(model, mask):
        cache = model(ids, attention_mask=real, use_cache=True).past_key_values
        known, found = CACHE.info().misses, []
        for step in range(6):
            real = torch.cat([real, torch.ones(2, 1, dtype=torch.int64)], 1)
            positions = real.sum(1, keepdim=True) - 1
            given = {"attention_mask": real, "position_ids": positions, "past_key_values": cache}
            found.append(model(new[:, step : step + 1], **given).logits)
        assert CACHE.info().misses <= known + (6 if mask == tm.documents([9, 40]) else 1)  # whose data ends earlier
        alone = model(torch.cat([ids[:1, :17], new[:1]], 1)).logits[:, 17:]
    assert_same(torch.cat(found, 1)[:1], alone)


def test_a_tensor_that_changes_behind_torch_is_read_again(model: Any) -> None:
    array = tm.causal.to_dense(TOKENS).numpy().copy()
    mask = torch.from_numpy(array)
    with torch.no_grad(), use(model):
        before = model(tokens(), attention_mask=mask).logits
        array &= tm.window(3).to_dense(TOKENS).numpy()
        after = model(tokens(), attention_mask=mask).logits
        assert_same(after, model(tokens(), attention_mask=mask.clone()).logits)
    assert not torch.allclose(before, after, atol=1e-2)


def test_a_pickled_model_runs_in_a_new_process(tmp_path: Path) -> None:
    model, ids = model_of("llama"), tokens(1)
    use_of = enable(model, MASK)
    expected = model(ids).logits
    torch.save((model, ids, expected), tmp_path / "model.pt")
    use_of.undo()
    script = (
        "import sys, torch, truemask\n"
        f"model, ids, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "sys.exit(0 if torch.allclose(model(ids).logits, expected, atol=1e-5) else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == 0


def test_an_empty_list_of_layers_is_no_place_for_a_mask() -> None:
    with pytest.raises(MaskError, match="layers= is empty, so the mask would apply nowhere"):
        use(model_of("llama"), MASK, layers=[])


def test_windows_that_a_model_cuts_beforehand_take_no_mask() -> None:
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
    torch.manual_seed(0)
    model = transformers.SwinModel(config).eval()
    pixels = torch.randn(1, 3, 16, 16)
    expected = model(pixels).last_hidden_state
    with use(model):
        assert_same(model(pixels).last_hidden_state, expected)
    with pytest.raises(MaskError, match="attends inside windows that the model cuts beforehand"):
        use(model, tm.documents([32, 32]))
