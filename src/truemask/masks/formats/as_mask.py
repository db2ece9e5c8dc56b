"""What a caller gives where a mask is taken: an expression, its text, or something that an error explains.

The language itself combines masks with masks only; what uses a mask (`attend`, `plan`, modules, `diagnose`, ...)
reads text too, all of them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from truemask.common.arguments import MAX_POSITION
from truemask.common.formatting import describe
from truemask.common.real_tensors import ordinary_tensors
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.formats.parse import parse

REMEMBERED = 128  # texts whose masks are kept


def from_text(given: Any) -> Any:
    """Text as the mask that it says, read once; anything else as it is.

    >>> from_text("causal & window(4)"), from_text(None)
    (causal & window(4), None)
    """
    if not isinstance(given, str):
        return given
    return parse(given) if torch.compiler.is_dynamo_compiling() else _remembered(given)


@lru_cache(maxsize=REMEMBERED)
def _remembered(text: str) -> Mask:
    with ordinary_tensors():
        return parse(text)


def expression(where: str, given: object) -> Mask:
    """A mask or the text of one; an error, which begins with `where`, says what else becomes a mask and how."""
    mask = from_text(given)
    if not isinstance(mask, Mask):
        raise MaskError(not_a_mask(f"{where} must be a mask expression, such as `causal & window(256)`", given))
    return mask


def not_a_mask(wanted: str, given: object, lists: str = "") -> str:
    """The words of an error about something that is no mask; `lists` says what else a list could be meant for.

    >>> from truemask.masks.leaves.bands import window
    >>> print(not_a_mask("it must be a mask", window))
    it must be a mask, got function <function window at ...>: call mask functions with their arguments, and wrap a ...
    """
    return f"{wanted}, got {describe(given)}: {_way_out(given, lists)}"


def _way_out(given: object, lists: str) -> str:
    if isinstance(given, Tensor):
        return (
            "a bool tensor, True = may attend, is `dense(tensor)`, flags of tokens are `keys(flags)`, and other "
            "conventions go through `from_torch_mha`, `from_additive`, `from_huggingface_2d` and their kin"
        )
    if isinstance(given, bool):
        return "is_causal=True is written `causal`, and no mask `everything`"
    if isinstance(given, Sequence) and any(isinstance(one, (Mask, str)) for one in given):
        return f"one mask for each head is `per_head([...])`, one for each sample `per_sample([...])`{lists}"
    if callable(given):
        return "call mask functions with their arguments, and wrap a function of (b, h, q, k) in `predicate`"
    if isinstance(given, int) and 0 < given <= MAX_POSITION:
        return f"a number alone is no rule, a window of {given} keys is `window({given})`"
    if given is None:
        return "no mask is `everything`"
    return "lists and arrays of booleans are `dense(...)`"
