"""`speculate`: several tokens of a Hugging Face model in one forward, under any mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.generation.choosing import Ways
from truemask.generation.options import Options
from truemask.generation.speculation.loop import Drafter, Sample, Speculated, gathered, samples_of, speculated
from truemask.generation.speculation.model_drafter import ModelDrafter
from truemask.generation.speculation.ngram import NgramDrafter
from truemask.interop.use import use
from truemask.masks.core.mask import Mask

NOT_HERE = {
    "causal": "the model's own rule stands, unless `tm.use(model, mask, replace=True)` is around the call",
    "cache_kv": "guesses are checked behind the keys of what was read",
    "samples_per_prompt": "repeat the rows of input_ids",
}


@torch.no_grad()
def speculate(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    draft: Any = "ngram",
    mask: Mask | str | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Speculated:
    """As `model.generate`, with several tokens from each forward: guesses of `draft` are checked all at once.

    The text stays what it is: greedy text and text drawn by a seed are the same without guesses (up to ties of
    logits), and drawn text has the same distribution.

    Args:
        model: a decoder of transformers (v5), in use (`tm.use`) or not; then it is used here, with its own masks.
        input_ids: int64 [b, n].
        max_new_tokens: how many tokens at most for each sample.
        draft: who guesses: "ngram" looks up the last tokens in what stands before; or another such model, with the
            same vocabulary, which reads under the same mask, or inside its own `tm.use`.
        mask: an expression, or its text, as in `tm.use`. None: what the model is in use with.
        attention_mask: bool or 0 and 1, [b, n]: pads are 0, and all on the left.
        options: `temperature` (here 0 by default: greedy), filters, penalties, `eos_token` (by default the model's
            own), `stop`, `min_tokens`, `seed`, `generator`, `draft_tokens`: see `Options`.

    Returns:
        A `Speculated`: tokens `[b, n + m]`, the prompt's and m new ones, with the model's pad token behind an end;
        log-probabilities `[b, m]`; accepted guesses of each forward `[b, f]`.

    Raises MaskError, ValueError or TypeError before the first token on what cannot be done.
    Sources: speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318), trees of guesses
    (SpecInfer, arXiv 2305.09781; Medusa, arXiv 2401.10774).

    >>> speculate(None, torch.zeros(1, 3), max_new_tokens=5)
    Traceback (most recent call last):
    truemask.errors.MaskError: model is NoneType None; speculate takes a decoder of transformers with a language head
    """
    from truemask.interop.huggingface.draft_reader import check_readable

    check_readable("model", model)
    guesser = _guesser(model, draft)
    given, ways, pad = _options(model, input_ids, max_new_tokens, options)
    real = _real(input_ids, attention_mask)
    samples = samples_of(ways, input_ids, real, _words(model), pad, with_prompts=guesser is None)
    for name, each in {"model": model, "draft": guesser or model}.items():
        _check_length(name, each, _read(input_ids, max_new_tokens))
    with _used(model, mask), nullcontext() if guesser is None else _used(guesser, mask):
        _generate(model, guesser, input_ids, real, samples, max_new_tokens, ways, given.draft_tokens)
    found = gathered(samples, max_new_tokens, pad, input_ids.device)
    new = max(len(sample.chosen) for sample in samples)
    return Speculated(torch.cat((input_ids, found.tokens[:, :new]), 1), found.logprobs[:, :new], found.accepted)


def _generate(
    model: Any,
    guesser: Any,
    input_ids: Tensor,
    real: Tensor,
    samples: list[Sample],
    new: int,
    ways: Ways,
    most: int,
) -> None:
    """Go on with each sample, in models that are in use."""
    from truemask.interop.huggingface.draft_reader import HuggingFaceReader

    tokens = _read(input_ids, new)
    read = HuggingFaceReader("model", model, real, tokens)
    logits = read.begin(input_ids)
    drafter: Drafter = NgramDrafter()
    if guesser is not None:
        guesses = HuggingFaceReader("draft", guesser, real, tokens)
        guesses.begin(input_ids)
        draws = ways.sampler.temperature > 0 and not ways.seeds
        drafter = ModelDrafter(guesses, input_ids.shape[1], ways.sampler if draws else None, ways.generator)
    speculated(read, drafter, logits, samples, new, most)


def _read(input_ids: Tensor, new: int) -> int:
    """How many tokens are read at most: the last new one never is."""
    return input_ids.shape[1] + max(0, new - 1)


@contextmanager
def _used(model: Any, mask: Mask | str | None) -> Iterator[None]:
    """Inside, the model is in use: under the mask, or as it is in use already, or with its own masks."""
    from truemask.interop.huggingface.configs import account_of, in_use_here

    if mask is None and account_of(model.config) is not None and in_use_here(model):
        yield
        return
    with use(model, mask):
        yield


def _guesser(model: Any, draft: Any) -> Any:
    from truemask.interop.huggingface.draft_reader import check_readable

    if isinstance(draft, str):
        if draft != "ngram":
            raise ValueError(f'draft is {draft!r}; guesses come from "ngram", a look-up in the text, or from a model')
        return None
    check_readable("draft", draft)
    if draft is model:
        raise ValueError("draft is the model itself, whose cache and mask cannot be two: pass another model")
    if _words(draft) != _words(model):
        raise ValueError(
            f"draft has a vocabulary of {_words(draft)}, and the model of {_words(model)}: guesses are tokens of the "
            "model, so both need the same"
        )
    return draft


def _options(model: Any, input_ids: Tensor, max_new_tokens: int, options: dict[str, Any]) -> tuple[Options, Ways, int]:
    """How tokens are chosen, and the pad token; ends and the penalty of repetition are the model's by default."""
    for name in options:
        if name in NOT_HERE:
            raise TypeError(f"speculate() has no keyword {name!r}: {NOT_HERE[name]}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens!r}; it counts the new tokens, so a whole number, 0 or more"
        )
    _check_ids(input_ids, _words(model))
    own = model.generation_config
    defaults: dict[str, Any] = {"temperature": 0.0, "eos_token": own.eos_token_id}
    if getattr(own, "repetition_penalty", None) is not None:
        defaults["repetition_penalty"] = float(own.repetition_penalty)
    given = Options.of("speculate", defaults | options)
    ways = given.ways(max_new_tokens, _words(model), len(input_ids))
    ends = [sequence[0] for sequence in ways.stops.sequences if len(sequence) == 1]
    pad = own.pad_token_id if own.pad_token_id is not None else ends[0] if ends else 0
    return given, ways, pad


