"""Generation: each prompt as if alone, the same with and without a cache, and every argument honoured."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from tests.support.nn_models import DIM, FEATURES, TOKENS, decoder, encoder, featured, ids, wrapped
from truemask.errors import MaskError
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.generation.decoding import evaluating
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, window
from truemask.masks.leaves.patterns import dilated
from truemask.masks.leaves.per_token import keys, prefix
from truemask.nn.wrappers import TransformerWrapper

PROMPTS = [ids(5, seed=1), ids(3, seed=2), ids(11, seed=3)]
ANSWER = 7


def model(net: TransformerWrapper | None = None, **keywords: Any) -> AutoregressiveWrapper:
    return AutoregressiveWrapper(featured("rotary") if net is None else net, **keywords)


def greedy(model: AutoregressiveWrapper, prompts: Any, length: int = ANSWER, **options: Any) -> torch.Tensor:
    return model.generate(prompts, length, temperature=0.0, **options)


def slowly(
    net: TransformerWrapper, prompt: torch.Tensor, mask: Mask = everything, length: int = ANSWER
) -> torch.Tensor:
    """The definition: the best token of the whole row, appended, again and again."""
    row = prompt[None]
    for _ in range(length):
        row = torch.cat((row, net(row, mask=mask)[:, -1].argmax(-1)[:, None]), dim=1)
    return row[0, len(prompt) :]


@pytest.mark.parametrize(
    "mask", [everything, causal & (window(3) | prefix(2)), blocks(3, back=1) | dilated(5)], ids=str
)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_batch_is_each_prompt_alone(feature: str, mask: Mask) -> None:
    """In x-transformers registers and a list of prompts generate something else than the same prompts alone."""
    net = featured(feature)
    expected = torch.stack([slowly(net, prompt, mask) for prompt in PROMPTS])
    assert torch.equal(greedy(model(net), PROMPTS, mask=mask), expected)
    assert torch.equal(greedy(model(net), PROMPTS, mask=mask, cache_kv=False), expected)
    assert torch.equal(torch.stack([greedy(model(net), prompt, mask=mask) for prompt in PROMPTS]), expected)


# -- forms of prompts --------------------------------------------------------------------------------------------------


def test_the_answer_has_the_form_of_the_prompt() -> None:
    assert greedy(model(), PROMPTS[0]).shape == (ANSWER,)
    assert greedy(model(), PROMPTS[0][None]).shape == (1, ANSWER)
    assert greedy(model(), PROMPTS).shape == (3, ANSWER)
    assert greedy(model(), PROMPTS, 0).shape == (3, 0)
    assert greedy(model(), PROMPTS[0].int()).dtype == torch.int64


@pytest.mark.parametrize("side", ["left", "right"])
def test_flags_over_the_prompt_are_padding(side: str) -> None:
    longest = max(map(len, PROMPTS))
    rows, flags = torch.full((3, longest), 29), torch.zeros(3, longest, dtype=torch.bool)
    for b, prompt in enumerate(PROMPTS):
        place = slice(0, len(prompt)) if side == "right" else slice(longest - len(prompt), longest)
        rows[b, place], flags[b, place] = prompt, True
    for feature in ("absolute", "registers"):
        net = featured(feature)
        assert torch.equal(greedy(model(net), rows, mask=flags), greedy(model(net), PROMPTS))


def test_a_flag_inside_the_prompt_hides_a_token() -> None:
    flags = torch.tensor([True, False, True, True, False])
    net = featured("absolute")
    hidden = keys(torch.cat((flags, torch.ones(ANSWER, dtype=torch.bool))))
    hidden = keys(torch.tensor([True, False, True, True] + [True] * ANSWER))  # the last pad is cut off
    assert torch.equal(greedy(model(net), PROMPTS[0], mask=flags), slowly(net, PROMPTS[0][:4], hidden))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "an empty list"),
        ([ids(3), ids(0)], r"at least one token each; got int64 \[0\]"),
        ([ids(2, 3)], r"got int64 \[2, 3\]"),
        (ids(0), "to begin from nothing pass a start token"),
        (ids(2, 3, 5), r"expected token ids \[n\], \[b, n\] or a list of \[n\]"),
        (torch.rand(5), r"prompts are float32 \[5\]"),
        (torch.ones(1, 3).bool(), r"prompts are bool \[1, 3\] on cpu; expected token ids"),
        ([torch.ones(3).bool()], r"list of token ids \[n\].*got bool \[3\]"),
        ([[1, 2], []], "got list \\[\\]"),
        ([True, False], "got bool True"),
        ([[1.0, 2.0]], "got list"),
        ([[[1, 2]]], "got list"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().generate(prompts, 3)


def test_lists_of_ints_are_prompts() -> None:
    assert torch.equal(greedy(model(), [prompt.tolist() for prompt in PROMPTS]), greedy(model(), PROMPTS))
    assert torch.equal(greedy(model(), PROMPTS[0].tolist()), greedy(model(), PROMPTS[0]))
    assert torch.equal(greedy(model(), [PROMPTS[0], tuple(PROMPTS[1].tolist())]), greedy(model(), PROMPTS[:2]))
    flags = torch.tensor([False, True, True, True, True])
    assert torch.equal(greedy(model(), PROMPTS[0].tolist(), mask=flags), greedy(model(), PROMPTS[0][1:]))
    steps = list(model().stream([prompt.tolist() for prompt in PROMPTS], ANSWER, temperature=0.0))
    assert torch.equal(torch.stack(steps, dim=1), greedy(model(), PROMPTS))


@pytest.mark.parametrize("prompts", ["abc", 5, None])
def test_what_holds_no_tokens_is_refused(prompts: Any) -> None:
    with pytest.raises(TypeError, match=r"expected token ids as a tensor, or a list of prompts"):
        model().generate(prompts, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eos_token": "x"}, TypeError, "eos_token is str 'x'; expected a token id, several of them, or None"),
        ({"eos_token": [3, True]}, TypeError, "eos_token is list .*; expected a token id, several of them, or None"),
        ({"eos_token": 2.5}, TypeError, "eos_token is float 2.5"),
        ({"eos_token": [3, TOKENS]}, ValueError, "eos_token is 31, which the model never gives"),
        ({"stop": [3]}, TypeError, r"stop has 3; it is a list of sequences of tokens: stop=\[\[3\]\], or eos_token=3"),
        ({"stop": ["."]}, TypeError, "stop has str '.'; expected sequences of token ids"),
        (
            {"stop": 3},
            TypeError,
            r"stop is int 3; expected a list of sequences of token ids, such as stop=\[\[7, 2\]\]",
        ),
        ({"stop": "."}, TypeError, "stop is str '.'; expected a list of sequences"),
        ({"stop": torch.tensor([3])}, TypeError, "stop has 3; it is a list of sequences"),
        ({"stop": [[]]}, ValueError, "stop has an empty sequence"),
        ({"eos_token": range(TOKENS), "min_tokens": 1}, ValueError, "min_tokens is 1, and every one of 31 tokens ends"),
        ({"stop": [[3, 0.5]]}, TypeError, "stop has 0.5 in a sequence"),
        ({"stop": [[3, TOKENS]]}, ValueError, "stop has 31, which the model never gives"),
        (
            {"min_tokens": ANSWER + 100},
            ValueError,
            "min_tokens is .*; it counts tokens of the answer, from 0",
        ),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0; it divides logits"),
        ({"presence_penalty": 3.0}, ValueError, "presence_penalty is 3.0; it is taken off logits, from -2 to 2"),
        ({"presence_penalty": "x"}, TypeError, "presence_penalty is str 'x'; expected a number"),
        ({"repetition_penalty": float("nan")}, ValueError, "repetition_penalty is nan; expected a finite number"),
        ({"generator": 3}, TypeError, "generator is int 3; expected a torch.Generator, or seed="),
        ({"seed": 1 << 64}, ValueError, "seed is 18446744073709551616; it counts in 64 bits"),
        ({"samples_per_prompt": 0}, ValueError, "samples_per_prompt is 0; it counts answers"),
        ({"seed": "x"}, TypeError, "seed is 'x'; expected a whole number, or one for each prompt"),
        ({"seed": [1, 2, 3, 4, 5, 6, 7]}, ValueError, "seed has 7 numbers for . prompts"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed= and generator= both say how tokens are drawn"),
        ({"eos_token": TOKENS}, ValueError, "eos_token is 31, which the model never gives: num_tokens=31"),
        ({"eos_token": -1}, ValueError, "eos_token is -1"),
        ({"cache_kv": "no"}, TypeError, "cache_kv is str 'no'; expected True or False"),
        ({"filter_thres": 0.9}, TypeError, "'filter_thres': x-transformers has it.*; pass top_k="),
        ({"filter_kwargs": {"k": 3}}, TypeError, "'filter_kwargs': x-transformers.*; pass top_k=, top_p= or min_p="),
        ({"prompt_lens": None}, TypeError, "pass a list of prompts, each"),
        ({"temprature": 0.5}, TypeError, "has no keyword 'temprature', did you mean 'temperature'"),
        ({"filter_logits_fn": "top_p"}, TypeError, "filter_logits_fn is str 'top_p'; expected a function.*pass top_p="),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_arguments_are_checked_before_the_first_token(method: str, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(model(), method)(PROMPTS, 3, **options)


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        (PROMPTS, torch.ones(3, 11, dtype=torch.bool), "a list of prompts holds no padding, so pass an expression"),
        (ids(2, 5), torch.ones(2, 7, dtype=torch.bool), r"a tensor speaks of the prompt's tokens, bool \[2, 5\]"),
        (ids(2, 5), torch.ones(2, 5), "a mask is bool and True means may attend"),
        (ids(2, 5), torch.tensor([[True] * 5, [False] * 5]), "marks every token of prompt 1 as padding"),
        (ids(2, 5), keys([True] * 9), "holds data for 9 .*, but was asked about 11"),
        (ids(2, 5), "causl", "unknown name 'causl', did you mean 'causal'"),
        (ids(2, 5), [causal], "must be a mask expression, its text, or bool flags over the prompt"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_the_first_token(prompts: Any, mask: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        model().stream(prompts, ANSWER, mask=mask)


# -- ends --------------------------------------------------------------------------------------------------------------


def test_after_an_eos_a_row_is_padding() -> None:
    whole = greedy(model(), PROMPTS)
    eos = int(whole[0, 2])
    answer = greedy(model(pad_value=29), PROMPTS, eos_token=eos)
    for row, full in zip(answer, whole, strict=True):
        first = next((i for i, token in enumerate(full.tolist()) if token == eos), ANSWER)
        assert torch.equal(row[: first + 1], full[: first + 1])
        assert (row[first + 1 :] == 29).all()


def test_an_eos_in_the_prompt_stops_nothing() -> None:
    """In x-transformers it blanks the whole answer."""
    prompt = PROMPTS[0]
    absent = next(token for token in range(TOKENS) if token not in greedy(model(), prompt).tolist())
    started = torch.cat((torch.tensor([absent]), prompt))
    whole = greedy(model(), started)
    if absent not in whole.tolist():
        assert torch.equal(greedy(model(), started, eos_token=absent), whole)
    assert int(greedy(model(pad_value=29), started, eos_token=absent)[0]) == int(whole[0])


def test_the_stream_ends_when_every_row_has() -> None:
    whole = greedy(model(), PROMPTS[:1])
    steps = list(model().stream(PROMPTS[:1], ANSWER, temperature=0.0, eos_token=int(whole[0, 0])))
    assert [step.tolist() for step in steps] == [[int(whole[0, 0])]]


def test_the_stream_is_the_answer_step_by_step() -> None:
    steps = list(model().stream(PROMPTS, ANSWER, temperature=0.0))
    assert all(step.shape == (3,) for step in steps)
    assert torch.equal(torch.stack(steps, dim=1), greedy(model(), PROMPTS))


@pytest.mark.parametrize("cache_kv", [True, False])
def test_absolute_positions_end_and_rotary_ones_do_not(cache_kv: bool) -> None:
    absolute = model(featured("absolute"))
    assert greedy(absolute, ids(41), 7, cache_kv=cache_kv).shape == (7,)  # the last token is never read
    with pytest.raises(ValueError, match=r"reach position 47, .* positions 0 to 46 \(max_seq_len=47\).*rotary_pos_emb"):
        absolute.stream(ids(41), 8, cache_kv=cache_kv)
    assert greedy(model(featured("rotary")), ids(41), 13, cache_kv=cache_kv).shape == (13,)


def test_padding_takes_no_room_of_the_shorter_prompts() -> None:
    net = featured("absolute")
    assert torch.equal(greedy(model(net), [ids(41), ids(3)], 7)[1], greedy(model(net), ids(3), 7))


# -- causal=False ------------------------------------------------------------------------------------------------------


def test_a_prefix_language_model_generates() -> None:
    net, mask = featured("rotary"), causal | prefix(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = greedy(model(net), PROMPTS[0], mask=mask, causal=False)
    assert torch.equal(cached, greedy(model(net), PROMPTS[0], mask=mask, causal=False, cache_kv=False))
    assert not torch.equal(net(PROMPTS[0][None], mask=mask, causal=False), net(PROMPTS[0][None]))


def test_a_cache_that_would_have_to_change_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lets earlier tokens read new ones.*cache_kv=False"):
        model().stream(PROMPTS[1], ANSWER, mask=causal | prefix(5), causal=False)
    answer = greedy(model(), PROMPTS[1], mask=causal | prefix(5), causal=False, cache_kv=False)
    assert answer.shape == (ANSWER,)


# -- randomness and modes ----------------------------------------------------------------------------------------------


def test_a_generator_repeats_the_answer() -> None:
    answers = [
        model().generate(PROMPTS, 19, temperature=1.3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_modes_come_back_even_after_an_error() -> None:
    wrapper = model().train()
    wrapper.net.emb_dropout.eval()  # one part is in its own mode
    modes = [part.training for part in wrapper.modules()]
    greedy(wrapper, PROMPTS)
    assert [part.training for part in wrapper.modules()] == modes

    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a filter that fails")

    with pytest.raises(RuntimeError, match="a filter that fails"):
        wrapper.generate(PROMPTS, 3, filter_logits_fn=broken)
    assert [part.training for part in wrapper.modules()] == modes
    steps = wrapper.stream(PROMPTS, 3)
    next(steps)
    assert [part.training for part in wrapper.modules()] == modes  # between two steps, too
    assert torch.is_grad_enabled()


def test_generation_does_not_drop() -> None:
    net = wrapped(decoder(attn_dropout=0.5, ff_dropout=0.5), emb_dropout=0.5)
    expected = greedy(model(net), PROMPTS)
    assert torch.equal(greedy(model(net).train(), PROMPTS), expected)
    with evaluating(net.modules()):
        assert not net.training


def test_a_copy_generates_the_same() -> None:
    wrapper = model(wrapped(tie_embedding=True))
    assert torch.equal(greedy(copy.deepcopy(wrapper), PROMPTS), greedy(wrapper, PROMPTS))


def test_dead_rows_generate_finite_logits() -> None:
    net = featured("absolute")
    assert greedy(model(net), PROMPTS, mask=causal - dilated(1000)).max() < TOKENS


@pytest.mark.parametrize("seq_len", [-1, 2.0, True])
def test_a_length_is_a_whole_number(seq_len: Any) -> None:
    with pytest.raises(ValueError, match="it counts the new tokens"):
        model().generate(PROMPTS, seq_len)


def test_the_wrapper_takes_a_wrapped_decoder() -> None:
    with pytest.raises(ValueError, match="built around an Encoder"):
        AutoregressiveWrapper(wrapped(encoder()))
    with pytest.raises(TypeError, match="expected a TransformerWrapper"):
        AutoregressiveWrapper(torch.nn.Linear(DIM, DIM))  # pyright: ignore[reportArgumentType]
