"""A forward whose rows are a draft: guessed continuations as a tree, behind keys that lie where each sample has them.

The model makes its mask as for rows in order, and what it says is its rule at positions. `DraftedMask` takes that rule
and the user's mask to the positions of the draft's nodes, and lets each node see only its own branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from truemask.errors import MaskError
from truemask.generation.speculation.places import Places
from truemask.generation.speculation.trees import Nodes
from truemask.interop.huggingface.mask_checks import check_samples
from truemask.interop.huggingface.masks import ModelMask
from truemask.masks.compose.boolean import conjunction, everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.per_token import padding
from truemask.masks.structure.data import lies_in_rows


@dataclass(frozen=True)
class DraftedForward:
    """The nodes of a forward, where the keys before them lie, and how many pads begin each sample, if any does."""

    nodes: Nodes
    places: Places
    starts: list[int] | None


DRAFTED: ContextVar[DraftedForward | None] = ContextVar("truemask_drafted", default=None)


@contextmanager
def drafted(forward: DraftedForward) -> Iterator[None]:
    """What runs inside reads a draft."""
    token = DRAFTED.set(forward)
    try:
        yield
    finally:
        DRAFTED.reset(token)


class DraftedMask(ModelMask):
    """The model's own mask for the nodes of a draft."""

    def __init__(self, forward: DraftedForward, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._forward = forward

    def combined_with(self, user_mask: Mask | None, replace: bool = False, position_ids: object = None) -> Mask:
        """The mask of the call: the model's own rule and the user's, at the positions of the nodes and of the keys."""
        if (user_mask, replace) not in self._masks:
            check_samples(user_mask, self.batch)
            starts, places = self._forward.starts, self._forward.places
            rule = everything if replace and user_mask is not None else self.lifted.mask
            user = everything if user_mask is None else user_mask
            if starts is not None:
                rule = rule.padded(starts)
                user = user if lies_in_rows(user, packed=False) else user.padded(starts)
                rule = conjunction(padding(starts=starts, on="keys"), rule)
            self._masks[user_mask, replace] = places.mask(conjunction(rule, user), self._forward.nodes)
        return self._masks[user_mask, replace]

    def rule_beside(self, user_mask: Mask, position_ids: object) -> tuple[Mask, int]:
        """What the rule removes was said when the prompt was read."""
        return everything, 0

    def warn_of_documents(self, user_mask: Mask | None) -> None:
        """Positions that come twice are branches, and no documents."""


def refuse_other(model_mask: ModelMask, path: str) -> None:
    """Raise if a layer is to read a draft under a mask that knows nothing of it."""
    if DRAFTED.get() is not None and not isinstance(model_mask, DraftedMask):
        raise MaskError(
            f"`{path}` gets no mask from transformers' mask functions, so a draft cannot be checked by it: generate "
            "without draft="
        )
