"""What a call is held to: which mask each layer runs, which positions are padding, what may reach what in the end.

The masks are those that the caller states, else those that the model claims (`kinds.py`); padding and packing are
read from the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from truemask.auditing.declared_masks import Said, four_axes, heads_of, is_peer, layers_of, said_of, stack_of
from truemask.auditing.subject import AuditError, Subject
from truemask.auditing.torch_modules import own_mask
from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.interop.positions import lies_in_rows
from truemask.interop.removed_pairs import dropped
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.foreign import from_huggingface_2d, from_torch_mha
from truemask.masks.foreign.token_spans import token_spans
from truemask.masks.formats.as_mask import from_text
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.per_token import padding

TORCH_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")


@dataclass(frozen=True)
class Claim:
    """What is promised of a call.

    Attributes:
        masks: one mask for each layer, or a single one that all layers run.
        source: who says so, for the report.
        layers: how many layers there are; None where nobody said.
        real: bool `[b, n]`, False at padding; None where there is none.
        documents: int64 `[b, n]`, which document a token belongs to; None where they are not packed.
        notes: what had to be assumed.
        own: the text of the first layer's mask before documents and padding were added.
    """

    masks: tuple[Mask, ...]
    source: str
    layers: int | None = None
    real: Tensor | None = None
    documents: Tensor | None = None
    notes: tuple[str, ...] = ()
    own: str = "causal"

    @property
    def text(self) -> str:
        """The masks, each different one once; long data are cut."""
        texts = dict.fromkeys(mask.text for mask in self.masks)
        return " then ".join(f"`{text if len(text) <= 100 else text[:97] + '...'}`" for text in texts)


def claim_of(subject: Subject, mask: object = None, layers: int | None = None) -> Claim:
    """The claim that a call is held to: `mask`, or what the model says; padding of the batch is added to both."""
    base = said_of(subject) if mask is None else Said(_stated(mask), "stated", layers_of(subject))
    if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool) or layers < 1):
        raise AuditError(f"layers= is {describe(layers)}; expected how many layers the model has, 1 or more")
    padded = _padding(subject)
    real = None if padded is None else flags_of(padded, subject)
    told = any(one.mask is not None and lies_in_rows(one.mask, packed=True) for one in base.given)
    documents = _documents(subject, real) if mask is None and not told else None

    def placed(one: Mask) -> Mask:
        if documents is not None:
            return one.packed(_lengths(documents))
        if real is None or isinstance(mask, Tensor) or lies_in_rows(one, packed=False):
            return one  # a tensor speaks of the rows as they lie
        return _begun(one, real, subject)

    masks = tuple(placed(one) for one in base.masks)
    if base.given:
        sizes = {"length": subject.length, "batch": subject.batch, "heads": heads_of(subject)}
        pairs = zip(masks, base.given, strict=True)
        masks = tuple(given.with_own(own, placed, **sizes) for own, given in pairs)
        masks = masks[:1] if len(set(masks)) == 1 else masks
    if padded is not None and (mask is not None or stack_of(subject) is None):  # truemask's own masks hold it already
        masks = tuple(padded if one is everything else one & padded for one in masks)
    count = layers if layers is not None else base.layers if base.layers is not None else len(masks)
    if len(masks) > 1 and count != len(masks):
        says = f"layers={count}" if layers is not None else f"the model has {count} layers"
        raise AuditError(f"{len(masks)} masks were given, one for each layer, and {says}")
    count = layers if layers is not None else len(masks) if len(masks) > 1 else base.layers
    notes = (*base.notes, *_assumed(subject, documents), *_dropped(base, subject))
    return Claim(masks, base.source, count, real, documents, notes, base.masks[0].text)


def checked(claim: Claim, subject: Subject) -> Claim:
    """The claim, once its masks answered for these sizes; MaskError with the model's sizes otherwise."""
    for mask in claim.masks:
        try:
            matrix_of(mask, subject)
        except MaskError as error:
            raise AuditError(
                f"the mask does not fit {subject.batch} samples of {subject.length} positions: {error}"
            ) from error
    return claim


def matrix_of(mask: Mask, subject: Subject) -> Tensor:
    """The mask as bool `[b, n, n]`: True where some head may attend."""
    n = subject.length
    heads = mask.head_count or heads_of(subject)  # 0: it varies over them without holding a number of them
    cells = mask.to_dense(n, n, batch=subject.batch, heads=heads)
    return cells.any(dim=1).expand(subject.batch, n, n)


def flags_of(mask: Mask, subject: Subject) -> Tensor:
    """A mask that asks nothing of queries, as bool `[b, n]`."""
    return mask.to_dense(1, subject.length, batch=subject.batch, heads=1)[:, 0, 0].expand(subject.batch, -1)


