"""Where the rows and keys of one attention call stand: what the forward says of it in several ways, compared.

Positions are told by `position_ids`, by 2-D flags (a token's position is the number of real tokens before it), by the
length of the cache, and by a 4-D mask (keys that no row sees may be pads). Where they agree, or where one is silent,
the others decide. `position_ids` that only number the rows say nothing of pads. What contradicts itself is a problem:
masks that ask for positions are refused there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from truemask.errors import MaskError
from truemask.interop.positions import CallerPositions
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.token_spans import token_positions
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.placement import places_rows, says_rows


class CallSizes(NamedTuple):
    """One attention call as transformers describes it; rows and keys that do not count on one axis are not `placed`."""

    q_len: int
    k_len: int
    q_start: int = 0
    k_start: int = 0
    placed: bool = True


class Placement(NamedTuple):
    """Row i is number `q_start + i` of the keys, key j number `k_start + j`; pads among them are told by `real`.

    `real [b or 1, n]`: which of the first n keys are tokens. `taken [b or 1, n]`: where position_ids restart, they
    alone are the positions, of rows and keys alike. `restarts`: they do. `problem`: why positions are not known.
    `keys_known`: the problem is the rows'. `shift`: it is that all tokens are so many positions further on. `behind`:
    it is that they are fewer than the keys before them, as in a later document of a packed row. `moved`: the rows are
    the last ones because the cache says so; transformers gives them no number.
    """

    q_start: int
    k_start: int
    real: Tensor | None = None
    taken: Tensor | None = None
    restarts: bool = False
    problem: str = ""
    keys_known: bool = False
    shift: int = 0
    behind: bool = False
    moved: bool = False

    def as_they_lie(self, user_mask: Mask) -> bool:
        """Whether a mask is about the rows and keys of this call, from 0 on: it says so, and nobody else does."""
        explicit = any(map(places_rows, user_mask.walk()))
        return bool(self.problem or self.moved) and explicit and says_rows(user_mask, self.keys_known or self.moved)

    def refusal(self, user_mask: Mask, sizes: CallSizes) -> str:
        """Why a mask that asks for positions cannot run in this call, and what can; or nothing."""
        if not self.problem or says_rows(user_mask, self.keys_known):
            return ""
        if user_mask == causal and not self.keys_known:  # they are in order
            return ""
        if self.shift and self.shift > 0 and _same_at(user_mask, self.shift, sizes.q_len):
            return ""
        start = sizes.k_len - sizes.q_len
        call = f"`.at(q_start={start})`" if start > 0 else f"`.take(q=torch.arange({sizes.q_len}), k=...)`"
        explicit = f"say where the rows and keys of this call stand, as {call} does if they are the last ones"
        if self.keys_known:
            return (
                f"{self.problem}, and `{user_mask}` asks: pass a 2-D attention_mask or position_ids, {explicit}, or "
                "leave the layer out with layers= if it attends to something else than its own tokens"
            )
        return (
            f"{self.problem}, so `{user_mask}` could count either. Pass position_ids that agree, a cache that keeps "
            f"all keys (`past_key_values=DynamicCache()`), or {explicit}"
        )


def _same_at(mask: Mask, shift: int, length: int) -> bool:
    """Whether a mask says the same so many positions further on."""
    sizes = {"batch": mask.batch_size, "heads": mask.head_count}
    moved = mask.at(q_start=shift, k_start=shift)
    try:
        return bool(moved.equivalent(mask, length, length, **sizes))
    except MaskError:  # it holds data for fewer positions
        return False


def placement_of(sizes: CallSizes, real: Tensor | None, caller_positions: CallerPositions) -> Placement:
    """Where the rows of a call with 2-D flags `[b, n]` stand, or with none."""
    q_start, start = sizes.q_start, Placement(sizes.q_start, sizes.k_start, real)
    if not sizes.placed:
        if caller_positions.cached is None or caller_positions.cached != sizes.k_len - sizes.q_len:
            return start._replace(problem=_not_placed(sizes), keys_known=True)
        q_start = sizes.k_start + caller_positions.cached  # the keys that were there before come first
    placement = start._replace(q_start=q_start, moved=not sizes.placed)
    flags = 0 if real is None else real.shape[1]
    places, beyond = _positions_for_rows(sizes, caller_positions), sizes.k_start + sizes.k_len
    if places is None:
        surely = real is not None and caller_positions.cached is not None and bool(real[:, beyond:].any())
        return placement._replace(problem=_too_many_flags(sizes, flags)) if surely else placement
    stop = q_start + sizes.q_len
    counted = torch.ones(1, stop, dtype=torch.bool) if real is None else _first(real.cpu(), stop)
    return _compared(placement, places, counted, caller_positions.first, f" ({flags} flags)" if flags else "")


def placement_of_tensor(sizes: CallSizes, visible: Tensor, caller_positions: CallerPositions) -> Placement:
    """Where the rows of a call with a 4-D mask stand; `visible [b or 1, k]` are the keys that some row sees."""
    places, q_start = _positions_for_rows(sizes, caller_positions), sizes.k_len - sizes.q_len
    if q_start and caller_positions.cached != q_start:
        if places is None:
            return Placement(0, 0, problem=_not_placed(sizes), keys_known=True)
        last = int(visible.any(0).int().flip(0).argmax())  # of a static cache, whose last slots are not written yet
        q_start = max(0, q_start - last)
    placement = Placement(q_start, 0)
    if places is None:
        return placement
    stop = q_start + sizes.q_len
    whole = torch.ones(1, stop, dtype=torch.bool)
    first = caller_positions.first
    plain = _compared(placement, places, whole, first, "")
    if not plain.problem:
        return plain._replace(taken=_shifted(places, first) if plain.restarts and not q_start else None)
    behind = _compared(placement._replace(real=_first(visible, stop)), places, visible[:, :stop], first, "")
    if behind.restarts and not q_start:
        return placement._replace(taken=_shifted(places, first), restarts=True)
    return plain if behind.problem else behind


def _compared(placement: Placement, places: Tensor, counted: Tensor, first: int, flags: str) -> Placement:
    """position_ids against the positions that tokens have by counting them."""
    rows = slice(placement.q_start, counted.shape[1])
    counts, tokens = token_positions(counted)[:, rows], counted[:, rows]
    numbers = torch.arange(rows.start, rows.stop)
    for moved in {0, first}:
        if bool(((places - moved == counts) | ~tokens).all()) or bool((places - moved == numbers).all()):
            return placement
    if not placement.q_start and _restarts(places, tokens):
        return placement._replace(restarts=True)
    shape = torch.broadcast_shapes(places.shape, counts.shape)
    away = (places - first - counts)[tokens.expand(shape)]
    alike = not placement.q_start and bool((away == away[:1]).all())
    last = [int(positions.expand(shape)[-1, -1]) for positions in (places - first, counts)]
    return placement._replace(
        problem=f"position_ids put the last row at {last[0]}, and its {counted.shape[1] - placement.k_start} keys"
        f"{flags} at {last[1]}",
        shift=int(away[0]) if alike and len(away) else 0,
        behind=bool(placement.q_start) and bool((away <= 0).all()),
    )


def _restarts(positions: Tensor, tokens: Tensor) -> bool:
    """Whether the positions of tokens go back somewhere in a sample."""
    positions, tokens = torch.broadcast_tensors(positions, tokens)
    return any(bool((row[real].diff() < 0).any()) for row, real in zip(positions, tokens, strict=True))


def _positions_for_rows(sizes: CallSizes, caller_positions: CallerPositions) -> Tensor | None:
    """position_ids `[b or 1, q]`, if they speak of the rows of this call."""
    fits = caller_positions.positions is not None and caller_positions.positions.shape[-1] == sizes.q_len
    return caller_positions.positions.detach().cpu() if fits and caller_positions.positions is not None else None


def _shifted(places: Tensor, first: int) -> Tensor:
    moved = first if bool((places >= first).all()) else 0
    return (places - moved).clamp(min=0)


def _first(flags: Tensor, length: int) -> Tensor:
    """The first so many flags; what is beyond them is no token yet."""
    return torch.nn.functional.pad(flags, (0, max(0, length - flags.shape[1])))[:, :length]


def _not_placed(sizes: CallSizes) -> str:
    return f"the model's mask for {sizes.q_len} rows and {sizes.k_len} keys does not say which positions the rows have"


def _too_many_flags(sizes: CallSizes, flags: int) -> str:
    return f"the attention_mask has {flags} flags, but the cache holds {sizes.k_start + sizes.k_len} keys"
