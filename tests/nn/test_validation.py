"""What a caller may pass, what is refused, and what is legal but probably not meant."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.support.equality import assert_same
from tests.support.nn_models import DIM, HEADS, decoder, encoder, features, ids, wrapped
from truemask.errors import ConventionWarning, MaskError
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, local, window
from truemask.masks.leaves.documents import documents
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.per_token import keys, padding, prefix, queries
from truemask.nn.layers import Decoder

BATCH, N = 3, 11
X = features(BATCH, N)
FLAGS = torch.tensor([[True] * N, [True] * 7 + [False] * 4, [False] * 2 + [True] * 5 + [False] * 4])
MATRIX = torch.rand(BATCH, HEADS, N, N, generator=torch.Generator().manual_seed(3)) < 0.6


def test_the_article_runs_as_written_and_says_what_its_mask_does() -> None:
    decoder = Decoder(dim=512, depth=6, heads=8, attn_flash=True)
    x = torch.randn(1, 256, 512)
    mask = torch.ones(1, 256).bool().triu(1)
    mask = ~mask
    with pytest.warns(
        ConventionWarning, match="keeps exactly one key, the first: a .1, n. tensor is key padding"
    ) as seen:
        output = decoder(x, mask=mask)
    assert output.shape == x.shape
    assert not output.isnan().any()
    assert mask.sum() == 1
    assert seen[0].filename == __file__  # it points at the caller's line
    assert "A Decoder is causal already" in str(seen[0].message)


@pytest.mark.parametrize("flags", [FLAGS, FLAGS[:1], FLAGS[1:2], torch.ones(1, 1, dtype=torch.bool)])
def test_ordinary_padding_gives_no_warning(flags: torch.Tensor) -> None:
    batch, n = flags.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder()(X[:batch, :n], mask=flags)


# -- one meaning for every form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [decoder, encoder])
def test_flags_are_keys_and_queries(model: type) -> None:
    assert_same(model()(X, mask=FLAGS), model()(X, mask=keys(FLAGS) & queries(FLAGS)))


@pytest.mark.parametrize("model", [decoder, encoder])
@pytest.mark.parametrize(
    "matrix", [MATRIX[0, 0], MATRIX, MATRIX[:, :1], MATRIX[:1], MATRIX[:, :, :1], MATRIX[:1, :1, :, :1]], ids=str
)
def test_a_matrix_is_dense(model: type, matrix: torch.Tensor) -> None:
    full = matrix.expand(BATCH, HEADS, N, N)
    assert_same(model()(X, attn_mask=matrix), model()(X, attn_mask=dense(full)))


def test_both_masks_are_anded_in_any_form() -> None:
    together = encoder()(X, mask=window(4) & keys(FLAGS) & queries(FLAGS))
    assert_same(encoder()(X, FLAGS, window(4)), together)
    assert_same(encoder()(X, window(4), keys(FLAGS) & queries(FLAGS)), together)
    assert_same(encoder()(X, FLAGS, window(4).to_dense(N)), together)


def test_one_row_of_flags_is_for_all_samples() -> None:
    assert_same(encoder()(X, mask=FLAGS[1:2]), encoder()(X, mask=FLAGS[1:2].expand(BATCH, -1)))


def test_every_layer_gets_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Combined once a forward, so it is planned once."""
    from truemask.nn import attention

    got: list[Mask] = []
    real = attention.results
    monkeypatch.setattr(attention, "results", lambda q, k, v, mask, args: got.append(mask) or real(q, k, v, mask, args))
    decoder()(X, FLAGS, window(3))
    assert len(got) == 2
    assert got[0] is got[1]


# -- three axes --------------------------------------------------------------------------------------------------------


def test_three_axes_are_heads_where_they_can_only_be_heads() -> None:
    assert_same(encoder()(X, attn_mask=MATRIX[0]), encoder()(X, attn_mask=MATRIX[:1]))


@pytest.mark.parametrize("size", [BATCH, 5])
def test_three_axes_that_are_not_heads_show_both_readings(size: int) -> None:
    with pytest.raises(
        MaskError, match=r"two readings: per head.*attn_mask\[None\], or per sample.*attn_mask\[:, None\]"
    ):
        encoder()(X, attn_mask=torch.ones(size, N, N, dtype=torch.bool))


