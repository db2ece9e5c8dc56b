"""What a mask lets a cache forget: until which query each key is needed.

A key that no later query sees never comes back, so what must be kept follows from one number a key, the last query that
sees it. It is worked out once for all tokens that will come, and says the same as `mask.live_keys` at every moment.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from truemask.errors import MaskError
from truemask.geometry.tiles.tile_map import Ints
from truemask.masks.core.mask import Mask
from truemask.masks.core.queries import last_seen, sizes_of
from truemask.masks.structure.order import looks_back
from truemask.nn.forward_mask import pairs_ahead

MOST_CELLS = 1 << 21  # that are looked at to find out; of a mask that would take more, every key is kept


class Retention:
    """Which of `tokens` keys are needed when, in any sample and head.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> from truemask.masks.leaves.per_token import prefix
    >>> kept = Retention(causal & (window(3) | prefix(1)), 1000, 1, 1)
    >>> kept.capacity, np.flatnonzero(kept.needed(np.arange(1000), 6, 6)).tolist()
    (4, [0, 4, 5])
    """

    def __init__(self, mask: Mask, tokens: int, batch: int, heads: int) -> None:
        self._last = _last_queries(mask, tokens, batch, heads)  # by position

    @property
    def capacity(self) -> int:
        """The most keys that a single new token reads, its own included: what a layer must have room for."""
        tokens = len(self._last)
        own = np.arange(tokens)
        steps = np.bincount(np.maximum(self._last, own) + 1, minlength=tokens + 1)[:tokens]
        return int((1 + own - steps.cumsum()).max(initial=0))

    def needed(self, positions: Ints, query: int, past: int) -> np.ndarray:
        """Which of these keys, of `past` that there are, `query` or a later one sees."""
        return (self._last[positions] >= query) & (positions < past)

    def lost(self, kept: Ints, past: int) -> tuple[int, int] | None:
        """A key that is not kept and that queries from `past` on need, with the last query that sees it."""
        needed = np.flatnonzero(self._last[:past] >= past)
        gone = np.setdiff1d(needed, kept)
        if not len(gone):
            return None
        worst = gone[self._last[gone].argmax()]
        return int(worst), int(self._last[worst])

    def least(self, kept: Ints, past: int) -> int:
        """How many tokens there must be at least, of `past`, for the kept keys to be all that is needed."""
        gone = np.setdiff1d(np.arange(past), kept)
        return int(self._last[gone].max(initial=-1)) + 1


@lru_cache(maxsize=16)
def _last_queries(mask: Mask, tokens: int, batch: int, heads: int) -> Ints:
    try:
        last = last_seen(mask, sizes_of(mask, tokens, tokens, batch, heads), MOST_CELLS)
    except MaskError:
        last = None
    return np.full(tokens, tokens - 1) if last is None else last


def check_cacheable(mask: Mask, tokens: int, batch: int, heads: int) -> None:
    """Raise MaskError if the mask lets a query see later keys, or its data end before `tokens`."""
    try:
        mask.check(tokens, tokens, batch=batch, heads=heads)
    except MaskError as error:
        raise MaskError(
            f"a cache for tokens={tokens} under mask=`{mask}`: {error}. Pass a mask that answers for all tokens "
            "that will come, or fewer tokens="
        ) from error
    if not looks_back(mask) and pairs_ahead(mask, tokens, batch, heads):
        raise MaskError(
            f"a cache cannot be sized by mask=`{mask}`: it lets queries see later keys, which are not there yet when a "
            f"query is computed. Pass `tm.causal & ...`, or no mask=, which keeps every key"
        )
