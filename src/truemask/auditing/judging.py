"""What was seen, held to what was promised: each kind of difference becomes a finding, with its witness and way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from truemask.auditing.caches import decoder_of, stops
from truemask.auditing.claims import Claim
from truemask.auditing.kinds import ASSUMED
from truemask.auditing.models import Subject
from truemask.auditing.probes import Seen, look_with_poison
from truemask.auditing.ruler import Ruler
from truemask.diagnosis.finding import Finding

LEAKS = ("future-leak", "leak", "documents-mix", "padding-matters", "padded-differs", "batch-neighbours")
UNSEEN = ("not-finite", "nothing-seen", "unbounded-layers")  # what keeps leaks from being seen
MOST_ALONE = 4  # padded samples that are run once more without their padding

FIXES = {
    "future-leak": "mask the later keys in every layer: attention needs `causal` ANDed with whatever else it gets; "
    "look for a mask of the wrong polarity or axis, and for layers that mix positions without a mask",
    "leak": "look for the layer that mixes these positions: a mask dropped, inverted, or read along another axis",
    "documents-mix": "keep documents apart with `causal.packed(lengths)`; transformers looks for documents in "
    "position_ids only without an attention_mask and without a cache: leave the first out and pass use_cache=False",
    "padding-matters": "hide padded keys from every real query, in every layer, by padding that reaches the attention "
    "(True = a real token here and in x-transformers, 1 in transformers, False in torch.nn)",
}


def leaks(subject: Subject, claim: Claim, seen: Seen, leaked: Tensor, reach: Tensor) -> Iterator[Finding]:
    """One finding for each kind of input that matters and must not; `leaked` is bool `[b, n, n]`."""
    n = subject.length
    later = torch.ones(n, n, dtype=torch.bool).triu(1).expand_as(leaked)
    rest = leaked
    kinds: list[tuple[str, Tensor]] = []
    if claim.real is not None:
        kinds.append(("padding-matters", ~claim.real[:, None, :].expand_as(leaked)))
    if claim.documents is not None:
        kinds.append(("documents-mix", claim.documents[:, :, None] != claim.documents[:, None, :]))
    if not bool((reach & later).any()):
        kinds.append(("future-leak", later))
    for code, cells in [*kinds, ("leak", torch.ones_like(leaked))]:
        if bool((rest & cells).any()):
            yield _leak(code, rest & cells, seen, claim)
        rest = rest & ~cells


def _leak(code: str, cells: Tensor, seen: Seen, claim: Claim) -> Finding:
    b, q, k = _witness(cells, seen.size)
    what = {
        "padding-matters": "which is padding",
        "documents-mix": "which belongs to another document",
        "future-leak": "which comes later",
        "leak": f"which {claim.text} hides, through all layers",
    }[code]
    if bool(seen.by_change[b, q, k]):
        more_so = " and its gradient is not 0" if bool(seen.by_gradient[b, q, k]) else ""
        proof = f"changing it moved the output by {float(seen.size[b, q, k]):.2g}{more_so}, which proves it"
    else:
        proof = "its gradient is not 0 and grows in proportion, though no change of it was seen to move the output"
    many = int(cells.sum())
    more = f" ({many} such pairs in {int(cells.flatten(1).any(dim=1).sum())} of {len(cells)} samples)" * (many > 1)
    message = f"output {q} depends on input {k}, {what}{more}: {proof}"
    return Finding(code, "error", f"sample {b}, output {q}, input {k}", message, FIXES[code])


def _witness(cells: Tensor, size: Tensor) -> tuple[int, int, int]:
    """The cell where most was seen; among cells without a size, the first."""
    flat = torch.where(cells, size.nan_to_num(posinf=1e300), -1.0).flatten()
    b, q, k = (int(i) for i in torch.unravel_index(flat.argmax(), cells.shape))
    return b, q, k


def blind_spots(claim: Claim, blind: Tensor, reach: Tensor, seen: Seen, seeds: int) -> Iterator[Finding]:
    """What may matter and was never seen to: a note only, where the mask was merely assumed."""
    many = int(blind.sum())
    if not many:
        return
    b, q, k = (int(i) for i in blind.nonzero()[0])
    later = torch.ones_like(blind[0]).triu(1)
    text = f"output {q} may depend on input {k} and was never seen to ({many} such pairs)"
    if bool((blind & later).any()) and not bool((seen.visible & later).any()):
        text += "; no output depends on any later input: the model looks back only, and its mask does not say so"
    back = _farthest(seen.visible)
    if back < _farthest(reach):
        text += f"; the farthest input seen to matter is {back} back, and the mask reaches {_farthest(reach)}"
    ways = "changing inputs" if seen.no_gradient else "changing inputs and following gradients"
    yield Finding(
        "blind-spots",
        "note" if claim.source == ASSUMED else "warning",
        f"sample {b}, output {q}, input {k}",
        f"{text}. {ways[0].upper()}{ways[1:]}, {seeds} seeds: evidence, not proof",
        "if the mask is what was meant, look for a flag or mask that the model ignores; if the model is right, state "
        "its mask with mask=, or the number of its layers with layers=",
    )


def _farthest(cells: Tensor) -> int:
    """How far back the farthest input is that some output has."""
    places = cells.any(dim=0).nonzero()
    return int((places[:, 0] - places[:, 1]).max()) if len(places) else 0


def nothing_seen(visible: Tensor, may: Tensor) -> Iterator[Finding]:
    """No output depends on another position, although the mask shows some: then no leak could be seen either."""
    others = ~torch.eye(may.shape[1], dtype=torch.bool)
    if bool((may & others).any()) and not bool((visible & others).any()):
        yield Finding(
            "nothing-seen",
            "warning",
            "everywhere",
            "no output was seen to depend on any other position, although the mask shows some: whether anything leaks "
            "cannot be seen either",
            "audit weights that are trained, or at least not zero (projections that begin at zero hide everything); of "
            "a model that is meant to mix nothing, state it: mask='local(0)'",
        )


def unbounded(claim: Claim, visible: Tensor, reach: Tensor, shown: Tensor) -> Iterator[Finding]:
    """Inputs that matter although no layer's mask shows them, in a model whose layers nobody counted."""
    beyond = visible & reach & ~shown & ~torch.eye(reach.shape[1], dtype=torch.bool)
    if claim.layers is None and bool(beyond.any()):
        b, q, k = (int(i) for i in beyond.nonzero()[0])
        yield Finding(
            "unbounded-layers",
            "note",
            f"sample {b}, output {q}, input {k}",
            f"output {q} depends on input {k}, which {claim.text} hides in one layer and lets through several: nobody "
            "said how many layers there are, so a model that ignores the mask may look the same",
            "pass layers=",
        )


