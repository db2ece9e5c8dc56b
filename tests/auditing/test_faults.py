"""Faults planted in small models: each is found, named and proven; correct models are clean; nothing is left behind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.audited_models import DIM, TOKENS, Planted, Sums, ids
from truemask.auditing.audit import assert_no_leak, audit
from truemask.auditing.report import Report
from truemask.auditing.subject import AuditError
from truemask.masks.compose.boolean import everything
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.documents import documents
from truemask.masks.leaves.patterns import dilated
from truemask.masks.leaves.patterns import random as cells_of_heads
from truemask.masks.leaves.per_token import padding, prefix
from truemask.nn.layers import Decoder, Encoder
from truemask.nn.wrappers import TransformerWrapper

N = 7


def serious(report: Report) -> list[str]:
    """The codes of what is worse than a note."""
    return [finding.code for finding in report.findings if finding.severity != "note"]


def picture(cells: Tensor) -> str:
    return "/".join("".join(".#"[int(cell)] for cell in row) for row in cells)


FAULTS: dict[str, tuple[Any, str]] = {
    "sees the next position": (lambda x: x.cumsum(1) + 1e-3 * x.roll(-1, 1), "future-leak"),
    "a mean over the text": (lambda x: x.cumsum(1) + x.mean(1, keepdim=True), "future-leak"),
    "a later maximum, which has no gradient": (
        lambda x: x.cumsum(1) + (x.flip(1).cummax(1).values.flip(1) > 1).float(),
        "future-leak",
    ),
    "a mask that is added and too weak": (
        lambda x: x + torch.softmax(torch.ones(len(x[0]), len(x[0])).triu(1) * -9, -1) @ x,
        "future-leak",
    ),
    "samples are rolled": (lambda x: x.cumsum(1) + 1e-3 * x.roll(1, 0), "batch-neighbours"),
    "statistics over the batch": (lambda x: (x - x.mean(0)).cumsum(1), "batch-neighbours"),
    "random numbers": (lambda x: x.cumsum(1) + 1e-3 * torch.rand_like(x), "nondeterministic"),
    "NaN where nothing is seen": (lambda x: torch.where(x[:, :1] == x, torch.nan, x.cumsum(1)), "not-finite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_else(name: str) -> None:
    fault, code = FAULTS[name]
    report = audit(Planted(fault).eval(), ids(3, N))
    assert serious(report) == [code]
    assert (report.ok, report.exit_code) == (False, 1)
    assert f"[{code}]" in str(report)


def test_the_matrix_of_what_is_seen_is_exact() -> None:
    report = audit(Planted(lambda x: x.cumsum(1) + 1e-3 * x.roll(-2, 1)).eval(), ids(2, 5))
    assert picture(report.visible[0]) == "#.#../##.#./###.#/####./#####"
    assert picture(report.leaks[1]) == "..#../...#./....#/...../....."
    assert not report.blind.any()
    assert "0 ■ · ! · ·" in str(report)


def test_neighbours_do_not_smear_what_a_sample_sees_of_itself() -> None:
    """Samples that see each other are changed one at a time, so that the neighbour's position is not taken for ours."""
    report = audit(Planted(lambda x: x.cumsum(1) + x.roll(1, 0).roll(-1, 1)).eval(), ids(3, 5))
    assert report.findings.codes == ["batch-neighbours"]
    assert "(3 such pairs)" in report.findings[0].message
    assert picture(report.visible[0]) == picture(torch.ones(5, 5).tril())


def test_a_correct_model_is_clean_and_the_assumption_is_said() -> None:
    report = audit(Sums().eval(), ids(2, N))
    assert (report.findings.codes, report.ok, report.exit_code) == ([], True, 0)
    assert report.notes[0].startswith("nobody said which mask this model runs: it was held to `causal`")
    assert "held to `causal` (assumed), through any number of layers" in report.title


