"""What a transformers model in use may stand inside of, what it may be given, and what every mistake says."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truemask as tm
from tests.support.equality import assert_same
from tests.support.huggingface_models import TOKENS, model_of, tokens
from truemask.errors import ConventionWarning, MaskError
from truemask.interop.use import enable, use

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")

MASK = tm.causal & tm.window(4)
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def model() -> Any:
    return model_of("llama", "sdpa")


# -- in and out --------------------------------------------------------------------------------------------------------


def test_a_block_gives_the_model_back_whatever_happens_inside(model: Any) -> None:
    before = model(tokens()).logits
    with pytest.raises(ZeroDivisionError), use(model, MASK) as same:
        assert_in_use(same, model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens()).logits, before)


def assert_in_use(same: Any, model: Any) -> None:
    """And then fail as a user's code does."""
    assert same is model
    assert model.config._attn_implementation == "truemask"
    raise ZeroDivisionError


def test_the_inner_block_counts_alone(model: Any) -> None:
    with use(model, MASK):
        outer = model(tokens()).logits
        with use(model, tm.window(9)):
            inner = model(tokens()).logits
        assert torch.equal(model(tokens()).logits, outer)
    with use(model, tm.window(9)):
        assert torch.equal(model(tokens()).logits, inner)
    assert not torch.allclose(inner, outer)


def test_for_good_and_back(model: Any) -> None:
    before = model(tokens()).logits
    first = enable(model, MASK)
    under_mask = model(tokens()).logits
    second = enable(model)
    assert_same(model(tokens()).logits, before)
    first.undo()  # the second took its place: nothing happens
    assert model.config._attn_implementation == "truemask"
    with use(model, MASK):
        assert torch.equal(model(tokens()).logits, under_mask)
        second.undo()  # the block goes on
        assert torch.equal(model(tokens()).logits, under_mask)
    second.undo()
    assert model.config._attn_implementation == "sdpa"


def test_the_sizes_of_masks_are_checked(model: Any) -> None:
    with use(model, tm.documents([5, 6])), pytest.raises(MaskError, match="holds data for 11 queries"):
        model(tokens())
    with use(model, tm.per_head([tm.causal] * 3)), pytest.raises(MaskError, match="3 heads"):
        model(tokens())


def test_parts_of_a_model_can_be_used(model: Any) -> None:
    with use(model, MASK):
        expected = model(tokens()).logits
    with use(model.model, MASK):
        assert torch.equal(model(tokens()).logits, expected)


# -- surroundings ------------------------------------------------------------------------------------------------------


def test_a_copy_made_inside_stays_in_use(model: Any) -> None:
    plain = model(tokens()).logits
    with use(model, MASK):
        twin, expected = copy.deepcopy(model), model(tokens()).logits
    assert torch.equal(twin(tokens()).logits, expected)
    assert torch.equal(model(tokens()).logits, plain)
    twin.set_attn_implementation("sdpa")
    assert torch.equal(twin(tokens()).logits, plain)


def test_an_enabled_model_is_forgotten_with_its_last_name() -> None:
    model = model_of("gpt2")
    enable(model, MASK)
    copied, watched = copy.deepcopy(model), weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None
    enable(copied).undo()
    assert copied.config._attn_implementation == "truemask"  # as it was copied


def test_nothing_of_it_is_saved(model: Any, tmp_path: Path) -> None:
    with use(model, MASK):
        model.save_pretrained(tmp_path)
    assert "truemask" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(tokens()).logits, model(tokens()).logits)


def test_two_models_in_two_threads() -> None:
    models, masks = [model_of("llama", seed=seed) for seed in (0, 1)], [MASK, tm.prefix(3) | tm.window(2)]
    expected = [run_under(model, mask) for model, mask in zip(models, masks, strict=True)]
    found: list[Tensor] = [torch.empty(0)] * 2

    def work(place: int) -> None:
        found[place] = torch.stack([run_under(models[place], masks[place]) for _ in range(5)])

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, reference in zip(found, expected, strict=True):
        assert_same(own, reference.expand_as(own))


def run_under(model: Any, mask: tm.Mask) -> Tensor:
    with torch.no_grad(), use(model, mask):
        return model(tokens()).logits


@pytest.mark.slow
def test_compiled_models_break_their_graph_at_attention_and_stay_right() -> None:
    model = model_of("gpt2", "sdpa").requires_grad_(False)
    with use(model, MASK):
        assert_same(torch.compile(model, backend="eager")(tokens()).logits, model(tokens()).logits)
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="a graph ends at masks and attention"):
            torch.compile(model, backend="eager", fullgraph=True)(tokens())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = model_of("gpt2").to(dtype)
    expected = model(tokens()).logits.double()
    with use(model):
        found = model(tokens()).logits
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < (1e-9 if dtype == torch.float64 else 0.05) * expected.abs().max()


