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
from truemask.interop.positions import StatedPositions
from truemask.masks.compose.boolean import everything, nothing
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.token_spans import token_positions
from truemask.masks.leaves.bands import causal

PLACING_KINDS = ("at", "take", "dense")
JOINING_KINDS = ("and", "or", "xor", "minus", "not")


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

    def as_they_lie(self, users: Mask) -> bool:
        """Whether a mask is about the rows and keys of this call, from 0 on: it says so, and nobody else does."""
        explicit = any(part.kind in PLACING_KINDS for part in users.walk())
        return bool(self.problem or self.moved) and explicit and says_rows(users, self.keys_known or self.moved)

    def refusal(self, users: Mask, sizes: CallSizes) -> str:
        """Why a mask that asks for positions cannot run in this call, and what can; or nothing."""
        if not self.problem or says_rows(users, self.keys_known):
            return ""
        if users == causal and not self.keys_known:  # they are in order
            return ""
        if self.shift and self.shift > 0 and _same_at(users, self.shift, sizes.q_len):
            return ""
        start = sizes.k_len - sizes.q_len
        own = f"`.at(q_start={start})`" if start > 0 else f"`.take(q=torch.arange({sizes.q_len}), k=...)`"
        explicit = f"say where the rows and keys of this call stand, as {own} does if they are the last ones"
        if self.keys_known:
            return (
                f"{self.problem}, and `{users}` asks: pass a 2-D attention_mask or position_ids, {explicit}, or leave "
                "the layer out with layers= if it attends to something else than its own tokens"
            )
        return (
            f"{self.problem}, so `{users}` could count either. Pass position_ids that agree, a cache that keeps all "
            f"keys (`past_key_values=DynamicCache()`), or {explicit}"
        )


def says_rows(mask: Mask, keys_known: bool = True) -> bool:
    """Whether a mask says itself which row and key of a call is which: by `at`, `take` or a tensor, in all its parts.

    >>> from truemask.masks.leaves.bands import local
    >>> says_rows(local(1).at(q_start=10)), says_rows(local(1))
    (True, False)
    """
    if mask.kind in JOINING_KINDS:
        return all(says_rows(part, keys_known) for part in mask.children)
    return mask.kind in PLACING_KINDS or mask in (everything, nothing) or (keys_known and not mask.varies_with_query)


def _same_at(mask: Mask, shift: int, length: int) -> bool:
    """Whether a mask says the same so many positions further on."""
    sizes = {"batch": mask.batch_size, "heads": mask.head_count}
    moved = mask.at(q_start=shift, k_start=shift)
    try:
        return bool(moved.equivalent(mask, length, length, **sizes))
    except MaskError:  # it holds data for fewer positions
        return False


def placement_of(sizes: CallSizes, real: Tensor | None, told: StatedPositions) -> Placement:
    """Where the rows of a call with 2-D flags `[b, n]` stand, or with none."""
    q_start, unknown = sizes.q_start, Placement(sizes.q_start, sizes.k_start, real)
    if not sizes.placed:
        if told.cached is None or told.cached != sizes.k_len - sizes.q_len:
            return unknown._replace(problem=_not_placed(sizes), keys_known=True)
        q_start = sizes.k_start + told.cached  # the keys that were there before come first
    found = unknown._replace(q_start=q_start, moved=not sizes.placed)
    flags = 0 if real is None else real.shape[1]
    places, beyond = _told_for(sizes, told), sizes.k_start + sizes.k_len
    if places is None:
        surely = real is not None and told.cached is not None and bool(real[:, beyond:].any())
        return found._replace(problem=_too_many_flags(sizes, flags)) if surely else found
    stop = q_start + sizes.q_len
    counted = torch.ones(1, stop, dtype=torch.bool) if real is None else _first(real.cpu(), stop)
    return _compared(found, places, counted, told.first, f" ({flags} flags)" if flags else "")


def placement_of_tensor(sizes: CallSizes, visible: Tensor, told: StatedPositions) -> Placement:
    """Where the rows of a call with a 4-D mask stand; `visible [b or 1, k]` are the keys that some row sees."""
    places, q_start = _told_for(sizes, told), sizes.k_len - sizes.q_len
    if q_start and told.cached != q_start:
        if places is None:
            return Placement(0, 0, problem=_not_placed(sizes), keys_known=True)
        last = int(visible.any(0).int().flip(0).argmax())  # of a static cache, whose last slots are not written yet
        q_start = max(0, q_start - last)
    found = Placement(q_start, 0)
    if places is None:
        return found
    stop = q_start + sizes.q_len
    whole = torch.ones(1, stop, dtype=torch.bool)
    plain = _compared(found, places, whole, told.first, "")
    if not plain.problem:
        return plain._replace(taken=_shifted(places, told.first) if plain.restarts and not q_start else None)
    behind = _compared(found._replace(real=_first(visible, stop)), places, visible[:, :stop], told.first, "")
    if behind.restarts and not q_start:
        return found._replace(taken=_shifted(places, told.first), restarts=True)
    return plain if behind.problem else behind


def _compared(found: Placement, places: Tensor, counted: Tensor, first: int, flags: str) -> Placement:
    """position_ids against the positions that tokens have by counting them."""
    rows = slice(found.q_start, counted.shape[1])
    own, tokens = token_positions(counted)[:, rows], counted[:, rows]
    numbers = torch.arange(rows.start, rows.stop)
    for moved in {0, first}:
        if bool(((places - moved == own) | ~tokens).all()) or bool((places - moved == numbers).all()):
            return found
    if not found.q_start and _restarts(places, tokens):
        return found._replace(restarts=True)
    away = (places - first - own)[tokens.expand(torch.broadcast_shapes(places.shape, own.shape))]
    alike = not found.q_start and bool((away == away[:1]).all())
    last = [int(each.expand(torch.broadcast_shapes(places.shape, own.shape))[-1, -1]) for each in (places - first, own)]
    return found._replace(
        problem=f"position_ids put the last row at {last[0]}, and its {counted.shape[1] - found.k_start} keys{flags} "
        f"at {last[1]}",
        shift=int(away[0]) if alike and len(away) else 0,
        behind=bool(found.q_start) and bool((away <= 0).all()),
    )


def _restarts(places: Tensor, tokens: Tensor) -> bool:
    """Whether the positions of tokens go back somewhere in a sample."""
    places, tokens = torch.broadcast_tensors(places, tokens)
    return any(bool((own[real].diff() < 0).any()) for own, real in zip(places, tokens, strict=True))


def _told_for(sizes: CallSizes, told: StatedPositions) -> Tensor | None:
    """position_ids `[b or 1, q]`, if they speak of the rows of this call."""
    fits = told.positions is not None and told.positions.shape[-1] == sizes.q_len
    return told.positions.detach().cpu() if fits and told.positions is not None else None


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
