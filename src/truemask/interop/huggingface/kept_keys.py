"""Which keys a layer of a sized cache still has, and which of them a mask lets it forget.

Keys are counted as they lie in the batch, pads included: key j is what the j-th token of the batch's rows wrote. A mask
over these places (`ModelMask.over_places`) says what later queries may see; what they may not is forgotten, and the
attention asks the mask about the places of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truemask.errors import MaskError
from truemask.generation.retention import Retention
from truemask.geometry.tiles.tile_map import Ints
from truemask.masks.core.mask import Mask

TABLE = 256  # places that a mask is asked about ahead of time, so that the steps in between make no new mask


@dataclass(frozen=True)
class Needs:
    """What queries that come will see: a mask over places, for so many samples and heads.

    `tokens`: how many there will be at most, or None. `lasts`: whether the mask says it for all of them; if not, every
    key is needed. So it is where nothing repeats and nobody says how many tokens there will be, and where finding it
    out would take long.
    """

    mask: Mask
    batch: int
    heads: int
    tokens: int | None = None
    lasts: bool = True

    def of(self, places: Ints, query: int, past: int) -> np.ndarray:
        """Which of the keys at these places, of `past` that there are, `query` or a later one sees; bool `[n]`."""
        everything = np.ones(len(places), bool)
        if not self.lasts:
            return everything
        if self.tokens is not None:
            return self._retention(self.tokens).needed(places, query, past)
        try:
            live = self.mask.live_keys(query, past, batch=self.batch, heads=self.heads)
        except MaskError:
            return everything
        return live.any(0).any(0).numpy()[places]

    def capacity(self, tokens: int) -> int:
        """The most keys that one token reads, its own included, of so many tokens."""
        return self._retention(tokens).capacity if self.lasts else tokens

    def _retention(self, tokens: int) -> Retention:
        return Retention(self.mask, tokens, self.batch, self.heads)


class Kept:
    """The keys that are there: those at `places`, int64 `[n]`, increasing, and every one from `since` on.

    `needs`: by which the others were forgotten; None if nothing was, or if the samples are others now. `query`: from
    which query on nothing is missing. Layers whose masks agree share these values.
    """

    def __init__(self, places: Ints, since: int, needs: Needs | None = None, query: int = 0) -> None:
        self.places, self.since, self.needs, self.query = places, since, needs, query
        self._placed: tuple[Mask, int, Mask] | None = None
        self._for_rows: tuple[Needs, int, Mask] | None = None  # those of one forward, which layers share
        self._agreed: Needs | None = None
        self._left: dict[tuple[Needs, int, int], tuple[Ints, Kept]] = {}

    @property
    def forgotten(self) -> int:
        """How many keys before `since` are gone."""
        return self.since - len(self.places)

    def count(self, past: int) -> int:
        """How many there are after so many tokens."""
        return past - self.forgotten

    def all_places(self, past: int) -> Ints:
        """Where they stand, int64 `[n]`."""
        return np.concatenate((self.places, np.arange(self.since, past)))

    def for_rows(self, needs: Needs, start: int, past: int) -> Mask:
        """The mask about the rows from `start` on and the keys that are there after `past` tokens."""
        if self._for_rows is None or self._for_rows[0] is not needs or self._for_rows[1] != start:
            self._for_rows = needs, start, self.placed(needs, past).at(q_start=start)
        return self._for_rows[2]

    def placed(self, needs: Needs, past: int) -> Mask:
        """The mask about all rows, and of the keys about those that are there after `past` tokens."""
        if not self.forgotten:
            return needs.mask
        if not len(self.places) or self.places[0] == self.forgotten:  # none is missing behind the first
            return needs.mask.at(k_start=self.forgotten)
        if self._placed is None or self._placed[0] != needs.mask or self._placed[1] < past:
            reach = self._reach(needs, past)
            places = torch.from_numpy(self.all_places(reach))
            self._placed = needs.mask, reach, needs.mask.take(k=places)
        return self._placed[2]

    def _reach(self, needs: Needs, past: int) -> int:
        """Up to which place the next steps may ask: some ahead, as far as the mask has data."""
        reach = -(-past // TABLE) * TABLE
        reach = reach if needs.tokens is None else max(past, min(reach, needs.tokens))
        try:
            needs.mask.check(reach, reach)
        except MaskError:
            return past
        return reach

    def left(self, needs: Needs, past: int, query: int) -> tuple[Ints, Kept]:
        """Which of the keys there are after `past` tokens `query` or a later one needs, by number, and those alone."""
        query = max(query, self.query)
        known = self._left.get((needs, past, query))
        if known is None:
            places = self.all_places(past)
            which = np.flatnonzero(needs.of(places, query, past) | (places >= query))
            if len(self._left) > 2:
                self._left.clear()
            known = self._left[needs, past, query] = which, Kept(places[which], past, needs, query)
        return known

    def lost(self, needs: Needs, past: int) -> int | None:
        """A key that queries from `past` on need and that is not there any more."""
        if needs == self.needs and past >= self.query:
            return None
        gone = np.setdiff1d(np.arange(min(past, self.since)), self.places)
        needed = gone[needs.of(gone, past, past)] if len(gone) else gone
        return int(needed[-1]) if len(needed) else None

    def lost_now(self, needs: Needs, past: int) -> int | None:
        """The same, if what queries need is another thing than when keys were forgotten."""
        if self.needs is None or self._agreed is needs:
            return None
        lost = None if needs == self.needs else self.lost(needs, past)
        self._agreed = needs if lost is None else None
        return lost

    def cut(self, past: int) -> Kept:
        """After only so many tokens."""
        return self if past >= self.since else Kept(self.places[self.places < past], past, self.needs, self.query)

    def of_other_samples(self) -> Kept:
        """The same places for samples in another order: the mask of what comes may be written in another way."""
        return Kept(self.places, self.since, None, self.query)


def all_keys() -> Kept:
    """What a layer begins with: nothing is forgotten."""
    return Kept(np.empty(0, np.int64), 0)


def of_places(bias: Tensor | None, kept: Kept, past: int) -> Tensor | None:
    """The columns of the keys that are there, of a tensor about all of them; one column stands for each."""
    if bias is None or not kept.forgotten or bias.shape[-1] == 1:
        return bias
    return bias[..., torch.from_numpy(kept.all_places(past)).to(bias.device)]
