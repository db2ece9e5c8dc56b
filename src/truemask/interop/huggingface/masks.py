"""What a transformers model claims about one forward: its mask as an expression, and where rows and keys stand.

The mask function makes a `ModelMask`; transformers carries it to every attention layer without looking inside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from truemask.attention.run import Ready
from truemask.errors import MaskError
from truemask.interop.huggingface.kept_keys import Needs
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
from truemask.interop.positions import CallerPositions
from truemask.masks.compose.boolean import conjunction, everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.data import lies_in_rows
from truemask.masks.structure.documents import depths, lists_documents, packed_like
from truemask.masks.structure.order import looks_back

NOT_SIZED = "a cache of `tm.cache_for` cannot forget by it: use a DynamicCache"


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
        self._rule, self.bias, self._same_axis = rule, bias, placed
        self.batch, self.q_len, self.k_len = sizes
        self.q_start, self.k_start = starts
        self.device = torch.device(device)
        self._real, self._visible, self._warned = real, visible, False
        self._caller_positions: CallerPositions | None = None
        self._masks: dict[tuple[Mask | None, bool], Mask] = {}
        self._needs: dict[tuple[Mask | None, bool, int, int | None], Needs] = {}
        self._met: set[tuple[Mask, int]] = set()
        self.ready: dict[Hashable, Ready] = {}  # calls of layers that ran, for those that ask the same
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
        return self._rule if isinstance(self._rule, Lifted) else self._rule()

    @property
    def packing(self) -> Packing | None:
        """The documents that it keeps apart."""
        return self.lifted.packing

    def is_first_with(self, user_mask: Mask, used: int) -> bool:
        """Whether no layer has met this mask of a use yet: what is to be said of both is said once."""
        is_first = (user_mask, used) not in self._met
        self._met.add((user_mask, used))
        return is_first

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

    def tell(self, caller_positions: CallerPositions) -> None:
        """What the forward was told of positions; what was told first counts."""
        if self._caller_positions is None:
            self._caller_positions = caller_positions

    @cached_property
    def placement(self) -> Placement:
        """Where the rows and keys stand, by all that tells of it."""
        caller_positions = self._caller_positions or CallerPositions()
        sizes = CallSizes(self.q_len, self.k_len, self.q_start, self.k_start, self._placed_rows)
        if self._visible is not None:
            return placement_of_tensor(sizes, self._visible, caller_positions)
        if self.packing is not None:
            return Placement(self.q_start, self.k_start, self._real)
        return placement_of(sizes, self._real, caller_positions)

    def combined_with(self, user_mask: Mask | None, replace: bool = False, position_ids: object = None) -> Mask:
        """The mask of the call: the model's own and the user's, or with `replace` the user's instead of the own rule.

        Padding and documents are facts about the batch: they stay, unless the user's mask says which documents there
        are. `position_ids`, if the layer was given them, then say where in its document a token stands.
        """
        if (user_mask, replace) not in self._masks:
            check_samples(user_mask, self.batch)
            rules = [] if replace and user_mask is not None else [self._rule_for(user_mask, position_ids)]
            user_masks = [] if user_mask is None else [self._placed(user_mask)]
            if replace and user_mask is not None and self.k_start:
                visible = conjunction(*user_masks, self._padding.keys)
                check_kept_keys(user_mask, visible, self.batch, self.q_start, self.q_len, self.k_start)
            self._masks[user_mask, replace] = self._in_call(rules, user_masks, user_mask)
        return self._masks[user_mask, replace]

    def needs(self, user_mask: Mask | None, replace: bool, heads: int, tokens: int | None) -> Needs:
        """What queries see of all tokens by where they lie in the batch, of which the call's rows are the last.

        Raises MaskError where that says nothing of the tokens that come.
        """
        key = user_mask, replace, heads, tokens
        if key not in self._needs:
            self._needs[key] = Needs(
                self._over_places(user_mask, replace), self.batch, heads, tokens, self._padding.lasts
            )
        return self._needs[key]

    def _over_places(self, user_mask: Mask | None, replace: bool) -> Mask:
        check_samples(user_mask, self.batch)
        if self._visible is not None:
            raise MaskError(f"a 4-D attention_mask does not say what later queries see, so {NOT_SIZED}")
        placement = self.placement
        clear = placement[:2] == (self.q_start, self.k_start) and placement.taken is None and not placement.moved
        if self.packing is not None or (user_mask is not None and (placement.as_they_lie(user_mask) or not clear)):
            reason = placement.problem or "the model packs documents, or does not say where its rows stand"
            raise MaskError(f"{reason}, so {NOT_SIZED}")
        rules = [] if replace and user_mask is not None else [self.lifted.mask]
        user_masks = [] if user_mask is None else [self._placed(user_mask)]
        mask = conjunction(*rules, *user_masks, self._padding.keys)
        if not self.lifted.looks_back and not looks_back(mask):
            raise MaskError(f"`{mask}` lets queries see later keys, so {NOT_SIZED}")
        return mask

    def rule_beside(self, user_mask: Mask, position_ids: object) -> tuple[Mask, int]:
        """The model's own rule, and the number of positions that it and a mask are about in this call."""
        if self._visible is not None or self.placement.problem:  # a tensor is the caller's; positions are not known
            return everything, 0
        if lies_in_rows(user_mask, packed=self.packing is not None):
            return self._rule_for(user_mask, position_ids), self._stop
        if self.packing is not None:
            return self.lifted.bare, int(self.packing.positions.max()) + 1
        positions = self._padding.positions
        return self.lifted.bare, self._stop if positions is None else int(positions[..., : self._stop].max()) + 1

    def _in_call(self, rules: list[Mask], user_masks: list[Mask], user_mask: Mask | None) -> Mask:
        """The mask of the call's rows and keys, of what the model says and what is asked, each where it counts from."""
        starts = self.q_start, self.k_start
        user_starts = starts if user_mask is None else self.placement[:2]
        if user_mask is not None and self.placement.as_they_lie(user_mask):
            terms = [_at(conjunction(*rules, self._padding.keys), starts), *user_masks]
        elif user_starts == starts:
            terms = [_at(conjunction(*rules, *user_masks, self._padding.keys), starts)]
        else:
            terms = [_at(conjunction(*rules), starts), _at(conjunction(*user_masks, self._padding.keys), user_starts)]
        return conjunction(*terms)

    def _rule_for(self, user_mask: Mask | None, position_ids: object) -> Mask:
        """The model's own rule; beside a mask that says which documents there are, at the positions inside of them.

        Rows of documents stand in order, and so do those of a tree: causality alone can count rows.
        """
        parts = [] if user_mask is None else list(user_mask.walk())
        if not any(map(lists_documents, parts)) or self._real is not None or self.q_len != self.k_len:
            return self.lifted.mask
        bare = self.lifted.bare
        if bare in (causal, everything):
            return bare
        packed = None if user_mask is None else packed_like(user_mask, bare)
        if packed is not None:
            return packed
        if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and position_ids.shape[1] == self.q_len:
            places = alike(position_ids)
            return bare.take(q=places, k=places)
        if any(depths(part) is not None for part in parts):
            raise MaskError(
                f"the model's own rule `{bare}` counts positions, and on the paths of `tree` these are not the rows: "
                "pass position_ids (`positions` of pack_tree)"
            )
        return self.lifted.mask

    def combined_across(self, user_mask: Mask | None, rows: ModelMask | None, replace: bool = False) -> Mask:
        """The same where queries and keys count on separate axes; `rows` is the mask of the self-attention before."""
        check_samples(user_mask, self.batch)
        rules = [] if replace and user_mask is not None else [self.lifted.mask]
        if user_mask is None:
            return conjunction(*rules, self._padding.keys)
        if user_mask.varies_with_query and rows is None:
            raise MaskError(
                f"`{user_mask}` for cross-attention asks which position a query has, and this model does not say: use "
                "a mask of keys alone (`keys(...)`, `prefix(...)`)"
            )
        if user_mask.varies_with_query and rows is not None and rows.placement.problem:
            raise MaskError(
                f"{rows.placement.problem}, and `{user_mask}` for cross-attention asks which position a row has"
            )
        q = None if rows is None else rows._positions_of_rows()
        k = self._positions_for(user_mask)
        placed = user_mask if q is None and k is None else user_mask.take(q=q, k=k)
        return conjunction(*rules, placed, self._padding.keys)

    def warn_of_documents(self, user_mask: Mask | None) -> None:
        """Say it if positions restart and nothing keeps the documents apart; once for each mask."""
        has_positions = self._caller_positions is not None and self._caller_positions.positions is not None
        settled = self._warned or self.q_len == 1 or self.packing is not None  # a row alone has no other document
        if settled or not has_positions or may_keep_apart(user_mask):
            return
        self._warned = True
        sizes = self.batch, self.q_len, self.k_len
        apart = self._visible is not None and keeps_apart(self.lifted.mask, self.placement.taken, sizes)
        if self.placement.restarts and not apart:
            warn_of_mixed_documents()

    def _positions_of_rows(self) -> Tensor:
        """Logical positions of the rows, `[q]` or `[b, q]`."""
        start = self.placement.q_start
        positions, stop = self._padding.positions, start + self.q_len
        return torch.arange(start, stop) if positions is None else positions[..., start:stop]

    def _placed(self, user_mask: Mask) -> Mask:
        """The user's mask at logical positions: a sample means the same alone, padded and packed (law 2).

        A mask that says itself how the rows are packed or padded is about the rows as they lie.
        """
        placement = self.placement
        if placement.behind and any(map(lists_documents, user_mask.walk())):
            return user_mask
        if refusal := placement.refusal(user_mask, CallSizes(self.q_len, self.k_len)):
            raise MaskError(refusal)
        if placement.as_they_lie(user_mask):
            return user_mask
        if self.packing is not None:
            return user_mask if lies_in_rows(user_mask, packed=True) else self.packing.of(user_mask)
        starts = self._padding.starts
        if lies_in_rows(user_mask, packed=placement.taken is not None):
            return user_mask
        if placement.taken is not None:
            return user_mask.take(q=alike(placement.taken), k=alike(placement.taken))
        if starts is not None:
            return user_mask.padded(starts)
        positions = self._positions_for(user_mask)
        return user_mask if positions is None else user_mask.take(q=positions, k=positions)

    def _positions_for(self, user_mask: Mask) -> Tensor | None:
        """Logical positions where pads move them, as far as `user_mask` has data: at least up to the last key."""
        positions = self._padding.positions
        if positions is None or _answers_for(user_mask, int(positions.max()) + 1):
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
