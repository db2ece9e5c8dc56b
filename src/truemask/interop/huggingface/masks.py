"""What a transformers model claims about one forward: its mask as an expression, and where rows and keys stand.

The mask function makes a `ModelMask`; transformers carries it to every attention layer without looking inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as changed
from functools import cached_property, reduce
from operator import and_
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from truemask.errors import MaskError
from truemask.interop.huggingface.mask_checks import (
    check_kept_keys,
    check_samples,
    keeps_apart,
    may_keep_apart,
    warn_of_mixed_documents,
)
from truemask.interop.huggingface.mask_functions import Lifted, Packing
from truemask.interop.huggingface.mask_placeholder import MaskPlaceholder
from truemask.interop.huggingface.placement import CallSizes, Placement, placement_of, placement_of_tensor
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.padding import BatchPadding, alike, batch_padding
from truemask.interop.positions import DOCUMENT_KINDS, StatedPositions, lies_in_rows
from truemask.masks.compose.boolean import And, everything
from truemask.masks.compose.packed import Packed
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal


class ModelMask(MaskPlaceholder):
    """The model's own mask for one forward, over absolute positions.

    `rule`: what it says of positions, or a function that finds it out: transformers makes masks for kinds of layers
    that a model does not have. `real [b, n]`: which of the first n positions are tokens and not padding, or None. Row i
    of the call is position `q_start + i`, key j is `k_start + j`. `placed`: rows and keys count on one axis.
    `visible [b or 1, k]`, where the rule is a tensor about the rows of the call: the keys that some row sees.
    It looks like the bool tensor `[b, 1, q, k]` that it stands for, as far as transformers looks.
    """

    ndim, dtype = 4, torch.bool

    def __init__(
        self,
        rule: Lifted | Callable[[], Lifted],
        sizes: tuple[int, int, int],
        starts: tuple[int, int] = (0, 0),
        *,
        real: Tensor | None = None,
        bias: Tensor | None = None,
        placed: bool = True,
        visible: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._made, self.bias, self._same_axis = rule, bias, placed
        self.batch, self.q_len, self.k_len = sizes
        self.q_start, self.k_start = starts
        self.device = torch.device(device)
        self._real, self._visible, self._warned = real, visible, False
        self._told: StatedPositions | None = None
        self._masks: dict[tuple[Mask | None, bool], Mask] = {}
        self._readers: WeakKeyDictionary[nn.Module, AttentionLayer] = WeakKeyDictionary()

    # -- as transformers sees it -------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """`[b, 1, q, k]`."""
        return torch.Size((self.batch, 1, self.q_len, self.k_len))

    def contiguous(self) -> ModelMask:
        """Itself: `generate` asks for it with a static cache."""
        return self

    def to(self, *_: object, **__: object) -> ModelMask:
        """Itself: `attend` brings a mask to the device of its tensors."""
        return self

    # -- as our attention reads it -----------------------------------------------------------------------------------

    @cached_property
    def lifted(self) -> Lifted:
        """What the model says of positions."""
        return self._made if isinstance(self._made, Lifted) else self._made()

    @property
    def packing(self) -> Packing | None:
        """The documents that it keeps apart."""
        return self.lifted.packing

    def read_by(self, module: nn.Module) -> bool:
        """Whether a layer has read it already."""
        return module in self._readers

    def note(self, module: nn.Module, layer: AttentionLayer) -> None:
        """Note that a layer reads it. Raises MaskError if it did under another mask: gradients would be wrong."""
        before = self._readers.setdefault(module, layer)
        if before is not layer and (before.mask, before.replace) != (layer.mask, layer.replace):
            raise MaskError(
                f"`{layer.path}` is recomputed for `backward` inside another `tm.use`, under `{layer.mask}`, but it "
                f"ran under `{before.mask}`: call `backward` inside the block in which the forward ran, or checkpoint "
                "by torch.utils.checkpoint"
            )

    @property
    def keys_written(self) -> int:
        """How many of the keys exist by now: a static cache has room for more behind the last query."""
        stop = self.q_start + self.q_len if self.lifted.looks_back else self.k_start + self.k_len
        return min(self.k_len, stop - self.k_start)

    def tell(self, told: StatedPositions) -> None:
        """What the forward was told of positions; what was told first counts."""
        if self._told is None:
            self._told = told

    @cached_property
    def placement(self) -> Placement:
        """Where the rows and keys stand, by all that tells of it."""
        told = self._told or StatedPositions()
        sizes = CallSizes(self.q_len, self.k_len, self.q_start, self.k_start, self._placed_rows)
        if self._visible is not None:
            return placement_of_tensor(sizes, self._visible, told)
        if self.packing is not None:
            return Placement(self.q_start, self.k_start, self._real)
        return placement_of(sizes, self._real, told)

    def mask(self, users: Mask | None, replace: bool = False, position_ids: object = None) -> Mask:
        """The mask of the call: the model's own and the user's, or with `replace` the user's instead of the own rule.

        Padding and documents are facts about the batch: they stay, unless the user's mask says which documents there
        are. `position_ids`, if the layer was given them, then say where in its document a token stands.
        """
        if (users, replace) not in self._masks:
            check_samples(users, self.batch)
            own = [] if replace and users is not None else [self._rule_beside(users, position_ids)]
            asked = [] if users is None else [self._placed(users)]
            if replace and users is not None and self.k_start:
                seen = _all([*asked, self._padding.keys])
                check_kept_keys(users, seen, self.batch, self.q_start, self.q_len, self.k_start)
            self._masks[users, replace] = self._in_call(own, asked, users)
        return self._masks[users, replace]

    def own_beside(self, users: Mask, position_ids: object) -> tuple[Mask, int]:
        """The model's own rule, and the number of positions that it and a mask are about in this call."""
        if self._visible is not None or self.placement.problem:  # a tensor is the caller's; positions are not known
            return everything, 0
        if lies_in_rows(users, packed=self.packing is not None):
            return self._rule_beside(users, position_ids), self._stop
        if self.packing is not None:
            return self.lifted.bare, int(self.packing.positions.max()) + 1
        known = self._padding.positions
        return self.lifted.bare, self._stop if known is None else int(known[..., : self._stop].max()) + 1

    def _in_call(self, own: list[Mask], asked: list[Mask], users: Mask | None) -> Mask:
        """The mask of the call's rows and keys, of what the model says and what is asked, each where it counts from."""
        starts = self.q_start, self.k_start
        stand = starts if users is None else self.placement[:2]
        if users is not None and self.placement.as_they_lie(users):
            terms = [_at(_all([*own, self._padding.keys]), starts), *asked]
        elif stand == starts:
            terms = [_at(_all([*own, *asked, self._padding.keys]), starts)]
        else:
            terms = [_at(_all(own), starts), _at(_all([*asked, self._padding.keys]), stand)]
        return _all(terms)

    def _rule_beside(self, users: Mask | None, position_ids: object) -> Mask:
        """The model's own rule; beside a mask that says which documents there are, at the positions inside of them.

        Rows of documents stand in order, and so do those of a tree: causality alone can count rows.
        """
        kinds = set() if users is None else {part.kind for part in users.walk()}
        if kinds.isdisjoint(DOCUMENT_KINDS) or self._real is not None or self.q_len != self.k_len:
            return self.lifted.mask
        bare = self.lifted.bare
        if bare in (causal, everything):
            return bare
        terms = users.terms if isinstance(users, And) else (users,)
        packed = next((term for term in terms if isinstance(term, Packed)), None)
        if packed is not None:
            return changed(packed, base=bare)
        if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and position_ids.shape[1] == self.q_len:
            places = alike(position_ids)
            return bare.take(q=places, k=places)
        if "tree" in kinds:
            raise MaskError(
                f"the model's own rule `{bare}` counts positions, and on the paths of `tree` these are not the rows: "
                "pass position_ids (`positions` of pack_tree)"
            )
        return self.lifted.mask

    def cross_mask(self, users: Mask | None, rows: ModelMask | None, replace: bool = False) -> Mask:
        """The same where queries and keys count on separate axes; `rows` is the claim of the self-attention before."""
        check_samples(users, self.batch)
        own = [] if replace and users is not None else [self.lifted.mask]
        if users is None:
            return _all([*own, self._padding.keys])
        if users.varies_with_query and rows is None:
            raise MaskError(
                f"`{users}` for cross-attention asks which position a query has, and this model does not say: use a "
                "mask of keys alone (`keys(...)`, `prefix(...)`)"
            )
        if users.varies_with_query and rows is not None and rows.placement.problem:
            raise MaskError(
                f"{rows.placement.problem}, and `{users}` for cross-attention asks which position a row has"
            )
        q = None if rows is None else rows._positions_of_rows()
        k = self._positions_for(users)
        taken = users if q is None and k is None else users.take(q=q, k=k)
        return _all([*own, taken, self._padding.keys])

    def warn_of_documents(self, users: Mask | None) -> None:
        """Say it if positions restart and nothing keeps the documents apart; once for each claim."""
        told = self._told is not None and self._told.positions is not None
        if self._warned or not told or self.packing is not None or may_keep_apart(users):
            return
        self._warned = True
        sizes = self.batch, self.q_len, self.k_len
        apart = self._visible is not None and keeps_apart(self.lifted.mask, self.placement.taken, sizes)
        if self.placement.restarts and not apart:
            warn_of_mixed_documents()

    def _positions_of_rows(self) -> Tensor:
        """Logical positions of the rows, `[q]` or `[b, q]`."""
        start = self.placement.q_start
        known, stop = self._padding.positions, start + self.q_len
        return torch.arange(start, stop) if known is None else known[..., start:stop]

    def _placed(self, users: Mask) -> Mask:
        """The user's mask at logical positions: a sample means the same alone, padded and packed (law 2).

        A mask that says itself how the rows are packed or padded is about the rows as they lie.
        """
        stand = self.placement
        if stand.behind and any(part.kind in DOCUMENT_KINDS for part in users.walk()):
            return users
        if refusal := stand.refusal(users, CallSizes(self.q_len, self.k_len)):
            raise MaskError(refusal)
        if stand.as_they_lie(users):
            return users
        if self.packing is not None:
            return users if lies_in_rows(users, packed=True) else self.packing.of(users)
        starts = self._padding.starts
        if lies_in_rows(users, packed=stand.taken is not None):
            return users
        if stand.taken is not None:
            return users.take(q=alike(stand.taken), k=alike(stand.taken))
        if starts is not None:
            return users.padded(starts)
        positions = self._positions_for(users)
        return users if positions is None else users.take(q=positions, k=positions)

    def _positions_for(self, users: Mask) -> Tensor | None:
        """Logical positions where pads move them, as far as `users` has data: at least up to the last key."""
        positions = self._padding.positions
        if positions is None or _answers_for(users, int(positions.max()) + 1):
            return positions
        return positions[..., : self._stop]

    @property
    def _placed_rows(self) -> bool:
        """Whether rows and keys are the same tokens: the last row and the last key are one, or the rule looks back."""
        ends = self.q_start + self.q_len == self.k_start + self.k_len
        return self._same_axis and (ends or self.lifted.looks_back)

    @property
    def _stop(self) -> int:
        """Behind the last key that is written."""
        return self.k_start + self.keys_written

    @cached_property
    def _padding(self) -> BatchPadding:
        return batch_padding(self._real if self._visible is None else self.placement.real, self._stop)


def _answers_for(mask: Mask, length: int) -> bool:
    """Whether a mask has data for so many positions."""
    try:
        mask.check(length, length)
    except MaskError:
        return False
    return True


def _at(mask: Mask, starts: tuple[int, ...]) -> Mask:
    return mask.at(q_start=starts[0], k_start=starts[1])


def _all(masks: list[Mask]) -> Mask:
    """The conjunction, without terms that say nothing."""
    said = [mask for mask in masks if mask != everything]
    return reduce(and_, said) if said else everything
