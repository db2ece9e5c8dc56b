"""`MultiheadAttention` is torch's module: numbers, gradients, state dict and conventions, and what it does better."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.equality import assert_same
from truemask.errors import MaskError
from truemask.masks.compose.boolean import nothing
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.per_token import keys
from truemask.masks.leaves.predicate import predicate
from truemask.nn.multihead import MultiheadAttention

B, Q, K, E, H = 3, 5, 7, 12, 4

MAKES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "other features": {"kdim": 10, "vdim": 6},
    "other features, no bias": {"kdim": 10, "bias": False, "batch_first": True},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}  # of the largest number of each tensor
NESTED = "ignore:The PyTorch API of nested tensors:UserWarning"


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def twins(**keywords: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same weights, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, **keywords)
    for part in theirs.parameters():
        nn.init.normal_(part, std=0.25, generator=drawn(1))
    ours = MultiheadAttention(E, H, **keywords)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(module: nn.MultiheadAttention, batched: bool, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((Q, E), (K, module.kdim), (K, module.vdim))
    found = [torch.randn(B, *size, generator=drawn(i), dtype=torch.float64).to(dtype) for i, size in enumerate(sizes)]
    if not batched:
        return [x[0].clone().requires_grad_() for x in found]
    return [(x if module.batch_first else x.transpose(0, 1).contiguous()).requires_grad_() for x in found]


def masks(kind: str, batched: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Torch's mask arguments; no query loses all of its keys."""
    hidden = torch.rand(Q, K, generator=drawn(7)) < 0.4
    hidden[:, 2] = False
    per_head = torch.rand((B if batched else 1) * H, Q, K, generator=drawn(8)) < 0.4
    per_head[:, :, 2] = False
    padded = torch.arange(K) >= torch.tensor([[7], [4], [3]])
    padded = padded if batched else padded[1]
    added = torch.randn(Q, K, generator=drawn(9), dtype=torch.float64).to(dtype)
    return {
        "none": {},
        "attn": {"attn_mask": hidden},
        "heads": {"attn_mask": per_head},
        "padding": {"key_padding_mask": padded},
        "both": {"attn_mask": per_head, "key_padding_mask": padded},
        "additive": {"attn_mask": torch.zeros(Q, K, dtype=dtype).masked_fill(hidden, -torch.inf)},
        "bias": {"attn_mask": added.masked_fill(hidden, -torch.inf).requires_grad_()},
        "head bias": {"attn_mask": torch.randn(per_head.shape, generator=drawn(3), dtype=torch.float64).to(dtype)},
        "key bias": {"key_padding_mask": padded.to(dtype) * -1.5, "attn_mask": added},
    }[kind]


