"""One case of `soak.py` run by the native kernel, twice, and held to `reference` in fp64.

What may not be compared is what a planted number reaches: rows of which it is a part or which see it, and the keys
that such rows see. Everywhere else results are finite where the reference's are, zero and -inf where a query may attend
to nothing, and no further from the reference than rounding explains:

* u = 2^-24 is fp32's rounding, h that of the dtype, S the largest score that q and k could make (the product of their
  longest rows), |.| the largest number;
* a score is off by 2 u S (its sum; the scale and base 2, which are folded in), so a weight by u (2 S + ROOM) of itself,
  and by h where it is rounded for the second product;
* out by as much of |v|; lse by u (2 S + ROOM + |lse|), in bf16 by what its powers of two are off, too; dq by as much of
  scale |k| G, where G is the usual size of dout . v, because it sums differences of such numbers (half as much again
  beside dropout, which leaves few of them to even each other out);
* any number by the smallest that the dtype can hold, or fp32's if that is larger: there it is rounded, or flushed;
* what rows add to a key is off at random: N, the root of the sum of squares of the weights that a key has, is what
  they come to; dv by as much of N |dout| or |dv|, dk of N scale |q| G.

`TIMES` of it is allowed. How much of what is allowed is used up is shown, so the limits can be seen to be tight.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from soak_cases import DTYPES, PLANTED, Case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import truemask as tm
from truemask.biases import Bias

TIMES, ROOM, U = 2.0, 8.0, 2.0**-24
POWERS = {"bf16": 2.7e-6}  # the relative error of 2^x where its polynomial is short (csrc/isa/simd.h)
Results = dict[str, Tensor]  # out, lse, dq, dk, dv, dsinks: those that were asked for; the reference's weights


class Fault(NamedTuple):
    """What was wrong with one result."""

    what: str
    how: str


class Verdict(NamedTuple):
    """Faults, and of each result the largest error as a share of what is allowed."""

    faults: list[Fault]
    shares: dict[str, float]
    beside: dict[str, tuple[float, float]]  # squares of the native kernel's and SDPA's errors, in the same measure


def checked(case: Case, *, peer: bool = True) -> Verdict:
    """Run the case and compare; with SDPA's error in the same dtype where SDPA can compute it."""
    before = torch.get_num_threads()
    try:
        found = [_run_with(case, threads) for threads in case.threads]
    finally:
        torch.set_num_threads(before)
    cells = Cells.of(case)
    want = results(case, "reference", clean_doubles(case))
    limits = allowed_errors(case, want, want.pop("weights"))
    faults = [
        Fault(name, f"other bits with {case.threads[1]} threads than with {case.threads[0]}")
        for name, x in found[0].items()
        if not _same_bits(x, found[1][name])
    ]
    shares = {}
    for name, x in found[0].items():
        wrong, share = compared(x, want[name], cells.comparable(name), limits[name])
        faults += [Fault(name, wrong)] if wrong else []
        shares[name] = share
    beside = _beside_sdpa(case, cells, found[0], want, limits) if peer and not faults else {}
    return Verdict(faults, shares, beside)


