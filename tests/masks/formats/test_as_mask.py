"""Text where a mask is taken: whatever takes one reads it as the mask that it says, and points at a mistake in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.support.equality import assert_same
from truemask.masks.formats.as_mask import from_text
from truemask.nn.multihead import MultiheadAttention
from truemask.viz.plot import save_picture

N = 7
TEXT, MASK = "causal & (window(3) | prefix(1))", tm.causal & (tm.window(3) | tm.prefix(1))
TYPO = "causal & windw(3)"
POINTED = r"unknown name 'windw', did you mean 'window'\?\n  causal & windw\(3\)\n           \^\^\^\^\^"

torch.manual_seed(0)
Q = torch.randn(2, 2, N, 8)
X = torch.randn(2, N, 16)
TOKENS = torch.randint(0, 11, (2, N))
DECODER = tm.Decoder(dim=16, depth=1, heads=2)
ENCODER = tm.Encoder(dim=16, depth=1, heads=2)
MODEL = tm.AutoregressiveWrapper(tm.TransformerWrapper(num_tokens=11, max_seq_len=32, attn_layers=DECODER))
TORCHS = MultiheadAttention(16, 2, batch_first=True)


def pictured(mask: Any, folder: Path) -> str:
    return save_picture(mask, folder / "mask.svg", N).read_text(encoding="utf-8")


def saved(mask: Any, folder: Path) -> tm.Mask:
    tm.save_mask(mask, folder / "mask.safetensors")
    return tm.load_mask(folder / "mask.safetensors")


DOORS: dict[str, Callable[[Any, Path], Any]] = {
    "attend": lambda mask, _: tm.attend(Q, Q, Q, mask),
    "plan of sizes": lambda mask, _: str(tm.plan(mask, N)),
    "plan of tensors": lambda mask, _: str(tm.plan(Q, Q, Q, mask)),
    "decoder": lambda mask, _: DECODER(X, mask=mask),
    "decoder's matrix": lambda mask, _: DECODER(X, attn_mask=mask),
    "encoder": lambda mask, _: ENCODER(X, mask=mask),
    "attention": lambda mask, _: DECODER.layers[0].attn(X, mask),  # pyright: ignore
    "wrapper": lambda mask, _: MODEL.net(TOKENS, mask=mask),
    "loss": lambda mask, _: MODEL(TOKENS, mask=mask),
    "generate": lambda mask, _: MODEL.generate(TOKENS, 4, mask=mask, temperature=0.0),
    "generate from lists": lambda mask, _: MODEL.generate([[1, 2], [3]], 4, mask=mask, temperature=0.0),
    "torch's module": lambda mask, _: TORCHS(X, X, X, mask=mask)[0],
    "audit": lambda mask, _: tm.audit(MODEL.net, TOKENS[:1], mask=mask).ok,
    "diagnose": lambda mask, _: str(tm.diagnose(mask, N)),
    "explain": lambda mask, _: str(tm.explain(mask, 5, 1)),
    "reach": lambda mask, _: str(tm.reach(mask, 5, layers=2)),
    "reach of layers": lambda mask, _: str(tm.reach([mask, tm.causal], 5)),
    "leaks": lambda mask, _: tm.reach(tm.causal, 5).leaks(mask),
    "collator": lambda mask, _: tm.PackCollator(4, mask=mask)([[1, 2], [3]])["mask"],
    "to torch": lambda mask, _: tm.to_torch_mha(mask, N),
    "to additive": lambda mask, _: tm.to_additive(mask, N),
    "picture": pictured,
    "file": saved,
}


@pytest.mark.parametrize("door", DOORS)
def test_text_is_the_mask_that_it_says(door: str, tmp_path: Path) -> None:
    found, wanted = DOORS[door](TEXT, tmp_path), DOORS[door](MASK, tmp_path)
    assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted


@pytest.mark.parametrize("door", DOORS)
def test_a_mistake_in_a_text_is_pointed_at(door: str, tmp_path: Path) -> None:
    with pytest.raises(tm.MaskError, match=POINTED):
        DOORS[door](TYPO, tmp_path)


@pytest.mark.parametrize("form", [tm.to_varlen, tm.to_flashmask])
def test_interval_formats_read_text(form: Callable[..., Any]) -> None:
    for found, wanted in zip(form("window(3)", N), form(tm.window(3), N), strict=True):
        assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted
    with pytest.raises(tm.MaskError, match=POINTED):
        form(TYPO, N)


@pytest.mark.parametrize("given", [X, tm.causal, None, 3])
def test_what_is_no_text_stays_as_it_is(given: object) -> None:
    assert from_text(given) is given


def test_a_text_is_read_once() -> None:
    assert from_text(TEXT) is from_text(TEXT)


def test_a_text_read_under_inference_serves_training() -> None:
    text = "causal & keys([True, True, True, True, False, True, True])"
    with torch.inference_mode():
        tm.attend(Q, Q, Q, text)
    q = Q.clone().requires_grad_()
    tm.attend(q, Q, Q, text).sum().backward()
    assert q.grad is not None


COMPILED: dict[str, Callable[[Any], Tensor]] = {
    "attend": lambda mask: tm.attend(Q, Q, Q, mask),
    "decoder": lambda mask: DECODER(X, mask=mask),
    "torch's module": lambda mask: TORCHS(X, X, X, mask=mask, need_weights=False)[0],
}


@pytest.mark.parametrize("door", COMPILED)
def test_text_in_a_compiled_function(door: str) -> None:
    torch._dynamo.reset()
    call = torch.compile(COMPILED[door], backend="eager", fullgraph=True)
    assert_same(call(TEXT), COMPILED[door](MASK))
    with pytest.raises(tm.MaskError, match=POINTED):
        call(TYPO)


def test_masks_are_combined_with_masks_and_text_is_parsed_first() -> None:
    with pytest.raises(tm.MaskError, match=r"got str 'window\(3\)': text becomes a mask by `parse\('window\(3\)'\)`"):
        tm.causal & "window(3)"  # pyright: ignore
    with pytest.raises(tm.MaskError, match=r"`per_head` .* text becomes a mask by `parse\('causal'\)`"):
        tm.per_head(["causal", "window(3)"])


@pytest.mark.parametrize("door", ["attend", "plan of sizes", "decoder", "generate", "torch's module", "diagnose"])
def test_a_list_of_masks_names_what_it_may_be_for(door: str, tmp_path: Path) -> None:
    with pytest.raises((tm.MaskError, TypeError), match=r"each head is `per_head\(\[...\]\)`, .* `per_sample"):
        DOORS[door]([tm.causal, tm.window(3)], tmp_path)
