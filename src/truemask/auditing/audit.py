"""`audit`: what a model's outputs really depend on, held to its mask; `assert_no_leak` is one line of a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truemask.auditing import checks
from truemask.auditing.amplified_probes import look_by_larger_changes
from truemask.auditing.batch_invariance import padding_findings
from truemask.auditing.cached_decoding import decoding_findings
from truemask.auditing.cross_attention import context_findings
from truemask.auditing.determinism import unsteady_calls, unsteady_in_training
from truemask.auditing.distances import Distances
from truemask.auditing.expected_masks import ExpectedMask, check_fit, expected_mask_of, matrix_of, reach_of
from truemask.auditing.multimodal import VectorModel, without_signals
from truemask.auditing.placeholders import placeholders
from truemask.auditing.probes import Dependencies, ProgressCallback, confirm, look, probed_positions
from truemask.auditing.report import Report
from truemask.auditing.subject import AuditedModel, AuditError, undisturbed
from truemask.auditing.torch_modules import without_queries
from truemask.common.finding import Finding, Findings
from truemask.common.formatting import describe

MAX_POSITIONS = 128


def audit(
    model: nn.Module,
    batch: Tensor | Mapping[str, Any],
    mask: object = None,
    *,
    layers: int | None = None,
    seeds: int = 2,
    positions: int = MAX_POSITIONS,
    train: bool = False,
    cache: bool = True,
    progress: ProgressCallback | None = None,
) -> Report:
    """What each output of a model really depends on, held to the mask that it should run.

    The model is a black box: tokens or embeddings go in, outputs for each position come out. What matters is found by
    gradients and by changing one position at a time, and compared with what the mask lets through all the layers (a
    position keeps its own input, so a window of w keys reaches `layers * (w - 1)` back). What cross-attention reads is
    replaced, too: its padding must not matter, nor what other samples read. A difference that is seen is a proof; that
    nothing is seen is evidence, as good as the number of seeds.

    It costs about `2 * seeds * min(n, positions)` forwards and backwards; the model's mode, buffers and gradients and
    all random generators are put back.

    Args:
        model: any module whose result holds a float tensor `[b, n, ...]`: a tensor, a tuple, or an object with
            `logits` or `last_hidden_state`.
        batch: token ids `[b, n]`, embeddings `[b, n, d]`, or a dict of keywords: `input_ids`, `attention_mask`, ...
            Of `pixel_values` and sound, the vectors are changed that the model makes of them; places of images in
            a text are left as they are.
        mask: what it should run: a mask, its text, a bool tensor for `dense`, or a list with one for each layer. None:
            what the model claims, with what `tm.use` gave it. The padding of the batch is ANDed to all of these, and
            an expression counts real tokens; a tensor counts rows.
        layers: how many layers run it; None: what the model says, else any number of them.
        seeds: how often everything is tried, with other replacements and other sums of outputs.
        positions: how many positions are probed; of longer texts the first, the last and a random choice.
        train: audit in training mode, with the same dropout in every call; otherwise in eval mode.
        cache: also decode with a cache and compare, where the model is causal and the audit knows its cache.
        progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        A `Report`: `.findings`, `.ok`, `.exit_code`, `.visible` (bool `[b, n, n]`), and text and pictures when printed.

    Raises:
        AuditError: a ValueError, if the batch, the outputs or the mask do not fit.

    >>> from truemask.nn.layers import Decoder
    >>> report = audit(Decoder(dim=16, depth=1, heads=2), torch.randn(1, 6, 16))
    >>> report.ok, report.visible[0].int().tolist()[1]
    (True, [1, 1, 0, 0, 0, 0])
    """
    _check(seeds, positions)
    subject = AuditedModel(*without_queries(*without_signals(model, batch)))
    was_training = subject.model.training
    with undisturbed(subject.model, train=train):
        measurements = _measured(subject, mask, layers, seeds, positions, progress or _silent)
        unsteady = unsteady_calls(subject, measurements.distances, train)
        results = [*unsteady, *measurements.findings(steady=not unsteady, cache=cache)]
    if was_training and not train and not unsteady:
        results += unsteady_in_training(subject, measurements.distances)
    return measurements.report(results, positions)


def assert_no_leak(model: nn.Module, batch: Tensor | Mapping[str, Any], mask: object = None, **options: Any) -> Report:
    """Raise AssertionError, with the report as its text, if an output depends on what its mask hides.

    What counts: later, hidden or padded inputs that matter, documents that mix, and neighbours in the batch; and
    whatever keeps the audit from seeing any of it: outputs that are no numbers or drown in noise, a model in which no
    output depends on another position at all (projections that begin at zero), and a window through layers that nobody
    counted (pass `layers=`). Blind spots and caches do not count, since nothing leaks by them: ask `audit`. The
    arguments are those of `audit`.

    >>> from truemask.nn.layers import Encoder
    >>> assert_no_leak(Encoder(dim=16, depth=1, heads=2), torch.randn(1, 4, 16), mask="causal")
    Traceback (most recent call last):
        ...
    AssertionError: audit of Encoder, 1 sample of 4 positions: held to `causal` ...
    """
    report = audit(model, batch, mask, **{"cache": False, **options})
    if set(report.findings.codes) & {*checks.LEAKS, *checks.UNSEEN}:
        raise AssertionError(str(report))
    return report


def _check(seeds: object, positions: object) -> None:
    for name, value, least in (("seeds", seeds, 1), ("positions", positions, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise AuditError(f"{name}= is {describe(value)}; expected a whole number, {least} or more")


def _silent(what: str, done: int, of: int) -> None:
    """The progress of an audit that nobody watches."""


def _measured(
    subject: AuditedModel, mask: object, layers: int | None, seeds: int, positions: int, progress: ProgressCallback
) -> _Measurements:
    """What the mask lets through, and what was seen to matter."""
    with torch.no_grad():
        baseline = subject.find_embedding()
    expected = check_fit(expected_mask_of(subject, mask, layers), subject)
    distances = Distances(baseline)
    distances.listen(subject)
    reach = reach_of(expected, subject)
    dependencies = look(subject, distances, seeds=seeds, positions=positions, progress=progress)
    confirm(subject, dependencies, ~reach)
    measurements = _Measurements(subject, expected, distances, reach, dependencies, seeds)
    hidden = ~reach & measurements.judged[:, :, None] & ~subject.signal_places[:, None, :]
    look_by_larger_changes(subject, distances, dependencies, hidden, progress)
    distances.listen(subject, times=1)  # a model that drifts from call to call is heard now
    return measurements


def _unaudited_notes(subject: AuditedModel) -> list[str]:
    """What of this call no audit changes, in words."""
    notes = list(subject.model.outside) if isinstance(subject.model, VectorModel) else []
    if bool(subject.signal_places.any()):
        names = placeholders(subject.model)
        ids = subject.inputs[subject.signal_places.to(subject.inputs.device)].unique().tolist()
        tokens = ", ".join(f"{token} ({names[token]})" for token in ids)
        notes.append(
            f"{int(subject.signal_places.sum())} places hold images, sounds or videos, by the tokens {tokens}: they "
            "were never replaced, moved or removed, so nothing is known of which outputs depend on each of them"
        )
    return notes


@dataclass(frozen=True)
class _Measurements:
    """Everything that was measured of one call."""

    subject: AuditedModel
    expected: ExpectedMask
    distances: Distances
    reach: Tensor
    dependencies: Dependencies
    seeds: int

    @property
    def judged(self) -> Tensor:
        """The outputs that are held to the mask, bool `[b, n]`."""
        everyone = torch.ones(self.reach.shape[:2], dtype=torch.bool)
        return everyone if self.expected.real is None else self.expected.real

    @property
    def looked(self) -> Tensor:
        """Where not seeing anything says something: not where outputs were NaN from the beginning.

        A position's own input is counted only if the mask shows it, since a model need not hand it on. The places of
        images and sounds are never changed.
        """
        diagonal = torch.eye(self.subject.length, dtype=torch.bool)
        return (
            self.dependencies.looked
            & (self.shown | ~diagonal)
            & self.finite[:, :, None]
            & ~self.subject.signal_places[:, None, :]
        )

    @property
    def shown(self) -> Tensor:
        """What the mask of some layer lets an output attend to, bool `[b, n, n]`."""
        return torch.stack([matrix_of(mask, self.subject) for mask in self.expected.masks]).any(dim=0)

    @property
    def finite(self) -> Tensor:
        """The outputs that are numbers before anything was changed, bool `[b, n]`; banned logits may be infinite."""
        outputs = self.distances.baseline
        return (~outputs.isnan().any(dim=-1) & outputs.isfinite().any(dim=-1)).cpu()

    def findings(self, *, steady: bool, cache: bool) -> list[Finding | str]:
        """What was found, and (as text) what could not be looked for.

        Calls of other shapes draw other random numbers, so they are compared only where equal calls agree.
        """
        judged = self.judged[:, :, None]
        hidden, visible = ~self.reach & judged, self.dependencies.visible
        blind = self.reach & ~visible & self.looked & judged
        cache = cache and steady and not bool(self.reach.triu(1).any())
        by_context = [*context_findings(self.subject, self.distances, self.reach, self.seeds)]
        sound = not any(isinstance(result, Finding) and result.severity == "error" for result in by_context)
        return [
            *self._not_finite(),
            *checks.nothing_seen(visible, self.reach & judged & self.looked),
            *checks.leaks(self.subject, self.expected, self.dependencies, visible & hidden, self.reach),
            *checks.unbounded(self.expected, visible & judged, self.reach, self.shown),
            *checks.neighbours(self.dependencies),
            *checks.small_positions(self.subject, self.expected),
            *by_context,
            *(padding_findings(self.subject, self.expected, self.distances, sound) if steady else ()),
            *checks.blind_spots(self.expected, blind, self.reach & judged, self.dependencies, self.seeds),
            *(decoding_findings(self.subject, self.expected, self.judged, self.distances) if cache else ()),
            *(() if self.dependencies.neighbours else checks.poisoned(self.subject, self.distances, hidden & ~visible)),
        ]

    def _not_finite(self) -> list[Finding]:
        bad = ~self.finite & self.judged
        if not bool(bad.any()):
            return []
        b, q = (int(i) for i in bad.nonzero()[0])
        text = f"{int(bad.sum())} outputs are NaN or infinite before anything was changed; of these little can be said"
        fix = "a query that sees no key gives NaN in many kernels; in `truemask.attend` it gives 0"
        return [Finding("not-finite", "warning", f"sample {b}, output {q}", text, fix)]

    def report(self, results: list[Finding | str], positions: int) -> Report:
        """The findings as a report."""
        b, n = self.subject.batch, self.subject.length
        layers = self.expected.layers
        through = f", through {layers} layer{'s' * (layers != 1)}" if layers else ", through any number of layers"
        title = (
            f"audit of {type(self.subject.model).__name__}, {b} sample{'s' * (b != 1)} of {n} positions: held to "
            f"{self.expected.text} ({self.expected.source}){through}"
        )
        notes = [
            *self.expected.notes,
            *_unaudited_notes(self.subject),
            *(result for result in results if isinstance(result, str)),
        ]
        more = self.reach & ~self.shown & ~torch.eye(n, dtype=torch.bool)
        if layers is None and bool(more.any()):
            notes.append(
                "nobody said how many layers there are, so whatever the mask lets through any number of them was "
                "allowed; pass layers= to be held to less"
            )
        if self.dependencies.no_gradient:
            notes.append(f"gradients could not be followed, changes alone were tried: {self.dependencies.no_gradient}")
        if b == 1:
            notes.append("the batch has one sample, so nothing is known of neighbours")
        if n > positions:
            probes = probed_positions(n, positions)
            notes.append(f"{len(probes)} of {n} positions were probed: {', '.join(map(str, probes[:12]))}, ...")
        findings = Findings(result for result in results if isinstance(result, Finding))
        return Report(
            title, findings, tuple(notes), self.reach, self.dependencies.visible, self.looked, self.judged.expand(b, n)
        )
