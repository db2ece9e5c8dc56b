"""From what a caller passes to the one mask that every layer of a forward runs.

    rows of the call   =  [registers]  tokens           (registers only while nothing is cached)
    keys of the call   =  memories  registers  tokens   (cached and new; memories are attn_num_mem_kv)

The user's mask speaks of tokens only, at logical positions, cached ones included (law 2 in docs/conventions.md);
registers and memories are prepended to it and seen by all. What a register itself sees follows one rule
(masks/structure/registers.py): a token only if every query that reads registers may read it. In an `Encoder` with key
padding that is every real token; under `causal` or packed documents it is nothing but registers. Where registers read
tokens, a query that is padding (of bool flags, `queries`, `padding` or `padded`) reads no register.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from truemask.attention.compiled import positions_traced
from truemask.common.formatting import describe
from truemask.common.real_tensors import for_now, is_recorded, ordinary_tensors, trusted
from truemask.common.warning import warn
from truemask.errors import MaskError
from truemask.masks.compose.boolean import conjunction, everything
from truemask.masks.core.deferred import BUILDERS, deferrable
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import from_text, not_a_mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.order import looks_back
from truemask.masks.structure.registers import with_registers
from truemask.nn.validation import read_matrix, read_padding

ONE_FOR_ALL = "; the layers of a stack share one mask, and layers of your own take theirs in `attend`"


@dataclass(frozen=True)
class Layout:
    """Where the rows and keys of one call lie. `past` counts tokens cached before this call."""

    batch: int
    heads: int
    new: int
    past: int = 0
    registers: int = 0
    memories: int = 0
    begun: bool = False  # whether the cache holds keys, so that registers and memories are among them

    @property
    def numbers(self) -> list[Any]:
        """All of it, for a compiled graph: `Layout(*numbers)`."""
        return [self.batch, self.heads, self.new, self.past, self.registers, self.memories, self.begun]

    @property
    def total(self) -> int:
        """Tokens in all, cached and new: what the user's mask speaks of."""
        return self.past + self.new

    @property
    def first_row(self) -> int:
        """The index of the first row of this call among registers and tokens."""
        return self.registers + self.past if self.begun else 0


def read_masks(
    mask: Mask | Tensor | str | None, attn_mask: Mask | Tensor | str | None, layout: Layout, x: Tensor
) -> Mask:
    """The AND of what the caller passed as `mask=` and `attn_mask=`, checked against the call's sizes."""
    if torch.compiler.is_dynamo_compiling() and not (mask is None and attn_mask is None):
        return _read_later(mask, attn_mask, layout.numbers)
    user = everything
    for name, value in (("mask", mask), ("attn_mask", attn_mask)):
        if value is not None:
            term = _read(name, value, layout, x)
            term.check(layout.total, layout.total, batch=layout.batch, heads=layout.heads)
            user = conjunction(user, term)
    return user


@deferrable
def _read_later(mask: Mask | Tensor | str | None, attn_mask: Mask | Tensor | str | None, numbers: list[Any]) -> Mask:
    tensor = next((x for x in (mask, attn_mask) if isinstance(x, Tensor)), torch.empty(0))
    return read_masks(mask, attn_mask, Layout(*numbers), tensor)


def _read(name: str, value: Mask | Tensor | str, layout: Layout, x: Tensor) -> Mask:
    value = from_text(value)
    if isinstance(value, Mask):
        return value
    if not isinstance(value, Tensor):
        raise MaskError(not_a_mask(f"{name}= must be a bool tensor, a mask expression or its text", value, ONE_FOR_ALL))
    if name == "mask":
        return read_padding(value, x, layout.batch, layout.total, layout.registers)
    return read_matrix(value, x, layout.batch, layout.heads, layout.total)


def agreed(user: Mask | None, own: Mask, *, causal_too: bool) -> Mask:
    """The mask of a call whose cache keeps what `own` lets it; the caller passed `user`, the same one, or none."""
    if user is None or user is own:
        return own
    if torch.compiler.is_dynamo_compiling():
        return _agreed_later(user, own, causal_too)
    if user != own and not (causal_too and _causal_too(user) == own):
        raise MaskError(
            f"the cache keeps what queries see under `{own}`, and the call is under `{user}`: pass the cache's mask or "
            "none, or make a cache without mask=, which keeps every key"
        )
    return user


@deferrable
def _agreed_later(user: Mask, own: Mask, causal_too: bool) -> Mask:
    return agreed(user, own, causal_too=causal_too)


