"""Prompts of different lengths become one batch: left padded and seen through `mask.padded`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.token_spans import token_spans
from truemask.masks.formats.as_mask import from_text, not_a_mask
from truemask.masks.leaves.per_token import keys
from truemask.nn.validation import require_bool

PromptLike = Tensor | Sequence[Tensor] | Sequence[int] | Sequence[Sequence[int]]  # what `generate` takes


@dataclass(frozen=True)
class Prompts:
    """Tokens (b, n) with pads on the left, the mask of prompt and answer, and how they were given."""

    tokens: Tensor
    real: Tensor  # bool (b, n): which are no pads
    mask: Mask
    single: bool  # one prompt without a batch axis


def as_tensors(prompts: PromptLike, device: torch.device) -> Tensor | list[Any]:
    """Prompts with every list of token ids as a tensor [n] on `device`; tensors stay as they are."""
    if isinstance(prompts, Tensor):
        return prompts
    if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
        raise TypeError(f"prompts are {describe(prompts)}; expected token ids as a tensor, or a list of prompts")
    if _is_ids(prompts):
        return torch.tensor(prompts, dtype=torch.int64, device=device)
    return [torch.tensor(row, dtype=torch.int64, device=device) if _is_ids(row) else row for row in prompts]


def _is_ids(row: object) -> bool:
    return isinstance(row, (list, tuple)) and len(row) > 0 and all(type(token) is int for token in row)


def read_prompts(
    prompts: Tensor | Sequence[Tensor], mask: Mask | Tensor | str | None, *, pad_value: int, answer: int
) -> Prompts:
    """Prompts as `generate` takes them, with `mask` an expression or bool flags over the prompt.

    Raises ValueError on prompts without tokens or of a wrong shape, MaskError on flags that do not fit.
    """
    mask = from_text(mask)
    if not (mask is None or isinstance(mask, (Mask, Tensor))):
        raise MaskError(not_a_mask("mask= must be a mask expression, its text, or bool flags over the prompt", mask))
    if isinstance(prompts, Tensor):
        rows, flags, single = _read_tensor(prompts, mask)
    else:
        rows, flags, single = _read_list(prompts, mask), None, False
    base = mask if isinstance(mask, Mask) else everything
    width = max(len(row) for row in rows)
    if flags is not None and not all(bool(row.all()) for row in flags):
        base = base & keys(_left_aligned(flags, width + answer))
    starts = [width - len(row) for row in rows]
    tokens = torch.stack([F.pad(row, (width - len(row), 0), value=pad_value) for row in rows])
    real = torch.arange(width, device=tokens.device) >= torch.tensor(starts, device=tokens.device)[:, None]
    return Prompts(tokens, real, base.padded(starts) if any(starts) else base, single)


def _read_tensor(prompts: Tensor, mask: Mask | Tensor | None) -> tuple[list[Tensor], list[Tensor] | None, bool]:
    if prompts.ndim not in (1, 2) or not _is_whole(prompts) or prompts.numel() == 0:
        raise ValueError(
            f"prompts are {describe(prompts)}; expected token ids [n], [b, n] or a list of [n], with at least one "
            "token each: to begin from nothing pass a start token"
        )
    single = prompts.ndim == 1
    tokens = prompts[None] if single else prompts
    if not isinstance(mask, Tensor):
        return list(tokens), None, single
    require_bool("mask", mask, prompts)
    flags = mask[None] if single and mask.ndim == 1 else mask
    if flags.shape != tokens.shape:
        raise MaskError(
            f"mask= is {describe(mask)}; a tensor speaks of the prompt's tokens, bool {list(prompts.shape)}. "
            "A rule for prompt and answer is an expression, such as mask=tm.window(256)"
        )
    spans = token_spans(flags)
    if not spans.tokens.all():
        index = int(spans.tokens.argmin())
        raise MaskError(f"mask= marks every token of prompt {index} as padding; each prompt needs at least one token")
    ends = spans.first.tolist(), spans.stop.tolist()
    rows, real_flags = (
        [row[first:stop] for row, first, stop in zip(part, *ends, strict=True)] for part in (tokens, flags)
    )
    return rows, real_flags, single


def _read_list(prompts: Sequence[Tensor], mask: Mask | Tensor | None) -> list[Tensor]:
    if isinstance(mask, Tensor):
        raise MaskError(f"mask= is {describe(mask)}; a list of prompts holds no padding, so pass an expression")
    rows = list(prompts)
    wrong = [row for row in rows if not _is_prompt(row)]
    if wrong or not rows:
        got = describe(wrong[0]) if wrong else "an empty list"
        raise ValueError(f"a list of prompts is a list of token ids [n], at least one token each; got {got}")
    return rows


def _is_prompt(row: object) -> bool:
    return isinstance(row, Tensor) and row.ndim == 1 and row.numel() > 0 and _is_whole(row)


def _is_whole(ids: Tensor) -> bool:
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def _left_aligned(flags: list[Tensor], length: int) -> Tensor:
    """Flags of each prompt from its first token on, True behind it: bool [b, length]."""
    return torch.stack([F.pad(row, (0, length - len(row)), value=True) for row in flags])
