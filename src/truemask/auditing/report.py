"""The report of an audit: findings, pictures of what was promised and what was seen, and an exit code."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from truemask.common.finding import Findings
from truemask.viz.picture import html_picture, text_picture

SHORT_POSITIONS = 40  # positions up to which the differences are drawn with a sign of their own
MAX_SAMPLES = 4
CLEAN = (
    "nothing was found: every difference that was seen is allowed (of what was not seen this is evidence, not proof)"
)
SIGNS = {False: "·■!o?", True: ".#!o?"}
LEGEND = "{1} depends, {0} does not, {2} depends and must not, {3} may and was never seen to, {4} nobody looked"


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What an audit found.

    Attributes:
        title: which model, on what, held to which mask.
        findings: what was found, the gravest first.
        notes: what was assumed and what was left out.
        reach: bool `[b, n, n]`, what the mask lets matter through all layers: output q (rows), input k (columns).
        visible: bool `[b, n, n]`, what was seen to matter.
        looked: bool `[b, n, n]`, where not seeing anything says something.
        judged: bool `[b, n]`, the outputs that were held to the mask: those of real tokens.
    """

    title: str
    findings: Findings
    notes: tuple[str, ...]
    reach: Tensor
    visible: Tensor
    looked: Tensor
    judged: Tensor

    @property
    def leaks(self) -> Tensor:
        """What was seen to matter and must not, bool `[b, n, n]`."""
        return self.visible & ~self.reach & self.judged[:, :, None]

    @property
    def blind(self) -> Tensor:
        """What may matter and was never seen to, bool `[b, n, n]`."""
        return self.reach & ~self.visible & self.looked & self.judged[:, :, None]

    @property
    def ok(self) -> bool:
        """Whether nothing worse than a note was found."""
        return self.findings.ok

    @property
    def exit_code(self) -> int:
        """0 if nothing worse than a note was found, 1 otherwise."""
        return 0 if self.ok else 1

    def __bool__(self) -> bool:
        """`ok`, so that `assert audit(...)` says what it seems to say."""
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON: without the pictures, with how many pairs leak and are blind."""
        return {
            "title": self.title,
            "ok": self.ok,
            "findings": self.findings.to_dicts(),
            "notes": list(self.notes),
            "leaks": int(self.leaks.sum()),
            "blind": int(self.blind.sum()),
        }

    def text(self, *, ascii: bool = False, pictures: bool = True) -> str:
        """The report for a terminal."""
        body = str(self.findings) if self.findings else CLEAN
        notes = [f"note: {note}" for note in self.notes]
        drawings = self._pictures(ascii) if pictures else []
        return "\n".join([self.title, "", body, *(["", *notes] if notes else []), *drawings])

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _pictures(self, ascii: bool) -> list[str]:
        lines = []
        for s, label in self._distinct()[:MAX_SAMPLES]:
            reach, visible = self.reach[s].numpy(), self.visible[s].numpy()
            # of a long text with few probes most of the picture would be what nobody looked at
            if self.looked.any(dim=0).all() or len(reach) <= SHORT_POSITIONS:
                pair = _picture_lines(reach, "may depend", ascii), _picture_lines(visible, f"depends, {label}", ascii)
                lines += ["", _beside(*pair)]
            if self.leaks[s].any() or self.blind[s].any():
                lines += ["", *self._differences(s, ascii)]
        return lines

    def _differences(self, s: int, ascii: bool) -> list[str]:
        if self.reach.shape[1] <= SHORT_POSITIONS:
            return [differences(self._codes(s), ascii=ascii)]
        titled = (("depends and must not", self.leaks[s]), ("may and was never seen to", self.blind[s]))
        return [text_picture(cells.numpy(), title=title, ascii=ascii) for title, cells in titled if cells.any()]

    def _codes(self, s: int) -> np.ndarray:
        """0 does not depend, 1 depends, 2 leak, 3 blind, 4 nobody looked."""
        unseen = ~self.visible[s] & (~self.looked[s] | ~self.judged[s][:, None])
        codes = self.visible[s].numpy().astype(np.int64)
        codes[unseen.numpy()] = 4
        codes[self.leaks[s].numpy()] = 2
        codes[self.blind[s].numpy()] = 3
        return codes

    def _distinct(self) -> list[tuple[int, str]]:
        """The samples that look different, those with findings first, and what each stands for."""
        alike: dict[bytes, list[int]] = {}
        for s in range(len(self.reach)):
            key = self.reach[s].numpy().tobytes() + self.visible[s].numpy().tobytes()
            alike.setdefault(key, []).append(s)
        groups = sorted(alike.values(), key=lambda group: not bool((self.leaks | self.blind)[group[0]].any()))
        return [(group[0], _samples(group)) for group in groups]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<li><b>{escape(finding.severity)} {escape(finding.code)}</b> {escape(finding.where)}: "
            f"{escape(finding.message)}{'<br><i>' + escape(finding.fix) + '</i>' if finding.fix else ''}</li>"
            for finding in self.findings
        )
        body = f"<ul>{rows}</ul>" if rows else f"<p>{CLEAN}</p>"
        notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in self.notes)
        labels = ["may depend", "depends", "and must not", "never seen to"]
        pictures = []
        for s, label in self._distinct()[:MAX_SAMPLES]:
            cells = np.stack([x[s].numpy() for x in (self.reach, self.visible, self.leaks, self.blind)])
            pictures.append(f"<div>{html_picture(cells, title=label, labels=labels)}</div>")
        return f"<div><p>{escape(self.title)}</p>{body}{''.join(pictures)}{notes}</div>"

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML file, without scripts and without other files; returns where it is."""
        target = Path(path)
        head = f'<!doctype html><meta charset="utf-8"><title>{escape(self.title)}</title>'
        body = f'<body style="font-family: sans-serif; max-width: 70em; margin: 2em auto">{self._repr_html_()}</body>'
        target.write_text(f"{head}\n{body}\n", encoding="utf-8")
        return target


def differences(codes: np.ndarray, *, ascii: bool = False) -> str:
    """A picture of a small array of codes, 0 to 4: see `LEGEND`.

    >>> print(differences(np.array([[1, 2], [3, 1]])))
    the difference
    0 ■ !
    1 o ■
    ■ depends, · does not, ! depends and must not, o may and was never seen to, ? nobody looked
    """
    signs, wide = SIGNS[ascii], len(str(len(codes) - 1))
    lines = [f"{q:>{wide}} " + " ".join(signs[code] for code in row) for q, row in enumerate(codes)]
    return "\n".join(["the difference", *lines, LEGEND.format(*signs)])


def _picture_lines(cells: np.ndarray, title: str, ascii: bool) -> list[str]:
    """A picture as lines, without its legend where two stand side by side."""
    return text_picture(cells, title=title, ascii=ascii).splitlines()[:-1]


def _beside(left: list[str], right: list[str]) -> str:
    """Two pictures side by side, or one above the other where they are wide."""
    wide = max(map(len, left))
    if 2 * wide > 96:
        return "\n".join([*left, *right])
    height = max(len(left), len(right))
    pad = [lines + [""] * (height - len(lines)) for lines in (left, right)]
    return "\n".join(f"{line:<{wide}}   {other}".rstrip() for line, other in zip(*pad, strict=True))


def _samples(group: list[int]) -> str:
    return f"sample {group[0]}" if len(group) == 1 else f"samples {', '.join(map(str, group[:8]))}"
