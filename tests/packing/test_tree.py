"""`pack_tree` computes each prompt once, and every loss, gradient and log-probability is that of a path alone."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.support.equality import assert_same
from tests.support.nn_models import TOKENS, decoder, wrapped
from truemask.masks.leaves.tree import tree
from truemask.nn.wrappers import TransformerWrapper
from truemask.packing.tree import PackedTrees, pack_tree

IGNORE = -100
SIZES: list[tuple[int, list[int]]] = [(4, [3, 1, 5]), (2, [2]), (6, []), (3, [0, 4])]


def drawn(sizes: list[tuple[int, list[int]]] = SIZES) -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(3)

    def some(n: int) -> Tensor:
        return torch.randint(1, TOKENS, (n,), generator=generator)

    return [some(n) for n, _ in sizes], [[some(n) for n in own] for _, own in sizes]


def model(rotary: bool = True) -> TransformerWrapper:
    return wrapped(decoder(rotary_pos_emb=rotary, rotary_emb_dim=4) if rotary else decoder())


def alone(net: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    """The log-probabilities of a completion, from the prompt and it in a row of their own."""
    row = torch.cat((prompt, completion))
    logits = net(row[None])[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def run(net: TransformerWrapper, trees: PackedTrees) -> Tensor:
    return net(trees.tokens, trees.mask, pos=trees.positions)


def losses(rotary: bool, length: int | None) -> tuple[TransformerWrapper, PackedTrees, Tensor, Tensor, Tensor]:
    """Three sums of minus log-probabilities: of paths alone, by labels, and by reading log-probabilities back."""
    net, (prompts, completions) = model(rotary), drawn()
    trees = pack_tree(prompts, completions, length)
    logits = run(net, trees)
    want = -torch.cat([alone(net, p, c) for p, own in zip(prompts, completions, strict=True) for c in own]).sum()
    by_labels = F.cross_entropy(
        trees.predictions(logits).flatten(0, 1), trees.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    read_back = -torch.cat([c for own in trees.unpack(trees.log_probabilities(logits)) for c in own]).sum()
    return net, trees, want, by_labels, read_back


@pytest.mark.parametrize("length", [None, 14, 31], ids=["one row", "tight rows", "rows with tails"])
@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "absolute"])
def test_losses_and_gradients_are_those_of_the_paths_alone(rotary: bool, length: int | None) -> None:
    net, _, want, *shared = losses(rotary, length)
    parts = list(net.parameters())
    wanted = torch.autograd.grad(want, parts)
    for loss in shared:
        assert_same(loss, want)
        for a, b in zip(torch.autograd.grad(loss, parts, retain_graph=True), wanted, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("length", [None, 14])
def test_log_probabilities_are_read_back_by_completion(length: int | None) -> None:
    """As GRPO needs them: weighed by advantages of each completion."""
    net, (prompts, completions) = model(), drawn()
    trees = pack_tree(prompts, completions, length)
    found = trees.unpack(trees.log_probabilities(run(net, trees)))
    assert [[len(c) for c in own] for own in found] == [own for _, own in SIZES]
    for prompt, own, got in zip(prompts, completions, found, strict=True):
        for completion, x in zip(own, got, strict=True):
            assert_same(x, alone(net, prompt, completion))
    rewards = [[float(i - j) for j in range(len(own))] for i, own in enumerate(found)]
    loss = torch.stack(
        [r * c.sum() for rs, own in zip(rewards, found, strict=True) for r, c in zip(rs, own, strict=True)]
    )
    assert torch.autograd.grad(loss.sum(), net.token_emb.weight)[0].abs().sum() > 0


@given(st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=4)), min_size=1, max_size=5))
def test_the_mask_shows_each_token_its_own_path(sizes: list[tuple[int, list[int]]]) -> None:
    """Drawn from the definition: token by token, in a row with a tail."""
    prompts, completions = drawn(sizes)
    length = max(n + sum(own) for n, own in sizes) + 2
    trees = pack_tree(prompts, completions, length)
    want = torch.zeros(len(trees.tokens), length, length, dtype=torch.bool)
    places: dict[int, tuple[int, range]] = {}
    covered = torch.zeros(len(trees.tokens), length, dtype=torch.bool)
    for prompt, completion, _, row, start, size in trees.pieces.tolist():
        own = range(start, start + size)
        places[prompt] = (row, own) if completion < 0 else places[prompt]
        path = [*(places[prompt][1] if completion >= 0 else ()), *own]
        assert trees.positions[row, start : start + size].tolist() == list(range(len(path) - size, len(path)))
        for i, place in enumerate(own):
            seen = path[: len(path) - size + i + 1]
            want[row, place, seen] = True
            covered[row, place] = True
            assert trees.previous[row, place] == (seen[-2] if len(seen) > 1 else -1)
    tail = ~covered
    want |= tail[:, :, None] & tail[:, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(trees.mask.to_dense(length, batch=len(want))[:, 0].expand_as(want), want)
    got = trees.unpack(trees.tokens)
    assert all(torch.equal(a, b) for x, y in zip(got, completions, strict=True) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trees.unpack_prompts(trees.tokens), prompts, strict=True))
    assert (trees.labels != IGNORE).sum() == sum(sum(own) for _, own in sizes)


def test_completions_may_go_on_in_several_ways() -> None:
    """Also behind an empty one; log-probabilities are those of each path alone."""
    net = model()
    turns = {"tokens": [3, 4], "completions": [[5], {"tokens": [], "completions": [[6, 7], [8]]}]}
    trees = pack_tree([[9], [1, 2]], [[], [[10], turns]], 13)
    found = trees.unpack(trees.log_probabilities(run(net, trees)))
    assert [x.tolist() for x in trees.unpack(trees.tokens)[1]] == [[10], [3, 4], [5], [], [6, 7], [8]]
    paths = [[1, 2], [1, 2], [1, 2, 3, 4], [], [1, 2, 3, 4], [1, 2, 3, 4]]
    for got, path, own in zip(found[1], paths, trees.unpack(trees.tokens)[1], strict=True):
        if path:
            assert_same(got, alone(net, torch.tensor(path), own))
    assert trees.saved == pytest.approx(1 - 10 / (3 + 5 + 6 + 5))


def test_a_hugging_face_model_takes_a_tree() -> None:
    """Its 4-D boolean mask says True = may attend, as ours does."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).double()
    prompts, completions = drawn()
    trees = pack_tree(prompts, completions, 14)
    rows, length = trees.tokens.shape
    mask = trees.mask.to_dense(length, batch=rows)
    logits = llama(trees.tokens, attention_mask=mask, position_ids=trees.positions).logits
    found = trees.unpack(trees.log_probabilities(logits))
    for prompt, own, got in zip(prompts, completions, found, strict=True):
        for completion, x in zip(own, got, strict=True):
            assert_same(x, alone(lambda row: llama(row).logits, prompt, completion))


