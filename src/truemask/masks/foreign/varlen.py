"""From a mask to the intervals that fast kernels take, and back: FlashAttention's documents, FlashMask's columns.

Both are read off the exact form (`mask.to_slabs`) and proven: what is returned is the mask, cell by cell, or there is
an error that names a cell where it would not be.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.geometry.ranges import spans
from truemask.geometry.slabs.algebra import all_of, odd_of
from truemask.geometry.slabs.measure import first_cell
from truemask.geometry.slabs.slabs import FAR, Ints, Slabs, stacked
from truemask.masks.compose.boolean import everything
from truemask.masks.core.data import integers
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.mask import Mask
from truemask.masks.core.slab_tensors import SlabTensors
from truemask.masks.formats.as_mask import expression
from truemask.masks.leaves.bands import causal as causal_mask
from truemask.masks.leaves.bands import local, window
from truemask.masks.leaves.documents import documents

OTHERS = "Export its cells with to_torch_sdpa, or its tiles with mask.to_block_mask"


class Varlen(NamedTuple):
    """What `flash_attn_varlen_func`, and torch's `varlen_attn`, take besides q, k and v of all samples in one row.

    `window_size` is (left, right), -1 unlimited, not counting the own key; lines are aligned at the last query and key
    of each document. `causal` repeats that right is 0.
    """

    cu_seqlens_q: Tensor  # int32 [documents + 1]
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    window_size: tuple[int, int]


class FlashMask(NamedTuple):
    """What PaddlePaddle's `flashmask_attention` takes: int32 `[b, h, k, 1 | 2 | 4]`, and whether it adds causality."""

    startend_row_indices: Tensor
    causal: bool


# -- documents with one band -------------------------------------------------------------------------------------------


class _Documents(NamedTuple):
    """Rows `[a, b)` and keys `[c, d)` of each document that has rows, and the slabs that begin one."""

    a: Ints
    b: Ints
    c: Ints
    d: Ints
    begins: Ints


def to_varlen(
    mask: Mask | str, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
) -> Varlen:
    """The mask as FlashAttention's variable-length documents with one band, if it is exactly that.

    The samples stand one behind the other: the arrays speak of `samples * q_len` queries and `samples * kv_len` keys.
    Rows that see nothing, and keys that nobody sees, are documents without keys, or without rows. Raises MaskError with
    a cell that differs if the mask is anything else, for instance if it has holes, or varies over heads. (T. Dao's
    FlashAttention, from 2.1 on; `torch.nn.attention.varlen`.)

    >>> from truemask.masks.leaves.bands import window
    >>> found = to_varlen(window(3).packed([2, 5]), 7)
    >>> found.cu_seqlens_q.tolist(), found.max_seqlen_q, found.causal, found.window_size
    ([0, 2, 7], 5, True, (2, 0))
    """
    mask = expression("to_varlen: mask", mask)
    kv_len = mask.kv_len_for(q_len) if kv_len is None else kv_len
    exact = mask.to_slabs(q_len, kv_len, batch=batch, heads=heads)
    if not bool((exact.variant == exact.variant[:, :1]).all()):
        raise MaskError(f"to_varlen: `{mask}` varies over heads, and documents do not: export `mask.select(heads=[i])`")
    samples = max(len(exact.variant), batch or 1)
    parts = _variants(exact)
    each = exact.variant[:, 0].expand(samples).tolist()
    if not q_len * samples:
        nothing = torch.zeros(2, dtype=torch.int32)
        return Varlen(
            nothing, torch.tensor([0, samples * kv_len], dtype=torch.int32), 0, samples * kv_len, False, UNBOUNDED
        )
    row = stacked([parts[v].moved(b * q_len, b * kv_len) for b, v in enumerate(each)])
    refuted: list[tuple[int, int]] = []
    for also in (np.zeros(0, np.int64), _diagonal(row)):
        cut = row.cut(np.append(np.arange(samples) * q_len, also))
        documents = _documents(cut, q_len)
        band = _band(cut, documents)
        cell = first_cell(odd_of([row, _seen(documents, band)]))
        if cell is None:
            return _varlen(documents, band, samples * kv_len)
        refuted.append(cell)
    raise _differs(mask, refuted[0], (q_len, kv_len), samples)