def neighbours(seen: Seen) -> Iterator[Finding]:
    """Samples of a batch that notice each other."""
    if not seen.neighbours:
        return
    (s, t), size = max(seen.neighbours.items(), key=lambda item: item[1])
    yield Finding(
        "batch-neighbours",
        "error",
        f"sample {t}, by sample {s}",
        (
            f"the outputs of sample {t} moved by {size:.2g} when sample {s} was replaced"
            if size
            else f"the outputs of sample {t} have a gradient at sample {s}"
        )
        + f" ({len(seen.neighbours)} such pairs): it depends on its neighbour in the batch",
        "look for statistics over the batch (BatchNorm in training mode), a reshape that mixes samples with heads or "
        "positions, and experts that share a capacity",
    )


def padded_alone(subject: Subject, claim: Claim, ruler: Ruler) -> Iterator[Finding | str]:
    """Each padded sample, run once more alone and without its padding."""
    if claim.real is None:
        return
    strange = [
        name
        for name, value in subject.keywords.items()
        if name != "seq_start_pos" and value is not None and not _cuts(subject, value)
    ]
    if strange:
        yield f"padded samples were not run without their padding, because of {', '.join(strange)} in the batch"
        return
    for s in (~claim.real).any(dim=1).nonzero().flatten().tolist()[:MOST_ALONE]:
        places = claim.real[s].nonzero().flatten()
        if not len(places):
            continue
        try:
            with torch.no_grad():
                alone = _alone(subject, s, places)
        except Exception as error:  # a mask of `tm.use` that holds data for all samples, or anything else
            yield f"padded samples could not be run without their padding: {_line(error)}"
            return
        apart = ruler.between(alone, ruler.baseline[s : s + 1, places])[0]
        worst = int(apart.argmax())
        if float(apart[worst]) > ruler.tolerance:
            yield _padded(s, int(places[worst]), float(apart[worst]), subject)
            return