@lru_cache(maxsize=64)
def _causal_too(user: Mask) -> Mask:
    return conjunction(causal, user)


def combine(user: Mask, layout: Layout, *, causal_too: bool, placed: Callable[[Mask, int], Mask] | None = None) -> Mask:
    """The mask of this call's rows over all keys: causal if the module is, behind registers and memories.

    `placed` makes the mask of all keys one of those that a cache has, given how many tokens the call brings.
    """
    if torch.compiler.is_dynamo_compiling():
        mask = _combine_later(user, layout.numbers, causal_too)
        return mask if placed is None else placed(mask, layout.new)
    if causal_too and layout.past == 0:
        _warn_if_ahead(user, layout)
    mask = conjunction(causal, user) if causal_too else user
    mask = with_registers(mask, layout.registers, layout.memories)
    if placed is not None:
        mask = placed(mask, layout.new)
    return mask.at(q_start=layout.first_row) if layout.first_row else mask


@deferrable
def _combine_later(user: Mask, numbers: list[Any], causal_too: bool) -> Mask:
    return combine(user, Layout(*numbers), causal_too=causal_too)


def _warn_if_ahead(user: Mask, layout: Layout) -> None:
    if user.is_late or causal not in user.walk() or looks_back(user):
        return
    total, batch, heads = map(for_now, (layout.total, layout.batch, layout.heads))
    pairs = pairs_ahead(user, total, batch, heads)
    if pairs:
        warn(
            f"the mask `{user}` lets queries see later keys, but this module is causal, which removed {pairs:,} of its "
            f"pairs at length {total}. To run the mask as it is written pass causal=False in the call"
        )


@lru_cache(maxsize=64)
def pairs_ahead(mask: Mask, n: int, batch: int, heads: int) -> int:
    """How many (query, key) pairs with key > query the mask lets through, over its distinct samples and heads."""
    return int((mask - causal).count(n, n, batch=batch, heads=heads).sum())


def token_positions(user: Mask, layout: Layout, pos: Tensor | None) -> Tensor:
    """Logical positions of this call's tokens, int64 [n] or [b, n]: the caller's, or the mask's."""
    if pos is None and torch.compiler.is_dynamo_compiling() and user is not everything:
        return positions_traced("_positions_later", user, layout.numbers)
    if pos is None:
        return _positions_of_mask(user, layout)
    if pos.is_floating_point() or pos.dtype == torch.bool:
        raise ValueError(f"pos= is {describe(pos)}; positions are whole numbers, int64 [n] or [b, n]")
    if tuple(pos.shape) not in {(layout.new,), (1, layout.new), (layout.batch, layout.new)}:
        raise ValueError(
            f"pos= is {describe(pos)}; expected the positions of this call's tokens, [{layout.new}] or "
            f"[{layout.batch}, {layout.new}]"
        )
    return pos


def _positions_of_mask(user: Mask, layout: Layout) -> Tensor:
    """The mask's logical positions; MaskError where it gives a token two of them."""
    if user == everything:
        return torch.arange(layout.past, layout.total)
    rows = user.at(q_start=layout.past) if layout.past else user
    way_out = "pass pos= in the call of the layers or of the TransformerWrapper, int64 [n] or [b, n]"
    try:
        q, k = rows.positions(layout.new, layout.total)
    except MaskError as error:
        raise MaskError(f"{error}. To say which positions the tokens have, {way_out}") from error
    if is_recorded():
        if not user.is_late:
            with trusted(), ordinary_tensors():  # the sizes are those of any call, and the check is of this one
                _positions_of_mask(user, Layout(*map(for_now, layout.numbers)))
        return q
    if bool((q != k[..., layout.past :]).any()):
        raise MaskError(
            f"the mask `{user}` gives tokens another position as queries than as keys, and a token has one: {way_out}"
        )
    return q


def _positions_later(user: Mask, numbers: list[Any]) -> Tensor:
    layout = Layout(*numbers)
    return _positions_of_mask(user, layout).expand(layout.batch, -1)


BUILDERS["_positions_later"] = _positions_later


def positions_with_registers(positions: Tensor, layout: Layout) -> Tensor:
    """Positions of this call's rows: registers stand before position 0, which packed documents share."""
    if layout.begun or not layout.registers:
        return positions
    before = torch.arange(-layout.registers, 0, device=positions.device)
    return torch.cat((before.expand(*positions.shape[:-1], -1), positions), dim=-1)
