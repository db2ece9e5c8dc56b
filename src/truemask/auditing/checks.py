"""What was seen, held to what was promised: each kind of difference becomes a finding, with its witness and way out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from truemask.auditing.declared_masks import ASSUMED, is_hugging_face
from truemask.auditing.distances import Distances
from truemask.auditing.expected_masks import ExpectedMask
from truemask.auditing.probes import Dependencies, look_with_poison
from truemask.auditing.subject import AuditedModel
from truemask.common.finding import Finding
from truemask.interop.positions import first_position

LEAKS = ("future-leak", "leak", "documents-mix", "padding-matters", "padded-differs", "batch-neighbours")
UNSEEN = ("not-finite", "nothing-seen", "unbounded-layers")  # what keeps leaks from being seen

FIXES = {
    "future-leak": "mask the later keys in every layer: attention needs `causal` ANDed with whatever else it gets; "
    "look for a mask of the wrong polarity or axis, and for layers that mix positions without a mask",
    "leak": "look for the layer that mixes these positions: a mask dropped, inverted, or read along another axis",
    "documents-mix": "keep documents apart with `{own}.packed(lengths)`",
    "padding-matters": "hide padded keys from every real query, in every layer, by padding that reaches the attention "
    "(True = a real token here and in x-transformers, 1 in transformers, False in torch.nn)",
}
DOCUMENTS_HINT = (
    "; transformers looks for documents in position_ids only without an attention_mask and without a cache: leave the "
    "first out and pass use_cache=False"
)


def leaks(
    subject: AuditedModel, expected: ExpectedMask, dependencies: Dependencies, leaked: Tensor, reach: Tensor
) -> Iterator[Finding]:
    """One finding for each kind of input that matters and must not; `leaked` is bool `[b, n, n]`."""
    n = subject.length
    later = torch.ones(n, n, dtype=torch.bool).triu(1).expand_as(leaked)
    rest = leaked
    kinds: list[tuple[str, Tensor]] = []
    if expected.real is not None:
        kinds.append(("padding-matters", ~expected.real[:, None, :].expand_as(leaked)))
    if expected.documents is not None:
        kinds.append(("documents-mix", expected.documents[:, :, None] != expected.documents[:, None, :]))
    if not bool((reach & later).any()):
        kinds.append(("future-leak", later))
    for code, cells in [*kinds, ("leak", torch.ones_like(leaked))]:
        if bool((rest & cells).any()):
            hint = is_hugging_face(subject) and not bool((reach & later).any())
            yield _leak(code, rest & cells, dependencies, expected, hint)
        rest = rest & ~cells


def _leak(code: str, cells: Tensor, dependencies: Dependencies, expected: ExpectedMask, hint: bool) -> Finding:
    b, q, k = _witness(cells, dependencies.size)
    what = {
        "padding-matters": "which is padding",
        "documents-mix": "which belongs to another document",
        "future-leak": "which comes later",
        "leak": f"which {expected.text} hides, through all layers",
    }[code]
    if bool(dependencies.by_change[b, q, k]):
        more_so = " and its gradient is not 0" if bool(dependencies.by_gradient[b, q, k]) else ""
        proof = f"changing it moved the output by {float(dependencies.size[b, q, k]):.2g}{more_so}, which proves it"
    elif bool(dependencies.by_larger[b, q, k]):
        proof = (
            f"a change of it moves the output by about {float(dependencies.size[b, q, k]):.2g}, less than sums may "
            "round, but in the same direction again and again, and more so for larger changes, which rounding does not"
        )
    else:
        proof = "its gradient is not 0 and grows in proportion, though no change of it was seen to move the output"
    pairs = int(cells.sum())
    more = f" ({pairs} such pairs in {int(cells.flatten(1).any(dim=1).sum())} of {len(cells)} samples)" * (pairs > 1)
    message = f"output {q} depends on input {k}, {what}{more}: {proof}"
    fix = FIXES[code].format(own=expected.own_text) + DOCUMENTS_HINT * (hint and code == "documents-mix")
    return Finding(code, "error", f"sample {b}, output {q}, input {k}", message, fix)


def _witness(cells: Tensor, size: Tensor) -> tuple[int, int, int]:
    """The cell where most was seen; among cells without a size, the first."""
    flat = torch.where(cells, size.nan_to_num(posinf=1e300), -1.0).flatten()
    b, q, k = (int(i) for i in torch.unravel_index(flat.argmax(), cells.shape))
    return b, q, k


def blind_spots(
    expected: ExpectedMask, blind: Tensor, reach: Tensor, dependencies: Dependencies, seeds: int
) -> Iterator[Finding]:
    """What may matter and was never seen to: a note only, where the mask was merely assumed."""
    pairs = int(blind.sum())
    if not pairs:
        return
    b, q, k = (int(i) for i in blind.nonzero()[0])
    later = torch.ones_like(blind[0]).triu(1)
    text = f"output {q} may depend on input {k} and was never seen to ({pairs} such pairs)"
    if bool((blind & later).any()) and not bool((dependencies.visible & later).any()):
        text += "; no output depends on any later input: the model looks back only, and its mask does not say so"
    back = _farthest(dependencies.visible)
    if back < _farthest(reach):
        text += f"; the farthest input seen to matter is {back} back, and the mask reaches {_farthest(reach)}"
    ways = "changing inputs" if dependencies.no_gradient else "changing inputs and following gradients"
    yield Finding(
        "blind-spots",
        "note" if expected.source == ASSUMED else "warning",
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


def unbounded(expected: ExpectedMask, visible: Tensor, reach: Tensor, shown: Tensor) -> Iterator[Finding]:
    """Inputs that matter although no layer's mask shows them, in a model whose layers nobody counted."""
    beyond = visible & reach & ~shown & ~torch.eye(reach.shape[1], dtype=torch.bool)
    if expected.layers is None and bool(beyond.any()):
        b, q, k = (int(i) for i in beyond.nonzero()[0])
        yield Finding(
            "unbounded-layers",
            "note",
            f"sample {b}, output {q}, input {k}",
            f"output {q} depends on input {k}, which {expected.text} hides in one layer and lets through several: "
            "nobody said how many layers there are, so a model that ignores the mask may look the same",
            "pass layers=",
        )


