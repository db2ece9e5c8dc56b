"""The words of a plan: its table and its refusals."""

from __future__ import annotations

from collections.abc import Iterable

from truemask.attention.planning.proposals import Proposals
from truemask.backends.base import Job, Request
from truemask.backends.costs.model import source
from truemask.common.formatting import duration
from truemask.masks.structure.data import sampling_note

MAX_PRINTED_CELLS = 1 << 24  # cells that a printed plan may evaluate to know a density exactly


def explain_plan(job: Job, backend: str, proposals: Proposals, notes: Iterable[str] = ()) -> str:
    """The plan as plain text: the mask, the sizes, the tiles, a line for each backend, and the notes that say anything.

    `>` marks the chosen backend; one that cannot run the call says why.
    """
    rows = []
    costs, descriptions = proposals.costs, proposals.descriptions
    for name, reasons in proposals.objections.items():
        mark = ">" if name == backend else " "
        cost = duration(costs[name]) if name in costs else "cannot"
        rows.append((f"{mark} {name}", cost, reasons[0] if reasons else descriptions[name]))
        rows.extend(("", "", reason) for reason in reasons[1:])
    widths = [max(len(row[i]) for row in [*rows, ("  backend", "predicted", "")]) for i in range(2)]
    table = [("  backend", "predicted", "how, or why not"), *rows]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in table]
    lines.append(f"predicted from {source()}")
    return "\n".join(
        [str(job.mask), sizes_text(job.request), tiles_text(job), *lines, *(note for note in notes if note)]
    )


def sizes_text(r: Request) -> str:
    """The shapes, dtype, device and direction of a request."""
    dtype = str(r.dtype).removeprefix("torch.")
    values = "k and v" if r.value_dim == r.head_dim else "k"
    shapes = f"q {[r.batch, r.heads, r.q_len, r.head_dim]}, {values} {[r.batch, r.kv_heads, r.kv_len, r.head_dim]}"
    if values == "k":
        shapes += f", v {[r.batch, r.kv_heads, r.kv_len, r.value_dim]}"
    return f"{shapes}, {dtype} on {r.device}, {'forward and backward' if r.grad else 'forward'}"


def tiles_text(job: Job) -> str:
    """How many tiles are EMPTY, MIXED and FULL, and the share of pairs let through (a range if it is dear to know).

    Another line says of a tensor that only a sample of it was looked at to know that.
    """
    r, tiles = job.request, job.tiles
    empty, mixed, full = tiles.counts
    total = max(1, empty + mixed + full)
    area = tiles.block[0] * tiles.block[1]
    if mixed * area <= MAX_PRINTED_CELLS:
        share = f"{job.mask.density(r.q_len, r.kv_len, batch=r.batch, heads=r.heads):.2%} of the pairs"
    else:
        share = f"{full / total:.1%} to {(full + mixed) / total:.1%} of the pairs"
    counted = f"tiles of {tiles.block[0]} x {tiles.block[1]}: {empty} empty, {mixed} mixed, {full} full; {share}"
    notes = set(map(sampling_note, job.mask.walk()))
    return "\n".join([counted, *sorted(notes - {""})])


def refusal(job: Job, objections: dict[str, list[str]], wanted: str | None) -> str:
    """Why nobody, or not the backend that was named, runs the call: everybody's reasons at once."""
    names = [wanted] if wanted else list(objections)
    who = f"the backend {wanted!r} cannot" if wanted else "no backend can"
    reasons = [f"  {name}: {reason}" for name in names for reason in objections[name]]
    able = [name for name, reasons in objections.items() if not reasons]
    way_out = [f"backend={able[0]!r} can"] if able else []
    return "\n".join([f"{who} run `{job.mask}` with {sizes_text(job.request)}:", *reasons, *way_out])
