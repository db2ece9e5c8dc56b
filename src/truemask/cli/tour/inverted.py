"""Act 2: the same inverted mask, and the row that it leaves without a key, given to every library.

The mask was meant to be causal and is upside down: every row sees only what comes after it, and the last row sees
nothing. What a library makes of that is measured from outside, by changing inputs and looking at outputs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from truemask.cli.tour.peers import DIM, PEERS, Peer, Run
from truemask.cli.tour.stage import Act, Part, Stage
from truemask.errors import ConventionWarning

N = 13  # tokens


@dataclass(frozen=True)
class Examination:
    """What one library did: largest relative changes of outputs that should not have moved."""

    dead_nan: bool  # the last row, which may see nothing, is NaN
    dead_zero: bool  # it is exactly 0 (a layer adds its input, so there it is not)
    dead_moved: float  # it, or in a causal module the first row, moves when other rows change
    leaked: float  # row 0 moves when the future changes
    bad_gradients: int  # input rows whose gradient is NaN after backward through every other row
    warning: str


def play(stage: Stage) -> None:
    stage.say(
        'In half of these libraries True means "may attend", in the other half "masked out". So a causal mask arrives '
        "upside down: every row sees only its future, the last row sees nothing. We change inputs and watch outputs."
    )
    rows: list[list[Part]] = []
    warning_texts: list[str] = []
    missing = False
    for peer in PEERS:
        if peer.missing:
            rows.append([peer.name, ("not installed", "dim"), "", "", ""])
            missing = True
            continue
        exam = examine(peer)
        rows.append(
            [
                peer.name,
                peer.given,
                dead_row(exam),
                future(exam),
                "a warning" if exam.warning else "nothing",
            ]
        )
        warning_texts.extend(f"{peer.name}: {exam.warning}" for _ in range(bool(exam.warning)))
    stage.table(["library", "was given", "row without keys", "reads the future", "it said"], rows)
    if missing:
        stage.say("To see the missing ones: ", ("pip install 'truemask[peers]'", "code"))
    for warning in warning_texts:
        stage.say(("The warning of ", "dim"), (warning, "dim"))
    stage.say(
        "A tensor cannot know what was meant, and a function like SDPA or ",
        ("attend", "code"),
        " does what it says. What truemask adds: it tells you that a tensor sees the future only; a row without keys "
        "is zeros, in every backend, dtype and direction; a Decoder never reads the future, whatever it is given; an "
        "expression shows what it says (",
        ("print(~causal)", "code"),
        "); foreign tensors come in by name (",
        ("tm.from_torch_mha(t)", "code"),
        ").",
    )


def examine(peer: Peer) -> Examination:
    """Measure one library; nothing is known here of how it works."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        run, x = peer.build(N), torch.randn(1, N, DIM)
        before = run(x).detach()
    warning = next((str(w.message) for w in caught_warnings if issubclass(w.category, ConventionWarning)), "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others, later = x.clone(), x.clone()
        others[:, :-1] = torch.randn(1, N - 1, DIM)
        later[:, 1:] = torch.randn(1, N - 1, DIM)
        leaked = _moved(before[0, 0], run(later).detach()[0, 0])
        moved = _moved(before[0, -1], run(others).detach()[0, -1])
        return Examination(
            dead_nan=bool(before[0, -1].isnan().any()),
            dead_zero=not before[0, -1].any(),
            dead_moved=max(moved, leaked) if peer.causal else moved,
            leaked=leaked,
            bad_gradients=_bad_gradients(run, x),
            warning=warning,
        )


def _moved(before: Tensor, after: Tensor) -> float:
    if bool(before.isnan().any() | after.isnan().any()):
        return 0.0
    return float((after - before).norm() / before.norm().clamp(min=1e-9))


def _bad_gradients(run: Run, x: Tensor) -> int:
    """Rows of the input whose gradient is not finite although the loss leaves the dead row out."""
    leaf = x.clone().requires_grad_()
    out = run(leaf)
    if not out.requires_grad:
        return 0
    out[:, :-1].square().sum().backward()
    assert leaf.grad is not None
    return int((~leaf.grad[0].isfinite().all(-1)).sum())


def dead_row(exam: Examination) -> Part:
    """What became of the row that may see nothing."""
    if exam.dead_nan:
        return ("NaN" + ("; gradients too" if exam.bad_gradients else ""), "bad")
    if exam.dead_moved:
        return (f"reads others, {exam.dead_moved:.0%}", "bad")
    return ("zeros" if exam.dead_zero else "its input alone", "good")


def future(exam: Examination) -> Part:
    """Whether the first row reads what comes after it."""
    return (f"yes, by {exam.leaked:.0%}", "bad") if exam.leaked else ("no", "good")


ACT = Act("inverted", "One inverted mask, every library", play)
