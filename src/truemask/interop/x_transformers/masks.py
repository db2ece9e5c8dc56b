"""The mask of one call of x-transformers' attention, as an expression: what the model claims, and what the user asks.

    rows of the call  =  [registers]  tokens
    keys of the call  =  [additional and memory keys]  [registers]  recurrence memory and cached tokens, new tokens

"Registers" are all that a wrapper puts before the tokens: memory tokens, class tokens, prepended embeddings. They,
additional keys and `attn_num_mem_kv` are seen by all and not counted (law 2). What a register itself sees follows the
rule of `truemask.masks.structure.registers`: it reads a token only if every query that reads registers may read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from truemask.errors import MaskError
from truemask.masks.compose.boolean import conjunction, everything
from truemask.masks.core.mask import Mask
from truemask.masks.foreign import from_x_transformers
from truemask.masks.leaves.bands import causal, window
from truemask.masks.leaves.per_token import keys
from truemask.masks.structure.data import lies_in_rows
from truemask.masks.structure.padding import seen_by_all
from truemask.masks.structure.registers import with_registers


@dataclass(frozen=True)
class RegisterLayout:
    """Where the rows and keys of one call lie.

    `extra` keys stand before the sequence's own. Row 0 is index `start` of the sequence (negative where a context is
    shorter than the queries). `front` registers begin the sequence, `back` of them end it. `starts` are left pads.
    `token` is the position of the first row's token, which masks of cross-attention count.
    """

    rows: int
    keys: int
    extra: int = 0
    front: int = 0
    back: int = 0
    starts: tuple[int, ...] | None = None
    token: int = 0
    cross: bool = False

    @property
    def start(self) -> int:
        return self.keys - self.extra - self.rows


def model_rule(is_causal: bool, max_attend_past: int | None) -> Mask:
    """What the layer's constructor says; `max_attend_past` keys before its own, and in an encoder all that follow.

    >>> model_rule(True, 3), model_rule(False, 3)
    (window(4), window(4) | ~causal)
    """
    if max_attend_past is None:
        return causal if is_causal else everything
    near = window(max_attend_past + 1)
    return near if is_causal else near | ~causal


@dataclass(frozen=True)
class ModelMask:
    """What the model says of one call: its `rule` of positions, and what the caller `passed` as tensors."""

    rule: Mask
    layout: RegisterLayout
    passed: Mask = everything

    def combined_with(self, user_mask: Mask | None) -> Mask:
        """The mask of the call's rows over all its keys: the model's and the user's, which meet here only."""
        return conjunction(_combined(self.rule, user_mask, self.layout), self.passed)


@lru_cache(maxsize=128)
def _combined(rule: Mask, user_mask: Mask | None, layout: RegisterLayout) -> Mask:
    """The same without tensors."""
    user = everything if user_mask is None else user_mask
    if layout.cross:
        return _behind(layout, conjunction(_moved(rule, layout.start), _cross(user, layout)))
    if layout.starts is not None and user_mask is not None and not lies_in_rows(user_mask, packed=False):
        user = user.padded(list(layout.starts))
    whole = conjunction(rule, _among_registers(user, layout))
    return _moved(_behind(layout, whole), layout.start)


def _behind(layout: RegisterLayout, mask: Mask) -> Mask:
    return mask.prepended(k=layout.extra) if layout.extra and mask != everything else mask


def _moved(mask: Mask, start: int) -> Mask:
    """For rows from `start` on; a negative one moves the keys instead, which relative masks cannot tell apart."""
    if mask == everything or start == 0:
        return mask
    return mask.at(q_start=start) if start > 0 else mask.at(k_start=-start)


def _cross(user_mask: Mask, layout: RegisterLayout) -> Mask:
    """A mask over a context, whose keys are counted as they come."""
    if user_mask == everything:
        return user_mask
    if layout.front:
        user_mask = user_mask.prepended(q=layout.front, seen=seen_by_all(user_mask))
    return _moved(user_mask, layout.token)


def _among_registers(user_mask: Mask, layout: RegisterLayout) -> Mask:
    """`user_mask` for a sequence that begins or ends with registers."""
    registers = layout.front or layout.back
    if not registers or user_mask == everything:
        return user_mask
    return with_registers(user_mask, registers, behind=layout.rows - registers if layout.back else None)


def from_flags(flags: Tensor | None, layout: RegisterLayout) -> Mask:
    """Key padding as `Attend` gets it, bool `[b, 1, 1, keys]` or `[b, keys]`."""
    if flags is None or bool(flags.all()):
        return everything
    return keys(flags.reshape(-1, layout.keys))


def from_matrix(attn_mask: Tensor | None, heads: int, layout: RegisterLayout) -> Mask:
    """`attn_mask` as a caller of the model gave it; memory keys may be left out, and are seen by all."""
    if attn_mask is None:
        return everything
    mask = from_x_transformers(attn_mask=attn_mask, heads=heads)
    length = layout.keys - layout.extra
    rows, columns = attn_mask.shape[-2:]
    if rows not in (1, layout.rows) or columns not in (1, length, layout.keys):
        raise MaskError(
            f"attn_mask is for {rows} rows and {columns} keys, but attention runs {layout.rows} rows over {length} keys"
            f"{f' and {layout.extra} memory keys' if layout.extra else ''}; registers and prepended embeddings count. "
            "Give a mask expression instead, which has no size: `tm.use(model, mask)`"
        )
    return mask.prepended(k=layout.extra) if layout.extra and columns == length else mask