def test_blind_spots_count_where_the_mask_is_stated() -> None:
    report = audit(Sums().eval(), ids(2, N), everything)
    assert serious(report) == ["blind-spots"]
    assert "looks back only" in report.findings[0].message
    narrow = Planted(lambda x: x + x.roll(1, 1) * (torch.arange(N) > 0)[:, None]).eval()
    assert audit(narrow, ids(1, N), window(2), layers=1).ok
    assert "the farthest input seen to matter is 1 back, and the mask reaches 2" in str(
        audit(narrow, ids(1, N), window(3), layers=1)
    )
    findings = audit(Planted(lambda x: x).eval(), ids(1, N)).findings
    assert [finding.severity for finding in findings] == ["warning", "note"]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_influence_goes_through_the_layers(layers: int) -> None:
    """A window of 3 reaches 2 back in each layer; a stack is held to exactly that."""
    model = Decoder(dim=16, depth=layers, heads=2)
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    report = audit(model, {"x": x, "mask": window(3)})
    distance = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal(report.reach[0], (distance >= 0) & (distance <= 2 * layers))
    assert torch.equal(report.visible[0], report.reach[0])
    deep = audit(model, {"x": x, "mask": window(3)}, mask=window(3), layers=layers + 1)
    assert serious(deep) == ["blind-spots"]
    shallow = audit(model, {"x": x, "mask": window(3)}, mask=window(2), layers=layers)
    assert serious(shallow) == ["leak"]


def test_a_mask_for_each_layer() -> None:
    masks = [window(2), prefix(1) | window(1)]
    report = audit(Sums().eval(), ids(1, 5), masks)
    assert picture(report.reach[0]) == "#..../##.../###../#.##./#..##"
    assert serious(report) == ["leak"]


SOUND: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "decoder": (Decoder(dim=16, depth=2, heads=2, attn_dim_head=8), {}),
    "rotary": (Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True), {}),
    "strictly before": (Decoder(dim=16, depth=2, heads=2, attn_dim_head=8), {"mask": causal - dilated(1000)}),
    "encoder": (Encoder(dim=16, depth=2, heads=2, attn_dim_head=8), {}),
    "documents": (Encoder(dim=16, depth=2, heads=2, attn_dim_head=8), {"mask": documents([3, 4])}),
    "packed": (Decoder(dim=16, depth=2, heads=2, attn_dim_head=8), {"mask": causal.packed([3, 4])}),
    "prefix": (Decoder(dim=16, depth=1, heads=2, attn_dim_head=8), {"mask": causal | prefix(3), "causal": False}),
    "right padding": (Encoder(dim=16, depth=2, heads=2), {"mask": torch.arange(N) < torch.tensor([[N], [4]])}),
    "left padding": (Decoder(dim=16, depth=2, heads=2), {"mask": padding(starts=[0, 2])}),
}


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("name", SOUND)
def test_our_own_models_are_clean(name: str, registers: int) -> None:
    layers, keywords = SOUND[name]
    torch.manual_seed(2)
    net = TransformerWrapper(num_tokens=TOKENS, max_seq_len=16, attn_layers=layers, num_memory_tokens=registers)
    report = audit(net.eval(), {"ids": ids(2, N), **keywords})
    assert report.findings.codes == [], str(report)
    assert "(what TransformerWrapper runs), through" in report.title
    assert torch.equal(report.visible & report.judged[:, :, None], report.reach & report.judged[:, :, None])


def test_our_own_cache_is_compared_with_one_call() -> None:
    layers = Decoder(dim=16, depth=2, heads=2, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=TOKENS, max_seq_len=16, attn_layers=layers).eval()
    assert audit(net, ids(2, N)).ok

    class Forgetful(TransformerWrapper):
        def forward(self, given: Tensor, *args: Any, cache: Any = None, **keywords: Any) -> Tensor:
            outputs = super().forward(given, *args, cache=cache, **keywords)
            return outputs if cache is None or cache.length == 0 else outputs * 1.5

    broken = Forgetful(num_tokens=TOKENS, max_seq_len=16, attn_layers=layers).eval()
    report = audit(broken, ids(2, N))
    assert serious(report) == ["cached-differs"]
    assert assert_no_leak(broken, ids(2, N)).ok, "nothing leaks by a cache, so this is not asked"


