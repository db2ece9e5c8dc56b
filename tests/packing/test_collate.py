"""The collator packs in the workers of a `DataLoader`; its batches keep documents apart in Hugging Face's models."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.data import DataLoader

from tests.support.equality import assert_same
from tests.support.nn_models import TOKENS, decoder, wrapped
from truemask.attention.attend import attend
from truemask.masks.leaves.bands import causal, window
from truemask.packing.collate import PackCollator

IGNORE = -100


def samples(count: int = 8) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 60, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, TOKENS, (n,), generator=generator).tolist()} for n in sizes]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_masks_block_masks_and_plans_are_built_in_workers() -> None:
    """What the parent gets runs there, and is what the parent would have built."""
    base = causal & window(7)
    collate = PackCollator(length=64, mask=base, block_mask=True, plan={"heads": 2, "head_dim": 8})
    batches = list(DataLoader(samples(), batch_size=4, collate_fn=collate, num_workers=2))
    assert len(batches) == 2
    for batch, start in zip(batches, (0, 4), strict=True):
        count = len(batch["input_ids"])
        assert torch.equal(batch["input_ids"], collate(samples()[start : start + 4])["input_ids"])
        assert batch["mask"] == base.packed(batch["lengths"])
        q, k, v = torch.randn(3, count, 2, 64, 8, generator=torch.Generator().manual_seed(1)).unbind()
        want = attend(q, k, v, base.packed(batch["lengths"]), backend="reference")
        assert_same(attend(q, k, v, batch["mask"], backend=batch["plan"].backend), want)
        assert_same(flex_attention(q, k, v, block_mask=batch["block_mask"]), want)
        assert f"> {batch['plan'].backend} " in str(batch["plan"])
        assert batch["plan"].request.q_len == 64
        assert pickle.loads(pickle.dumps(batch["plan"])).backend == batch["plan"].backend


def test_a_loss_on_a_batch_is_that_of_the_samples() -> None:
    net, given = wrapped(decoder(rotary_pos_emb=True, rotary_emb_dim=4)), samples(5)
    batch = PackCollator(length=64, mask=causal)(given)
    logits = net(batch["input_ids"], batch["mask"])
    assert_same(total(logits, batch["labels"]), sum_alone(lambda row: net(row, causal), given))


def total(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def sum_alone(logits_of: Any, given: list[dict[str, list[int]]]) -> Tensor:
    rows = [torch.tensor([sample["input_ids"]]) for sample in given]
    return torch.stack([total(logits_of(row), row) for row in rows]).sum()


def test_without_a_length_a_batch_is_one_full_row() -> None:
    batch = PackCollator()([{"input_ids": [1, 2]}, {"input_ids": torch.tensor([3, 4, 5])}])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORE, 4, 5, IGNORE, 2]]
    assert PackCollator(mask=causal)([[1], [2]])["lengths"] == [[1, 1]]


def test_other_fields_and_options_reach_the_batch() -> None:
    collate = PackCollator(length=3, long="truncate", pad=9, ignore_index=-1)
    batch = collate([{"input_ids": [1, 2, 3, 4], "weight": [0.5] * 4}, {"input_ids": [5], "weight": [1.0]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 9, 9]]
    assert batch["labels"].tolist() == [[-1, 2, 3], [-1, -1, -1]]
    assert batch["weight"].tolist() == [[0.5] * 3, [1.0, 0.0, 0.0]]
    assert set(batch) == {"input_ids", "labels", "position_ids", "weight", "use_cache"}


MISUSE: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"block_mask": True}, "block_mask and plan are made of a mask: pass mask="),
    "tensor": (
        {"mask": torch.ones(2, 2)},
        r"mask is an expression, such as `causal`, or its text, got float32 \[2, 2\]",
    ),
    "plan": ({"mask": causal, "plan": True}, "plan are keywords"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told(name: str) -> None:
    keywords, message = MISUSE[name]
    with pytest.raises((ValueError, TypeError), match=message):
        PackCollator(8, **keywords)
    with pytest.raises(ValueError, match="there are no sequences"):
        PackCollator()([])
    with pytest.raises(ValueError, match="a dict needs its tokens as 'input_ids'"):
        PackCollator()([{"ids": [1]}])


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def llama(implementation: str = "sdpa") -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation=implementation,
    )
    return transformers.LlamaForCausalLM(config).double()


SOFTMAX_IN = {"eager": torch.float32, "sdpa": torch.float64}  # whatever the model's own dtype is


@pytest.mark.parametrize("implementation", SOFTMAX_IN)
@pytest.mark.parametrize("length", [None, 64])
def test_a_hugging_face_model_keeps_the_documents_apart(implementation: str, length: int | None) -> None:
    """Loss and gradients of `model(**batch)`; with its default cache the model would mix the documents."""
    model, given = llama(implementation), samples(5)
    batch = PackCollator(length=length)(given)
    found = model(**batch)
    loss = total(found.logits, batch["labels"])
    want = sum_alone(lambda row: model(row).logits, given)
    within = {"rtol": 0.0, "atol": 64 * torch.finfo(SOFTMAX_IN[implementation]).eps * want.item()}
    torch.testing.assert_close(loss, want, **within)
    parts = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parts, retain_graph=True) for x in (loss, want)), strict=True):
        torch.testing.assert_close(a, b, **within)
    count = int((batch["labels"] != IGNORE).sum())
    assert_same(found.loss, (want / count).float())  # the model's own loss is in fp32
    cached = total(model(**{**batch, "use_cache": True}).logits, batch["labels"])
    assert abs((cached - want).item()) > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_takes_it(tmp_path: Path) -> None:
    """One step with a learning rate of 1: what the weights lose is the gradient of the samples alone."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, given = llama(), samples(4)
    before = [part.detach().clone() for part in model.parameters()]
    loss = sum_alone(lambda row: model(row).logits, given) / sum(len(x["input_ids"]) - 1 for x in given)
    want = torch.autograd.grad(loss, list(model.parameters()))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_num_workers=2,
    )
    transformers.Trainer(model, arguments, data_collator=PackCollator(length=64), train_dataset=given).train()
    for old, new, grad in zip(before, model.parameters(), want, strict=True):
        torch.testing.assert_close(old - new.detach(), grad, rtol=1e-4, atol=1e-5)
