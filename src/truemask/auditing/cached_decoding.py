"""Decoding in steps beside one call: as the batch is, with padded context, and with beams that change places."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truemask.auditing.cached_calls import BeamSwap, Decode, NoCache, decoder_of, has_beams, stops
from truemask.auditing.cross_attention import context_of
from truemask.auditing.distances import Distances
from truemask.auditing.expected_masks import ExpectedMask
from truemask.auditing.subject import SEED, AuditedModel, line_of
from truemask.common.finding import Finding

BEAMS_PER_SAMPLE = 2


class DecodingTrial(NamedTuple):
    """One way of decoding a call: `what` it is, which outputs are held to one call, and when beams change places."""

    what: str
    subject: AuditedModel
    judged: Tensor  # bool `[b, n]`
    swap: BeamSwap | None = None


def decoding_findings(
    subject: AuditedModel, expected: ExpectedMask, judged: Tensor, distances: Distances
) -> Iterator[Finding | str]:
    """The outputs decoded with a cache beside those of one call, until something differs."""
    decode, why = decoder_of(subject)
    if decode is not None and expected.documents is not None:
        decode, why = None, "decoding with a cache was not tried, because the batch packs documents"
    if decode is None:
        if why:
            yield why
        return
    ends = stops(subject.length, subject.signal_places)
    for turn, make in enumerate((_as_it_is, _padded_context, _beams)):
        trial = make(subject, judged, ends, decode)
        if trial is None:
            continue
        try:
            with torch.no_grad():
                distance = _distance(trial, decode, ends, distances)
        except NoCache as error:
            yield f"decoding with {'a cache' if turn == 0 else trial.what} was not tried, because {error}"
            return
        except Exception as error:  # any model may raise anything here, and that is what is reported
            # with pictures only `generate` knows how a step is called, which a bare call need not survive
            fails = turn == 0 and not bool(subject.signal_places.any())
            yield _failed(error) if fails else f"decoding with {trial.what or 'a cache'} failed: {line_of(error)}"
            return
        if float(distance.max()) > distances.tolerance:
            yield _differs(trial, distance, ends)
            return


def _as_it_is(subject: AuditedModel, judged: Tensor, ends: list[int], decode: Decode) -> DecodingTrial:
    return DecodingTrial("", subject, judged)


def _padded_context(subject: AuditedModel, judged: Tensor, ends: list[int], decode: Decode) -> DecodingTrial | None:
    """The call with the end of the context told to be padding: a mask that is forgotten later on shows then."""
    context = context_of(subject)
    if context is None or context.is_signal or not context.padding or not bool(context.real.all()):
        return None
    parameters = inspect.signature(subject.model.forward).parameters
    size = context.real.shape[1]
    if size < 2 or not (
        context.padding in parameters
        or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    ):
        return None
    flags = torch.ones_like(context.real, dtype=torch.int64)
    flags[1 if subject.batch > 1 else 0 :, size - max(1, size // 3) :] = 0
    padding_flags = flags.bool() if context.name == "context" else flags
    keywords = {**subject.keywords, context.padding: padding_flags.to(context.value.device)}
    return DecodingTrial("padding in the context", subject.changed(subject.inputs, keywords), judged)


def _beams(subject: AuditedModel, judged: Tensor, ends: list[int], decode: Decode) -> DecodingTrial | None:
    """Two beams for each sample, the second with other tokens, which change places half-way."""
    tensors = [value for value in subject.keywords.values() if isinstance(value, Tensor)]
    of_samples = all(value.ndim and len(value) in (1, subject.batch) for value in tensors)
    if (
        not has_beams(decode) or len(ends) <= BEAMS_PER_SAMPLE or not of_samples
    ):  # patches of all pictures lie in one row
        return None

    def doubled(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.ndim > 0 and len(value) == subject.batch
        return value.repeat_interleave(BEAMS_PER_SAMPLE, dim=0) if fits else value

    beams = subject.changed(doubled(subject.inputs), {name: doubled(value) for name, value in subject.keywords.items()})
    beams.signal_places, judged = doubled(subject.signal_places), doubled(judged)
    second = judged.clone()
    second[::BEAMS_PER_SAMPLE] = False
    second[:, 0] = False
    beams.inputs = beams.other_inputs(second, torch.Generator().manual_seed(SEED))
    rows = torch.arange(BEAMS_PER_SAMPLE * subject.batch).unflatten(0, (-1, BEAMS_PER_SAMPLE)).flip(1).flatten()
    swap = BeamSwap(ends[(len(ends) - 1) // 2], rows.to(subject.inputs.device))
    return DecodingTrial("beams", beams, judged, swap)


def _distance(trial: DecodingTrial, decode: Decode, ends: list[int], distances: Distances) -> Tensor:
    """How far each output that counts is from that of one call, float64 `[b, n]`."""
    at_once = distances.baseline if trial.what == "" else trial.subject.outputs()
    outputs = decode(trial.subject, ends, trial.swap)
    return torch.where(trial.judged, distances.between(at_once, outputs), 0.0)


def _differs(trial: DecodingTrial, distance: Tensor, ends: list[int]) -> Finding:
    b, q = (int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    how = f"{ends[0]} tokens, then step by step" + f", with {trial.what}" * bool(trial.what)
    if trial.swap is not None:
        where, fix = (
            f"sample {b // BEAMS_PER_SAMPLE}, output {q}",
            "reorder all that is remembered of earlier tokens with the beams",
        )
    else:
        where = f"sample {b}, output {q}"
        fix = "find what does not know which tokens came before: positions, a mask, or a part that sees new ones only"
    if "decoder_" in str(trial.subject.name):
        fix += "; the padding of the context must go to every step"
    message = (
        f"decoded with a cache ({how}) the output differs by {float(distance[b, q]):.2g} from that of one call, which "
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