def test_dropout_is_repeatable_and_off_in_evaluation() -> None:
    model = model_of("gpt2").train()
    with use(model, MASK):
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(model(tokens()).logits)
        assert torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], found[2])
        assert torch.equal(model.eval()(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt_oss"])
def test_attention_weights_come_out(name: str) -> None:
    model = model_of(name)
    expected = model(tokens(), output_attentions=True).attentions
    with use(model):
        found = model(tokens(), output_attentions=True).attentions
    assert len(found) == 2
    for own, reference in zip(found, expected, strict=True):
        assert_same(own, reference)


def test_a_trainer_trains_on_packed_rows(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    expected, own, masked = trained(None, tmp_path), trained(enable, tmp_path), trained(under_mask, tmp_path)
    assert own == pytest.approx(expected, rel=1e-4)
    assert masked != pytest.approx(expected, rel=1e-2)
    assert masked[-1] < masked[0]


def under_mask(model: Any) -> Any:
    return enable(model, tm.window(3))


def trained(switch: Callable[[Any], Any] | None, folder: Path) -> list[float]:
    """The losses of a few steps on documents packed into rows, whose position_ids restart."""
    model, generator = model_of("llama").train(), torch.Generator().manual_seed(0)
    documents = [{"input_ids": torch.randint(1, 61, (n,), generator=generator).tolist()} for n in (5, 9, 7, 12)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, seed=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    collate = transformers.DataCollatorWithFlattening()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collate)
    used = switch(model) if switch else None
    trainer.train()
    if used is not None:
        used.undo()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_what_a_trainer_trained_on_packed_rows_passes_the_audit(tmp_path: Path) -> None:
    """Documents of a packed row do not see each other, in training nor after it, and the audit sees it when they do."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model, generator = model_of("llama").train(), torch.Generator().manual_seed(0)
    documents = [{"input_ids": torch.randint(1, 61, (n,), generator=generator).tolist()} for n in (5, 7, 4, 8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, seed=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    collate = tm.PackCollator(12)
    mask = tm.causal & (tm.window(3) | tm.prefix(1))
    used = enable(model, mask)
    before = model.model.embed_tokens.weight.detach().clone()
    transformers.Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collate).train()
    assert not torch.equal(before, model.model.embed_tokens.weight)
    batch = {name: value for name, value in collate(documents).items() if name != "labels"}
    lengths = tm.pack([one["input_ids"] for one in documents], 12).lengths
    report = tm.audit(model.eval(), batch, mask.packed(lengths), layers=2, cache=False)  # nobody decodes a packed row
    assert report.ok, str(report)
    mixed = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    used.undo()
    with pytest.raises(AssertionError, match=r"documents-mix|leak"):
        tm.assert_no_leak(model, mixed, tm.causal.packed(lengths))


def test_positions_that_restart_without_packing_are_told(model: Any) -> None:
    positions = torch.tensor([[*range(11), *range(12)]]).expand(2, -1)
    with use(model, MASK):
        with pytest.warns(ConventionWarning, match="pass use_cache=False"):
            model(tokens(), position_ids=positions)
        with pytest.warns(ConventionWarning, match="the documents see each other"):
            model(tokens(), position_ids=positions, attention_mask=torch.ones(2, TOKENS), use_cache=False)
    with use(model, tm.causal.packed([11, 12])):  # what keeps them apart needs no warning, which would be an error here
        model(tokens(), position_ids=positions)


def test_law_6_nan_in_one_document_does_not_reach_the_other(model: Any) -> None:
    """And law 5: a token that may see nothing takes no part in attention, and is no NaN."""
    ids = tokens(1)
    ids[:, :9], ids[:, 9:] = ids[:, :9].clamp(max=59), ids[:, 9:].clamp(max=59)
    mask = tm.causal.packed([9, TOKENS - 9])
    with torch.no_grad(), use(model, mask):
        expected = model(ids).logits
        model.get_input_embeddings().weight[60] = float("nan")
        ids[0, 4] = 60
        found = model(ids).logits
    assert torch.equal(found[:, 9:], expected[:, 9:])
    assert torch.equal(found[:, :4], expected[:, :4])
    assert found[:, 4:9].isnan().any()
    with torch.no_grad(), use(model, tm.nothing):
        assert model(ids[:, 9:]).logits.isfinite().all()


# -- 4-D tensors -------------------------------------------------------------------------------------------------------


def test_tensors_with_four_axes_are_read_as_transformers_reads_them(model: Any) -> None:
    dense, ids = (tm.causal & tm.window(5)).to_dense(TOKENS), tokens()
    biased = torch.randn(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)).masked_fill(~dense, LOWEST)
    expected = model(ids, attention_mask=dense).logits, model(ids, attention_mask=biased).logits
    with use(model):
        assert_same(model(ids, attention_mask=dense).logits, expected[0])
        assert_same(model(ids, attention_mask=torch.where(dense, 0.0, LOWEST)).logits, expected[0])
        assert_same(model(ids, attention_mask=biased).logits, expected[1])
    with use(model, tm.window(5)):
        assert_same(model(ids, attention_mask=tm.causal.to_dense(TOKENS)).logits, expected[0])


# -- mistakes ----------------------------------------------------------------------------------------------------------


def other(name: str, **arguments: Any) -> Any:
    """A model that is not among those of `huggingface_models.py`."""
    return getattr(transformers, name)(getattr(transformers, arguments.pop("config"))(**arguments))


BLOOM = {"config": "BloomConfig", "hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 61}
LONG_T5 = {"config": "LongT5Config", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "text": (lambda m: use(m, "causal & windw(3)"), r"did you mean 'window'"),
    "text of a layer": (lambda m: use(m, layers={0: "causal &"}), r"causal &\n +\^"),
    "list": (
        lambda m: use(m, [MASK, MASK]),
        r"one mask for each head is `per_head\(\[...\]\)`, .* for each layer `layers=\{0: ..., 1: ...\}`",
    ),
    "list for a layer": (lambda m: use(m, layers={0: [MASK]}), r"use: layers\[0\] must be a mask .* `per_head"),
    "tensor": (
        lambda m: use(m, torch.ones(3, 3)),
        r"got float32 \[3, 3\] on cpu: a bool tensor, True = may attend, is `dense\(tensor\)`",
    ),
    "typo": (lambda m: use(m, MASK, layers="full_attentoin"), "did you mean 'full_attention'"),
    "index": (lambda m: use(m, MASK, layers=[2]), "layers=2: no layer of .* the indices 0 to 1"),
    "kind of layers": (lambda m: use(m, MASK, layers=1.5), r"layers= takes kinds of layers .* got float 1.5"),
    "nowhere": (lambda m: use(m, layers="full_attention"), "says where, but there is no mask"),
    "nothing": (lambda m: use(m, replace=True), "there is no mask"),
    "flag": (lambda m: use(m, MASK, replace="yes"), "replace is True or False, got str 'yes'"),
    "no model": (lambda m: use(nn.Linear(1, 1), MASK), "got Linear of `torch.nn.modules.linear`"),
    "several parts": (lambda m: use(model_of("t5"), MASK), "several places .*decoder, encoder, cross_attention"),
    "no interface": (lambda m: use(other("BloomForCausalLM", **BLOOM), MASK), "has no layer that asks transformers"),
    "own attention": (
        lambda m: use(other("LongT5ForConditionalGeneration", **LONG_T5), MASK, layers="encoder"),
        "computes attention itself and would not see the mask",
    ),
    "by hand": (lambda m: (m.set_attn_implementation("truemask"), m(tokens())), "no `tm.use` or `tm.enable` knows"),
    "packing twice": (
        lambda m: use(m).__enter__()(tokens(), cu_seq_lens_q=torch.tensor([0, 11, 23])),
        "cu_seq_lens_q says that documents are packed",
    ),
    "wrong size": (
        lambda m: use(m).__enter__()(tokens(), attention_mask=torch.ones(1, 1, 22, 22, dtype=torch.bool)),
        r"is bool \[1, 1, 22, 22\] on cpu, but the call has 2 samples, 23 queries and 23 keys",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_says_what_to_do(model: Any, mistake: str) -> None:
    with use(model):  # the key is known to transformers from here on
        assert model.config._attn_implementation == "truemask"
    act, message = MISTAKES[mistake]
    with pytest.raises(MaskError, match=message):
        act(model)


def test_a_class_without_a_file_cannot_switch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "_can_set_attn_implementation_cached_value", False, raising=False)
    with pytest.raises(MaskError, match="LlamaForCausalLM cannot switch its attention"), use(model, MASK):
        raise AssertionError
    assert model.config._attn_implementation == "sdpa"


def test_text_is_read_where_a_mask_is_taken(model: Any) -> None:
    with use(model, MASK):
        expected = model(tokens()).logits
    for given in ({"mask": str(MASK)}, {"layers": {"full_attention": str(MASK)}}, {"layers": {0: MASK, 1: str(MASK)}}):
        with use(model, **given):
            assert torch.equal(model(tokens()).logits, expected)


META = {
    "nothing": {},
    "flags": {"attention_mask": torch.ones(2, TOKENS).long().to("meta")},
    "flags and positions": {
        "attention_mask": torch.ones(2, TOKENS).long().to("meta"),
        "position_ids": torch.arange(TOKENS)[None].to("meta"),
    },
    "a tensor": {"attention_mask": torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")},
    "floats": {"attention_mask": torch.ones(2, 1, TOKENS, TOKENS, device="meta")},
}


@pytest.mark.parametrize("given", META)
@pytest.mark.parametrize("mask", [None, MASK], ids=str)
def test_a_model_on_the_meta_device_has_shapes(mask: tm.Mask | None, given: str) -> None:
    model = model_of("llama", "sdpa").to("meta")
    with use(model, mask):
        found = model(tokens().to("meta"), **META[given]).logits
    assert found.is_meta
    assert found.shape == (2, TOKENS, 61)
