"""`pack` puts every token somewhere once, fills rows well, and changes no loss and no gradient."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.equality import assert_same
from tests.support.nn_models import TOKENS, decoder, wrapped
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.masks.leaves.bands import causal, window
from truemask.nn.wrappers import TransformerWrapper
from truemask.packing.best_fit import best_fit
from truemask.packing.pack import PackedRows, Place, pack

IGNORE = -100
LENGTHS = [5, 11, 2, 7, 3, 1, 8, 6]


def sequences(lengths: list[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, TOKENS, (n,), generator=generator) for n in lengths]


def model(rotary: bool = True) -> TransformerWrapper:
    return wrapped(decoder(rotary_pos_emb=rotary, rotary_emb_dim=4) if rotary else decoder())


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Hugging Face's `ForCausalLMLoss`: logits at i against the label at i + 1, as a sum."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=30), st.integers(1, 23), st.sampled_from(["split", "truncate"])
)
def test_every_token_is_somewhere_once(lengths: list[int], length: int, long: str) -> None:
    """Checked against the rows as they lie there, document by document."""
    if not any(lengths):
        return
    given = [[1000 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    packed = pack(given, length, long=long, pad=-1)
    kept = [x[:length] if long == "truncate" else x for x in given]
    assert [x.tolist() for x in packed.unpack(packed.tokens)] == kept
    assert sorted(packed.tokens[packed.tokens >= 0].tolist()) == sorted(token for x in kept for token in x)
    assert packed.fill == sum(map(len, kept)) / packed.tokens.numel()
    for row, lengths_of_row in enumerate(packed.lengths):
        assert sum(lengths_of_row) == length
        assert all(lengths_of_row)
        start = 0
        for n in lengths_of_row:
            tokens, labels = (x[row, start : start + n].tolist() for x in (packed.tokens, packed.labels))
            assert packed.positions[row, start : start + n].tolist() == list(range(n))
            assert labels == [IGNORE, *([IGNORE] * (n - 1) if tokens[0] < 0 else tokens[1:])]
            assert tokens == list(range(tokens[0], tokens[0] + n)) or tokens == [-1] * n
            start += n


@pytest.mark.parametrize("seed", range(4))
def test_best_fit_is_best_fit(seed: int) -> None:
    """Against the definition, which looks through all rows; ties between rows that are equally full may differ."""
    sizes = np.random.default_rng(seed).integers(1, 41, 200)
    free: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fits = [left for left in free if left >= size]
        if fits:
            free[free.index(min(fits))] -= size
        else:
            free.append(40 - size)
    rows, starts = best_fit(sizes, 40)
    used = np.bincount(rows, sizes)
    assert sorted(40 - used.astype(int)) == sorted(free)
    for row in range(len(used)):
        own = sorted(zip(starts[rows == row].tolist(), sizes[rows == row].tolist(), strict=True))
        assert [start for start, _ in own] == [sum(n for _, n in own[:i]) for i in range(len(own))]


def test_rows_are_well_filled() -> None:
    """Text-like lengths, log-normal around 150 tokens: fewer than 1 % of the tokens are padding."""
    sizes = np.clip(np.random.default_rng(0).lognormal(5, 1, 5000), 1, 2048).astype(int)
    packed = pack([np.zeros(n, np.int64) for n in sizes], 2048)
    assert packed.fill > 0.99
    assert len(packed.tokens) <= 11 / 9 * math.ceil(sizes.sum() / 2048) + 4


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "absolute"])
@pytest.mark.parametrize("base", [causal, causal & window(3)], ids=str)
def test_losses_and_gradients_are_those_of_the_sequences_alone(rotary: bool, base: Any) -> None:
    net, given = model(rotary), sequences()
    packed = pack(given, 13)
    logits = net(packed.tokens, base.packed(packed.lengths))
    loss = shifted_loss(logits, packed.labels)
    alone = torch.stack([shifted_loss(net(x[None], base), x[None]) for x in given]).sum()
    assert_same(loss, alone)
    for a, b in zip(gradients(loss, net), gradients(alone, net), strict=True):
        assert_same(a, b)
    again = F.cross_entropy(logits.flatten(0, 1), packed.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert_same(again, alone)
    for got, x in zip(packed.unpack(logits), given, strict=True):
        assert_same(got, net(x[None], base)[0])


def test_the_loss_of_our_own_wrapper_takes_the_labels() -> None:
    net, given = model(), sequences()
    loss_of, packed = AutoregressiveWrapper(net), pack(given, 13)
    loss = loss_of(packed.tokens, causal.packed(packed.lengths), labels=packed.labels)
    alone = torch.stack([shifted_loss(net(x[None], causal), x[None]) for x in given]).sum()
    assert_same(loss, alone / sum(n - 1 for n in LENGTHS))


def test_positions_make_a_model_without_our_masks_restart() -> None:
    """What rotary sees is `positions`, whoever makes the mask."""
    net, packed = model(), pack(sequences(), 13)
    mask = causal.packed(packed.lengths)
    assert torch.equal(packed.positions, mask.positions(13)[0])
    assert_same(net(packed.tokens, mask, pos=packed.positions), net(packed.tokens, mask))


def test_padding_reaches_no_sequence() -> None:
    net, given = model(), sequences()
    left, right = (pack(given, 13, pad=pad) for pad in (0, 9))
    a, b = (net(x.tokens, causal.packed(x.lengths)) for x in (left, right))
    for x, y in zip(left.unpack(a), right.unpack(b), strict=True):
        assert torch.equal(x, y)


def test_own_labels_and_other_fields_travel_along() -> None:
    samples = [
        {"input_ids": [1, 2, 3], "labels": [IGNORE, 7, 8], "reward": [0.5, 1.5, 2.5], "attention_mask": [1, 1, 1]},
        {"input_ids": torch.tensor([4, 5]), "labels": np.array([4, 6]), "reward": [9.0, 8.0], "attention_mask": [1, 1]},
    ]
    packed = pack(samples, 6)
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 0]]
    assert packed.labels.tolist() == [[IGNORE, 7, 8, IGNORE, 6, IGNORE]]
    assert packed.targets.tolist() == [[7, 8, IGNORE, 6, IGNORE, IGNORE]]
    assert packed.extras["reward"].tolist() == [[0.5, 1.5, 2.5, 9.0, 8.0, 0.0]]
    assert {name: x.dtype for name, x in packed.extras.items()} == {"reward": torch.float32}


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (([1, 2], [0.5]), torch.float64),
        ((torch.ones(2).bfloat16(), torch.ones(1).bfloat16()), torch.float32),
        (([True, False], [True]), torch.bool),
        ((np.ones(2, np.int16), np.ones(1, np.int32)), torch.int32),
    ],
)
def test_fields_have_a_dtype_that_holds_all_of_them(values: Any, dtype: torch.dtype) -> None:
    packed = pack([{"input_ids": [1, 2], "x": values[0]}, {"input_ids": [3], "x": values[1]}], None)
    assert packed.extras["x"].dtype == dtype
    assert packed.extras["x"].tolist()[0] == [*values[0], *values[1]]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_all_kinds_of_sequences_are_the_same(kind: Any) -> None:
    given = [[1, 2], [3], [], [4, 5, 6]]
    packed = pack([kind(x) for x in given], 4)
    assert packed.tokens.tolist() == [[4, 5, 6, 3], [1, 2, 0, 0]]
    assert packed.tokens.dtype == packed.labels.dtype == torch.int64
    assert (packed.places(2), packed.places(-1)) == ([], [Place(0, 0, 3)])
    assert [len(x) for x in packed.unpack(torch.zeros(2, 4, 7))] == [2, 1, 0, 3]


def test_pieces_of_a_split_sequence_are_whole_again() -> None:
    packed = pack([[0, 1, 2, 3, 4, 5, 6], [7]], 3, long="split")
    assert len(packed.places(0)) == 3
    assert packed.places(1) == [Place(2, 1, 2)]
    assert packed.unpack(packed.tokens)[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert packed.positions.max() == 2


def test_unpack_is_differentiable_and_gives_no_row_twice() -> None:
    packed = pack(sequences(), 13)
    x = torch.zeros(*packed.tokens.shape, 2, requires_grad=True)
    torch.stack([part.sum() for part in packed.unpack(x)]).sum().backward()
    assert x.grad is not None
    assert x.grad.unique().tolist() == [0.0, 1.0]
    assert x.grad.sum() == 2 * sum(LENGTHS)


def test_the_result_pickles() -> None:
    packed: PackedRows = pickle.loads(pickle.dumps(pack(sequences(), 13)))
    assert packed.unpack(packed.tokens)[1].tolist() == sequences()[1].tolist()


MISUSE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "too long": ([[1] * 9, [1]], {}, r"1 of 2 sequences are longer than length=8, the longest is sequence 0 with 9"),
    "typo": ([[1]], {"long": "splitt"}, r"did you mean 'split'\?"),
    "text": (["ab"], {}, r"sequence 0 must be whole numbers \[n\], got str 'ab': text has to be tokenized first"),
    "one text": ("ab", {}, r"sequences are a list of token sequences, got str"),
    "one sequence": ([1, 2, 3], {}, r"got int 1: for one sequence pass a list that holds it"),
    "floats": ([[1.5]], {}, r"sequence 0 must be whole numbers"),
    "two dimensions": (torch.ones(2, 3, 4).long(), {}, r"sequence 0 must be whole numbers \[n\], got int64 \[3, 4\]"),
    "ragged": ([[[1], [2, 3]]], {}, r"sequence 0 must be whole numbers"),
    "nothing": ([], {}, r"there are no sequences"),
    "no tokens": ([[], []], {}, r"none of the 2 sequences has a token"),
    "pad": ([[1]], {"pad": 1.5}, r"pad must be a whole number, got float 1\.5"),
    "length": ([[1]], {"length": 0}, r"length must be at least 1"),
    "no ids": ([{"text": [1]}], {}, r"a dict needs its tokens as 'input_ids', got the keys \['text'\]"),
    "keys differ": ([{"input_ids": [1]}, {"tokens": [1]}], {}, r"but sequence 1 has \['tokens'\]"),
    "shifted labels": (
        [{"input_ids": [1, 2], "labels": [2]}],
        {},
        r"2 tokens in 'input_ids' and 1 numbers in 'labels'",
    ),
    "a name": ([{"input_ids": [1], "id": "x"}], {}, r"\['id'\] of sequence 0 must be one number for each token, \[n\]"),
    "positions": ([{"input_ids": [1], "position_ids": [0]}], {}, r"'position_ids' is worked out by packing"),
    "padded": ([{"input_ids": [1, 0], "attention_mask": [1, 0]}], {}, r"sequence 0 hides tokens.*padding=False"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told(name: str) -> None:
    given, keywords, message = MISUSE[name]
    with pytest.raises((ValueError, TypeError), match=message):
        pack(given, **{"length": 8, **keywords})


def test_wrong_outputs_and_indices_are_told() -> None:
    packed = pack([[1, 2]], 4)
    with pytest.raises(
        ValueError, match=r"outputs are float32 \[4, 1\] on cpu; expected a tensor that begins with \[1, 4\]"
    ):
        packed.unpack(torch.zeros(4, 1))
    with pytest.raises(IndexError, match="there is no sequence 1: 1 were packed"):
        packed.places(1)


@pytest.mark.slow
@pytest.mark.timing
def test_a_hundred_thousand_sequences_take_seconds() -> None:
    """A quadratic search would take minutes; the bound is ten times what it takes."""
    import time

    sizes = np.clip(np.random.default_rng(1).lognormal(4, 1, 100_000), 1, 2048).astype(int)
    given = [np.zeros(n, np.int32) for n in sizes]
    began = time.perf_counter()
    packed = pack(given, 2048)
    assert time.perf_counter() - began < 10
    assert packed.fill > 0.99