def neighbours(dependencies: Dependencies) -> Iterator[Finding]:
    """Samples of a batch that notice each other."""
    if not dependencies.neighbours:
        return
    (s, t), size = max(dependencies.neighbours.items(), key=lambda item: item[1])
    yield Finding(
        "batch-neighbours",
        "error",
        f"sample {t}, by sample {s}",
        (
            f"the outputs of sample {t} moved by {size:.2g} when sample {s} was replaced"
            if size
            else f"the outputs of sample {t} have a gradient at sample {s}"
        )
        + f" ({len(dependencies.neighbours)} such pairs): it depends on its neighbour in the batch",
        "look for statistics over the batch (BatchNorm in training mode), a reshape that mixes samples with heads or "
        "positions, and experts that share a capacity",
    )


def small_positions(subject: AuditedModel, expected: ExpectedMask) -> Iterator[Finding]:
    """Positions from 0 for a model that keeps the first ones for padding."""
    first, positions = first_position(subject.model), subject.keywords.get("position_ids")
    if not first or not isinstance(positions, Tensor) or positions.ndim != 2:
        return
    small = (positions.cpu() < first).expand(subject.batch, -1)
    small = small if expected.real is None else small & expected.real
    if bool(small.any()):
        b, q = (int(i) for i in small.nonzero()[0])
        yield Finding(
            "positions-too-small",
            "warning",
            f"sample {b}, input {q}",
            f"{type(subject.model).__name__} counts positions from {first} (its padding has the one before), and "
            f"position_ids hold {int(positions.cpu()[small[: len(positions)]].min())}: every token is read at another "
            "place than alone",
            f"pass position_ids + {first}",
        )


def poisoned(subject: AuditedModel, distances: Distances, hidden: Tensor) -> Iterator[Finding]:
    """NaN or huge numbers that reach where they are hidden: many kernels let them, so it is a note."""
    if not bool(hidden.any()):
        return
    for what, k, noticed in look_with_poison(subject, distances, hidden):
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