def test_a_prompt_is_computed_once() -> None:
    trees = pack_tree([[1] * 90], [[[2] * 10] * 8])
    assert trees.tokens.shape == (1, 170)
    assert trees.saved == pytest.approx(1 - 170 / 800)
    assert trees.mask == tree([-1, *[0] * 8, -1], lengths=[90, *[10] * 8, 0])


def test_the_result_pickles_and_half_precision_is_read_in_full() -> None:
    trees: PackedTrees = pickle.loads(pickle.dumps(pack_tree(*drawn(), 14)))
    logits = torch.randn(*trees.tokens.shape, TOKENS, generator=torch.Generator().manual_seed(0))
    half = trees.log_probabilities(logits.bfloat16())
    assert half.dtype == torch.float32
    assert_close = torch.testing.assert_close
    assert_close(half, trees.log_probabilities(logits.bfloat16().float()))


MISUSE: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "flat": ([[1]], [[2, 3]], {}, r"prompt 0, completion 0 must be whole numbers \[n\], got int 2"),
    "counts": ([[1]], [], {}, r"1 prompts and 0 lists of completions: each prompt needs a list of its own"),
    "empty prompt": ([[]], [[[1]]], {}, r"prompt 0 has no tokens, so nothing predicts"),
    "too long": ([[1, 2]], [[[3] * 4, [5]]], {"length": 6}, r"prompt 0 and its 2 completions have 7 tokens.*length=6"),
    "text": ("ab", [[[1]]], {}, r"prompts are a list, got str 'ab'"),
    "none": ([], [], {}, r"0 prompts and 0 lists"),
    "keys": ([[1]], [[{"input_ids": [1], "completions": []}]], {}, r"'completions': \[...\]\}, got the keys"),
    "text inside": ([[1]], ["ab"], {}, r"completions of prompt 0 are a list of sequences, got str"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told(name: str) -> None:
    prompts, completions, keywords, message = MISUSE[name]
    with pytest.raises((ValueError, TypeError), match=message):
        pack_tree(prompts, completions, **keywords)
    with pytest.raises(
        ValueError,
        match=r"log_probabilities: logits are float32 \[3\] on cpu; expected a tensor that is \[1, 2, vocabulary\]",
    ):
        pack_tree([[1]], [[[2]]]).log_probabilities(torch.zeros(3))