def _check_ids(input_ids: Any, words: int) -> None:
    whole = isinstance(input_ids, Tensor) and input_ids.dtype in (torch.int64, torch.int32)
    if not whole or input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids are {describe(input_ids)}; expected token ids, int64 [b, n], at least one each")
    low, high = (int(end) for end in input_ids.aminmax())
    if low < 0 or high >= words:
        raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary: ids are 0 to {words - 1}")


def _real(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which tokens are no pads, bool [b, n]."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    real = attention_mask.bool() if isinstance(attention_mask, Tensor) else attention_mask
    if not isinstance(real, Tensor) or real.shape != input_ids.shape:
        raise MaskError(
            f"attention_mask is {describe(attention_mask)}; expected flags of the prompts' tokens, "
            f"{list(input_ids.shape)}. Any other rule is an expression: mask="
        )
    if not bool((real.int().diff(dim=1) >= 0).all()) or not bool(real[:, -1].all()):
        raise MaskError("attention_mask has a 0 behind a 1: pads of prompts stand on the left, and each has a token")
    return real


def _words(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _check_length(name: str, model: Any, tokens: int) -> None:
    """Raise ValueError if a model that learned its positions has fewer than so many."""
    table = next((part for path, part in model.named_modules() if path.endswith(("wpe", "embed_positions"))), None)
    learned = table.num_embeddings if isinstance(table, torch.nn.Embedding) else tokens
    if tokens > learned:
        raise ValueError(
            f"the prompts and the new tokens reach position {tokens - 1}, and {name} learned positions 0 to "
            f"{learned - 1}: ask for fewer, or cut the prompts"
        )
