"""What may be asked of every mask, and how masks are combined and re-indexed: one class, explained here.

The answers are functions of a mask: counts, cells and equivalence in `queries.py`, which stands on `exact_form.py`;
pictures in `pictures.py`; bytes in `memory.py`. What a kind of mask says of itself is in `value.py`. The kinds that
operators and re-indexing methods build (`compose/`) derive from this class and are found by their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truemask.common.arguments import whole
from truemask.errors import MaskError
from truemask.geometry.logic import States
from truemask.geometry.tiles.tile_map import Rectangles, TileMap
from truemask.masks.core import pictures, queries
from truemask.masks.core.block_mask import block_mask_of
from truemask.masks.core.construction import build, operand
from truemask.masks.core.handles import handle_fields
from truemask.masks.core.kinds import KINDS
from truemask.masks.core.memory import mask_memory
from truemask.masks.core.queries import sizes_of
from truemask.masks.core.slab_tensors import SlabTensors
from truemask.masks.core.value import Value
from truemask.masks.core.verdict import Verdict

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from typing_extensions import Self


class Mask(Value):
    """A rule that says which query may attend to which key, in each sample and head.

    Masks are values: immutable, hashable, picklable; `==` compares expressions, `equivalent` compares meaning. Combine
    them with `&`, `|`, `~`, `^` and `-` (and not); re-index them with `at`, `take`, `select`, `packed`, `padded`, `T`.

    >>> from truemask.masks.leaves.bands import causal, window
    >>> from truemask.masks.leaves.per_token import prefix
    >>> mask = causal & (window(3) | prefix(1))
    >>> mask
    causal & (window(3) | prefix(1))
    >>> mask.to_dense(5)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]
    """

    handle: Tensor  # this mask in a compiled graph (handles.py)
    number: str  # the same while `torch.export` traces by way of dynamo

    def __new__(cls, *_: object, **__: object) -> Self:
        new = super().__new__(cls)
        vars(new).update({} if torch.compiler.is_dynamo_compiling() else handle_fields(new))
        return new

    def __init_subclass__(cls) -> None:
        if cls.kind:
            KINDS[cls.kind] = cls

    @classmethod
    def make(cls, *args: Any, **parts: Any) -> Mask:
        """Build from what a user may write; kinds with canonical fields override it."""
        return cls(*args, **parts)

    def twin(self) -> Self:
        """An equal mask that shares all data but is another object, without a handle."""
        new = object.__new__(type(self))
        vars(new).update({name: part for name, part in vars(self).items() if name not in ("handle", "number")})
        return new

    # -- operators ---------------------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        return build("and", self, other)

    def __or__(self, other: Mask) -> Mask:
        return build("or", self, other)

    def __xor__(self, other: Mask) -> Mask:
        return build("xor", self, other)

    def __sub__(self, other: Mask) -> Mask:
        return build("minus", self, other)

    def __invert__(self) -> Mask:
        return build("not", self)

    def __rand__(self, other: object) -> Mask:
        return build("and", other, self)

    def __ror__(self, other: object) -> Mask:
        return build("or", other, self)

    def __rxor__(self, other: object) -> Mask:
        return build("xor", other, self)

    def __rsub__(self, other: object) -> Mask:
        return build("minus", other, self)

    def __bool__(self) -> bool:
        raise MaskError(
            f"the mask `{self}` is neither true nor false: Python's `and`, `or`, `not` and `if` cannot combine masks. "
            "Use `&`, `|` and `~`"
        )

    def __call__(self, *args: object, **kwargs: object) -> Mask:
        name = self.text
        raise MaskError(
            f"`{name}` is a value, not a function: write `{name}` without parentheses (its cells are `mask[q, k]`, "
            "its meaning on index tensors `mask.truth(b, h, q, k)`)"
        )

    # -- re-indexing -------------------------------------------------------------------------------------------------

    @property
    def T(self) -> Mask:
        """Queries and keys change places."""
        return build("transposed", self)

    def at(self, q_start: int = 0, k_start: int = 0) -> Mask:
        """The same mask for rows that start at position `q_start` and keys that start at `k_start`.

        Row i of the result is position q_start + i. This is how chunks, prefill and decoding ask: never rewrite a
        mask, re-index it (law 2 in docs/conventions.md). `m.at(a).at(b)` is `m.at(a + b)`.

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.at(q_start=3).to_dense(1)[0, 0].int().tolist()  # decoding position 3: four keys so far
        [[1, 1, 1, 1]]
        """
        return build("at", self, q_start, k_start)

    def take(self, q: object = None, k: object = None) -> Mask:
        """The same mask for any rows and keys: logical positions, int64 `[n]` or `[b, n]`; None keeps an axis."""
        return build("take", self, q, k)

    def select(self, samples: object = None, heads: object = None) -> Mask:
        """The same mask for chosen samples and heads, in that order (beams, compaction, tensor parallel)."""
        return build("select", self, samples, heads)

    def packed(self, lengths: object, kv_lengths: object = None) -> Mask:
        """The same document, and this mask at positions that restart in each document (law 2 in docs/conventions.md).

        `lengths` are tokens per document, `[m]` or one list per sample; `kv_lengths` for packed cross-attention.

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.packed([2, 3]).to_dense(5)[0, 0].int().tolist()
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
        """
        return build("packed", self, lengths, kv_lengths)

    def padded(self, starts: object) -> Mask:
        """Left padding: sample b begins at `starts[b]`, and this mask counts from there (law 2 in docs/conventions.md).

        `starts` are tokens, one for each sample; what stands before sees nothing and is seen by nobody.

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.padded([1]).to_dense(3)[0, 0].int().tolist()
        [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
        """
        return build("padded", self, starts)

    def prepended(self, q: int = 0, k: int = 0, seen: Mask | None = None) -> Mask:
        """With `q` extra rows and `k` extra keys before the mask's own, which do not count them (registers, memory).

        The extra keys are seen by every row. The extra rows see them, and those of the mask's own keys that `seen`
        lets through (default: all); `seen` must be the same for every query.
        """
        return build("prepended", self, q, k, build("everything") if seen is None else seen)

    # -- cells and tiles ---------------------------------------------------------------------------------------------

    def tile(self, rectangles: Rectangles) -> States:
        """EMPTY (0), MIXED (1) or FULL (2) for whole rectangles; EMPTY and FULL are proofs, MIXED promises nothing.

        They must lie within the mask's data (`check`).

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.tile(Rectangles.of(q=([0, 0, 4], [4, 4, 8]), k=([4, 0, 0], [8, 4, 4]))).tolist()
        [0, 1, 2]
        """
        return self._tile(rectangles)

    def __getitem__(self, place: tuple[int, int]) -> bool:
        """Whether query `place[0]` may attend to key `place[1]`."""
        return queries.cell(self, place)

    def tiles(
        self,
        q_len: int,
        kv_len: int | None = None,
        block: int | tuple[int, int] = 128,
        *,
        batch: int | None = None,
        heads: int | None = None,
    ) -> TileMap:
        """Which tiles are EMPTY, MIXED or FULL, without evaluating cells; `block` is an int or (queries, keys).

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.tiles(1024).counts
        TileCounts(empty=28, mixed=8, full=28)
        """
        return queries.tiles(self, sizes_of(self, q_len, kv_len, batch, heads), block)

    def to_dense(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The mask as a bool tensor `[b, h, q, k]`, True = may attend; size 1 where it does not vary."""
        return queries.dense(self, sizes_of(self, q_len, kv_len, batch, heads), device)

    def to_block_mask(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        block: int | tuple[int, int] = 128,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The mask for FlexAttention: a `torch.nn.attention.flex_attention.BlockMask`, without evaluating every cell.

        Its lists are those of torch's `create_block_mask`, its `mask_mod` is `truth`; `block` is an int or (queries,
        keys). `device=None` is the CPU. It can be made in a `DataLoader` worker, pinned, and moved with `.to(device)`,
        which takes the mask's data along (docs/flex.md).

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.to_block_mask(512).full_kv_num_blocks
        tensor([[[0, 1, 2, 3]]], dtype=torch.int32)
        """
        return block_mask_of(self, self.tiles(q_len, kv_len, block, batch=batch, heads=heads), device)

    def to_slabs(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> SlabTensors:
        """The exact form as plain int64 tensors: slabs of rows, and runs of keys whose ends move by 0 or 1 a row.

        Raises MaskError if the mask has none (predicates, random cells) or it would be larger than two million runs.

        >>> from truemask.masks.leaves.bands import window
        >>> slabs = window(3).to_slabs(8)
        >>> slabs.q_start.tolist(), slabs.q_stop.tolist(), slabs.starts.tolist()
        ([0, 3], [3, 8], [0, 1, 2])
        >>> slabs.low.tolist(), slabs.low_slope.tolist(), slabs.high.tolist(), slabs.high_slope.tolist()
        ([0, -2], [0, 1], [1, 1], [1, 1])
        """
        return queries.slabs(self, sizes_of(self, q_len, kv_len, batch, heads))

    def show(
        self, q_len: int = 16, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> str:
        """A picture in text, one panel for each sample and head that differs; shares of tiles where it is large."""
        return pictures.text_panels(self, sizes_of(self, q_len, kv_len, batch, heads))

    def _repr_html_(self) -> str:
        return pictures.html_panels(self)

    # -- questions ---------------------------------------------------------------------------------------------------

    def check(self, q_len: int, kv_len: int, *, batch: int | None = None, heads: int | None = None) -> None:
        """Raise a MaskError if the mask cannot answer for these sizes."""
        queries.check(self, q_len, kv_len, batch, heads)

    def count(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """The number of (query, key) pairs let through, int64 `[b, h]` (size 1 where the mask does not vary).

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.count(5)
        tensor([[15]])
        """
        return queries.count(self, sizes_of(self, q_len, kv_len, batch, heads))

    def density(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> float:
        """The share of all (query, key) pairs that is let through, a mean over samples and heads; 0.0 of nothing."""
        pairs = self.count(q_len, kv_len, batch=batch, heads=heads)
        cells = q_len * (self.kv_len_for(q_len) if kv_len is None else kv_len)
        return float(pairs.double().mean()) / cells if cells else 0.0

    def dead_queries(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """Which queries may attend to nothing, bool `[b, h, q]`: their output is zeros (law 5, docs/conventions.md)."""
        return ~queries.live_queries(self, sizes_of(self, q_len, kv_len, batch, heads))

    def dead_keys(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """Which keys no query may attend to, bool `[b, h, k]`."""
        return ~queries.seen(self, sizes_of(self, q_len, kv_len, batch, heads))

    def live_keys(
        self,
        q_start: int,
        kv_len: int | None = None,
        *,
        q_stop: int | None = None,
        batch: int | None = None,
        heads: int | None = None,
    ) -> Tensor:
        """Which of the keys so far any later query may still see, bool `[b, h, k]`: what a cache must keep.

        Later queries are those from position `q_start` on, up to `q_stop`; by default all that can ever come (as far as
        the mask's data reach). `kv_len` is the number of keys, by default `q_start`.

        >>> from truemask.masks.leaves.bands import causal, window
        >>> from truemask.masks.leaves.per_token import prefix
        >>> mask = causal & (window(3) | prefix(1))
        >>> mask.live_keys(6)[0, 0].int().tolist()  # the sink, and what position 6 and later ones look back at
        [1, 0, 0, 0, 1, 1]
        """
        q_start = whole(q_start, "q_start")
        kv_len = q_start if kv_len is None else whole(kv_len, "kv_len")
        stop = queries.last_query(self, q_start, kv_len) if q_stop is None else whole(q_stop, "q_stop", q_start)
        later = self.at(q_start=q_start)
        return queries.seen(later, sizes_of(later, max(0, stop - q_start), kv_len, batch, heads))

    def equivalent(
        self, other: Mask, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Verdict:
        """Whether both masks let the same pairs through at these sizes; `==` compares the expressions instead.

        The answer is true or false like a bool, and says which cell refutes it (`.witness`).

        >>> from truemask.masks.leaves.bands import causal, window
        >>> window(8).equivalent(causal, 8)
        yes
        >>> window(8).equivalent(causal, 9)
        no: query 8 may see key 0 under `causal`, but not under `window(8)`
        """
        other = operand("equivalent", other)
        return queries.refuted(self, other, self ^ other, q_len, kv_len, batch, heads)

    def implies(
        self, other: Mask, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Verdict:
        """Whether `other` lets through at least what this mask does; when not, `.witness` is a cell that it hides.

        >>> from truemask.masks.leaves.bands import causal, window
        >>> window(8).implies(causal, 1000)
        yes
        >>> causal.implies(window(8), 1000).witness
        Cell(sample=0, head=0, query=8, key=0)
        """
        other = operand("implies", other)
        return queries.refuted(self, other, self - other, q_len, kv_len, batch, heads)

    def positions(self, q_len: int, kv_len: int | None = None) -> tuple[Tensor, Tensor]:
        """The logical positions of rows and keys, int64 `[n]` or `[b, n]`: what rotary embeddings need.

        Raises MaskError where parts of the expression are re-indexed differently.

        >>> from truemask.masks.leaves.bands import causal
        >>> causal.packed([2, 3]).positions(5)[0].tolist()
        [0, 1, 0, 1, 2]
        """
        return queries.positions(self, q_len, kv_len)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the mask holds, and of what it has worked out and remembers; shared ones once.

        >>> from truemask.masks.leaves.per_token import keys
        >>> flags = keys([True] * 500)
        >>> flags.nbytes, (flags & flags).nbytes
        (500, 500)
        """
        return sum(mask_memory(self).values())
