"""Slabs as plain tensors, for whoever wants the intervals themselves: kernels, viewers, other libraries."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from truemask.geometry.slabs.slabs import Ints, Slabs


class SlabTensors(NamedTuple):
    """The exact forms of the distinct masks of a batch, one after the other; all int64.

    Variant v has the slabs `first[v]:first[v + 1]`. Slab i is the queries `[q_start[i], q_stop[i])` and has the runs
    `starts[i]:starts[i + 1]`. Run j lets query q see the keys from `low[j] + low_slope[j] * q` up to, not including,
    `high[j] + high_slope[j] * q`.
    """

    variant: Tensor  # [b, h], 1 where the mask does not vary
    first: Tensor  # [variants + 1]
    q_start: Tensor  # [slabs]
    q_stop: Tensor  # [slabs]
    starts: Tensor  # [slabs + 1]
    low: Tensor  # [runs]
    low_slope: Tensor
    high: Tensor
    high_slope: Tensor


def slab_tensors(parts: list[Slabs], which: Ints) -> SlabTensors:
    """The slabs of every variant, and which variant each sample and head has."""
    start, stop = (np.concatenate([x.rows[side] for x in parts]) for side in (slice(-1), slice(1, None)))
    counts = np.concatenate([x.sizes for x in parts])
    ends, slopes = (np.concatenate([getattr(x, name) for x in parts], axis=1) for name in ("ends", "slopes"))
    columns = (
        which,
        np.append(0, np.cumsum([len(x.sizes) for x in parts])),
        start,
        stop,
        np.append(0, np.cumsum(counts)),
        *(x for side in (0, 1) for x in (ends[side], slopes[side])),
    )
    return SlabTensors(*(torch.from_numpy(np.array(x, np.int64)) for x in columns))