UNBOUNDED = (-1, -1)


def _variants(exact: SlabTensors) -> list[Slabs]:
    """The slabs of each variant."""
    rows, starts, low, low_slope, high, high_slope = (
        np.append(exact.q_start.numpy(), exact.q_stop[-1:].numpy()),
        *(x.numpy() for x in exact[4:]),
    )
    variants = []
    for a, b in zip(exact.first.tolist(), exact.first[1:].tolist(), strict=False):
        runs = slice(starts[a], starts[b])
        ends, slopes = np.stack([low[runs], high[runs]]), np.stack([low_slope[runs], high_slope[runs]])
        variants.append(
            Slabs.of(np.append(rows[a:b], exact.q_stop[b - 1]), starts[a : b + 1] - starts[a], ends, slopes)
        )
    return variants


def _diagonal(x: Slabs) -> Ints:
    """The rows of slabs that are one key wide and move: each of them may be a document."""
    single = np.flatnonzero(x.sizes == 1)
    run = x.starts[single]
    single = single[(x.ends[1, run] - x.ends[0, run] == 1) & (x.slopes[:, run] == 1).all(0)]
    return spans(x.rows[single], x.rows[single + 1])[1]


def _hull(x: Slabs) -> tuple[Ints, Ints, Ints, Ints]:
    """The first and last key of each slab on its first row, and on its last: all runs taken as one."""
    some = x.sizes > 0
    first, last = x.starts[:-1][some], x.starts[1:][some] - 1
    low, high = (np.full((2, len(some)), end) for end in (FAR, -1))
    for n, row in enumerate((x.rows[:-1][some], x.rows[1:][some] - 1)):
        low[n, some] = x.ends[0, first] + x.slopes[0, first] * row
        high[n, some] = x.ends[1, last] + x.slopes[1, last] * row
    return low[0], low[1], high[0], high[1]


def _documents(x: Slabs, q_len: int) -> _Documents:
    """A new document begins with each sample, and where no row from there on sees a key that one before saw."""
    low, _, _, high = _hull(x)
    before, after = np.maximum.accumulate(high)[:-1], np.minimum.accumulate(low[::-1])[::-1][1:]
    begins = np.append(0, np.flatnonzero((before <= after) | (x.rows[1:-1] % q_len == 0)) + 1)
    a = x.rows[begins]
    c, d = np.minimum.reduceat(low, begins), np.maximum.reduceat(high, begins)
    reached = np.maximum.accumulate(np.maximum(d, 0))
    return _Documents(a, np.append(a[1:], x.rows[-1]), np.where(d < 0, reached, c), np.where(d < 0, reached, d), begins)


def _band(x: Slabs, documents: _Documents) -> tuple[int, int]:
    """(left, right) that most lines inside documents say; unlimited where there are none."""
    document = np.searchsorted(documents.begins, np.arange(len(x.sizes)), "right") - 1
    document = document[x.sizes > 0]
    c, d, shift = documents.c[document], documents.d[document], documents.d[document] - documents.b[document]
    low_first, low_last, high_first, high_last = (side[x.sizes > 0] for side in _hull(x))
    left, right = [], []
    for row, low, high in (
        (x.rows[:-1][x.sizes > 0], low_first, high_first),
        (x.rows[1:][x.sizes > 0] - 1, low_last, high_last),
    ):
        left.append((row + shift - low)[low > c])
        right.append((high - 1 - row - shift)[high < d])
    return _most_frequent(np.concatenate(left)), _most_frequent(np.concatenate(right))


def _most_frequent(numbers: Ints) -> int:
    values, times = np.unique(numbers, return_counts=True)
    return max(0, int(values[times.argmax()])) if len(values) else -1


def _seen(documents: _Documents, band: tuple[int, int]) -> Slabs:
    """The slabs of documents with one band."""
    a, b, c, d, _ = documents
    rows, shift, some = np.append(a, b[-1]), d - b, c < d
    whole = Slabs(rows, np.append(0, np.cumsum(some)), 2 * np.stack([c, d])[:, some])
    (left, right), still = band, np.zeros_like(shift)
    ends = np.stack([still - FAR if left < 0 else shift - left, still + FAR if right < 0 else shift + right + 1])
    slopes = np.stack([still + (left >= 0), still + (right >= 0)])
    return all_of([whole, Slabs.of(rows, np.arange(len(rows)), ends, slopes)])