def test_three_axes_that_could_be_both_are_never_guessed() -> None:
    """x-transformers silently reads a per-sample mask as a per-head one when the batch has as many samples as heads."""
    x = features(HEADS, N)
    with pytest.raises(MaskError, match="it fits both"):
        encoder()(x, attn_mask=MATRIX[0])
    assert not torch.equal(encoder()(x, attn_mask=MATRIX[0][None]), encoder()(x, attn_mask=MATRIX[0][:, None]))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(BATCH, N), r"float32 \[3, 11\].*a mask is bool and True means may attend.*from_additive\(mask\)"),
        (torch.ones(BATCH, N, dtype=torch.long), r"int64 \[3, 11\].*from_huggingface_2d\(mask\)"),
        (torch.ones(BATCH, N + 2, dtype=torch.bool), "It is 2 longer than the input: cut it"),
        (torch.ones(BATCH, N - 2, dtype=torch.bool), r"key padding is bool \[3, 11\]"),
        (torch.ones(N, N, dtype=torch.bool), r"A \(q, k\) matrix goes into attn_mask="),
        (torch.ones(N, dtype=torch.bool), r"pass mask\[None\]"),
        (torch.ones(BATCH, 1, N, N, dtype=torch.bool), "goes into attn_mask="),
        (torch.ones(BATCH + 2, N, dtype=torch.bool), "Is another batch meant"),
        (
            torch.ones(BATCH, N, dtype=torch.bool, device="meta"),
            r"on meta and the input is on cpu: pass mask.to\('cpu'\)",
        ),
        ([[True] * N] * BATCH, "must be a bool tensor, a mask expression or its text, got list"),
        (keys(FLAGS[:2]), "holds data for 2 samples, but was asked about 3"),
        (keys(FLAGS[:, :7]), "holds data for 7 keys, but was asked about 11"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: object, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        decoder()(X, mask=mask)


@pytest.mark.parametrize(
    ("attn_mask", "message"),
    [
        (torch.zeros(N, N), r"attn_mask= is float32 \[11, 11\] on cpu; a mask is bool.*from_additive\(attn_mask\)"),
        (
            torch.ones(N, N - 1, dtype=torch.bool),
            r"expected \(q, k\) = \[11, 11\] or \(b, h, q, k\) = \[3, 4, 11, 11\]",
        ),
        (torch.ones(BATCH, N, dtype=torch.bool), r"\(b, n\) key padding goes into mask="),
        (torch.ones(2, HEADS, N, N, dtype=torch.bool), r"bool \[2, 4, 11, 11\]"),
        (torch.ones(1, 1, 1, N, N, dtype=torch.bool), r"bool \[1, 1, 1, 11, 11\]"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(attn_mask: torch.Tensor, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        decoder()(X, attn_mask=attn_mask)


def test_flags_that_count_the_registers_are_recognised() -> None:
    net = wrapped(num_memory_tokens=3)
    with pytest.raises(MaskError, match="The 3 registers are added for you and seen by all"):
        net(ids(BATCH, N), mask=torch.ones(BATCH, N + 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (features(N), f"takes features .b, n, {DIM}., got float64"),
        (X[..., 1:], "got float64 .3, 11, 22."),
        (ids(BATCH, N, DIM), "token ids go through a TransformerWrapper"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder()(x)


def test_an_input_of_another_dtype_or_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Decoder has float64 parameters .*float32 .*x.to\(torch.float64\).*model.to"):
        decoder()(X.float())
    with pytest.raises(ValueError, match=r"has float16 parameters .*x.to\(torch.float16\).*model.to\(torch.float32\)"):
        encoder().half()(X.float())
    with pytest.raises(ValueError, match=r"Decoder is on cpu .* on meta: pass x.to\('cpu'\), .*model.to\('meta'\)"):
        decoder()(X.to("meta"))
    with pytest.raises(ValueError, match="Decoder has float64 parameters"):
        decoder().to("meta")(X.float().to("meta"))


def test_autocast_chooses_dtypes_itself() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder().float()(X.bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (ids(N), r"pass ids\[None\]"),
        (torch.rand(2, 3), "expected whole numbers"),
        (torch.tensor([[3, 31]]), "token 31 is outside the vocabulary: num_tokens=31, so ids are 0 to 30"),
        (torch.tensor([[3, -1]]), "token -1 is outside"),
        (torch.ones(2, 3, dtype=torch.long, device="meta"), "on meta and the model is on cpu: move one with"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped()(tokens)


@pytest.mark.parametrize(
    ("pos", "message"), [(torch.rand(N), "positions are whole numbers"), (torch.arange(N + 1), r"\[11\] or \[3, 11\]")]
)
def test_positions_that_do_not_fit_are_refused(pos: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(rotary_pos_emb=True, rotary_emb_dim=4)(X, pos=pos)


# -- causal and the user's mask ----------------------------------------------------------------------------------------


def test_an_expression_that_names_causal_and_looks_ahead_is_noticed() -> None:
    mask = causal | prefix(4)
    with pytest.warns(ConventionWarning, match=r"removed 6 of its pairs at length 11.*pass causal=False") as seen:
        out = decoder()(X, mask=mask)
    assert seen[0].filename == __file__
    assert_same(out, decoder()(X))


@pytest.mark.parametrize(
    "mask",
    [
        prefix(4),  # says nothing about causal: the AND is what a Decoder does
        local(3),
        causal | prefix(1),  # sees nothing that is later
        causal & local(3),
        causal.packed([4, 7]),
        (causal & prefix(3)).padded([0, 2, 4]),
        window(3) | (causal & documents([4, 7])),
        causal.T & everything - causal.T,
    ],
    ids=str,
)
def test_other_expressions_are_not_warned_about(mask: Mask) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder()(X, mask=mask)


@pytest.mark.parametrize("flash", [True, False])
def test_causal_false_runs_the_mask_as_written_on_every_backend(flash: bool) -> None:
    """x-transformers ignores the override with flash."""
    mask = causal | prefix(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = decoder(attn_flash=flash)(X, mask=mask, causal=False)
    assert_same(out, encoder(attn_flash=flash)(X, mask=mask))
    assert_same(encoder(attn_flash=flash)(X, causal=True), decoder()(X))
    assert not torch.equal(out, decoder()(X))


@pytest.mark.parametrize("lengths", [[11, 7, 0]])
def test_padding_expressions_are_flags(lengths: list[int]) -> None:
    flags = torch.arange(N)[None] < torch.tensor(lengths)[:, None]
    assert_same(decoder()(X, mask=padding(lengths=lengths)), decoder()(X, mask=flags))