def test_dropout_is_not_a_leak() -> None:
    net = TransformerWrapper(
        num_tokens=TOKENS,
        max_seq_len=16,
        attn_layers=Decoder(dim=16, depth=2, heads=2, attn_dropout=0.2),
        emb_dropout=0.1,
    )
    evaluated, trained = audit(net.train(), ids(2, N)), audit(net, ids(2, N), train=True)
    assert evaluated.findings.codes == trained.findings.codes == ["nondeterministic"]
    assert evaluated.ok
    assert "in training mode" in evaluated.findings[0].message
    assert trained.ok


def test_batch_statistics_are_found_in_training_mode_only() -> None:
    class Normed(Sums):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(DIM)

        def after(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2).cumsum(1)

    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert audit(model, ids(3, N)).ok
    assert "batch-neighbours" in audit(model, ids(3, N), train=True).findings.codes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_left_behind() -> None:
    model = TransformerWrapper(num_tokens=TOKENS, max_seq_len=16, attn_layers=Decoder(dim=16, depth=1, heads=2))
    model.attn_layers.eval()
    modes = [module.training for module in model.modules()]
    model.token_emb.weight.grad = torch.ones_like(model.token_emb.weight)
    batch = ids(2, N)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    audit(model, batch)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.token_emb.weight.grad, torch.ones_like(model.token_emb.weight))
    assert all(p.grad is None for p in model.attn_layers.parameters())
    assert torch.equal(batch, ids(2, N))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert not any(module._forward_hooks for module in model.modules())


def test_without_gradients_changes_are_enough() -> None:
    class Closed(Sums):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class OneHot(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x, TOKENS).double().flip(1).cumsum(1).flip(1)

    clean, leaky = audit(Closed().eval(), ids(2, N)), audit(OneHot(), ids(2, N))
    assert clean.ok
    assert "gradients could not be followed" in clean.notes[-1]
    assert serious(leaky) == ["future-leak"]


def test_long_texts_are_probed_in_some_positions_and_say_which() -> None:
    report = audit(Planted(lambda x: x.cumsum(1) + x[:, -1:] * 1e-2).eval(), ids(1, 200), positions=9)
    assert serious(report) == ["future-leak"]
    assert report.looked.any(dim=1).all(), "a probed output says something of every input"
    assert any(note.startswith("9 of 200 positions were probed: 0, ") for note in report.notes)
    assert audit(Sums().eval(), ids(1, 200), "causal", positions=9).ok, "where nobody looked there are no blind spots"


def test_hidden_nan_is_a_note() -> None:
    """Multiplying by 0 keeps NaN: most kernels do, so it is said and does not fail."""
    times_zero = Planted(lambda x: torch.ones(N, N).tril() @ x).eval()
    report = audit(times_zero, ids(2, N))
    assert (report.findings.codes, report.findings[0].severity, report.ok) == (["poison-spreads"], "note", True)
    assert "NaN planted in input 6" in report.findings[0].message
    assert audit(Sums().eval(), ids(2, N)).findings.codes == []


def test_outputs_are_found_wherever_they_are() -> None:
    for wrap in (lambda y: (y, None), lambda y: {"loss": y.mean(), "logits": y}, lambda y: [y.mean(), y]):
        assert audit(Planted(lambda x, wrap=wrap: wrap(x.cumsum(1))).eval(), ids(2, N)).ok


def test_embeddings_and_half_precision() -> None:
    x = torch.randn(2, N, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.bfloat16):
        report = audit(Decoder(dim=16, depth=1, heads=2).to(dtype), x.to(dtype))
        assert report.findings.codes == [], str(report)


