"""`PackCollator`: samples of a `DataLoader` or of Hugging Face's `Trainer` as a packed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from truemask.attention.planning.plan import plan
from truemask.common.arguments import whole
from truemask.common.formatting import describe
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import from_text, not_a_mask
from truemask.packing.pack import pack


@dataclass(frozen=True)
class PackCollator:
    """Samples to a batch of packed rows; it pickles, so that the workers of a `DataLoader` do the packing.

    A batch has `input_ids`, `labels` (not shifted) and `position_ids` (they restart), int64 `[rows, length]`, and any
    other field of the samples.

    Without a `mask` the batch is what Hugging Face's causal models take, by `Trainer(data_collator=...)` or
    `model(**batch)`. They find the documents in `position_ids`, but only without `attention_mask` and without a cache
    (transformers 5.23, `masking_utils._preprocess_mask_arguments`), so the first is left out and the batch says
    `use_cache=False`: with either, documents would read each other and nothing would say so.

    With a `mask` the batch also has `lengths`, a list for each row, and `mask`, which is `mask.packed(lengths)`; on
    request the `block_mask` for FlexAttention and the `plan`, both worked out where the collator runs.

    Args:
        length: tokens of a row; None puts all samples of a batch into one row without padding.
        mask: what tokens read inside their own document, such as `causal & window(512)`.
        block_mask: whether the batch has `block_mask`, the mask's `to_block_mask(length)`.
        plan: keywords for `truemask.plan`, which knows rows and length from the batch, and neither heads, head size,
            dtype nor device: `plan={"heads": 8, "head_dim": 64, "grad": True}`. The batch has the `plan`; run by it
            with `attend(..., mask, backend=batch["plan"].backend)`.
        long, pad, ignore_index, first_position: as `pack` has them. RoBERTa, XLM-R, ESM and MPNet count positions
            from `padding_idx + 1`, usually `first_position=2`.

    >>> batch = PackCollator(8)([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[1, 2, 3, 4, 5, 0, 0, 0]], [[-100, 2, 3, -100, 5, -100, -100, -100]])
    >>> batch["position_ids"].tolist(), batch["use_cache"]
    ([[0, 1, 2, 0, 1, 0, 1, 2]], False)
    >>> from truemask.masks.leaves.bands import causal
    >>> PackCollator(6, mask=causal)([[1, 2, 3], [4, 5]])["mask"]
    causal.packed([3, 2, 1])
    """

    length: int | None = None
    _: KW_ONLY
    mask: Mask | str | None = None
    block_mask: bool = False
    plan: Mapping[str, Any] | None = None
    long: str = "error"
    pad: int = 0
    ignore_index: int = -100
    first_position: int = 0

    def __post_init__(self) -> None:
        mask = from_text(self.mask)
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(not_a_mask("PackCollator: mask is an expression, such as `causal`, or its text", mask))
        object.__setattr__(self, "mask", mask)
        if self.plan is not None and not isinstance(self.plan, Mapping):
            raise TypeError(f"PackCollator: plan are keywords, such as {{'heads': 8}}, got {describe(self.plan)}")
        if self.mask is None and (self.block_mask or self.plan is not None):
            raise ValueError("PackCollator: block_mask and plan are made of a mask: pass mask=, such as mask=causal")
        whole(self.first_position, "PackCollator: first_position")

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        rows = pack(
            samples,
            self.length,
            long=self.long,
            pad=self.pad,
            ignore_index=self.ignore_index,
            first_position=self.first_position,
        )
        batch: dict[str, Any] = {
            "input_ids": rows.tokens,
            "labels": rows.labels,
            "position_ids": rows.positions,
            **rows.extras,
        }
        batch["use_cache"] = False  # with a cache, transformers does not look for documents
        if not isinstance(self.mask, Mask):
            return batch
        count, length = rows.tokens.shape
        mask = self.mask.packed(rows.lengths)
        batch.update(lengths=rows.lengths, mask=mask)
        if self.block_mask:
            batch["block_mask"] = mask.to_block_mask(length, batch=count)
        if self.plan is not None:
            batch["plan"] = plan(mask, length, batch=count, **self.plan)
        return batch