def _varlen(documents: _Documents, band: tuple[int, int], keys: int) -> Varlen:
    """Documents and the keys between them as running totals."""
    between = documents.c - np.append(0, documents.d[:-1])
    q = np.append(np.stack([np.zeros_like(between), documents.b - documents.a], 1), 0)
    k = np.append(np.stack([between, documents.d - documents.c], 1), keys - documents.d[-1])
    some = (q > 0) | (k > 0)
    sides = [np.append(0, np.cumsum(side[some])) for side in (q, k)]
    if max(side[-1] for side in sides) >= 1 << 31:
        raise MaskError(f"to_varlen: {sides[0][-1]} queries and {sides[1][-1]} keys are more than int32 counts")
    totals_q, totals_k = (torch.from_numpy(side.astype(np.int32)) for side in sides)
    return Varlen(totals_q, totals_k, int(q.max()), int(k.max()), band[1] == 0, band)


def _differs(mask: Mask, cell: tuple[int, int], sizes: tuple[int, int], samples: int) -> MaskError:
    """The error that shows where the nearest documents differ."""
    (sample, q), k = divmod(cell[0], sizes[0]), cell[1]
    k -= sample * sizes[1]
    where = f" of sample {sample}" if samples > 1 else ""
    sees = "" if bool(mask.truth(*(torch.tensor(i) for i in (sample, 0, q, k)))) else "not "
    return MaskError(
        f"to_varlen: `{mask}` is not documents with one band: query {q}{where} may {sees}see key {k}, "
        f"unlike in the nearest mask that is. {OTHERS}"
    )


