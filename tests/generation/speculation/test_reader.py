"""Drafts are read as their paths are read alone, however much was kept, moved, forgotten and taken back before."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.support.chance import assert_drawn_from
from tests.support.equality import assert_same
from tests.support.nn_models import TOKENS, featured, ids
from truemask.backends.native.library import missing
from truemask.generation.speculation.acceptance import right_or_drawn
from truemask.generation.speculation.ngram import NgramDrafter
from truemask.generation.speculation.reader import OwnReader
from truemask.generation.speculation.trees import Draft, chains, side_by_side
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, window
from truemask.masks.leaves.per_token import prefix
from truemask.nn.layers import Decoder
from truemask.nn.wrappers import TransformerWrapper

SINKS = causal & (window(4) | prefix(2))
MASKS = {"all": everything, "sinks": SINKS, "blocks": causal & blocks(5), "padded": SINKS.padded([0, 3, 1])}
WIDTH, MOST = 7, 6


def random_draft(numbers: random.Random, pending: int, size: int) -> Draft:
    draft = Draft([pending])
    for _ in range(size):
        draft.add(numbers.randrange(len(draft.tokens)), numbers.randrange(TOKENS))
    return draft


def path_to(draft: Draft, node: int) -> list[int]:
    path = [node]
    while draft.parents[path[0]] >= 0:
        path.insert(0, draft.parents[path[0]])
    return path


def assert_reads_paths(net: TransformerWrapper, mask: Mask, texts: list[list[int]], drafts: list[Draft], found: Tensor):
    for sample, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
        own = mask.select(samples=[sample]) if mask.batch_size > 1 else mask
        for node in range(len(draft.tokens)):
            tokens = torch.tensor([[*text, *[draft.tokens[at] for at in path_to(draft, node)]]])
            expected = net(tokens, own)[0, -1]
            torch.testing.assert_close(found[sample, node], expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["absolute", "rotary", "alibi", "registers", "grouped", "memories"])
@pytest.mark.parametrize("kind", MASKS)
def test_nodes_are_read_as_their_paths(name: str, kind: str) -> None:
    net, mask, numbers = featured(name), MASKS[kind], random.Random(4)
    prompts = ids(3, WIDTH)
    texts = prompts.tolist()
    read = OwnReader(net, mask, causal_too=None, batch=3, tokens=45, most=MOST + 1)
    read.begin(prompts)
    while max(map(len, texts)) < 36:
        drafts = [random_draft(numbers, numbers.randrange(TOKENS), numbers.randrange(MOST)) for _ in texts]
        assert_reads_paths(net, mask, texts, drafts, read(side_by_side(drafts)))
        paths = [path_to(draft, numbers.randrange(len(draft.tokens))) for draft in drafts]
        read.accept(paths)
        for text, draft, path in zip(texts, drafts, paths, strict=True):
            text += [draft.tokens[node] for node in path]
        assert read.cache.places.read == list(map(len, texts))


@torch.no_grad()
@pytest.mark.parametrize("kind", MASKS)
def test_what_is_not_sure_can_be_taken_back(kind: str) -> None:
    net, mask, numbers = featured("rotary"), MASKS[kind], random.Random(5)
    prompts = ids(3, WIDTH)
    texts = prompts.tolist()
    read = OwnReader(net, mask, causal_too=None, batch=3, tokens=45, most=MOST + 1)
    read.begin(prompts)
    while max(map(len, texts)) < 36:
        new = [[numbers.randrange(TOKENS) for _ in range(numbers.randrange(1, 3))] for _ in texts]
        for step in range(MOST - 1):  # a model guesses: all of it is read, and later only some of it is right
            read(chains(new if step == 0 else [[1]] * 3))
            read.accept([range(len(row) if step == 0 else 1) for row in new], sure=False)
        texts = [[*text, *row] for text, row in zip(texts, new, strict=True)]
        read.rewind(list(map(len, texts)))
        drafts = [Draft([numbers.randrange(TOKENS)]) for _ in texts]
        assert_reads_paths(net, mask, texts, drafts, read(side_by_side(drafts)))
        read.accept([[] for _ in texts])


@torch.no_grad()
def test_the_cache_is_as_small_as_the_mask() -> None:
    net, numbers = featured("rotary"), random.Random(6)
    read = OwnReader(net, SINKS, causal_too=None, batch=2, tokens=1000, most=MOST + 1)
    whole = OwnReader(net, everything, causal_too=None, batch=2, tokens=1000, most=MOST + 1)
    prompts = ids(2, 300)
    read.begin(prompts)
    assert read.cache.bytes < whole.cache.bytes / 10
    addresses = [read.cache.layer(index).memory.data_ptr() for index in range(2)]
    for _ in range(100):
        drafts = [random_draft(numbers, numbers.randrange(TOKENS), MOST) for _ in range(2)]
        read(side_by_side(drafts))
        read.accept([path_to(draft, numbers.randrange(len(draft.tokens))) for draft in drafts])
    assert addresses == [read.cache.layer(index).memory.data_ptr() for index in range(2)]
    assert min(read.cache.places.read) > 400
    assert read.cache.places.stop <= read.cache.room


@pytest.mark.skipif(bool(missing()), reason=f"the move is whoever builds the kernel: {missing()}")
@pytest.mark.parametrize("positions", ["rotary", "learned", "alibi", "none"])
@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_the_native_kernel_reads_the_same(positions: str, kind: str) -> None:
    torch.manual_seed(0)
    known = {"rotary_pos_emb": positions == "rotary", "alibi_pos_bias": positions == "alibi"}
    layers = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, attn_kv_heads=2, **known)
    net = TransformerWrapper(
        num_tokens=TOKENS, max_seq_len=60, attn_layers=layers, use_abs_pos_emb=positions == "learned"
    ).eval()
    both = [OwnReader(net, MASKS[kind], causal_too=None, batch=3, tokens=45, most=4) for _ in range(2)]
    steps = [native_steps(both[0]), native_steps(both[1])]
    both[1]._step = None
    prompts, numbers = ids(3, WIDTH), random.Random(9)
    for read in both:
        read.begin(prompts)
    for _ in range(8):
        drafts = [random_draft(numbers, numbers.randrange(TOKENS), 3) for _ in range(3)]
        native, plain = (read(side_by_side(drafts)) for read in both)
        assert_same(native, plain)
        paths = [path_to(draft, numbers.randrange(4)) for draft in drafts]
        for read in both:
            read.accept(paths)
    assert (len(steps[0]), len(steps[1])) == (8, 0)


def native_steps(read: OwnReader) -> list[Tensor]:
    """What the kernel gave, from now on."""
    step, given = read._step, []
    assert step is not None
    run = step.read

    def noted(tokens: Tensor, positions: Tensor | None) -> Tensor | None:
        found = run(tokens, positions)
        if found is not None:
            given.append(found)
        return found

    step.read = noted
    return given


# -- guesses -----------------------------------------------------------------------------------------------------------


def test_a_draft_is_filled_up_by_roots_that_nobody_reads() -> None:
    draft = Draft([7])
    assert draft.add_path([1, 2], most=2) == 1
    assert draft.add_path([3], most=2) == 0
    nodes = side_by_side([draft, Draft([5])])
    assert nodes.tokens.tolist() == [[7, 1], [5, 5]]
    assert nodes.parents.tolist() == [[-1, 0], [-1, -1]]
    assert chains([[], [4, 5]]).parents.tolist() == [[-1, -1], [-1, 0]]


def test_the_longest_and_latest_run_is_looked_up_first_and_others_beside_it() -> None:
    text = [1, 2, 3, 4, 9, 9, 2, 3, 5, 9, 9, 3, 6, 1, 2, 3]
    (draft,) = NgramDrafter()([text], [6])
    assert [draft.tokens[node] for node in draft.children(0)] == [4, 5]  # [1, 2, 3] before [2, 3]
    assert draft.tokens[:5] == [3, 4, 9, 9, 2]
    assert len(draft.tokens) == 7


def test_what_is_new_is_not_looked_up_and_what_has_grown_is() -> None:
    drafter = NgramDrafter()
    assert drafter([[1, 2, 3]], [4])[0].tokens == [3]
    assert drafter([[1, 2, 3, 4, 2, 3]], [1])[0].tokens == [3, 4]
    assert drafter([[1, 2, 3, 4, 2, 3]], [0])[0].tokens == [3]


@pytest.mark.parametrize("many", [1, 2, 3])
def test_the_rule_of_speculative_sampling(many: int) -> None:
    p, q = torch.tensor([0.4, 0.0, 0.2, 0.3, 0.1]), torch.tensor([0.1, 0.4, 0.3, 0.1, 0.1])
    drawn, generator = 6000, torch.Generator().manual_seed(8)
    counts, first = torch.zeros(5), 0
    for _ in range(drawn):
        guesses = torch.multinomial(q, many, generator=generator).tolist()
        token = right_or_drawn(p, guesses, q, generator)
        counts[token] += 1
        first += token == guesses[0]
    assert counts[1] == 0
    assert_drawn_from(counts, p)
    if many == 1:  # as often as it can be: where p and q overlap
        assert first / drawn == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.05)
