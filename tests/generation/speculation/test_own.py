"""`generate(draft=...)`: the text of `generate`, whoever guesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.chance import assert_drawn_from
from tests.support.nn_models import FEATURES, TOKENS, decoder, featured, ids, wrapped
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.generation.choosing import Chosen
from truemask.generation.speculation.loop import Speculated
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, window
from truemask.masks.leaves.per_token import padding, prefix
from truemask.nn.layers import Encoder
from truemask.nn.wrappers import TransformerWrapper

SINKS = causal & (window(4) | prefix(2))
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "sinks": {"mask": SINKS},
    "blocks": {"mask": causal & blocks(5)},
    "ahead in the prompt": {"mask": causal | prefix(3), "causal": False},
}
ANSWER = 21


def model(name: str = "rotary", noise: float = 0.0) -> AutoregressiveWrapper:
    net = featured(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return AutoregressiveWrapper(net)


def draft_of(kind: str, name: str = "rotary") -> Any:
    """Who guesses: nobody's model, one that is right now and then, or the model itself, which is always right."""
    return {"ngram": "ngram", "another": model(name, 0.1), "itself": model(name)}[kind]


def prompts(*lengths: int) -> list[Tensor]:
    return [ids(1, length, seed=length)[0] for length in lengths]


def accepted_by(wrapper: AutoregressiveWrapper, given: Any, seq_len: int, **options: Any) -> Speculated:
    found = wrapper.generate(given, seq_len, return_accepted=True, **options)
    assert isinstance(found, Speculated)
    return found


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "another") for name in FEATURES), ("rotary", "ngram"), ("registers", "itself")]
)
def test_greedy_text_is_that_without_guesses(name: str, kind: str) -> None:
    wrapper, given = model(name), prompts(3, 9, 5)
    for mask in MASKS if name == "rotary" else ("sinks", "ahead in the prompt"):
        options = MASKS[mask] | {"temperature": 0.0}
        plain = wrapper.generate(given, ANSWER, return_logprobs=True, **options)
        found = accepted_by(wrapper, given, ANSWER, draft=draft_of(kind, name), draft_tokens=5, **options)
        assert isinstance(plain, Chosen)
        assert torch.equal(found.tokens, plain.tokens)
        assert torch.allclose(found.logprobs, plain.logprobs, atol=1e-6)
        if kind == "itself":
            assert found.accepted[0].tolist() == [3, 4, 4, 4, 0]  # a second guess beside each chain
        assert bool(((found.accepted + 1).sum(1) == ANSWER - 1).all())


@pytest.mark.parametrize("kind", ["ngram", "another"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3, "temperature": 0.7},
        {"top_p": 0.8, "repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": 0.3, "samples_per_prompt": 2},
        {"eos_token": [2, 5], "min_tokens": 4},
        {"stop": [[4, 4], [7]], "mask": SINKS},
        {"filter_logits_fn": lambda logits: logits - logits[..., :1], "min_p": 0.01},
    ],
)
def test_seeds_draw_the_same_text_whoever_guesses(kind: str, options: dict[str, Any]) -> None:
    wrapper, given = model(), prompts(3, 9, 5)
    plain = wrapper.generate(given, ANSWER, seed=7, **options)
    assert torch.equal(plain, wrapper.generate(given, ANSWER, seed=7, draft=draft_of(kind), **options))


@pytest.mark.parametrize("kind", ["ngram", "another"])
def test_a_sample_accepts_its_own_number_and_is_what_it_is_alone(kind: str) -> None:
    wrapper, given = model(), prompts(3, 9, 5, 7)
    together = accepted_by(wrapper, given, ANSWER, temperature=0.0, draft=draft_of(kind), mask=SINKS)
    assert len({tuple(row) for row in together.accepted.tolist()}) > 1
    for prompt, tokens, accepted in zip(given, together.tokens, together.accepted, strict=True):
        alone = accepted_by(wrapper, prompt, ANSWER, temperature=0.0, draft=draft_of(kind), mask=SINKS)
        assert torch.equal(alone.tokens, tokens)
        assert alone.accepted.tolist() == [count for count in accepted.tolist() if count >= 0]


def test_what_is_looked_up_is_accepted_where_a_text_repeats_itself() -> None:
    found = accepted_by(model("no positions"), prompts(9), 60, temperature=0.0, draft="ngram", mask=SINKS)
    assert max(found.accepted[0].tolist()) >= 3


def test_per_sample_masks_go_with_their_samples() -> None:
    wrapper, given = model(), torch.stack(prompts(8, 8, 8)) % torch.tensor([[7], [11], [13]])
    mask = causal & padding(lengths=[40, 40, 40], on="keys") & prefix([3, 40, 5])
    options: dict[str, Any] = {"mask": mask, "samples_per_prompt": 2, "seed": 1}
    plain = wrapper.generate(given, ANSWER, **options)
    assert torch.equal(plain, wrapper.generate(given, ANSWER, draft="ngram", **options))


