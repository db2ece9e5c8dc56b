"""The cases of `soak.py`: mask, sizes, dtype, layouts, options, plants: each drawn from the seed and its index."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
from soak_masks import Drawing, Reach
from torch import Tensor

import truemask as tm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
THREADS = (1, 2, 4)
HOSTILE = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38)
PLANTED = 3e4  # a number beyond it was planted: what is drawn stays below, and fp16 ends at twice as much
SIZES = {"small": 0.6, "middle": 0.27, "large": 0.05, "few queries": 0.08}  # shares of the cases
HEAD_SIZES = (8, 16, 24, 32, 40, 64, 80, 96, 128, 256)
LAYOUTS = ("plain", "heads inside", "gaps between rows", "gaps in rows", "rows and columns swapped", "expanded")
OPTIONS = {"scale": 0.25, "softcap": 0.15, "sinks": 0.25, "bias": 0.3, "dropout": 0.15, "lse": 0.6, "plant": 0.3}


class Shape(NamedTuple):
    """Sizes of q `[b, hq, q, d]`, k `[b, hk, k, d]` and v `[b, hk, k, dv]`."""

    b: int
    hq: int
    hk: int
    q: int
    k: int
    d: int
    dv: int

    @property
    def work(self) -> int:
        """Multiplications of the forward, where everything is seen."""
        return self.b * self.hq * self.q * self.k * (self.d + self.dv)


@dataclass
class Case:
    """One call and what comes back to it: every number of it follows from the seed and the index."""

    seed: int
    index: int
    shape: Shape
    mask: tm.Mask
    dtype: str
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    wants: str = "qkvs"  # whose gradients are asked for: q, k, v, sinks; none of them is a call under no_grad
    threads: tuple[int, ...] = (1, 2)
    said: dict[str, str] = field(default_factory=dict)  # what was drawn, for people
    words: frozenset[str] = frozenset()  # of the mask
    tags: tuple[str, ...] = ()  # of size and options
    layouts: frozenset[str] = frozenset()

    def __str__(self) -> str:
        shape = ", ".join(f"{name} {size}" for name, size in self.shape._asdict().items())
        said = "; ".join(f"{name}: {text}" for name, text in self.said.items())
        return f"{self.mask!r}\n  {shape}; {self.dtype}; gradients {self.wants or 'none'}; {said}"


def drawn_case(seed: int, index: int) -> Case:
    """The case of this number."""
    draw = Random(f"{seed}/{index}")
    tensors = torch.Generator().manual_seed(draw.getrandbits(48))
    size = draw.choices(list(SIZES), list(SIZES.values()))[0]
    shape = _shape(draw, size)
    drawing = Drawing(draw)
    start = max(0, shape.k - shape.q) if size == "few queries" and drawing.coin() else 0
    mask = drawing.mask(Reach(start + shape.q, shape.k, shape.b, shape.hq), draw.randint(1, 3)).at(q_start=start)
    dtype = draw.choices(list(DTYPES), [2, 2, 1])[0]
    chosen = {option for option, share in OPTIONS.items() if draw.random() < share}
    said = {"size": size}
    q, k, v, dout = _tensors(draw, tensors, shape, DTYPES[dtype], said, "plant" in chosen)
    dlse = torch.randn(shape.b, shape.hq, shape.q, generator=tensors)
    case = Case(seed, index, shape, mask, dtype, q, k, v, dout, dlse, said=said, words=frozenset(drawing.words))
    case.layouts = frozenset(said[name] for name in ("q", "k", "v", "dout"))
    case.options = _options(draw, tensors, case, chosen)
    case.wants = draw.choices(["qkvs", "", "q", "kv", "v"], [8, 2, 1, 1, 1])[0]
    case.threads = tuple(draw.sample(THREADS, 2))
    case.tags = (size, *(sorted(chosen) or ["nothing else"]), *(["no gradient"] if not case.wants else []))
    said["threads"] = ", then ".join(map(str, case.threads))
    return case


# -- sizes -------------------------------------------------------------------------------------------------------------


def _shape(draw: Random, size: str) -> Shape:
    """Sizes that are multiples of nothing, as a rule."""
    hk, group = draw.choice([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)])
    if size == "small":
        longest, d = 40, _head_size(draw, 48)
    elif size == "middle":
        longest, d = 150, _head_size(draw, 136)
    elif size == "large":
        longest, d = 310, _head_size(draw, 256)
        hk, group = draw.choice([(1, 1), (2, 1), (1, 8), (2, 3), (5, 1), (4, 2)])
    else:
        hk, group = draw.choice([(1, 1), (1, 8), (2, 4), (3, 2), (8, 1)])
        d = _head_size(draw, 128)
        return _within(Shape(draw.randint(1, 3), hk * group, hk, draw.randint(1, 4), draw.randint(1, 3000), d, d))
    k = draw.randint(1, longest)
    q = k if draw.random() < 0.5 else draw.randint(1, longest)
    dv = d if draw.random() < 0.6 else _head_size(draw, max(d, 16))
    return _within(Shape(draw.randint(1, 3), hk * group, hk, q, k, d, dv))


def _head_size(draw: Random, most: int) -> int:
    """A usual one, or any."""
    usual = [size for size in HEAD_SIZES if size <= most]
    return draw.choice(usual) if draw.random() < 0.4 else draw.randint(1, most)


def _within(shape: Shape, work: int = 150_000_000) -> Shape:
    """With fewer samples if it were too slow in fp64."""
    return shape if shape.work <= work else shape._replace(b=1)


# -- tensors -----------------------------------------------------------------------------------------------------------


def _tensors(
    draw: Random, generator: torch.Generator, s: Shape, dtype: torch.dtype, said: dict[str, str], plant: bool
) -> list[Tensor]:
    """q, k, v and what arrives at out, in layouts of their own, with hostile numbers here and there."""
    sizes = {"q": (s.hq, s.q, s.d), "k": (s.hk, s.k, s.d), "v": (s.hk, s.k, s.dv), "dout": (s.hq, s.q, s.dv)}
    louder = {"q": draw.choice([1, 1, 3, 10]), "k": draw.choice([1, 1, 3, 10]), "v": 1, "dout": 1}
    made = []
    for name, size in sizes.items():
        layout = draw.choices(LAYOUTS, [3, 1, 1, 1, 1, 1])[0]
        b = 1 if layout == "expanded" else s.b
        x = (torch.randn(b, *size, generator=generator) * louder[name]).to(dtype)
        if plant:
            said[f"planted in {name}"] = _planted(draw, x)
        said[name], loud = layout, louder[name]
        if loud > 1:
            said[f"{name} times"] = str(loud)
        made.append(laid_out(x, layout).expand(s.b, -1, -1, -1))
    return made


def _planted(draw: Random, x: Tensor) -> str:
    """Put hostile numbers into some rows of x, in place; which."""
    said = []
    for _ in range(draw.choice([0, 0, 1, 1, 2, 5])):
        place = tuple(draw.randrange(n) for n in x.shape)
        hostile, most = draw.choice(HOSTILE), torch.finfo(x.dtype).max
        number = hostile if not math.isfinite(hostile) else max(min(hostile, most), -most)
        x[place] = number
        said.append(f"{number:.3g} at {place}")
    return ", ".join(said) or "nothing"


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides; what lies between them is NaN."""
    b, h, n, d = x.shape
    if layout == "heads inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "rows and columns swapped":
        return x.mT.contiguous().mT
    if layout.startswith("gaps"):
        room = x.new_full(
            (b, h, 2 * n + 1, d + 3) if layout.endswith("between rows") else (b, h, n, 2 * d + 1), torch.nan
        )
        view = room[:, :, 1::2, 2:-1] if layout.endswith("between rows") else room[..., 1::2]
        return view.copy_(x)
    return x


