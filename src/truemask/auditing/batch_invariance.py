"""Batched against alone: each padded sample is run once more, cut to what is real of it and of what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from truemask.auditing.cross_attention import Context, context_of
from truemask.auditing.distances import Distances
from truemask.auditing.expected_masks import ExpectedMask
from truemask.auditing.multimodal import VectorModel
from truemask.auditing.subject import AuditedModel, line_of
from truemask.common.finding import Finding
from truemask.interop.positions import first_position

MAX_SAMPLES_ALONE = 4  # padded samples that are run once more without their padding
START_POSITIONS = "seq_start_pos"


def padding_findings(
    subject: AuditedModel, expected: ExpectedMask, distances: Distances, sound: bool
) -> Iterator[Finding | str]:
    """Each padded sample, run once more without its padding; and without that of its context, if that was `sound`."""
    context = context_of(subject)
    real = torch.ones(subject.batch, subject.length, dtype=torch.bool) if expected.real is None else expected.real
    context_real = real if context is None else context.real
    whole = real.all(dim=1) & (context_real.all(dim=1) | ~torch.tensor(sound))
    padded = (~whole & real.any(dim=1)).nonzero().flatten().tolist()
    if not padded:
        return
    strange = [name for name in subject.keywords if not _cuts(subject, context, name)]
    if strange or isinstance(subject.model, VectorModel):
        because = f"of {', '.join(strange)} in the batch" if strange else "what makes their vectors lies outside"
        yield f"padded samples were not run without their padding, because {because}"
        return
    for s in padded[:MAX_SAMPLES_ALONE]:
        places = real[s].nonzero().flatten()
        try:
            with torch.no_grad():
                alone = _alone(subject, context, s, places, context_real[s].nonzero().flatten()).outputs()
        except Exception as error:  # a mask of `tm.use` that holds data for all samples, or anything else
            yield f"padded samples could not be run without their padding: {line_of(error)}"
            return
        distance = distances.between(alone, distances.baseline[s : s + 1, places])[0]
        worst = int(distance.argmax())
        if float(distance[worst]) > distances.tolerance:
            yield _padded(s, int(places[worst]), float(distance[worst]), subject, bool(real[s].all()))
            return


def _padded(s: int, place: int, distance: float, subject: AuditedModel, of_context: bool) -> Finding:
    fix = "make padding invisible, and let positions begin at each sample's first real token"
    if "attention_mask" in subject.keywords and "position_ids" not in subject.keywords and not of_context:
        first = first_position(subject.model)
        fix += f": position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0){f' + {first}' * bool(first)}"
    what = (
        "the same tokens alone, without padding, give" if not of_context else "alone, without padded context, it gives"
    )
    return Finding(
        "padded-differs",
        "error",
        f"sample {s}, output {place}",
        f"{what} an output that differs by {distance:.2g}: padding matters, which this proves",
        fix,
    )


def _cuts(subject: AuditedModel, context: Context | None, name: str) -> bool:
    """Whether a keyword can be cut to one sample and some places."""
    value = subject.keywords[name]
    if value is None or name == START_POSITIONS or (context is not None and name in (context.name, context.padding)):
        return True
    if isinstance(value, Tensor):
        return value.ndim >= 2 and value.shape[0] in (1, subject.batch) and value.shape[1] == subject.length
    return isinstance(value, (bool, int, float, str))


def _alone(
    subject: AuditedModel, context: Context | None, s: int, places: Tensor, context_places: Tensor
) -> AuditedModel:
    """The call of sample `s` at its real `places`, reading the places `context_places` of its context."""

    def cut(name: str | None, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        of_context = context is not None and name in (context.name, context.padding)
        sample = value[min(s, len(value) - 1)][None]
        if of_context and context is not None and context.is_signal:
            return sample
        return sample[:, (context_places if of_context else places).to(value.device)]

    keywords = {name: cut(name, value) for name, value in subject.keywords.items() if name != START_POSITIONS}
    return subject.changed(cut(None, subject.inputs), keywords)
