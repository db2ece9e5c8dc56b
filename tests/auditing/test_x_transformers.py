"""The peer's defects (x-transformers 2.31.10) that can be seen from outside, each found; its sound models are clean.

The names (M1, G3, ...) are those of the project's list of its defects. What a black box cannot see, and why: crashes
show themselves (M7, M8, M10, M15, M16, G1, G6, G8, G9); what `generate` does with tokens is not a call of the network
(G2, G5, G7, G10, G11); copies, pickles and dtypes of positions are not about who sees whom (O1, bf16); a mask of
cross-attention that is swallowed speaks of the context, whose positions are not the outputs' (M6, M9); memory and speed
(M13, M14) and names (M17, M20, O2 to O5) change no output. Registers with a list of prompts generate something else
because of the call that `generate` makes, left padding by `seq_start_pos` with registers: that call is audited (M2).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.auditing.test_faults import serious
from tests.support.audited_models import TOKENS, ids
from truemask.auditing.audit import audit
from truemask.interop.use import use
from truemask.masks.compose.boolean import everything
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.matrices import dense

peer: Any = pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `peers` has it)")

N = 8
SIZES: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "verbose": False}
NOT_SELF = ~torch.eye(N, dtype=torch.bool)
RIGHT = torch.arange(N) < torch.tensor([[N], [5]])
STARTS = torch.tensor([0, 3])


def net(kind: str = "Decoder", *, wrapper: dict[str, Any] | None = None, **keywords: Any) -> Any:
    torch.manual_seed(4)
    layers = getattr(peer, kind)(**SIZES, **keywords)
    return peer.TransformerWrapper(num_tokens=TOKENS, max_seq_len=16, attn_layers=layers, **wrapper or {}).eval()


@pytest.mark.parametrize(
    ("kind", "options", "keywords"),
    [
        ("Decoder", {}, {}),
        ("Decoder", {"attn_flash": True, "rotary_pos_emb": True}, {}),
        ("Decoder", {"attn_max_attend_past": 2}, {}),
        ("Decoder", {}, {"mask": RIGHT}),
        ("Decoder", {}, {"seq_start_pos": STARTS}),
        ("Decoder", {}, {"causal": False}),
        ("Decoder", {"attn_flash": True}, {"attn_mask": NOT_SELF}),
        ("Encoder", {}, {"mask": RIGHT}),
        ("PrefixDecoder", {}, {"prefix_attn_len": 3}),
    ],
    ids=str,
)
def test_its_sound_models_are_clean(kind: str, options: dict[str, Any], keywords: dict[str, Any]) -> None:
    report = audit(net(kind, **options), {"x": ids(2, N), **keywords})
    assert serious(report) == [], str(report)


def test_m12_a_mask_without_the_diagonal_averages_the_future() -> None:
    report = audit(net(), {"x": ids(2, N), "attn_mask": NOT_SELF})
    assert serious(report) == ["future-leak"]
    assert report.leaks[0, 0, 1:].all(), "the first output averages all that comes later"


def test_m3_flash_ignores_that_causal_is_false() -> None:
    report = audit(net(attn_flash=True), {"x": ids(2, N), "causal": False})
    assert serious(report) == ["blind-spots"]
    assert "no output depends on any later input" in report.findings[0].message


def test_m5_a_mask_for_each_sample_is_read_as_one_for_each_head() -> None:
    cells = torch.rand(2, N, N, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = cells | torch.eye(N, dtype=torch.bool)
    report = audit(net(), {"x": ids(2, N), "attn_mask": masks}, causal & dense(masks, axes="bqk"))
    assert serious(report) == ["leak"]
    assert audit(net(), {"x": ids(2, N), "attn_mask": masks[:, None]}, causal & dense(masks, axes="bqk")).ok


def test_m1_padding_is_dropped_beside_another_key_mask() -> None:
    flags = torch.ones(2, N, dtype=torch.bool)
    flags[:, 2] = False
    report = audit(net("Encoder"), {"x": ids(2, N), "mask": RIGHT, "self_attn_kv_mask": flags})
    assert serious(report) == ["padding-matters", "padded-differs"]
    assert not report.leaks[0].any()
    assert report.leaks[1, :5, 5:].all()


def test_m2_registers_are_hidden_in_the_place_of_padding() -> None:
    report = audit(net(wrapper={"num_memory_tokens": 3}), {"x": ids(2, N), "seq_start_pos": STARTS})
    assert serious(report) == ["padding-matters", "padded-differs"]


def test_m4_left_padding_of_continuous_inputs_is_never_handed_on() -> None:
    torch.manual_seed(4)
    model = peer.ContinuousTransformerWrapper(dim_in=5, dim_out=5, max_seq_len=16, attn_layers=peer.Decoder(**SIZES))
    x: Tensor = torch.randn(2, N, 5, generator=torch.Generator().manual_seed(0))
    report = audit(model.eval(), {"x": x, "seq_start_pos": STARTS})
    assert serious(report) == ["padding-matters", "padded-differs"]


def test_m18_a_residual_averages_over_the_text() -> None:
    assert serious(audit(net(mv_split_residual=True), ids(2, N)))[0] == "future-leak"


@pytest.mark.parametrize("option", ["attn_data_dependent_alibi", "shift_tokens"])  # G3, G4
def test_g3_and_g4_generation_differs_from_training(option: str) -> None:
    report = audit(net(**{option: 1}), ids(2, N))
    assert serious(report) == ["cached-differs"]


def test_a_model_in_use_is_held_to_what_it_was_given() -> None:
    model, batch = net(), ids(2, N)
    with use(model, window(3)):
        report = audit(model, batch)
    assert serious(report) == [], str(report)
    assert "held to `window(3)` (what x-transformers' Decoder says, and tm.use)" in report.title
    assert torch.equal(report.visible, report.reach)
    with use(model, everything, replace=True, layers=[1]):
        assert "held to `causal` then `everything`" in audit(model, batch).title
    assert "held to `causal` (what x-transformers' Decoder says)" in audit(model, batch).title
