"""`generate(draft=...)` of our own models: who guesses, and what cannot be."""

from __future__ import annotations

from torch import nn

from truemask.common.formatting import describe
from truemask.generation.choosing import Ways
from truemask.generation.decoding import evaluating
from truemask.generation.options import Options
from truemask.generation.prompts import Prompts
from truemask.generation.speculation.loop import Drafter, Speculated, gathered, samples_of, speculated
from truemask.generation.speculation.model_drafter import ModelDrafter
from truemask.generation.speculation.ngram import NgramDrafter
from truemask.generation.speculation.reader import OwnReader
from truemask.nn.wrappers import TransformerWrapper


def draft_model(draft: object, words: int) -> TransformerWrapper | None:
    """The model that guesses; None if guesses are looked up. Raises TypeError or ValueError on what cannot guess."""
    if isinstance(draft, str):
        if draft != "ngram":
            raise ValueError(f'draft is {draft!r}; guesses come from "ngram", a look-up in the text, or from a model')
        return None
    net = getattr(draft, "net", draft)
    if not isinstance(net, TransformerWrapper):
        raise TypeError(
            f'draft is {describe(draft)}; expected "ngram", or a model: a TransformerWrapper around a Decoder, or an '
            "AutoregressiveWrapper"
        )
    if not net.attn_layers.causal:
        raise ValueError("draft is built around an Encoder, whose rows read what they should guess: use a Decoder")
    if net.num_tokens != words:
        raise ValueError(
            f"draft has num_tokens={net.num_tokens}, and the model {words}: guesses are tokens of the model, so both "
            "need the same vocabulary"
        )
    return net


def generated(
    net: TransformerWrapper, start: Prompts, seq_len: int, ways: Ways, options: Options, pad_value: int
) -> Speculated:
    """Answers of up to `seq_len` tokens to prompts, with the guesses that `options` say."""
    guesser = draft_model(options.draft, net.num_tokens)
    rows = [i for i in range(len(start.tokens)) for _ in range(options.samples_per_prompt)]
    samples = samples_of(
        ways, start.tokens[rows], start.real[rows], net.num_tokens, pad_value, with_prompts=guesser is None
    )
    modules: list[nn.Module] = [*net.modules(), *([] if guesser is None else guesser.modules())]
    with evaluating(modules):
        read = _reader(net, start, seq_len, options)
        logits = read.begin(start.tokens)
        read.select(rows)
        draft: Drafter = NgramDrafter()
        if guesser is not None:
            guesses = _reader(guesser, start, seq_len, options)
            guesses.begin(start.tokens)
            guesses.select(rows)
            draws = ways.sampler.temperature > 0 and not ways.seeds
            sampler = ways.sampler if draws else None
            draft = ModelDrafter(guesses, start.tokens.shape[1], sampler, ways.generator)
        speculated(read, draft, logits[rows], samples, seq_len, options.draft_tokens)
    return gathered(samples, seq_len, pad_value, start.tokens.device)


def _reader(net: TransformerWrapper, start: Prompts, seq_len: int, options: Options) -> OwnReader:
    batch, width = start.tokens.shape
    tokens = width + max(0, seq_len - 1)  # the last new token is never read
    most = options.draft_tokens + 1
    return OwnReader(net, start.mask, causal_too=options.causal, batch=batch, tokens=tokens, most=most)
