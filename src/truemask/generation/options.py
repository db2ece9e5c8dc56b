"""The keywords of `generate` and `stream`, in one place: what they mean, and what of them cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.generation.choosing import Ways, seeds_of
from truemask.generation.penalties import Penalties
from truemask.generation.sampling import Filter, Sampler
from truemask.generation.stopping import Stops, Tokens
from truemask.masks.core.mask import Mask
from truemask.nn.config import check_type, reject_unknown
from truemask.nn.x_transformers_names import GENERATE

DRAFT_TOKENS = 12  # guesses that are checked at once


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keywords of `generate` and `stream`.

    temperature         0 takes the best token; 1 samples from the model's own distribution (see `Sampler`)
    top_k, top_p, min_p, filter_logits_fn  filters of logits, see `Sampler`
    repetition_penalty, frequency_penalty, presence_penalty  for tokens that were there before, see `Penalties`
    eos_token           a token that ends an answer, or several; one in the prompt stops nothing
    stop                sequences of tokens that end an answer; the one that did is its last part
    min_tokens          so many tokens come before the one that ends an answer
    mask                an expression, over prompt and answer at positions counted from each prompt's first token; or
                        bool flags over the prompt's tokens: False at the ends is padding, False inside hides a token
    causal              overrides whether rows may read later keys
    cache_kv            False recomputes everything in each step, with the same result
    samples_per_prompt  so many answers of each prompt, one below the other; the prompt is computed once
    seed                draws by it and the number of the step alone, so that a sample's text depends neither on its
                        batch nor on its neighbours: one number for each prompt, or one that counts up with the
                        prompts; of several samples of a prompt the first is the one that is drawn alone
    generator           draws by it instead
    draft               guesses several tokens ahead, which one forward checks: "ngram" looks up the last tokens in what
                        stands before, and a model of the same vocabulary (TransformerWrapper) goes on by itself, under
                        the same mask. What is generated stays what it is: greedy and seeded text is the same, and
                        drawn text has the same distribution (docs/generation.md)
    draft_tokens        so many guesses at most are checked at once, along all the ways on; fewer where they were wrong
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    filter_logits_fn: Filter | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    eos_token: Tokens = None
    stop: Sequence[Sequence[int]] | None = None
    min_tokens: int = 0
    mask: Mask | Tensor | str | None = None
    causal: bool | None = None
    cache_kv: bool = True
    samples_per_prompt: int = 1
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    draft: Any = None
    draft_tokens: int = DRAFT_TOKENS

    @classmethod
    def of(cls, caller: str, keywords: Mapping[str, Any]) -> Options:
        """From what a caller passed; TypeError on what there is not, with the nearest name."""
        known = [item.name for item in fields(cls)]
        reject_unknown(caller, [name for name in keywords if name not in known], known, GENERATE)
        return cls(**keywords)

    def __post_init__(self) -> None:
        check_type("cache_kv", self.cache_kv, "bool")
        check_type("samples_per_prompt", self.samples_per_prompt, "int")
        if self.samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt is {self.samples_per_prompt}; it counts answers, so 1 or more")
        check_type("draft_tokens", self.draft_tokens, "int")
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens is {self.draft_tokens}; it counts guesses, so 1 or more")
        if self.draft is not None and not self.cache_kv:
            raise ValueError(
                "draft= keeps the keys of guesses that were right, and cache_kv=False keeps none: leave one of them out"
            )
        if not (self.generator is None or isinstance(self.generator, torch.Generator)):
            raise TypeError(
                f"generator is {describe(self.generator)}; expected a torch.Generator, or seed= for a number"
            )
        if self.seed is not None and self.generator is not None:
            raise ValueError("seed= and generator= both say how tokens are drawn: pass one of them")

    def ways(self, seq_len: int, words: int, prompts: int) -> Ways:
        """How tokens are chosen, for answers of up to `seq_len` tokens to so many prompts, from so many words."""
        penalties = self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        return Ways(
            Sampler(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                filter_logits_fn=self.filter_logits_fn,
            ),
            Penalties(**dict(zip(("repetition", "frequency", "presence"), penalties, strict=True))),
            Stops.read(self.eos_token, self.stop, self.min_tokens, seq_len, words),
            seeds_of(self.seed, prompts, self.samples_per_prompt),
            self.generator,
        )
