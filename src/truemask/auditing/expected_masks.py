"""What a call is held to: which mask each layer runs, which positions are padding, what may reach what in the end.

The masks are those that the caller states, else those that the model declares (`declared_masks.py`); padding and
packing are read from the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from truemask.auditing.declared_masks import (
    DeclaredMask,
    declared_mask_of,
    has_four_axes,
    heads_of,
    is_peer,
    layers_of,
    stack_of,
)
from truemask.auditing.subject import AuditedModel, AuditError
from truemask.auditing.torch_modules import torch_mask_of
from truemask.common.formatting import describe, shortened
from truemask.errors import MaskError
from truemask.interop.removed_pairs import removed_pairs
from truemask.masks.compose.boolean import conjunction
from truemask.masks.core.mask import Mask
from truemask.masks.foreign import from_huggingface_2d, from_torch_mha
from truemask.masks.foreign.token_spans import token_spans
from truemask.masks.formats.as_mask import from_text
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.per_token import padding
from truemask.masks.structure.data import lies_in_rows

TORCH_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")


@dataclass(frozen=True)
class ExpectedMask:
    """What is promised of a call.

    Attributes:
        masks: one mask for each layer, or a single one that all layers run.
        source: who says so, for the report.
        layers: how many layers there are; None where nobody said.
        real: bool `[b, n]`, False at padding; None where there is none.
        documents: int64 `[b, n]`, which document a token belongs to; None where they are not packed.
        notes: what had to be assumed.
        own_text: the text of the first layer's mask before documents and padding were added.
    """

    masks: tuple[Mask, ...]
    source: str
    layers: int | None = None
    real: Tensor | None = None
    documents: Tensor | None = None
    notes: tuple[str, ...] = ()
    own_text: str = "causal"

    @property
    def text(self) -> str:
        """The masks, each different one once; long data are cut."""
        texts = dict.fromkeys(mask.text for mask in self.masks)
        return " then ".join(f"`{shortened(text, 100)}`" for text in texts)


def expected_mask_of(subject: AuditedModel, mask: object = None, layers: int | None = None) -> ExpectedMask:
    """The mask that a call is held to: `mask`, or what the model says; padding of the batch is added to both."""
    base = (
        declared_mask_of(subject) if mask is None else DeclaredMask(_stated_masks(mask), "stated", layers_of(subject))
    )
    if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool) or layers < 1):
        raise AuditError(f"layers= is {describe(layers)}; expected how many layers the model has, 1 or more")
    padded = _padding(subject)
    real = None if padded is None else flags_of(padded, subject)
    says_documents = any(
        layer_mask.mask is not None and lies_in_rows(layer_mask.mask, packed=True) for layer_mask in base.user_masks
    )
    documents = _documents(subject, real) if mask is None and not says_documents else None

    def placed(layer_mask: Mask) -> Mask:
        if documents is not None:
            return layer_mask.packed(_lengths(documents))
        if real is None or isinstance(mask, Tensor) or lies_in_rows(layer_mask, packed=False):
            return layer_mask  # a tensor speaks of the rows as they lie
        return _from_first_token(layer_mask, real, subject)

    masks = tuple(placed(layer_mask) for layer_mask in base.masks)
    if base.user_masks:
        sizes = {"length": subject.length, "batch": subject.batch, "heads": heads_of(subject)}
        pairs = zip(masks, base.user_masks, strict=True)
        masks = tuple(user_mask.combined_with(model_mask, placed, **sizes) for model_mask, user_mask in pairs)
        masks = masks[:1] if len(set(masks)) == 1 else masks
    if padded is not None and (mask is not None or stack_of(subject) is None):  # truemask's own masks hold it already
        masks = tuple(conjunction(layer_mask, padded) for layer_mask in masks)
    count = layers if layers is not None else base.layers if base.layers is not None else len(masks)
    if len(masks) > 1 and count != len(masks):
        says = f"layers={count}" if layers is not None else f"the model has {count} layers"
        raise AuditError(f"{len(masks)} masks were given, one for each layer, and {says}")
    count = layers if layers is not None else len(masks) if len(masks) > 1 else base.layers
    notes = (*base.notes, *_assumption_notes(subject, documents), *_removed_pair_notes(base, subject))
    return ExpectedMask(masks, base.source, count, real, documents, notes, base.masks[0].text)


def check_fit(expected: ExpectedMask, subject: AuditedModel) -> ExpectedMask:
    """The expected masks, once they have answered for these sizes; MaskError with the model's sizes otherwise."""
    for mask in expected.masks:
        try:
            matrix_of(mask, subject)
        except MaskError as error:
            raise AuditError(
                f"the mask does not fit {subject.batch} samples of {subject.length} positions: {error}"
            ) from error
    return expected


def matrix_of(mask: Mask, subject: AuditedModel) -> Tensor:
    """The mask as bool `[b, n, n]`: True where some head may attend."""
    n = subject.length
    heads = mask.head_count or heads_of(subject)  # 0: it varies over them without holding a number of them
    cells = mask.to_dense(n, n, batch=subject.batch, heads=heads)
    return cells.any(dim=1).expand(subject.batch, n, n)


def flags_of(mask: Mask, subject: AuditedModel) -> Tensor:
    """A mask that asks nothing of queries, as bool `[b, n]`."""
    return mask.to_dense(1, subject.length, batch=subject.batch, heads=1)[:, 0, 0].expand(subject.batch, -1)