@deferrable
def from_varlen(
    cu_seqlens_q: object,
    cu_seqlens_k: object = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Mask:
    """FlashAttention's variable-length documents as a mask of one long row: running totals, int `[documents + 1]`.

    `window_size` is (left, right), -1 unlimited, not counting the own key; lines are aligned at the last query and key
    of each document; with `causal` right is 0.

    >>> import torch
    >>> from_varlen(torch.tensor([0, 3, 7]), causal=True)
    causal.packed([3, 4])
    >>> steps = from_varlen([0, 1, 2], [0, 3, 7], window_size=(1, 0))  # two samples decode
    >>> steps.to_dense(2, 7)[0, 0].int().tolist()
    [[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    """
    q = _totals(cu_seqlens_q, "cu_seqlens_q")
    k = q if cu_seqlens_k is None else _totals(cu_seqlens_k, "cu_seqlens_k")
    if len(q) != len(k):
        raise MaskError(f"from_varlen: {len(q) - 1} documents of queries and {len(k) - 1} of keys; each needs both")
    lengths, kv_lengths, alike = q.diff(), k.diff(), torch.equal(q, k)
    band, other = _banded(*window_size, causal), None if alike else kv_lengths
    if band == everything:
        return documents(lengths, kv_lengths=other)
    shift = kv_lengths - lengths
    shifts = shift[(lengths > 0) & (kv_lengths > 0)].unique().tolist() or [0]
    if len(shifts) == 1:
        return band.at(q_start=max(0, shifts[0]), k_start=max(0, -shifts[0])).packed(lengths, other)
    places = torch.arange(int(q[-1])) + (k - q)[1:].repeat_interleave(lengths)
    down = max(0, -int(places.min()))
    return documents(lengths, kv_lengths=other) & band.at(k_start=down).take(q=places + down)


def _totals(value: object, name: str) -> Tensor:
    totals = integers(value, f"from_varlen({name})", (1,), "[documents + 1]").tensor
    if len(totals) < 2 or int(totals[0]) or bool((totals.diff() < 0).any()):
        raise MaskError(f"from_varlen: {name} are running totals from 0 on, that never fall: got {describe(value)}")
    return totals


def _banded(left: int, right: int, causal: bool) -> Mask:
    """`q - left <= k <= q + right`, -1 for no limit."""
    right = 0 if causal else right
    if min(left, right) < -1:
        raise MaskError(f"from_varlen: window_size={(left, right)} counts keys on each side, -1 for no limit")
    if left == right:
        return everything if left < 0 else local(left)
    past = everything if left < 0 else causal_mask.at(q_start=left).T
    future = everything if right < 0 else causal_mask.at(q_start=right)
    if right == 0:
        return causal_mask if left < 0 else window(left + 1)
    return future if left < 0 else past if right < 0 else past & future


# -- columns -----------------------------------------------------------------------------------------------------------


def to_flashmask(mask: Mask | str, n: int, *, batch: int | None = None, heads: int | None = None) -> FlashMask:
    """The column form of FlashMask for `n` queries and keys, if it holds the mask: `[b, h, k, 1 | 2 | 4]`.

    Each key says from which queries it is hidden: `[LTS, LTE)` on and below the diagonal, `[UTS, UTE)` above it. The
    last axis is `LTS` (with `LTE` n) or `LTS, LTE` where the mask is causal, else `LTS, UTE` (with `LTE` n and `UTS` 0)
    or all four; b and h are 1 where the mask does not vary. Raises MaskError with the first key that needs more than
    one interval on a side. (G. Wang et al., FlashMask, arXiv 2410.01359; `paddle.nn.functional.flashmask_attention`.)

    >>> from truemask.masks.leaves.bands import window
    >>> found = to_flashmask(window(3), 5)
    >>> found.startend_row_indices[0, 0, :, 0].tolist(), found.causal  # from which query on each key is forgotten
    ([3, 4, 5, 5, 5], True)
    """
    mask = expression("to_flashmask: mask", mask)
    exact = mask.T.to_slabs(n, n, batch=batch, heads=heads)
    columns = np.zeros((len(exact.first) - 1, n, 4), np.int64)
    for v, slabs in enumerate(_variants(exact)):
        place = [f"{name} {i}" for name, i in zip(("sample", "head"), (exact.variant == v).nonzero()[0], strict=True)]
        where = "".join(f" of {x}" for x, size in zip(place, exact.variant.shape, strict=True) if size > 1)
        columns[v] = _columns(mask, slabs, n, where) if n else 0
    below, above = columns[..., :2], columns[..., 2:]
    causal = bool((above == np.stack([np.zeros(n), np.arange(n)], -1)).all())
    open_ended = bool((below[..., 1] == n).all())
    if causal:
        indices = below[..., :1] if open_ended else below
    else:
        indices = columns[..., [0, 3]] if open_ended and not above[..., 0].any() else columns
    return FlashMask(torch.from_numpy(indices.astype(np.int32))[exact.variant], causal)


def _columns(mask: Mask, x: Slabs, n: int, where: str) -> Ints:
    """LTS, LTE, UTS, UTE of each key; the slabs are those of the transposed mask."""
    slab = np.repeat(np.arange(len(x.sizes)), np.diff(x.rows))
    count = np.minimum(x.sizes[slab], 4)  # four runs are more than fit
    key, run = spans(x.starts[slab], x.starts[slab] + count)
    gap = np.arange(len(run)) + key  # the one before each run: a key has one more of them than runs
    begin, end = np.zeros(len(run) + n, np.int64), np.full(len(run) + n, n)
    begin[gap + 1] = x.ends[1, run] + x.slopes[1, run] * key
    end[gap] = x.ends[0, run] + x.slopes[0, run] * key
    owner = np.repeat(np.arange(n), count + 1)
    out = np.stack([np.full(n, n), np.full(n, n), np.zeros(n, np.int64), np.zeros(n, np.int64)], 1)
    for side, first, stop in ((0, np.maximum(begin, owner), end), (2, begin, np.minimum(end, owner))):
        some = first < stop
        times = np.bincount(owner[some], minlength=n)
        if (times > 1).any():
            k = int(np.argmax(times > 1))
            hidden = " and ".join(f"[{a}, {b})" for a, b in np.stack([first, stop], 1)[some & (owner == k)])
            raise MaskError(
                f"to_flashmask: key {k}{where} of `{mask}` is hidden from the queries {hidden} "
                f"{'below' if side == 0 else 'above'} the diagonal, and there is place for one interval. {OTHERS}"
            )
        out[owner[some], side], out[owner[some], side + 1] = first[some], stop[some]
    return out
