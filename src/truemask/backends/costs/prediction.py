"""Seconds that follow from the constants: of work by dtype, direction and head size, of few rows, of few tasks.

What this does not know: caches (but that torch's kernel waits for long keys), other programs, threads that share a
core, and between 1 and 32 rows and beside the two head sizes it draws straight lines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from truemask.backends.base import Request
from truemask.backends.costs.model import table
from truemask.backends.costs.rates import Both, Pace, Rates, SdpaRates

BACKWARD_PRODUCTS = 2.5  # five products of the forward's size in the backward, against two
KEYS_AT_ONCE = 512  # of torch's kernel
CACHED = 2 << 20  # bytes of keys and values for which it does not wait


def seconds(rates: Rates, request: Request, cells: float) -> float:
    """Predicted seconds for so many scores by all threads at full speed."""
    both = paces(rates, request)
    cells = cells * spread(rates)
    forward = rates.call + cells * cell_seconds(both.forward, request)
    if not request.grad:
        return forward
    return forward + rates.call_backward + BACKWARD_PRODUCTS * cells * cell_seconds(both.backward, request)


def paces(rates: Rates, request: Request) -> Both:
    """Those of the call's dtype."""
    return rates.paces[pace_name(request)]


def pace_name(request: Request) -> str:
    """The dtype as paces are named."""
    return {8: "fp64", 4: "fp32"}.get(request.dtype.itemsize) or ("bf16" if "bf" in str(request.dtype) else "fp16")


def cell_seconds(pace: Pace, request: Request) -> float:
    """Of a score: on the line through those of the two head sizes, within what both allow.

    A softmax takes the same time at any head size, so a score takes less than twice as long at 128 as at 64.
    """
    size = (request.head_dim + request.value_dim) / 128  # in heads of 64
    at64, at128 = 4 * 64 / pace.d64, 4 * 128 / pace.d128
    return max(at64 + (size - 1) * (at128 - at64), min(at64, at128) * min(1.0, size))


# -- threads -----------------------------------------------------------------------------------------------------------


def spread(rates: Rates, tasks: float = math.inf) -> float:
    """How many times longer so many equal tasks take here than with all the threads that `rates` were measured with."""
    threads = table().threads(rates)
    tasks = max(1.0, tasks)
    used = threads if math.isinf(tasks) else tasks / math.ceil(tasks / threads)
    return rates.threads / used


# -- torch's flash kernel ----------------------------------------------------------------------------------------------


def rows_at_once(rows: int) -> int:
    """How many rows of queries torch's kernel takes at a time."""
    return 32 if rows < 192 else 64 if rows < 768 else 256


def share(pace: Pace, rows: ArrayLike) -> NDArray[np.float64]:
    """The share of full speed at which torch's kernel takes blocks of so many rows.

    Up to 32 rows, the time of a block is on the line between those of one row and of 32.
    """
    rows = np.maximum(1, np.asarray(rows, float))
    one, most = 1 / pace.rows1, 32 / pace.rows32
    few = rows / (one + (most - one) * (np.clip(rows, 1, 32) - 1) / 31)
    return np.where(rows < 32, few, np.where(rows < 192, pace.rows32, np.where(rows < 768, pace.rows64, 1.0)))


def blocks_of(rows: ArrayLike, keys: ArrayLike) -> NDArray[np.float64]:
    """Blocks that torch's kernel cuts `rows` x `keys` into."""
    rows = np.asarray(rows, float)
    at_once = np.where(rows < 192, 32, np.where(rows < 768, 64, 256))
    return np.ceil(rows / at_once) * np.ceil(np.asarray(keys, float) / KEYS_AT_ONCE)


class Blocks(NamedTuple):
    """What torch's kernel is given: rows of each call or strip, scores that it computes of them, blocks, and tasks."""

    rows: ArrayLike
    cells: ArrayLike
    number: float
    tasks: float


def flash_seconds(rates: Rates, pace: Pace, request: Request, blocks: Blocks, times: float = 1.0) -> float:
    """Seconds of torch's kernel, beside what a call takes."""
    work = times * cell_seconds(pace, request) * float((np.asarray(blocks.cells) / share(pace, blocks.rows)).sum())
    return spread(rates, blocks.tasks) * (work + blocks.number * pace.step / rates.threads)


def waiting(rates: SdpaRates, request: Request, itemsize: int, tasks: float) -> float:
    """Seconds in which torch's kernel waits for keys and values; a single row reads them as fast as they come."""
    r = request
    nbytes = r.batch * r.kv_heads * r.kv_len * (r.head_dim + r.value_dim) * itemsize
    return spread(rates, tasks) * max(0, nbytes - CACHED) / rates.read if r.q_len > 1 else 0.0