def reach_of(claim: Claim, subject: Subject) -> Tensor:
    """Which inputs may matter to which outputs after all layers, bool `[b, n, n]`.

    A layer lets position q take from the positions that its mask shows it, and keep its own. Through several layers
    what may matter is the product of these matrices: a window of w keys reaches `layers * (w - 1)` back. Without a
    number of layers it is the closure, through any number of them.
    """
    own = torch.eye(subject.length, dtype=torch.bool)
    steps = [matrix_of(mask, subject) | own for mask in claim.masks]
    if len(steps) == 1:
        return _power(steps[0], claim.layers)
    return reduce(lambda first, later: _product(later, first), steps)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return (left.float() @ right.float()) > 0


def _power(step: Tensor, layers: int | None) -> Tensor:
    """`step` through so many layers, or until nothing is added."""
    reach, done = step, 1
    while layers is None or done < layers:
        more = _product(reach, step if layers is not None else reach)
        if torch.equal(more, reach):
            return reach
        reach, done = more, done + 1
    return reach


# -- what the caller states --------------------------------------------------------------------------------------------


def _stated(mask: object) -> tuple[Mask, ...]:
    mask = from_text(mask)
    if isinstance(mask, Mask):
        return (mask,)
    if isinstance(mask, Tensor):
        return (dense(mask),)
    if isinstance(mask, Sequence) and mask:
        return tuple(one for part in mask for one in _stated(part))
    raise AuditError(
        f"mask= is {describe(mask)}; expected a mask such as tm.causal, its text, a bool tensor for tm.dense, or a "
        "list with a mask for each layer"
    )


# -- padding and packing -----------------------------------------------------------------------------------------------


def _padding(subject: Subject) -> Mask | None:
    """The keys that the batch says are real, or None if all are."""
    parts, shape = [], (subject.batch, subject.length)
    decoder = str(subject.name).startswith("decoder_")
    given = subject.keywords.get("decoder_attention_mask" if decoder else "attention_mask")
    if isinstance(given, Tensor) and tuple(given.shape) == shape:
        parts.append(from_huggingface_2d(given))
    given = subject.keywords.get("mask")
    if isinstance(given, Tensor) and tuple(given.shape) == shape and given.dtype == torch.bool and _means_true(subject):
        parts.append(from_huggingface_2d(given))
    for name in TORCH_PADDING:
        given = subject.keywords.get(name)
        if isinstance(given, Tensor) and given.dtype == torch.bool and tuple(given.shape) == shape:
            parts.append(from_torch_mha(key_padding_mask=given))
    starts = subject.keywords.get("seq_start_pos")
    if isinstance(starts, Tensor) and tuple(starts.shape) == shape[:1]:
        parts.append(padding(starts=starts, on="keys"))
    parts = [part for part in parts if not bool(flags_of(part, subject).all())]
    return reduce(lambda left, right: left & right, parts) if parts else None


def _begun(mask: Mask, real: Tensor, subject: Subject) -> Mask:
    """The mask at positions that count from each sample's first token (law 2); itself where that changes nothing."""
    spans = token_spans(real)
    if not spans.solid.all() or not spans.first.any():
        return mask
    moved = mask.padded(spans.first.tolist())
    same = matrix_of(moved, subject) == matrix_of(mask, subject)
    return mask if bool(same[real[:, :, None] & real[:, None, :]].all()) else moved


def _dropped(base: Said, subject: Subject) -> Iterator[str]:
    """What the model's own rule takes away of a mask that `tm.use` gave it."""
    sizes = subject.length, subject.batch, heads_of(subject) or 1
    pairs = zip(base.masks, base.given, strict=False)
    found = [dropped(given.mask, own, *sizes) for own, given in pairs if not given.replace]
    for one in dict.fromkeys(map(str, filter(None, found))):
        yield f"{one}. To run the mask as it is written: `tm.use(model, mask, replace=True)`"


def _assumed(subject: Subject, documents: Tensor | None) -> Iterator[str]:
    """What was read from the batch without being said."""
    if documents is not None:
        yield "position_ids begin again, so the batch was taken for packed documents that must not mix"
    given = subject.keywords.get("mask")
    foreign = stack_of(subject) is None and not is_peer(subject) and own_mask(subject) is None
    if foreign and isinstance(given, Tensor) and given.dtype == torch.bool and given.shape == subject.inputs.shape[:2]:
        yield "mask= of the batch was taken for padding with True at real tokens, which the model does not say"


def _means_true(subject: Subject) -> bool:
    """Whether this model's `mask=` of `[b, n]` holds True at real tokens, as far as one can know."""
    known = is_peer(subject) or stack_of(subject) is not None
    return known or (subject.batch != subject.length and own_mask(subject) is None)


def _documents(subject: Subject, real: Tensor | None) -> Tensor | None:
    """Documents told by positions that begin again, int64 `[b, n]`; None if every sample is one.

    The audit reads this itself: in interop equal positions may be pads.
    """
    positions = subject.keywords.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != subject.length:
        return None
    if four_axes(subject):  # such a mask says by itself who belongs together
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
