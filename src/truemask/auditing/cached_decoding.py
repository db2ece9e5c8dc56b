"""Decoding in steps beside one call: as the batch is, with padded context, and with beams that change places."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truemask.auditing.cached_calls import Decode, NoCache, Swap, decoder_of, has_beams, stops
from truemask.auditing.cross_attention import context_of
from truemask.auditing.distances import Ruler
from truemask.auditing.expected_masks import Claim
from truemask.auditing.subject import SEED, Subject, line_of
from truemask.common.finding import Finding

BEAMS = 2


class Trial(NamedTuple):
    """One way of decoding a call: `what` it is, which outputs are held to one call, and when beams change places."""

    what: str
    subject: Subject
    judged: Tensor  # bool `[b, n]`
    swap: Swap | None = None


def decoded(subject: Subject, claim: Claim, judged: Tensor, ruler: Ruler) -> Iterator[Finding | str]:
    """The outputs decoded with a cache beside those of one call, until something differs."""
    decode, why = decoder_of(subject)
    if decode is not None and claim.documents is not None:
        decode, why = None, "decoding with a cache was not tried, because the batch packs documents"
    if decode is None:
        if why:
            yield why
        return
    ends = stops(subject.length, subject.held)
    for turn, make in enumerate((_as_it_is, _padded_context, _beams)):
        trial = make(subject, judged, ends, decode)
        if trial is None:
            continue
        try:
            with torch.no_grad():
                apart = _apart(trial, decode, ends, ruler)
        except NoCache as error:
            yield f"decoding with {'a cache' if turn == 0 else trial.what} was not tried, because {error}"
            return
        except Exception as error:  # any model may raise anything here, and that is what is reported
            # with pictures only `generate` knows how a step is called, which a bare call need not survive
            fails = turn == 0 and not bool(subject.held.any())
            yield _failed(error) if fails else f"decoding with {trial.what or 'a cache'} failed: {line_of(error)}"
            return
        if float(apart.max()) > ruler.tolerance:
            yield _differs(trial, apart, ends)
            return


def _as_it_is(subject: Subject, judged: Tensor, ends: list[int], decode: Decode) -> Trial:
    return Trial("", subject, judged)


def _padded_context(subject: Subject, judged: Tensor, ends: list[int], decode: Decode) -> Trial | None:
    """The call with the end of the context told to be padding: a mask that is forgotten later on shows then."""
    context = context_of(subject)
    if context is None or context.is_signal or not context.padding or not bool(context.real.all()):
        return None
    takes = inspect.signature(subject.model.forward).parameters
    size = context.real.shape[1]
    if size < 2 or not (context.padding in takes or any(one.kind is one.VAR_KEYWORD for one in takes.values())):
        return None
    flags = torch.ones_like(context.real, dtype=torch.int64)
    flags[1 if subject.batch > 1 else 0 :, size - max(1, size // 3) :] = 0
    given = flags.bool() if context.name == "context" else flags
    keywords = {**subject.keywords, context.padding: given.to(context.value.device)}
    return Trial("padding in the context", subject.changed(subject.inputs, keywords), judged)


def _beams(subject: Subject, judged: Tensor, ends: list[int], decode: Decode) -> Trial | None:
    """Two beams for each sample, the second with other tokens, which change places half-way."""
    tensors = [value for value in subject.keywords.values() if isinstance(value, Tensor)]
    of_samples = all(value.ndim and len(value) in (1, subject.batch) for value in tensors)
    if not has_beams(decode) or len(ends) <= BEAMS or not of_samples:  # patches of all pictures lie in one row
        return None

    def doubled(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.ndim > 0 and len(value) == subject.batch
        return value.repeat_interleave(BEAMS, dim=0) if fits else value

    both = subject.changed(doubled(subject.inputs), {name: doubled(value) for name, value in subject.keywords.items()})
    both.held, judged = doubled(subject.held), doubled(judged)
    second = judged.clone()
    second[::BEAMS] = False
    second[:, 0] = False
    both.inputs = both.other_inputs(second, torch.Generator().manual_seed(SEED))
    rows = torch.arange(BEAMS * subject.batch).unflatten(0, (-1, BEAMS)).flip(1).flatten()
    swap = Swap(ends[(len(ends) - 1) // 2], rows.to(subject.inputs.device))
    return Trial("beams", both, judged, swap)


def _apart(trial: Trial, decode: Decode, ends: list[int], ruler: Ruler) -> Tensor:
    """How far each output that counts is from that of one call, float64 `[b, n]`."""
    at_once = ruler.baseline if trial.what == "" else trial.subject.outputs()
    outputs = decode(trial.subject, ends, trial.swap)
    return torch.where(trial.judged, ruler.between(at_once, outputs), 0.0)


def _differs(trial: Trial, apart: Tensor, ends: list[int]) -> Finding:
    b, q = (int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    how = f"{ends[0]} tokens, then step by step" + f", with {trial.what}" * bool(trial.what)
    if trial.swap is not None:
        where, fix = (
            f"sample {b // BEAMS}, output {q}",
            "reorder all that is remembered of earlier tokens with the beams",
        )
    else:
        where = f"sample {b}, output {q}"
        fix = "find what does not know which tokens came before: positions, a mask, or a part that sees new ones only"
    if "decoder_" in str(trial.subject.name):
        fix += "; the padding of the context must go to every step"
    message = (
        f"decoded with a cache ({how}) the output differs by {float(apart[b, q]):.2g} from that of one call, which "
        "proves that it is not generated as it was trained"
    )
    return Finding("cached-differs", "error", where, message, fix)


def _failed(error: Exception) -> Finding:
    return Finding(
        "cache-fails",
        "warning",
        "decoding",
        f"the call works at once and fails with a cache: {line_of(error)}",
        "decode without a cache (use_cache=False), or with a mask that the cache understands",
    )
