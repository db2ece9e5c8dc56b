"""What FlexAttention needs besides the mask: soft cap and bias as a `score_mod`, and data in sizes compiled once.

`score_mod` and `mask_mod` are objects whose tensors `torch.compile` takes as inputs, so new numbers are no new
compilation. The size of such a tensor would be a symbol in the compiled code, and torch 2.13 writes wrong C++ for some
of those (it replaces `ks1` inside `ks14`). So data is padded to a few sizes, each of which is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truemask.backends.base import Inputs, Job
from truemask.backends.shared.eager import bias_values
from truemask.biases import Alibi, Bias, Relative
from truemask.common.torch_internals import with_constant_sizes
from truemask.masks.core.block_mask import MaskMod
from truemask.masks.core.lookup import look_up, pick
from truemask.masks.core.mask import Mask

MIN_TABLE_SIZE = 1 << 16  # positions that data is padded to at least; beyond, to a power of four


@dataclass(frozen=True)
class ScoreMod:
    """Soft cap, then bias: `score_mod(score, b, h, q, k)`."""

    softcap: Tensor | None
    bias: Tensor | None  # [b, h, q, k], 1 where it does not vary
    rule: Bias | None  # a bias asked for each cell
    positions: tuple[Tensor, Tensor] | None

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        if self.bias is not None:
            places = (i if n > 1 else i * 0 for i, n in zip((b, h, q, k), self.bias.shape, strict=True))
            score = score + pick(self.bias, *places).to(score.dtype)
        if self.rule is not None and self.positions is not None:
            row, column = look_up(self.positions[0], b, q), look_up(self.positions[1], b, k)
            score = score + self.rule.value(b, h, row, column).to(score.dtype)
        return score


def score_mod_of(inputs: Inputs, job: Job) -> ScoreMod | None:
    """The `score_mod` of a call, or None if the scores stay as they are.

    `alibi` and `relative` are asked for each cell; any other bias object is asked once, for all cells together, because
    nobody knows whether it can be traced.
    """
    r, bias, positions = job.request, inputs.bias, None
    if inputs.softcap is None and bias is None:
        return None
    softcap = None if inputs.softcap is None else torch.full((), inputs.softcap, dtype=r.compute_dtype, device=r.device)
    if isinstance(bias, Bias):
        positions = job.positions
        if not isinstance(bias, (Alibi, Relative)):
            bias = bias_values(bias, positions, slice(None), (r.batch, r.heads), r.device)
    if isinstance(bias, Tensor) or bias is None:
        return ScoreMod(softcap, None if bias is None else static(bias), None, None)
    assert positions is not None
    row, column = (static(padded(x.to(r.device))) for x in positions)
    return ScoreMod(softcap, None, _static_rule(bias), (row, column))


def _static_rule(bias: Alibi | Relative) -> Bias:
    if isinstance(bias, Alibi):
        return Alibi(static(bias.slopes))
    return Relative(static(bias.table), bias.max_distance, bias.bidirectional)


def static_data(mask_mod: Any) -> MaskMod:
    """The same `mask_mod` with its data padded."""
    assert isinstance(mask_mod, MaskMod)
    new = MaskMod(mask_mod.mask, mask_mod.device)
    vars(new)["bound"] = _with_static_tables(vars(new)["bound"])
    return new


def table_bytes(mask_mod: Any) -> int:
    """What the tables of a `mask_mod` hold, each once."""
    tables = {id(x): x for part in vars(mask_mod)["bound"].walk() for x in vars(part)["_bound_tables"].values()}
    return sum(x.nbytes for x in tables.values())


def _with_static_tables(bound: Mask) -> Mask:
    """A bound mask with other tables; a mask that is part of it twice is so again."""
    done: dict[int, Any] = {}

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        if not isinstance(value, Mask):
            return value
        if id(value) not in done:
            new = done[id(value)] = value.twin()
            parts = {name: changed(part) for name, part in vars(value).items() if isinstance(part, (tuple, Mask))}
            tables = {name: static(padded(table)) for name, table in vars(value)["_bound_tables"].items()}
            vars(new).update(parts, _bound_tables=tables)
        return done[id(value)]

    return changed(bound)


def padded(table: Tensor) -> Tensor:
    """A table `[n]` or `[b, n]` with its last entry repeated, as `look_up` reads beyond the end."""
    if table.ndim not in (1, 2) or table.shape[-1] == 0:
        return table
    size = MIN_TABLE_SIZE
    while size < table.shape[-1]:
        size *= 4
    return torch.cat([table, table[..., -1:].expand(*table.shape[:-1], size - table.shape[-1])], -1)


def static(tensor: Tensor) -> Tensor:
    """The tensor with a note that its sizes are constants of what is compiled."""
    return with_constant_sizes(tensor.detach(), *range(tensor.ndim))