def test_the_report_as_html(tmp_path: Any) -> None:
    report = audit(Planted(FAULTS["sees the next position"][0]).eval(), ids(2, N))
    page = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 1, "samples that look alike are drawn once"
    assert "future-leak" in page
    assert report._repr_html_() in page
    assert "#" in report.text(ascii=True)
    assert report.text(ascii=True).isascii()


def test_assert_no_leak() -> None:
    assert_no_leak(Sums().eval(), ids(2, N))
    assert_no_leak(Sums().eval(), ids(2, N), everything)  # blind spots leak nothing
    with pytest.raises(AssertionError, match=r"(?s)audit of Planted.*future-leak.*the difference"):
        assert_no_leak(Planted(FAULTS["a mean over the text"][0]).eval(), ids(2, N))


def test_noise_is_measured_and_not_taken_for_a_leak() -> None:
    """Calls that differ whatever the seed: what is smaller than that noise counts for nothing, what is larger does."""
    noise = np.random.default_rng(0)

    def shaky(x: Tensor, leak: float) -> Tensor:
        draws = torch.from_numpy(noise.standard_normal(x.shape)).to(x.dtype)
        return x.detach().cumsum(1) + 1e-3 * draws + leak * x.detach().flip(1)

    quiet, loud = (audit(Planted(lambda x, leak=leak: shaky(x, leak)).eval(), ids(2, N)) for leak in (0.0, 1.0))
    assert serious(quiet) == ["nondeterministic"]
    assert "even with the same random numbers they differ" in quiet.findings[0].message
    assert set(serious(loud)) == {"future-leak", "nondeterministic"}


def test_without_a_number_of_layers_the_closure_is_allowed_and_said() -> None:
    sums, note = Sums().eval(), "nobody said how many layers there are"
    assert audit(sums, ids(1, N), window(2)).ok
    assert any(said.startswith(note) for said in audit(sums, ids(1, N), window(2)).notes)
    assert not any(said.startswith(note) for said in audit(sums, ids(1, N), causal).notes)
    assert serious(audit(sums, ids(1, N), window(2), layers=1)) == ["leak"]


def test_masks_that_differ_between_heads() -> None:
    """What some head may see may matter; the number of heads is the model's."""
    net = TransformerWrapper(num_tokens=TOKENS, max_seq_len=16, attn_layers=Decoder(dim=16, depth=1, heads=3)).eval()
    scattered = cells_of_heads(0.3, per_head=True)
    report = audit(net, {"ids": ids(1, N), "mask": scattered})
    allowed = (causal & scattered).to_dense(N, heads=3)[0].any(dim=0) | torch.eye(N, dtype=torch.bool)
    assert torch.equal(report.visible[0], allowed), str(report)
    with pytest.raises(AuditError, match="varies over heads and holds no number of them"):
        audit(Sums(), ids(1, N), scattered)


BANNED = {"-1e9": -1e9, "the lowest number": torch.finfo(torch.float32).min, "-inf": -torch.inf}


@pytest.mark.parametrize("banned", BANNED)
def test_banned_logits_hide_nothing_and_are_no_fault(banned: str) -> None:
    """Each feature is measured in its own size."""

    def ban(x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x[..., :3], BANNED[banned]), x[..., 3:]], dim=-1)

    assert audit(Planted(lambda x: ban(x.cumsum(1))).eval(), ids(2, N)).ok
    batch = audit(Planted(lambda x: ban(x.cumsum(1) + 0.5 * x.detach().mean(0))).eval(), ids(2, N))
    assert "batch-neighbours" in serious(batch)
    future = audit(Planted(lambda x: ban(x.cumsum(1) + 0.01 * x.detach().roll(-1, 1))).eval(), ids(2, N))
    assert "future-leak" in serious(future)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_a_convolution_by_fft_is_no_leak(dtype: torch.dtype) -> None:
    """It gives every input a tiny gradient, which does not grow in proportion."""
    kernel = torch.randn(N, DIM, generator=torch.Generator().manual_seed(6), dtype=dtype)

    def convolved(x: Tensor) -> Tensor:
        product = torch.fft.rfft(x, 2 * N, dim=1) * torch.fft.rfft(kernel, 2 * N, dim=0)
        return torch.fft.irfft(product, 2 * N, dim=1)[:, :N]

    assert serious(audit(Planted(convolved).to(dtype).eval(), ids(2, N), causal)) == []


