"""What is refused, or told, where a user's mask meets that of a transformers model."""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.common.warning import warn
from truemask.errors import MaskError
from truemask.interop.padding import alike
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.leaves.documents import documents
from truemask.masks.structure.documents import may_separate_documents


def check_samples(user_mask: Mask | None, batch: int) -> None:
    """Raise if a mask is about another number of samples than the batch has rows."""
    held = 1 if user_mask is None else user_mask.batch_size
    if held <= 1 or held == batch:
        return
    each, rest = divmod(batch, held)
    rows = [sample for sample in range(held) for _ in range(each)]
    way = "" if rest else f", and for beams side by side `mask.select(samples={rows})`"
    raise MaskError(
        f"`{user_mask}` speaks of {held} samples, but the batch has {batch} rows: give it an entry for each{way}"
    )


def check_kept_keys(user_mask: Mask, mask: Mask, batch: int, q_start: int, q_len: int, k_start: int) -> None:
    """Raise if the mask sees keys that a sliding cache has given up, as the model's own window allowed it to."""
    heads = user_mask.head_count or 1
    if bool(mask.at(q_start=q_start).count(q_len, k_start, batch=batch, heads=heads).any()):
        raise MaskError(
            f"`{user_mask}` takes the place of the model's window and sees keys before position {k_start}, which "
            "the sliding cache has given up: pass a cache that keeps all, `past_key_values=DynamicCache()`"
        )


def may_keep_apart(user_mask: Mask | None) -> bool:
    """Whether a mask may keep documents apart."""
    return user_mask is not None and any(map(may_separate_documents, user_mask.walk()))


def keeps_apart(rule: Mask, positions: Tensor | None, sizes: tuple[int, int, int]) -> bool:
    """Whether a rule hides anything of an earlier document, as `positions` that restart tell them."""
    if positions is None:
        return False
    batch, q_len, k_len = sizes
    restarts = alike(positions).diff(dim=-1) < 0
    numbers = torch.nn.functional.pad(restarts.long().cumsum(-1), (1, 0))
    across = causal & ~documents(ids=numbers) & ~rule
    return bool(across.count(q_len, k_len, batch=batch, heads=across.head_count).any())


def warn_of_mixed_documents() -> None:
    """Say that positions restart and nothing keeps the documents apart."""
    warn(
        "position_ids restart as for packed documents, but the documents see each other: transformers keeps "
        "them apart only without attention_mask and cache (pass use_cache=False), and some models, GPT-OSS "
        "among them, not even then. `mask.packed(lengths)` does"
    )
