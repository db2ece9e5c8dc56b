"""`audit`: what a model's outputs really depend on, held to its mask; `assert_no_leak` is one line of a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truemask.auditing import checks as judging
from truemask.auditing.amplified_probes import look_by_larger_changes
from truemask.auditing.batch_invariance import padded_alone
from truemask.auditing.cached_decoding import decoded
from truemask.auditing.cross_attention import context_findings
from truemask.auditing.determinism import unsteady_calls, unsteady_in_training
from truemask.auditing.distances import Ruler
from truemask.auditing.expected_masks import Claim, checked, claim_of, matrix_of, reach_of
from truemask.auditing.multimodal import Signals, without_signals
from truemask.auditing.placeholders import placeholders
from truemask.auditing.probes import Seen, Step, choose, confirm, look
from truemask.auditing.report import Finding, Findings, Report
from truemask.auditing.subject import AuditError, Subject, undisturbed
from truemask.auditing.torch_modules import without_queries
from truemask.common.formatting import describe

MOST_POSITIONS = 128


def audit(
    model: nn.Module,
    batch: Tensor | Mapping[str, Any],
    mask: object = None,
    *,
    layers: int | None = None,
    seeds: int = 2,
    positions: int = MOST_POSITIONS,
    train: bool = False,
    cache: bool = True,
    progress: Step | None = None,
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
    model, batch = without_queries(*without_signals(model, batch))
    subject = Subject(model, batch)
    given = model.training
    with undisturbed(model, train=train):
        baseline = _baseline(subject)
        claim = checked(claim_of(subject, mask, layers), subject)
        ruler = Ruler(baseline)
        ruler.listen(subject)
        reach = reach_of(claim, subject)
        seen = look(subject, ruler, seeds=seeds, positions=positions, step=progress or _silent)
        confirm(subject, seen, ~reach)
        real = torch.ones(reach.shape[:2], dtype=torch.bool) if claim.real is None else claim.real
        hidden = ~reach & real[:, :, None] & ~subject.held[:, None, :]
        look_by_larger_changes(subject, ruler, seen, hidden, progress or _silent)
        ruler.listen(subject, times=1)  # a model that drifts from call to call is heard now
        facts = _Facts(subject, claim, ruler, reach, seen, seeds)
        unsteady = unsteady_calls(subject, ruler, train)
        found = [*unsteady, *facts.findings(steady=not unsteady, cache=cache)]
    if given and not train and not unsteady:
        with undisturbed(model, train=True):
            found += unsteady_in_training(subject, ruler)
    return facts.report(found, positions)


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
    if set(report.findings.codes) & {*judging.LEAKS, *judging.UNSEEN}:
        raise AssertionError(str(report))
    return report


def _check(seeds: object, positions: object) -> None:
    for name, value, least in (("seeds", seeds, 1), ("positions", positions, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise AuditError(f"{name}= is {describe(value)}; expected a whole number, {least} or more")


def _silent(what: str, done: int, of: int) -> None:
    """The progress of an audit that nobody watches."""


def _baseline(subject: Subject) -> Tensor:
    with torch.no_grad():
        return subject.find_embedding()


def _outside(subject: Subject) -> list[str]:
    """What of this call no audit changes, in words."""
    notes = list(subject.model.outside) if isinstance(subject.model, Signals) else []
    if bool(subject.held.any()):
        named = placeholders(subject.model)
        held = subject.inputs[subject.held.to(subject.inputs.device)].unique().tolist()
        tokens = ", ".join(f"{token} ({named[token]})" for token in held)
        notes.append(
            f"{int(subject.held.sum())} places hold images, sounds or videos, by the tokens {tokens}: they were never "
            "replaced, moved or removed, so nothing is known of which outputs depend on each of them"
        )
    return notes


@dataclass(frozen=True)
class _Facts:
    """Everything that was measured of one call."""

    subject: Subject
    claim: Claim
    ruler: Ruler
    reach: Tensor
    seen: Seen
    seeds: int

    @property
    def judged(self) -> Tensor:
        """The outputs that are held to the mask, bool `[b, n]`."""
        everyone = torch.ones(self.reach.shape[:2], dtype=torch.bool)
        return everyone if self.claim.real is None else self.claim.real

    @property
    def looked(self) -> Tensor:
        """Where not seeing anything says something: not where outputs were NaN from the beginning.

        A position's own input is counted only if the mask shows it, since a model need not hand it on. The places of
        images and sounds are never changed.
        """
        own = torch.eye(self.subject.length, dtype=torch.bool)
        return self.seen.looked & (self.shown | ~own) & self.finite[:, :, None] & ~self.subject.held[:, None, :]

    @property
    def shown(self) -> Tensor:
        """What the mask of some layer lets an output attend to, bool `[b, n, n]`."""
        return torch.stack([matrix_of(mask, self.subject) for mask in self.claim.masks]).any(dim=0)

    @property
    def finite(self) -> Tensor:
        """The outputs that are numbers before anything was changed, bool `[b, n]`; banned logits may be infinite."""
        outputs = self.ruler.baseline
        return (~outputs.isnan().any(dim=-1) & outputs.isfinite().any(dim=-1)).cpu()

    def findings(self, *, steady: bool, cache: bool) -> list[Finding | str]:
        """What was found, and (as text) what could not be looked for.

        Calls of other shapes draw other random numbers, so they are compared only where equal calls agree.
        """
        judged = self.judged[:, :, None]
        hidden, visible = ~self.reach & judged, self.seen.visible
        blind = self.reach & ~visible & self.looked & judged
        cache = cache and steady and not bool(self.reach.triu(1).any())
        by_context = [*context_findings(self.subject, self.ruler, self.reach, self.seeds)]
        sound = not any(isinstance(one, Finding) and one.severity == "error" for one in by_context)
        return [
            *self._not_finite(),
            *judging.nothing_seen(visible, self.reach & judged & self.looked),
            *judging.leaks(self.subject, self.claim, self.seen, visible & hidden, self.reach),
            *judging.unbounded(self.claim, visible & judged, self.reach, self.shown),
            *judging.neighbours(self.seen),
            *judging.small_positions(self.subject, self.claim),
            *by_context,
            *(padded_alone(self.subject, self.claim, self.ruler, sound) if steady else ()),
            *judging.blind_spots(self.claim, blind, self.reach & judged, self.seen, self.seeds),
            *(decoded(self.subject, self.claim, self.judged, self.ruler) if cache else ()),
            *(judging.poisoned(self.subject, self.ruler, hidden & ~visible) if not self.seen.neighbours else ()),
        ]

    def _not_finite(self) -> list[Finding]:
        bad = ~self.finite & self.judged
        if not bool(bad.any()):
            return []
        b, q = (int(i) for i in bad.nonzero()[0])
        text = f"{int(bad.sum())} outputs are NaN or infinite before anything was changed; of these little can be said"
        fix = "a query that sees no key gives NaN in many kernels; in `truemask.attend` it gives 0"
        return [Finding("not-finite", "warning", f"sample {b}, output {q}", text, fix)]

    def report(self, found: list[Finding | str], positions: int) -> Report:
        """The findings as a report."""
        b, n = self.subject.batch, self.subject.length
        layers = self.claim.layers
        through = f", through {layers} layer{'s' * (layers != 1)}" if layers else ", through any number of layers"
        title = (
            f"audit of {type(self.subject.model).__name__}, {b} sample{'s' * (b != 1)} of {n} positions: held to "
            f"{self.claim.text} ({self.claim.source}){through}"
        )
        notes = [*self.claim.notes, *_outside(self.subject), *(one for one in found if isinstance(one, str))]
        more = self.reach & ~self.shown & ~torch.eye(n, dtype=torch.bool)
        if layers is None and bool(more.any()):
            notes.append(
                "nobody said how many layers there are, so whatever the mask lets through any number of them was "
                "allowed; pass layers= to be held to less"
            )
        if self.seen.no_gradient:
            notes.append(f"gradients could not be followed, changes alone were tried: {self.seen.no_gradient}")
        if b == 1:
            notes.append("the batch has one sample, so nothing is known of neighbours")
        if n > positions:
            probed = choose(n, positions)
            notes.append(f"{len(probed)} of {n} positions were probed: {', '.join(map(str, probed[:12]))}, ...")
        findings = Findings(one for one in found if isinstance(one, Finding))
        return Report(
            title, findings, tuple(notes), self.reach, self.seen.visible, self.looked, self.judged.expand(b, n)
        )
