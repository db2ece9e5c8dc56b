"""Biases: numbers added to the scores, as objects that are asked about cells and store their parameters only.

A mask says whether a query may attend to a key; a bias says how much it likes to (law 1: they travel separately). A
bias object speaks about logical positions, as masks do: under `mask.at(q_start=...)` or `mask.packed(...)` it is
asked about the positions that the mask's rows and keys have, so decoding, packing and padding need no change to it.
Who computes decides how much exists at a time: `reference` asks for some rows of `[q, k]`, `sdpa` for all of them, in
every call (its plan counts the bytes, and refuses where they are too many).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from truemask.common.arguments import whole
from truemask.common.formatting import describe
from truemask.errors import MaskError


class Bias(ABC):
    """A number for each (sample, head, query, key), differentiable in its `parameters`.

    `value` is all that a bias of your own must define; `parameters` names the tensors that it reads, so that their
    gradients are kept, and `head_count` (1: the same for all heads) lets `attend` check it.
    """

    @property
    @abstractmethod
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that `value` reads and that may want gradients."""

    @property
    @abstractmethod
    def head_count(self) -> int:
        """For how many heads it holds numbers; 1 if it does not vary over heads."""

    @abstractmethod
    def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The bias at int64 index tensors that broadcast together: floats that broadcast with them."""

    @property
    def requires_grad(self) -> bool:
        """Whether any parameter wants a gradient."""
        return any(p.requires_grad for p in self.parameters)


class Alibi(Bias):
    """`-slope[h] * |q - k|`, in at least fp32: half precision cannot tell distances beyond 256 (or 2048) apart."""

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = _floats(slopes, "slopes", (1,), "[heads]")

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    @property
    def head_count(self) -> int:
        return len(self.slopes)

    def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        slopes = self.slopes.to(q.device, torch.promote_types(self.slopes.dtype, torch.float32))
        return -slopes[h if len(slopes) > 1 else h * 0] * (q - k).abs().to(slopes.dtype)

    def __repr__(self) -> str:
        return f"alibi({describe(self.slopes)})"


class Relative(Bias):
    """`table[h, bucket(k - q)]`."""

    def __init__(self, table: Tensor, max_distance: int | None, bidirectional: bool) -> None:
        self.table = _floats(table, "table", (2,), "[heads, buckets]")
        buckets = self.table.shape[1]
        if not isinstance(bidirectional, bool):
            raise MaskError(f"bidirectional must be True or False, got {describe(bidirectional)}")
        if max_distance is not None:
            max_distance = whole(max_distance, "max_distance", 1)
        if bidirectional and max_distance is not None and buckets % 2:
            raise MaskError(
                f"a table of T5's buckets over both directions has an even number of columns, one half for each, got "
                f"{describe(table)}, whose last column nothing would read; for distances into the past only pass "
                "`bidirectional=False`"
            )
        if bidirectional and max_distance is None and buckets % 2 == 0:
            raise MaskError(
                f"a table over both directions has an odd number of columns (distances -r to r), got "
                f"{describe(table)}; for T5's logarithmic buckets pass `max_distance=128`, for distances into the "
                "past only `bidirectional=False`"
            )
        self.max_distance, self.bidirectional = max_distance, bidirectional
        side = buckets if not bidirectional else buckets // 2
        self._near = torch.arange(side + (max_distance is None and bidirectional))
        if max_distance is not None:
            self._near = logarithmic_buckets(side, max_distance)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.table,)

    @property
    def head_count(self) -> int:
        return self.table.shape[0]

    @property
    def reach(self) -> int:
        """The distance from which on nothing changes."""
        return len(self._near) - 1

    def value(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table, near = self.table.to(q.device), self._near.to(q.device)
        distance = k - q
        reach = len(near) - 1
        if not self.bidirectional:
            column = near[(-distance).clamp(0, reach)]
        elif self.max_distance is None:
            column = distance.clamp(-reach, reach) + reach
        else:
            column = near[distance.abs().clamp(max=reach)] + (distance > 0) * (table.shape[1] // 2)
        return table[h if len(table) > 1 else h * 0, column]

    def __repr__(self) -> str:
        log = "" if self.max_distance is None else f", max_distance={self.max_distance}"
        return f"relative({describe(self.table)}{log}, bidirectional={self.bidirectional})"


def alibi(slopes: Tensor | int) -> Bias:
    """A penalty that grows with distance: `bias[h, q, k] = -slopes[h] * |q - k|` (ALiBi, arXiv 2108.12409).

    `slopes` is float `[heads]`, positive as a rule, and may be a parameter; or a number of heads, which have the usual
    slopes then (`usual_slopes`). Raises `MaskError` for anything else.

    >>> import torch
    >>> bias = alibi(torch.tensor([0.5, 0.25]))
    >>> q, k = torch.arange(3)[:, None], torch.arange(3)
    >>> bias.value(torch.tensor(0), torch.tensor(0), q, k).tolist()
    [[-0.0, -0.5, -1.0], [-0.5, -0.0, -0.5], [-1.0, -0.5, -0.0]]
    """
    if isinstance(slopes, int) and not isinstance(slopes, bool):
        return Alibi(usual_slopes(slopes))
    if not isinstance(slopes, Tensor):
        raise MaskError(
            f"alibi takes slopes, a float tensor [heads], or a number of heads for the usual ones, as `alibi(8)`; got "
            f"{describe(slopes)}"
        )
    return Alibi(slopes)


def usual_slopes(heads: int) -> Tensor:
    """The slopes of the paper, float32 `[heads]`: 2**(-8/heads), 2**(-16/heads), ..., 2**-8.

    That is for a power of two. Other numbers of heads have the slopes of the power of two below, followed by every
    other one of the power above, as in the authors' code and in BLOOM.

    >>> usual_slopes(4).tolist(), usual_slopes(3).tolist()
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    below = 1 << (whole(heads, "alibi(heads)", 1).bit_length() - 1)
    own, between = (torch.arange(1, n + 1) * (-8 / n) for n in (below, 2 * below))
    return 2 ** torch.cat((own, between[::2]))[:heads]