def test_a_tiny_leak_is_told_by_its_gradient_alone() -> None:
    report = audit(Planted(lambda x: x.cumsum(1) + 1e-9 * x.flip(1)).eval(), ids(2, N))
    assert serious(report) == ["future-leak"]
    assert "grows in proportion" in report.findings[0].message
    assert "proves" not in report.findings[0].message


def test_a_tiny_leak_between_samples_is_not_blamed_on_positions() -> None:
    report = audit(Planted(lambda x: x.cumsum(1) + 1e-7 * x.roll(1, 0).flip(1)).eval(), ids(2, N))
    assert serious(report) == ["batch-neighbours"]
    assert "have a gradient at sample" in report.findings[0].message


UNSEEN: dict[str, Any] = {
    "no numbers": lambda x: x * torch.nan,
    "nothing mixed": lambda x: x + 0 * x.flip(1),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_no_leak_is_not_asserted_where_none_could_be_seen(name: str) -> None:
    with pytest.raises(AssertionError, match=r"not-finite|nothing-seen"):
        assert_no_leak(Planted(UNSEEN[name]).eval(), ids(2, N), causal)
    assert_no_leak(Planted(lambda x: x).eval(), ids(2, N), "local(0)")


def test_a_window_through_nobody_knows_how_many_layers_is_not_asserted() -> None:
    with pytest.raises(AssertionError, match=r"(?s)unbounded-layers.*pass layers="):
        assert_no_leak(Sums().eval(), ids(2, N), window(3))
    with pytest.raises(AssertionError, match="hides, through all layers"):
        assert_no_leak(Sums().eval(), ids(2, N), window(3), layers=1)


def test_outputs_that_are_all_zero_may_still_move() -> None:
    before = Sums().eval()(ids(2, N)).detach()
    moved = audit(
        Planted(lambda x: x.cumsum(1).detach() - before + 0.5 * (x - x[:1]).flip(1).detach()).eval(), ids(2, N)
    )
    assert moved.visible.any()
    from_zero = audit(Planted(lambda x: (x.cumsum(1) - before).detach().flip(1)).eval(), ids(2, N))
    assert "future-leak" in serious(from_zero)


class Counts(Sums):
    """Buffers of every kind: one that is expanded, one that each call replaces."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("calls", torch.tensor(0))

    def after(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x.cumsum(1)


def test_buffers_are_put_back() -> None:
    model = Counts().eval()
    assert audit(model, ids(2, N)).ok
    assert int(model.calls) == 0


def test_an_embedding_called_by_keyword_is_found() -> None:
    class Named(Sums):
        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.embedding(input=x)) + 1e-9 * self.embedding(input=x).flip(1)

    assert serious(audit(Named().eval(), ids(2, N))) == ["future-leak"]


def test_a_hole_in_the_positions_is_no_new_document() -> None:
    class Placed(Sums):
        def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
            return self.after(self.embedding(x)) + position_ids[..., None]

    holes, restarts = torch.tensor([[0, 1, 2, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert audit(Placed().eval(), {"x": ids(1, 6), "position_ids": holes}).ok
    mixed = audit(Placed().eval(), {"x": ids(1, 6), "position_ids": restarts})
    assert serious(mixed) == ["documents-mix"]
    assert any("position_ids begin again" in note for note in mixed.notes)


def test_a_report_is_true_if_it_is_clean() -> None:
    clean, leaky = audit(Sums().eval(), ids(1, N)), audit(Sums().eval(), ids(1, N), "local(0)")
    assert clean
    assert not leaky
    said = leaky.to_dict()
    assert (said["ok"], said["leaks"], said["findings"][0]["code"]) == (False, N * (N - 1) // 2, "leak")