def reach_of(expected: ExpectedMask, subject: AuditedModel) -> Tensor:
    """Which inputs may matter to which outputs after all layers, bool `[b, n, n]`.

    A layer lets position q take from the positions that its mask shows it, and keep its own. Through several layers
    what may matter is the product of these matrices: a window of w keys reaches `layers * (w - 1)` back. Without a
    number of layers it is the closure, through any number of them.
    """
    diagonal = torch.eye(subject.length, dtype=torch.bool)
    steps = [matrix_of(mask, subject) | diagonal for mask in expected.masks]
    if len(steps) == 1:
        return _power(steps[0], expected.layers)
    return reduce(lambda first, later: _product(later, first), steps)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return (left.float() @ right.float()) > 0


def _power(step: Tensor, layers: int | None) -> Tensor:
    """`step` through so many layers, or until nothing is added."""
    reach, count = step, 1
    while layers is None or count < layers:
        more = _product(reach, step if layers is not None else reach)
        if torch.equal(more, reach):
            return reach
        reach, count = more, count + 1
    return reach


# -- what the caller states --------------------------------------------------------------------------------------------


def _stated_masks(mask: object) -> tuple[Mask, ...]:
    mask = from_text(mask)
    if isinstance(mask, Mask):
        return (mask,)
    if isinstance(mask, Tensor):
        return (dense(mask),)
    if isinstance(mask, Sequence) and mask:
        return tuple(layer_mask for part in mask for layer_mask in _stated_masks(part))
    raise AuditError(
        f"mask= is {describe(mask)}; expected a mask such as tm.causal, its text, a bool tensor for tm.dense, or a "
        "list with a mask for each layer"
    )


# -- padding and packing -----------------------------------------------------------------------------------------------


def _padding(subject: AuditedModel) -> Mask | None:
    """The keys that the batch says are real, or None if all are."""
    parts, shape = [], (subject.batch, subject.length)
    decoder = str(subject.name).startswith("decoder_")
    flags = subject.keywords.get("decoder_attention_mask" if decoder else "attention_mask")
    if isinstance(flags, Tensor) and tuple(flags.shape) == shape:
        parts.append(from_huggingface_2d(flags))
    flags = subject.keywords.get("mask")
    if isinstance(flags, Tensor) and tuple(flags.shape) == shape and flags.dtype == torch.bool and _means_true(subject):
        parts.append(from_huggingface_2d(flags))
    for name in TORCH_PADDING:
        flags = subject.keywords.get(name)
        if isinstance(flags, Tensor) and flags.dtype == torch.bool and tuple(flags.shape) == shape:
            parts.append(from_torch_mha(key_padding_mask=flags))
    starts = subject.keywords.get("seq_start_pos")
    if isinstance(starts, Tensor) and tuple(starts.shape) == shape[:1]:
        parts.append(padding(starts=starts, on="keys"))
    parts = [part for part in parts if not bool(flags_of(part, subject).all())]
    return conjunction(*parts) if parts else None


def _from_first_token(mask: Mask, real: Tensor, subject: AuditedModel) -> Mask:
    """The mask at positions that count from each sample's first token (law 2); itself where that changes nothing."""
    spans = token_spans(real)
    if not spans.solid.all() or not spans.first.any():
        return mask
    shifted = mask.padded(spans.first.tolist())
    same = matrix_of(shifted, subject) == matrix_of(mask, subject)
    return mask if bool(same[real[:, :, None] & real[:, None, :]].all()) else shifted


def _removed_pair_notes(base: DeclaredMask, subject: AuditedModel) -> Iterator[str]:
    """What the model's own rule takes away of a mask that `tm.use` gave it."""
    sizes = subject.length, subject.batch, heads_of(subject) or 1
    pairs = zip(base.masks, base.user_masks, strict=False)
    removals = [
        removed_pairs(user_mask.mask, model_mask, *sizes) for model_mask, user_mask in pairs if not user_mask.replace
    ]
    for removal in dict.fromkeys(map(str, filter(None, removals))):
        yield f"{removal}. To run the mask as it is written: `tm.use(model, mask, replace=True)`"


def _assumption_notes(subject: AuditedModel, documents: Tensor | None) -> Iterator[str]:
    """What was read from the batch without being said."""
    if documents is not None:
        yield "position_ids begin again, so the batch was taken for packed documents that must not mix"
    flags = subject.keywords.get("mask")
    foreign = stack_of(subject) is None and not is_peer(subject) and torch_mask_of(subject) is None
    if foreign and isinstance(flags, Tensor) and flags.dtype == torch.bool and flags.shape == subject.inputs.shape[:2]:
        yield "mask= of the batch was taken for padding with True at real tokens, which the model does not say"


def _means_true(subject: AuditedModel) -> bool:
    """Whether this model's `mask=` of `[b, n]` holds True at real tokens, as far as one can know."""
    by_library = is_peer(subject) or stack_of(subject) is not None
    return by_library or (subject.batch != subject.length and torch_mask_of(subject) is None)


def _documents(subject: AuditedModel, real: Tensor | None) -> Tensor | None:
    """Documents told by positions that begin again, int64 `[b, n]`; None if every sample is one."""
    positions = subject.keywords.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != subject.length:
        return None
    if has_four_axes(subject):  # such a mask says by itself who belongs together
        return None
    positions = positions.cpu().expand(subject.batch, -1)
    begins = torch.diff(positions, dim=1) <= 0  # a hole is no new document
    inside = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    if not bool((begins & inside[:, 1:] & inside[:, :-1]).any()):
        return None
    begins |= torch.diff(inside.int(), dim=1) != 0
    return torch.nn.functional.pad(begins, (1, 0)).cumsum(dim=1)


def _lengths(documents: Tensor) -> list[list[int]] | list[int]:
    lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in documents]
    return lengths[0] if len(lengths) == 1 else lengths
