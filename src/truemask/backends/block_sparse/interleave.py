"""Strips that see some fixed keys and a moving interval, as under sinks and a window: how not to copy the interval.

A strip's keys must lie side by side to be a view. So the fixed keys come once more for each step of the interval:

    f f 0 1 2 | f f 3 4 5 | f f 6 7 8 | ...         fixed keys f, an interval that moves 3 keys at each step

Strip i is the view that begins at the i-th bar and is long enough to hold the whole interval; its mask hides all
copies of f but the first. Instead of every strip's keys, little more than all keys once are copied.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

MIN_STRIPS = 4  # strips that are worth it
MAX_HIDDEN_SHARE = 0.2  # of a strip's columns


class Interleaved(NamedTuple):
    """Keys interleaved: strip i is `keys[i * step:i * step + width]`."""

    keys: Tensor  # int64
    step: int
    width: int
    source: Ints  # [width]: which of a strip's own columns each is; -1: a copy, to be hidden

    def part(self, part: slice) -> Tensor:
        """The keys that some strips need."""
        return self.keys[part.start * self.step : (part.stop - 1) * self.step + self.width]


def interleaved(intervals: Ints) -> Interleaved | None:
    """The intervals `[strips, n, 2]` of strips, all in order, interleaved; None if they are not of this kind."""
    sizes = intervals[0, :, 1] - intervals[0, :, 0]
    steps = np.diff(intervals[:, :, 0], axis=0)
    if (
        len(intervals) < MIN_STRIPS
        or (np.diff(intervals, axis=2)[:, :, 0] != sizes).any()
        or (steps != steps[:1]).any()
    ):
        return None
    moving = np.flatnonzero(steps[0])
    if len(moving) != 1 or steps[0, moving[0]] < 0:
        return None
    at, step, size = int(moving[0]), int(steps[0, moving[0]]), int(sizes[moving[0]])
    offsets = np.cumsum(sizes) - sizes
    fixed = [i for i in range(len(sizes)) if i != at]
    keys = np.concatenate([np.arange(*intervals[0, i]) for i in fixed])
    columns = np.concatenate([offsets[i] + np.arange(sizes[i]) for i in fixed])
    times = -(-size // step)
    if (times - 1) * len(keys) > MAX_HIDDEN_SHARE * size:
        return None
    width, bar = times * len(keys) + size, len(keys) + step
    starts = intervals[0, at, 0] + step * np.arange(len(intervals) - 1 + times)
    blocks = np.concatenate([np.tile(keys, (len(starts), 1)), starts[:, None] + np.arange(step)], 1)
    source = np.full((times, bar), -1)
    source[0, : len(keys)] = columns
    source[:, len(keys) :] = offsets[at] + np.arange(times * step).reshape(times, step)
    length = (len(intervals) - 1) * bar + width
    return Interleaved(torch.from_numpy(blocks.ravel()[:length].copy()), bar, width, source.ravel()[:width])