def _padded(s: int, place: int, apart: float, subject: Subject) -> Finding:
    fix = "make padding invisible, and let positions begin at each sample's first real token"
    if "attention_mask" in subject.keywords and "position_ids" not in subject.keywords:
        fix += ": position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)"
    return Finding(
        "padded-differs",
        "error",
        f"sample {s}, output {place}",
        f"the same tokens alone, without padding, give an output that differs by {apart:.2g}: padding matters, which "
        "this proves",
        fix,
    )


def _cuts(subject: Subject, value: Any) -> bool:
    """Whether a keyword can be cut to one sample and some positions."""
    if isinstance(value, Tensor):
        return value.ndim >= 2 and value.shape[0] in (1, subject.batch) and value.shape[1] == subject.length
    return isinstance(value, (bool, int, float, str))


def _alone(subject: Subject, s: int, places: Tensor) -> Tensor:
    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[min(s, len(value) - 1)][None][:, places.to(value.device)]

    kept = {name: cut(value) for name, value in subject.keywords.items() if name != "seq_start_pos"}
    whole, subject.keywords = subject.keywords, kept
    try:
        return subject.outputs(cut(subject.inputs))
    finally:
        subject.keywords = whole


def cached(subject: Subject, claim: Claim, judged: Tensor, ruler: Ruler) -> Iterator[Finding | str]:
    """The outputs decoded with a cache beside those of one call."""
    decode, why = decoder_of(subject)
    if decode is not None and claim.documents is not None:
        decode, why = None, "decoding with a cache was not tried, because the batch packs documents"
    if decode is None or subject.length < 2:
        if why:
            yield why
        return
    ends = stops(subject.length)
    try:
        with torch.no_grad():
            outputs = decode(subject, ends)
    except Exception as error:  # any model may raise anything here, and that is what is reported
        yield Finding(
            "cache-fails",
            "warning",
            "decoding",
            f"the call works at once and fails with a cache: {_line(error)}",
            "decode without a cache (use_cache=False), or with a mask that the cache understands",
        )
        return
    if outputs is None:
        yield "decoding with a cache was not tried, because the model returned none"
        return
    apart = torch.where(judged, ruler.moved(outputs), 0.0)
    b, q = (int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    if float(apart[b, q]) > ruler.tolerance:
        yield Finding(
            "cached-differs",
            "error",
            f"sample {b}, output {q}",
            f"decoded with a cache ({ends[0]} tokens, then step by step) the output differs by "
            f"{float(apart[b, q]):.2g} from that of one call, which proves that it is not generated as it was trained",
            "find what does not know which tokens came before: positions, a mask, or a part that sees new ones only",
        )


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {said[0][:160]}"


def poisoned(subject: Subject, ruler: Ruler, hidden: Tensor) -> Iterator[Finding]:
    """NaN or huge numbers that reach where they are hidden: many kernels let them, so it is a note."""
    if not bool(hidden.any()):
        return
    for what, k, noticed in look_with_poison(subject, ruler, hidden):
        if bool(noticed.any()):
            b, q = (int(i) for i in noticed.nonzero()[0])
            yield Finding(
                "poison-spreads",
                "note",
                f"sample {b}, output {q}, input {k}",
                f"with {what} planted in input {k}, which must not matter, output {q} is not finite: hidden values are "
                "multiplied by 0, and 0 times NaN is NaN. Finite values may still be hidden well",
                "select with the mask, do not multiply by it; `truemask.attend` contains such values on the CPU",
            )
            return