def _run_with(case: Case, threads: int) -> Results:
    torch.set_num_threads(threads)
    return results(case, "native", [case.q, case.k, case.v, case.dout])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def results(case: Case, backend: str, tensors: list[Tensor]) -> Results:
    """What a backend gives for these q, k, v and dout; the reference in fp64."""
    wide = torch.float64 if backend == "reference" else None
    options: dict[str, Any] = {name: x.to(wide) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    leaves = {name: x.detach() for name, x in zip("qkv", tensors, strict=False)}
    if "sink_logits" in options:
        options["sink_logits"] = leaves["s"] = options["sink_logits"].detach()
    wanted = {name: x.requires_grad_() for name, x in leaves.items() if name in case.wants}
    torch.manual_seed(case.index)  # of the dropout
    options["return_weights"] = wide is not None
    got = tm.attend(leaves["q"], leaves["k"], leaves["v"], case.mask, backend=backend, **options)
    names = ["out", *(name for name in ("lse", "weights") if options.get(f"return_{name}"))]
    found: Results = dict(zip(names, got if isinstance(got, tuple) else (got,), strict=True))
    given = [found["out"], *([found["lse"]] if "lse" in found else [])]
    arriving = [tensors[3], case.dlse.to(given[-1].dtype)][: len(given)]
    ends = [(x, grad) for x, grad in zip(given, arriving, strict=True) if x.requires_grad]
    if wanted and ends:
        found.update(_gradients(wanted, ends))
    return {name: x.detach() for name, x in found.items()}


def _gradients(wanted: dict[str, Tensor], ends: list[tuple[Tensor, Tensor]]) -> Results:
    """Of what is wanted, zeros where nothing arrives."""
    outs, grads = zip(*ends, strict=True)
    leaves = list(wanted.values())
    found = torch.autograd.grad(outs, leaves, grads, allow_unused=True, materialize_grads=True)
    return {"dsinks" if name == "s" else f"d{name}": x for name, x in zip(wanted, found, strict=True)}


# -- what may be compared ----------------------------------------------------------------------------------------------


def planted(x: Tensor) -> Tensor:
    """Where something hostile stands."""
    return ~(x.abs() <= PLANTED)


def clean_doubles(case: Case) -> list[Tensor]:
    """q, k, v and dout in fp64, without what was planted."""
    return [x.double().masked_fill(planted(x), 0) for x in (case.q, case.k, case.v, case.dout)]


class Cells(NamedTuple):
    """Which results nothing that was planted reaches."""

    forward: Tensor  # [b, hq, q]
    backward: Tensor  # [b, hq, q]
    keys: Tensor  # [b, hk, k]
    dead: Tensor  # [b, hq, q]: what the mask lets see nothing

    @classmethod
    def of(cls, case: Case) -> Cells:
        """Those of a case."""
        s = case.shape
        seen = case.mask.to_dense(s.q, s.k, batch=s.b, heads=s.hq).expand(s.b, s.hq, s.q, s.k)
        dead = ~seen.any(-1)
        bad_q, bad_k, bad_v, bad_dout = (planted(x).any(-1) for x in (case.q, case.k, case.v, case.dout))
        bad = (bad_k | bad_v).repeat_interleave(s.hq // s.hk, 1)
        reached = bad_q | (seen & bad[:, :, None]).any(-1)
        forward, backward = ~reached | dead, ~(reached | bad_dout) | dead
        touched = (seen & ~backward[..., None]).any(2)
        return cls(forward, backward, ~touched.view(s.b, s.hk, -1, s.k).any(2), dead)

    def comparable(self, name: str) -> Tensor:
        """For the result of this name, as a mask that broadcasts to it."""
        if name == "lse":
            return self.forward
        if name == "dsinks":
            return self.backward.all(-1).all(0)
        return {"out": self.forward, "dq": self.backward}.get(name, self.keys)[..., None]


# -- what is compared --------------------------------------------------------------------------------------------------


def compared(got: Tensor, want: Tensor, where: Tensor, limit: float) -> tuple[str, float]:
    """What is wrong, in words, and the largest error as a share of the limit."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)} instead of {list(want.shape)}", math.inf
    where = where.expand(want.shape)
    a, b = got.double()[where], want.double()[where]
    finite = b.isfinite()
    if not torch.equal(a[~finite], b[~finite]):
        return f"{a[~finite].unique().tolist()} where the reference has {b[~finite].unique().tolist()}", math.inf
    off = (a - b)[finite].abs()
    if not off.numel():
        return "", 0.0
    if not off.isfinite().all():
        return f"{int((~off.isfinite()).sum())} of {off.numel()} are not finite", math.inf
    worst = float(off.max())
    share = 0.0 if worst == 0 else worst / limit if limit else math.inf
    return f"off by {worst:.3g}, allowed is {limit:.3g}" if share > 1 else "", share


def allowed_errors(case: Case, want: Results, weights: Tensor) -> dict[str, float]:
    """For each result, by the rule at the head of this file."""
    q, k, v, dout = (x.abs() for x in clean_doubles(case))
    scale = abs(case.options.get("scale", 1 / math.sqrt(case.shape.d)))
    scores = scale * _longest(q) * _longest(k) + _largest_bias(case)
    once = U * (2 * scores + ROOM)
    info = torch.finfo(DTYPES[case.dtype])
    smallest = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    dropout = case.options.get("dropout", 0.0)
    kept = 1 / (1 - dropout)
    rounded = TIMES * (once + info.eps / 2)
    arriving = float(dout.square().mean().sqrt() * v.square().mean().sqrt()) * math.sqrt(case.shape.dv) * kept + 1
    arriving *= 1.5 if dropout else 1.0
    of_keys = math.sqrt(float(weights.square().sum(2).unflatten(1, (case.shape.hk, -1)).sum(2).max()))
    sizes = {
        "out": kept * float(v.max()),
        "dq": scale * float(k.max()) * arriving,
        "dk": of_keys * scale * float(q.max()) * arriving,
        "dv": of_keys * float(dout.max()),
        "dsinks": arriving,
    }
    largest = {name: float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0 for name, x in want.items()}
    limits = {name: rounded * max(sizes[name], largest[name]) + TIMES * smallest for name in want if name != "lse"}
    return {**limits, "lse": TIMES * (once + U * largest.get("lse", 0.0)) + POWERS.get(case.dtype, 0.0)}


def _longest(x: Tensor) -> float:
    return float(x.norm(dim=-1).max())


def _largest_bias(case: Case) -> float:
    bias: Any = case.options.get("bias")
    if bias is None:
        return 0.0
    if isinstance(bias, Bias):
        far = torch.tensor(case.shape.q + case.shape.k + 400)
        zero, heads = torch.zeros((), dtype=torch.int64), torch.arange(bias.head_count)
        near = torch.arange(-200, 201)[:, None]
        return max(float(bias.value(zero, heads, zero, x).abs().max()) for x in (far, near))
    return float(bias[bias.isfinite()].abs().max()) if bias.isfinite().any() else 0.0


# -- SDPA in the same dtype --------------------------------------------------------------------------------------------


def _beside_sdpa(
    case: Case, cells: Cells, found: Results, want: Results, limits: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """Squares of the errors of both, as shares of what is allowed; nothing where SDPA cannot compute the case."""
    s, options = case.shape, case.options
    if not set(options) <= {"scale", "return_lse"} or s.d != s.dv or "qkv" not in case.wants or "lse" in found:
        return {}
    if bool(cells.dead.any()) or not bool(cells.backward.all()):
        return {}
    allowed = case.mask.to_dense(s.q, s.k, batch=s.b, heads=s.hq)
    leaves = [x.detach().contiguous().requires_grad_() for x in (case.q, case.k, case.v)]  # else it runs unfused
    out = scaled_dot_product_attention(*leaves, attn_mask=allowed, scale=options.get("scale"), enable_gqa=s.hq != s.hk)
    theirs = dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, case.dout)), strict=True))
    return {
        name: (_square(found[name], want[name], limits[name]), _square(x, want[name], limits[name]))
        for name, x in theirs.items()
    }


def _square(got: Tensor, want: Tensor, limit: float) -> float:
    return float(((got.detach().double() - want) / limit).square().mean()) if limit else 0.0