def assert_same_results(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    """The output, and the weights if there are any."""
    assert_same(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None and expected[1] is not None:
        assert_same(found[1], expected[1])


def results(module: nn.Module, given: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Outputs, weights and gradients of a call."""
    out, weights = module(*given, **options)
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(1, -1, weights.numel(), dtype=out.dtype).view_as(weights)).sum()
    learned = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    wanted = [*given, *learned, *module.parameters()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [out, *([] if weights is None else [weights]), *(g for g in found if g is not None)]


@pytest.mark.parametrize(
    "kind", ["none", "attn", "heads", "padding", "both", "additive", "bias", "head bias", "key bias"]
)
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_it_is_torchs_module(make: str, kind: str, dtype: torch.dtype) -> None:
    ours, theirs = (module.to(dtype) for module in twins(**MAKES[make]))
    for batched, need, average in ((True, True, True), (True, True, False), (True, False, True), (False, True, False)):
        given, mask = inputs(theirs, batched, dtype), masks(kind, batched, dtype)
        options = {"need_weights": need, "average_attn_weights": average, **mask}
        left, right = results(ours, given, options), results(theirs, given, options)
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert a.shape == b.shape
            scale = max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("make", MAKES)
def test_state_dict_and_initial_weights_are_torchs(make: str) -> None:
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(E, H, **MAKES[make])
    torch.manual_seed(5)
    ours = MultiheadAttention(E, H, **MAKES[make])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for module in (ours, theirs):
        torch.manual_seed(6)
        module._reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    found = theirs.load_state_dict(twins(**MAKES[make])[0].state_dict(), strict=True)
    assert list(found.missing_keys) + list(found.unexpected_keys) == []


@pytest.mark.parametrize("make", MAKES)
def test_from_torch_takes_over_the_same_parameters(make: str) -> None:
    theirs = nn.MultiheadAttention(E, H, dropout=0.25, dtype=torch.float64, **MAKES[make]).eval()
    ours = MultiheadAttention.from_torch(theirs)
    assert [id(x) for x in ours.parameters()] == [id(x) for x in theirs.parameters()]
    assert (ours.dropout, ours.training, ours.batch_first) == (0.25, False, theirs.batch_first)
    given = inputs(theirs, True, torch.float64)
    torch.testing.assert_close(ours(*given), theirs(*given), rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.MultiheadAttention, got Linear"):
        MultiheadAttention.from_torch(nn.Linear(2, 2))


def test_copies_and_pickles_keep_their_meaning() -> None:
    ours, _ = twins()
    x = torch.randn(Q, B, E, generator=drawn())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x, x, x, mask=window(2))[0], ours(x, x, x, mask=window(2))[0])
        assert not other._qkv_same_embed_dim


@pytest.mark.parametrize("need", [True, False], ids=["weights", "no weights"])
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(need: bool) -> None:
    ours, _ = twins()
    x = torch.randn(Q, B, E, generator=drawn(), requires_grad=True)
    hidden = torch.zeros(B, Q, dtype=torch.bool)
    hidden[1] = True
    out, weights = ours(x, x, x, hidden, need_weights=need)
    assert torch.equal(out[:, 1], ours.out_proj.bias.expand(Q, E))
    if weights is not None:
        assert not weights[1].any()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isfinite().all()
    assert not grad[:, 1].any()


def test_a_nan_behind_the_mask_stays_there() -> None:
    ours, _ = twins()
    x = torch.randn(Q, B, E, generator=drawn())
    bad = x.clone()
    bad[3:, 1] = torch.nan
    hidden = torch.zeros(B, Q, dtype=torch.bool)
    hidden[1, 3:] = True
    clean, _ = ours(x, x, x, hidden, need_weights=False)
    out, _ = ours(x, bad, bad, hidden, need_weights=False)
    assert_same(out, clean)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_expression_is_anded_with_torchs_masks(batch_first: bool) -> None:
    ours, theirs = twins(batch_first=batch_first)
    x = torch.randn(B, Q, E, generator=drawn())
    x = x if batch_first else x.transpose(0, 1)
    hidden = torch.rand(B * H, Q, Q, generator=drawn(4)) < 0.3
    padded = torch.arange(Q) >= torch.tensor([[5], [4], [3]])
    i, j = torch.arange(Q)[:, None], torch.arange(Q)
    shown = ((j <= i) & (j > i - 3)) | (j == 0)
    diagonal = torch.eye(Q, dtype=torch.bool)
    hidden, padded = hidden & ~diagonal & (j > 0), padded & (torch.arange(Q) > 0)
    want = theirs(x, x, x, padded, attn_mask=hidden | ~shown, average_attn_weights=False)
    expression = window(3) | dense((j == 0).expand(Q, Q))
    got = ours(x, x, x, padded, attn_mask=hidden, average_attn_weights=False, mask=expression)
    assert_same_results(got, want)
    alone = ours(x, x, x, mask=expression & keys(~padded), attn_mask=hidden, average_attn_weights=False)
    assert_same_results(alone, want)


def test_an_expression_does_not_count_the_keys_that_the_module_adds() -> None:
    ours, theirs = twins(add_bias_kv=True, add_zero_attn=True, batch_first=True)
    x = torch.randn(B, Q, E, generator=drawn())
    want = theirs(x, x, x, attn_mask=torch.ones(Q, Q, dtype=torch.bool).triu(1))
    assert_same_results(ours(x, x, x, mask=causal), want)
    none = ours(x, x, x, mask=nothing)[1]
    assert not none[..., :Q].any()
    assert_same(none.sum(-1), torch.ones(B, Q))


@pytest.mark.parametrize(("need", "given"), list(itertools.product((True, False), (None, "bool", "float"))))
def test_is_causal_is_causal(need: bool, given: str | None) -> None:
    ours, theirs = twins()
    x = torch.randn(Q, B, E, generator=drawn())
    later = torch.ones(Q, Q, dtype=torch.bool).triu(1)
    mask = {"bool": later, "float": torch.zeros(Q, Q).masked_fill(later, -torch.inf)}.get(str(given))
    want = theirs(x, x, x, attn_mask=later, need_weights=need)
    assert_same_results(ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=need), want)


def test_dropout_drops_the_same_cells_whoever_runs_it() -> None:
    """Weights by the reference, outputs by the fastest backend; and other cells in the next step."""
    ours, _ = twins(dropout=0.5)
    x = torch.randn(Q, B, E, generator=drawn())
    torch.manual_seed(3)
    out, weights = ours(x, x, x, average_attn_weights=False)
    torch.manual_seed(3)
    fast, _ = ours(x, x, x, need_weights=False)
    assert_same(fast, out)
    values = ours._heads(ours._project(x, x, x)[2])  # b h k d
    assert_same(ours.out_proj((weights @ values).permute(2, 0, 1, 3).flatten(2)), out)
    assert 0.3 < float((weights == 0).double().mean()) < 0.7
    assert not torch.allclose(ours(x, x, x, need_weights=False)[0], out)
    assert torch.equal(ours.eval()(x, x, x)[0], ours(x, x, x)[0])


ENCODER_MASKS: dict[str, dict[str, Tensor | bool]] = {
    "none": {},
    "padding": {"src_key_padding_mask": torch.arange(Q) >= torch.tensor([[5], [4], [2]])},
    "causal": {"src_mask": torch.ones(Q, Q, dtype=torch.bool).triu(1), "is_causal": True},
}


@pytest.mark.parametrize("kind", ENCODER_MASKS)
@pytest.mark.parametrize("mode", ["train", "eval", "eval without grad"])
def test_it_runs_inside_an_encoder_layer(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    want_layer = copy.deepcopy(layer)
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    layer.train(mode == "train"), want_layer.train(mode == "train")
    calls = counted(monkeypatch)
    x, mask = torch.randn(B, Q, E, generator=drawn()), ENCODER_MASKS[kind]
    with torch.set_grad_enabled(mode != "eval without grad"):
        got, want = layer(x, **mask), want_layer(x, **mask)
    real = ~mask.get("src_key_padding_mask", torch.zeros(B, Q, dtype=torch.bool))
    assert_same(got[real], want[real])
    assert calls == [1]


@pytest.mark.filterwarnings(NESTED)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("late", [True, False], ids=["assigned to the stack", "stacked"])
def test_it_runs_inside_an_encoder(late: bool, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's stack turns padded samples into a nested tensor for its own fast path."""
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    want_stack = nn.TransformerEncoder(layer, 2).eval()
    stack = copy.deepcopy(want_stack)
    if not late:
        layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
        with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
            stack = nn.TransformerEncoder(layer, 2).eval()
    else:
        for one in stack.layers:
            one.self_attn = MultiheadAttention.from_torch(one.self_attn)
    calls = counted(monkeypatch)
    x, padding = torch.randn(B, Q, E, generator=drawn()), ENCODER_MASKS["padding"]["src_key_padding_mask"]
    with torch.set_grad_enabled(grad):
        got = stack(x, src_key_padding_mask=padding)
        want = want_stack(x, src_key_padding_mask=padding)
    assert_same(got[~padding], want[~padding])
    assert len(calls) >= 2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each call of the module."""
    calls, forward = [], MultiheadAttention.forward

    def counting(self: MultiheadAttention, *args: Any, **keywords: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **keywords)

    monkeypatch.setattr(MultiheadAttention, "forward", counting)
    return calls


def test_a_decoder_layer_takes_it_too() -> None:
    layer = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    want_layer = copy.deepcopy(layer)
    layer.self_attn, layer.multihead_attn = map(MultiheadAttention.from_torch, (layer.self_attn, layer.multihead_attn))
    x, memory = torch.randn(B, Q, E, generator=drawn()), torch.randn(B, K, E, generator=drawn(1))
    mask = nn.Transformer.generate_square_subsequent_mask(Q)
    options = {"tgt_mask": mask, "memory_key_padding_mask": torch.arange(K).expand(B, K) > 4, "tgt_is_causal": True}
    assert_same(layer(x, memory, **options), want_layer(x, memory, **options))


@pytest.mark.filterwarnings(NESTED)
def test_nested_samples_train() -> None:
    ours, _ = twins(batch_first=True)
    parts = [torch.randn(n, E, generator=drawn(n), requires_grad=True) for n in (5, 2, 3)]
    x = torch.nested.as_nested_tensor(parts)
    out, _ = ours(x, x, x, need_weights=False, mask=causal)
    for part, got in zip(parts, out.unbind(), strict=True):
        want, _ = ours(part, part, part, need_weights=False, mask=causal)
        assert_same(got, want)
        for a, b in zip(*(torch.autograd.grad(y.sum(), part, retain_graph=True) for y in (got, want)), strict=True):
            assert_same(a, b)


def call(keywords: dict[str, Any], **make: Any) -> None:
    x = torch.randn(Q, B, E, generator=drawn())
    MultiheadAttention(E, H, **make)(*keywords.pop("x", (x, x, x)), **keywords)


X = torch.zeros(Q, B, E)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NEST = torch.nested.as_nested_tensor([torch.zeros(2, E), torch.zeros(1, E)])
MISUSE: dict[str, tuple[dict[str, Any], str]] = {
    "int mask": (
        {"attn_mask": torch.zeros(Q, Q, dtype=torch.long)},
        r"attn_mask is int64 \[5, 5\] on cpu, and it must be",
    ),
    "mask shape": (
        {"attn_mask": torch.zeros(B, Q, Q, dtype=torch.bool)},
        r"must be \[5, 5\] or \[12, 5, 5\] for 3 samples",
    ),
    "padding shape": ({"key_padding_mask": torch.zeros(Q, B, dtype=torch.bool)}, r"key_padding_mask must be \[3, 5\]"),
    "expression as attn_mask": ({"attn_mask": causal}, r"is an expression, `causal`: pass it as mask="),
    "tensor as mask": ({"mask": torch.ones(Q, Q, dtype=torch.bool)}, r"True = may attend as mask=dense\(tensor\)"),
    "not causal": ({"attn_mask": torch.eye(Q).bool(), "is_causal": True}, r"attn_mask shows query 0 the key 1"),
    "bias and causal": (
        {"attn_mask": torch.ones(Q, Q), "is_causal": True},
        r"for both, ANDed, pass mask=causal instead",
    ),
    "ids": ({"x": (X.long(), X, X)}, r"query must be a tensor of floats, got int64 \[5, 3, 12\]"),
    "numbers": ({"x": (1, 2, 3)}, r"query must be a tensor of floats, got int 1"),
    "nested with padding": (
        {"x": (NEST, NEST, NEST), "key_padding_mask": torch.zeros(2, 2)},
        r"a nested tensor is taken for self-attention only",
    ),
    "batch": ({"x": (X, X[:, :2], X[:, :2])}, r"3 samples of queries and 2 of keys"),
    "features": ({"x": (X[..., :5], X, X)}, r"query must have 12 features"),
    "values": ({"x": (X, X, X[:3])}, r"each key needs its value"),
    "rank": ({"x": (X, X[0], X[0])}, r"all alike; got query float32 \[5, 3, 12\]"),
    "list": ({"key_padding_mask": [[True]]}, r"key_padding_mask must be a tensor or None, got list"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told(name: str) -> None:
    keywords, message = MISUSE[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call(dict(keywords))


def test_a_mask_for_other_sizes_and_wrong_makes_are_told() -> None:
    with pytest.raises(MaskError, match="the call has 3 samples, 4 heads, 5 queries and 5 keys"):
        call({"mask": keys(torch.ones(3, dtype=torch.bool))})
    with pytest.raises(ValueError, match="embed_dim=12 is no multiple of num_heads=5"):
        MultiheadAttention(12, 5)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1\.0"):
        MultiheadAttention(12, 4, dropout=1.0)


def test_autocast_gives_what_torch_gives() -> None:
    ours, theirs = twins()
    x = torch.randn(Q, B, E, generator=drawn())
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0]
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_it_compiles_into_one_graph() -> None:
    ours, theirs = twins(add_bias_kv=True)
    x = torch.randn(Q, B, E, generator=drawn())
    hidden = torch.ones(Q, Q, dtype=torch.bool).triu(1)
    added = torch.randn(Q, Q, generator=drawn(2)).masked_fill(hidden, -torch.inf)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for mask in (hidden, added):
        want = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
        assert_same(compiled(x, x, x, attn_mask=mask, need_weights=False)[0], want)
    odd = predicate(lambda b, h, q, k: (q - k) % 2 == 0)
    assert_same(compiled(x, x, x, mask=causal & window(2), need_weights=False)[0], ours(x, x, x, mask=window(2))[0])
    assert_same(ours(x, x, x, mask=odd)[0], ours(x, x, x, mask=odd, need_weights=False)[0])


@pytest.mark.parametrize("need", [True, False])
def test_second_derivatives_by_the_reference(need: bool) -> None:
    ours, theirs = twins()
    ours.backend = "reference"
    found = []
    for net, weights in ((ours, need), (theirs, True)):  # without weights torch has none
        x = torch.randn(Q, B, E, generator=drawn()).requires_grad_()
        (grad,) = torch.autograd.grad(net(x, x, x, need_weights=weights)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert_same(*found)


def test_a_compiled_module_takes_another_length() -> None:
    torch._dynamo.reset()
    ours, _ = twins()
    run = torch.compile(ours.eval(), fullgraph=True, backend="eager")
    for length in (Q, Q + 1, Q + 2):
        x = torch.randn(length, B, E, generator=drawn())
        assert_same_results(run(x, x, x), ours(x, x, x))
