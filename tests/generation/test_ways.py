"""Ways to generate: several samples of a prompt, ends, penalties, seeds, log-probabilities, beams."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.nn_models import TOKENS, decoder, wrapped
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.generation.beams import Beams
from truemask.generation.choosing import Chosen, seeds_of, uniform
from truemask.generation.penalties import Penalties
from truemask.generation.sampling import drawn
from truemask.generation.stopping import Stops
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.per_token import prefix
from truemask.nn.layers import Decoder
from truemask.nn.wrappers import TransformerWrapper

SINKS = causal & (window(4) | prefix(2))
ANSWER = 9


def model(**keywords: Any) -> AutoregressiveWrapper:
    return AutoregressiveWrapper(wrapped(decoder(rotary_pos_emb=True, rotary_emb_dim=4, **keywords))).eval()


def prompts(*lengths: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(TOKENS, (length,), generator=numbers) for length in lengths]


# -- several samples of a prompt, seeds --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, SINKS])
@pytest.mark.parametrize("cache_kv", [True, False])
def test_samples_of_a_prompt_are_those_of_the_prompt_repeated(mask: Mask | None, cache_kv: bool) -> None:
    wrapper, given = model(), prompts(3, 7)
    repeated = [given[0]] * 3 + [given[1]] * 3
    seeds = [4, *seeds_of([4], 1, 3)[1:], 9, *seeds_of([9], 1, 3)[1:]]
    found = wrapper.generate(given, ANSWER, samples_per_prompt=3, seed=[4, 9], mask=mask, cache_kv=cache_kv)
    assert found.shape == (6, ANSWER)
    assert torch.equal(found, wrapper.generate(repeated, ANSWER, seed=seeds, mask=mask))
    assert len({tuple(row) for row in found[:3].tolist()}) == 3


def test_the_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, widths = model(), []
    original = TransformerWrapper.forward

    def forward(self: TransformerWrapper, ids: Tensor, *args: Any, **keywords: Any) -> Tensor:
        widths.append(tuple(ids.shape))
        return original(self, ids, *args, **keywords)

    monkeypatch.setattr(TransformerWrapper, "forward", forward)
    wrapper.generate(prompts(7), 2, samples_per_prompt=5)
    assert widths[0] == (1, 7)
    assert all(width == (5, 1) for width in widths[1:])


def test_one_prompt_of_several_samples_has_rows() -> None:
    (prompt,) = prompts(5)
    assert model().generate(prompt, 4, samples_per_prompt=3).shape == (3, 4)
    assert model().generate(prompt, 4).shape == (4,)


@pytest.mark.parametrize("mask", [None, SINKS])
def test_a_seed_draws_the_same_text_alone_and_in_any_batch(mask: Mask | None) -> None:
    wrapper, given = model(), prompts(3, 7, 5)
    together = wrapper.generate(given, ANSWER, seed=[11, 12, 13], mask=mask)
    assert torch.equal(together, wrapper.generate(given, ANSWER, seed=11, mask=mask))
    for prompt, seed, row in zip(given, (11, 12, 13), together, strict=True):
        assert torch.equal(wrapper.generate(prompt, ANSWER, seed=seed, mask=mask), row)
    backwards = wrapper.generate(given[::-1], ANSWER, seed=[13, 12, 11], mask=mask)
    assert torch.equal(backwards.flip(0), together)
    several = wrapper.generate(given, ANSWER, seed=11, samples_per_prompt=2, mask=mask)
    assert torch.equal(several[::2], together)  # the first of each is the one alone


def test_seeds_differ_and_do_not_follow_torch_s() -> None:
    wrapper, given = model(), prompts(5)[0]
    assert len({tuple(wrapper.generate(given, ANSWER, seed=seed).tolist()) for seed in range(9)}) == 9
    torch.manual_seed(0)
    first = wrapper.generate(given, ANSWER, seed=3)
    torch.manual_seed(1)
    assert torch.equal(wrapper.generate(given, ANSWER, seed=3), first)


def test_all_bits_of_a_seed_count_for_every_sample() -> None:
    seeds = [3, 3 + (1 << 32), 3 - (1 << 63), 4]
    assert len(set(seeds_of(seeds, 4, 5))) == 20
    assert len({uniform(seed, 0) for seed in seeds_of(seeds, 4, 5)}) == 20


def test_numbers_of_seeds_are_uniform() -> None:
    numbers = [uniform(seed, step) for seed in range(40) for step in range(50)]
    places = torch.arange(len(numbers)) / len(numbers)
    away = (torch.tensor(numbers).sort().values - places).abs().max()
    assert float(away) < 1.95 / len(numbers) ** 0.5  # Kolmogorov and Smirnov: one run in a thousand is farther away
    assert len(set(numbers)) == len(numbers)


def test_drawing_has_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0], dtype=torch.float64)
    draws = 20_000
    u = torch.tensor([uniform(7, step) for step in range(draws)], dtype=torch.float64)
    counts = drawn(probabilities.expand(draws, -1), u).bincount(minlength=5)
    assert counts[[1, 4]].sum() == 0
    expected = draws * probabilities[[0, 2, 3]]
    assert float(((counts[[0, 2, 3]] - expected).square() / expected).sum()) < 13.8  # chi-square, likewise
    assert drawn(probabilities[None], torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 3


# -- ends --------------------------------------------------------------------------------------------------------------


def greedy(wrapper: AutoregressiveWrapper, given: Any, **options: Any) -> Tensor:
    found = wrapper.generate(given, ANSWER, temperature=0.0, **options)
    assert isinstance(found, Tensor)
    return found


def test_several_tokens_and_sequences_end_an_answer() -> None:
    wrapper, given = model(), prompts(4, 6)
    free = greedy(wrapper, given).tolist()
    ends = [free[0][3], free[1][5]]
    for row, cut in zip(free, greedy(wrapper, given, eos_token=ends).tolist(), strict=True):
        stop = next(i for i, token in enumerate(row) if token in ends)
        assert cut == row[: stop + 1] + [0] * (ANSWER - stop - 1)
    assert torch.equal(greedy(wrapper, given, stop=torch.tensor([ends]).T), greedy(wrapper, given, eos_token=ends))
    pair = free[0][2:4]
    for row, cut in zip(free, greedy(wrapper, given, stop=[pair, [1, 2, 3, 4]]).tolist(), strict=True):
        stop = next((i for i in range(1, ANSWER) if row[i - 1 : i + 1] == pair), ANSWER)
        assert cut == row[: stop + 1] + [0] * (ANSWER - stop - 1)


def test_what_is_in_the_prompt_ends_nothing() -> None:
    wrapper, given = model(), prompts(4)[0]
    free = greedy(wrapper, given)
    first = [int(given[-1]), int(free[0])]
    assert torch.equal(greedy(wrapper, given, stop=[first]), free)


def test_nothing_ends_before_min_tokens() -> None:
    wrapper, given = model(), prompts(4, 6)
    free = greedy(wrapper, given)
    end = int(free[0, 1])
    held = greedy(wrapper, given, eos_token=end, min_tokens=5)
    assert not (held[:, :5] == end).any()
    assert torch.equal(held[0, :1], free[0, :1])


def test_a_sequence_is_held_back_by_its_last_token() -> None:
    stops = Stops(((1,), (2, 3)), least=3)
    logits = torch.zeros(2, 5)
    forbidden = stops.held_back(logits, torch.tensor([[2], [4]])).isinf()
    assert forbidden.tolist() == [[False, True, False, True, False], [False, True, False, False, False]]
    assert not stops.held_back(logits, torch.tensor([[4, 4, 2, 2], [4, 4, 4, 4]])).isinf().any()
    assert stops.ended(torch.tensor([[4, 4, 2, 3], [4, 4, 4, 4]])).tolist() == [True, False]


# -- penalties, log-probabilities --------------------------------------------------------------------------------------


def test_penalties_are_hugging_face_s_and_openai_s() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models`)")
    numbers = torch.Generator().manual_seed(0)
    logits, came = torch.randn(3, 11, generator=numbers), torch.randint(11, (3, 6), generator=numbers)
    seen = torch.zeros(3, 11, dtype=torch.bool).scatter_(1, came, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(came, logits.clone())
    nothing = torch.zeros(3, 11, dtype=torch.int64)
    assert torch.allclose(Penalties(repetition=1.7).apply(logits, seen=seen, counts=nothing), expected)
    counts = torch.nn.functional.one_hot(came, 11).sum(1)
    found = Penalties(frequency=0.5, presence=0.25).apply(logits, seen=seen, counts=counts)
    assert torch.allclose(found, logits - 0.5 * counts - 0.25 * (counts > 0))


@pytest.mark.parametrize("option", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_penalties_make_an_answer_repeat_less(option: str) -> None:
    wrapper, given = model(), prompts(5, 9)
    plain = wrapper.generate(given, 30, temperature=0.0)
    other = wrapper.generate(given, 30, temperature=0.0, **{option: 1.9})
    assert isinstance(plain, Tensor)
    assert isinstance(other, Tensor)
    assert len(other.unique()) > len(plain.unique())
    alone = wrapper.generate(given[0], 30, temperature=0.0, **{option: 1.9})
    assert torch.equal(other[0], alone)  # pads count as nothing


def test_log_probabilities_are_the_model_s() -> None:
    wrapper, given = model(), prompts(5)[0]
    found = wrapper.generate(given, ANSWER, seed=2, temperature=1.3, top_k=9, return_logprobs=True)
    assert isinstance(found, Chosen)
    whole = torch.cat((given, found.tokens))[None]
    with torch.no_grad():
        expected = wrapper.net(whole)[0, len(given) - 1 : -1].log_softmax(-1).gather(1, found.tokens[:, None])[:, 0]
    assert torch.allclose(found.logprobs, expected.float(), atol=1e-5)
    end = int(found.tokens[2])
    cut = wrapper.generate(given, ANSWER, seed=2, temperature=1.3, top_k=9, eos_token=end, return_logprobs=True)
    assert isinstance(cut, Chosen)
    stop = found.tokens.tolist().index(end) + 1
    assert torch.equal(cut.logprobs[stop:], torch.zeros(ANSWER - stop))


# -- beams -------------------------------------------------------------------------------------------------------------


def tiny() -> AutoregressiveWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=4, max_seq_len=0, attn_layers=layers)
    torch.nn.init.normal_(net.project_out.weight, std=1.0)
    return AutoregressiveWrapper(net.double()).eval()


def likelihood(wrapper: AutoregressiveWrapper, prompt: Tensor, answer: tuple[int, ...]) -> float:
    whole = torch.cat((prompt, torch.tensor(answer)))[None]
    with torch.no_grad():
        logprobs = wrapper.net(whole)[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_enough_for_all_find_the_best_of_all(length_penalty: float) -> None:
    """Against every answer of a vocabulary of four, of which one ends."""
    wrapper, prompt, end, longest = tiny(), torch.tensor([0, 1, 2]), 3, 4
    answers = [
        answer
        for n in range(1, longest + 1)
        for answer in itertools.product(range(4), repeat=n)
        if end not in answer[:-1] and (answer[-1] == end or n == longest)
    ]
    scores = {answer: likelihood(wrapper, prompt, answer) / len(answer) ** length_penalty for answer in answers}
    best = sorted(scores, key=lambda answer: -scores[answer])[:3]
    found = wrapper.beam_search(prompt, longest, beams=81, return_n=3, eos_token=end, length_penalty=length_penalty)
    for row, score, answer in zip(found.tokens.tolist(), found.scores.tolist(), best, strict=True):
        assert row == [*answer, *[0] * (longest - len(answer))]
        assert score == pytest.approx(scores[answer], abs=1e-6)


@pytest.mark.parametrize("mask", [None, SINKS])
def test_one_beam_is_greedy(mask: Mask | None) -> None:
    wrapper, given = model(), prompts(3, 8)
    found = wrapper.beam_search(given, ANSWER, beams=1, mask=mask)
    assert isinstance(found, Beams)
    assert torch.equal(found.tokens[:, 0], greedy(wrapper, given, mask=mask))


@pytest.mark.parametrize("mask", [None, SINKS])
def test_beams_of_a_batch_are_those_alone_and_without_a_cache(mask: Mask | None) -> None:
    wrapper, given = model(), prompts(3, 8)
    options: dict[str, Any] = {"beams": 3, "return_n": 3, "eos_token": [5, 6], "mask": mask}
    found = wrapper.beam_search(given, ANSWER, **options)
    again = wrapper.beam_search(given, ANSWER, **options, cache_kv=False)
    assert torch.equal(found.tokens, again.tokens)
    for prompt, tokens, scores in zip(given, *found, strict=True):
        alone = wrapper.beam_search(prompt, ANSWER, **options)
        assert torch.equal(alone.tokens, tokens)
        assert torch.allclose(alone.scores, scores, atol=1e-5)


def test_beams_are_those_of_transformers() -> None:
    """A Llama of ours and theirs give other numbers; the same logits do not: theirs are a table of the last token."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `models`)")
    table = 2 * torch.randn(12, 12, generator=torch.Generator().manual_seed(3))

    class Table(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = transformers.LlamaConfig
        main_input_name = "input_ids"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(table)

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(logits=self.weight[input_ids])

        def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
            return {"input_ids": input_ids}

    theirs = Table(transformers.LlamaConfig(vocab_size=12, num_hidden_layers=1, pad_token_id=0, use_cache=False))
    ours = tabled(table)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for beams, penalty, ends in itertools.product((2, 4), (0.5, 1.0), ([7], [7, 8])):
        expected = theirs.generate(
            ids, num_beams=beams, num_return_sequences=beams, max_new_tokens=6, eos_token_id=ends, pad_token_id=10,
            length_penalty=penalty, do_sample=False, use_cache=False, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        found = ours.beam_search(ids, 6, beams=beams, return_n=beams, eos_token=ends, length_penalty=penalty)
        answers = expected.sequences[:, 3:].view(2, beams, -1)
        assert torch.equal(found.tokens[..., : answers.shape[-1]], answers)
        assert torch.allclose(found.scores.float(), expected.sequences_scores.view(2, beams), atol=1e-5)


def tabled(table: Tensor) -> AutoregressiveWrapper:
    """A model whose logits are a row of a table, by the last token."""
    words = len(table)
    layers = Decoder(dim=words, depth=1, heads=1, attn_dim_head=4, use_rmsnorm=True, norm_add_unit_offset=False)
    net = TransformerWrapper(num_tokens=words, max_seq_len=0, attn_layers=layers, use_abs_pos_emb=False)
    with torch.no_grad():
        for parameter in layers.layers.parameters():
            parameter.zero_()
        layers.final_norm.gain.fill_(words**-0.5)  # of a row that is 1 at one place
        net.token_emb.weight.copy_(torch.eye(words))
        net.project_out.weight.copy_(table.T)
    return AutoregressiveWrapper(net, pad_value=10).eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams=0 and return_n=1: at least one answer"),
        ({"beams": 2, "return_n": 3}, "beams=2 and return_n=3"),
        ({"eos_token": TOKENS}, "which the model never gives"),
    ],
)
def test_searches_are_checked_before_they_begin(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().beam_search(prompts(3), 4, **options)