# -- options -----------------------------------------------------------------------------------------------------------


def _options(draw: Random, generator: torch.Generator, case: Case, chosen: Iterable[str]) -> dict[str, Any]:
    """The keywords of `attend`."""
    found: dict[str, Any] = {}
    if "scale" in chosen:
        found["scale"] = draw.choice([0.0, -0.3, 0.01, 1.0, -1.0 / math.sqrt(case.shape.d)])
    if "softcap" in chosen:
        found["softcap"] = draw.choice([0.5, 2.0, 30.0])
    if "sinks" in chosen:
        sinks = torch.randn(case.shape.hq, generator=generator) * draw.choice([1, 10])
        found["sink_logits"] = sinks.to(draw.choice([torch.float32, DTYPES[case.dtype]]))
    if "bias" in chosen:
        found["bias"] = _bias(draw, generator, case)
    if "dropout" in chosen:
        found["dropout"] = draw.choice([0.1, 0.5, 0.9])
    if "lse" in chosen:
        found["return_lse"] = True
    case.said.update({name: _told(value) for name, value in found.items() if name != "bias"})
    return found


def _told(value: object) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {value.tolist()}" if isinstance(value, Tensor) else str(value)


def _bias(draw: Random, generator: torch.Generator, case: Case) -> Any:
    """A tensor that broadcasts, or an object."""
    s, heads = case.shape, draw.choice([1, case.shape.hq])
    kind = draw.choice(["tensor", "tensor", "alibi", "relative", "past", "t5"])
    if kind != "tensor" and not _has_positions(case):
        kind = "tensor"
    case.said["bias"] = kind
    if kind == "alibi":
        return tm.alibi(torch.rand(heads, generator=generator))
    if kind != "tensor":
        reach = draw.randint(1, 100)
        table = torch.randn(heads, 32 if kind == "t5" else 2 * reach + 1, generator=generator)
        return tm.relative(table, max_distance=100 if kind == "t5" else None, bidirectional=kind != "past")
    shape = tuple(draw.choice([1, n]) for n in (s.b, s.hq, s.q, s.k))[draw.choice([0, 0, 2, 3]) :]
    bias = torch.randn(shape, generator=generator)
    if draw.random() < 0.3:
        bias[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
    if draw.random() < 0.3 and len(shape) > 1:
        bias = bias.mT.contiguous().mT
    case.said["bias"] = f"{kind} {list(shape)}"
    return bias.to(draw.choice([torch.float32, DTYPES[case.dtype]]))


def _has_positions(case: Case) -> bool:
    """Whether the mask counts positions in one way, so that a bias object can be asked about them."""
    try:
        case.mask.positions(case.shape.q, case.shape.k)
    except tm.MaskError:
        return False
    return True