def relative(table: Tensor, *, max_distance: int | None = None, bidirectional: bool = True) -> Bias:
    """A learned number for each head and distance: `bias[h, q, k] = table[h, bucket(k - q)]`.

    `table` is float `[heads, buckets]` (one row serves all heads); distances are in tokens and those beyond the table
    share its last bucket:

    * by default `buckets` is 2r + 1 and the bucket is `clip(k - q, -r, r) + r` (Shaw et al., arXiv 1803.02155);
    * with `bidirectional=False` it is `clip(q - k, 0, buckets - 1)`: the past only, and every later key counts as 0;
    * with `max_distance` the buckets are T5's (arXiv 1910.10683): in each direction the first half of them is one
      distance each and the others grow logarithmically up to `max_distance`; with `bidirectional` the later keys
      have the second half of the table. A T5 checkpoint's `relative_attention_bias.weight` is this table, transposed.

    >>> import torch
    >>> bias = relative(torch.tensor([[-1.0, 0.0, 2.0]]))
    >>> q, k = torch.arange(3)[:, None], torch.arange(3)
    >>> bias.value(torch.tensor(0), torch.tensor(0), q, k).tolist()
    [[0.0, 2.0, 2.0], [-1.0, 0.0, 2.0], [-1.0, -1.0, 0.0]]
    """
    return Relative(table, max_distance, bidirectional)


def logarithmic_buckets(buckets: int, max_distance: int) -> Tensor:
    """T5's bucket of every distance from 0 to `max_distance`, int64 `[max_distance + 1]`.

    Worked out once on the CPU, in T5's own single precision, so that every device has the same buckets (law 7).

    >>> logarithmic_buckets(8, 16).tolist()
    [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    """
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise MaskError(
            f"max_distance={max_distance} must be larger than the {exact} distances that have a bucket of their own "
            f"({buckets} buckets in each direction, at least 2)"
        )
    distance = torch.arange(max_distance + 1)
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (growth * (buckets - exact)).to(torch.int64)
    return torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def _floats(value: object, name: str, dims: tuple[int, ...], shape: str) -> Tensor:
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim in dims and value.numel()):
        raise MaskError(f"{name} must be a float tensor {shape} that is not empty, got {describe(value)}")
    return value