def test_padding_of_the_prompts_by_flags() -> None:
    wrapper, tokens = model(), ids(2, 9)
    flags = torch.tensor([[False] * 2 + [True] * 7, [True] * 3 + [False] + [True] * 5])
    plain = wrapper.generate(tokens, ANSWER, mask=flags, temperature=0.0)
    assert torch.equal(plain, wrapper.generate(tokens, ANSWER, mask=flags, temperature=0.0, draft=model(noise=0.1)))


def test_answers_of_no_and_of_one_token_and_of_a_single_prompt() -> None:
    wrapper, (prompt,) = model(), prompts(5)
    for seq_len in (0, 1, 2):
        found = accepted_by(wrapper, prompt, seq_len, temperature=0.0, draft="ngram")
        assert found.tokens.shape == found.logprobs.shape == (seq_len,)
        assert torch.equal(found.tokens, wrapper.generate(prompt, seq_len, temperature=0.0))
        assert found.accepted.tolist() == [0] * max(0, seq_len - 1)


def test_forwards_without_gradients_in_evaluation_mode() -> None:
    wrapper = AutoregressiveWrapper(wrapped(decoder(attn_dropout=0.5))).train()
    found = wrapper.generate(prompts(5), 9, temperature=0.0, draft=wrapper)
    assert not found.requires_grad
    assert wrapper.net.training
    assert torch.equal(found, wrapper.generate(prompts(5), 9, temperature=0.0))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"draft": "n-gram"}, "draft is 'n-gram'"),
    "no model": ({"draft": 3}, "draft is int 3; expected"),
    "an encoder": (
        {"draft": TransformerWrapper(num_tokens=TOKENS, max_seq_len=9, attn_layers=Encoder(dim=16, depth=1, heads=2))},
        "draft is built around an Encoder",
    ),
    "other words": ({"draft": wrapped(num_tokens=7)}, "draft has num_tokens=7, and the model 31"),
    "no room in the draft": ({"draft": wrapped(max_seq_len=9)}, "draft learned absolute positions 0 to 8"),
    "no cache": ({"draft": "ngram", "cache_kv": False}, "draft= keeps the keys of guesses"),
    "no guesses": ({"draft": "ngram", "draft_tokens": 0}, "draft_tokens is 0"),
    "half guesses": ({"draft": "ngram", "draft_tokens": 0.5}, "draft_tokens is float 0.5"),
    "nothing accepted": ({"return_accepted": True}, "return_accepted=True tells"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said_by_name(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=words):
        model().generate(prompts(5), 9, **options)


def test_a_stream_has_no_guesses() -> None:
    with pytest.raises(ValueError, match="stream gives a token of every sample at a time"):
        model().stream(prompts(5), 9, draft="ngram")


# -- the distribution of what is drawn ---------------------------------------------------------------------------------

DRAWN = 1500
KEPT = 4  # tokens that a filter leaves at each step: 64 texts of three tokens


@pytest.mark.parametrize("mask", [None, SINKS], ids=str)
@pytest.mark.parametrize("kind", ["ngram", "another", "itself"])
def test_texts_are_drawn_as_the_model_draws_them(kind: str, mask: Mask | None) -> None:
    wrapper, prompt = model(), torch.tensor([1, 2, 3, 1, 2])
    options: dict[str, Any] = {"top_k": KEPT, "temperature": 3.0, "mask": mask}
    generator = torch.Generator().manual_seed(5)
    found = accepted_by(
        wrapper, prompt, 4, samples_per_prompt=DRAWN, generator=generator, draft=draft_of(kind), **options
    )
    if kind != "ngram":
        assert (found.accepted > 0).sum() > DRAWN / 20  # guesses did decide
    texts, shares = texts_with_shares(wrapper, prompt, mask)
    counts = (found.tokens[:, None, :3] == texts).all(-1).sum(0).double()
    assert counts.sum() == DRAWN
    assert_drawn_from(counts, shares)


def texts_with_shares(wrapper: AutoregressiveWrapper, prompt: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
    """All texts [t, 3] that can be drawn, and how likely each is."""
    texts, shares = torch.zeros(1, 0, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            logits = wrapper.net(torch.cat((prompt.expand(len(texts), -1), texts), 1), mask)[:, -1]
        best = logits.topk(KEPT)
        shares = (shares[:, None] * (best.values / 3.0).softmax(-1)).flatten()
        texts = torch.cat((texts.repeat_interleave(KEPT, 0), best.indices.flatten()[:, None]), 1)
    return texts, shares
