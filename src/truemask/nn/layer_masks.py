"""A mask for each layer of a stack: how it is given, how it is kept, and how a forward gets its masks.

A model's own masks are part of what it is, so a config keeps them as text and a checkpoint has them in its JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.mask import Mask
from truemask.masks.formats.as_mask import from_text, not_a_mask
from truemask.masks.structure.parts import with_term


def texts_of_layers(given: object, pattern: object, depth: int) -> tuple[str, ...] | None:
    """The masks of `depth` layers as texts: of a sequence of them, or of a dict of them and a pattern of its names.

    Raises TypeError, ValueError or MaskError on what says nothing of `depth` layers.

    >>> texts_of_layers({"L": "causal & window(8)", "G": "causal"}, "LG", 3)
    ('causal & window(8)', 'causal', 'causal & window(8)')
    """
    if given is None and pattern is None:
        return None
    if isinstance(given, Mapping):
        return _of_pattern(given, pattern, depth)
    if pattern is not None:
        raise ValueError(
            f"layer_pattern={pattern!r} names the masks of layer_masks=, which is {describe(given)}: pass a dict such "
            'as layer_masks={"L": "window(1024)", "G": "causal"}'
        )
    if isinstance(given, (str, Mask)) or not isinstance(given, Sequence):
        raise TypeError(
            f"layer_masks= is {describe(given)}; it takes a list of {depth} masks, one for each layer, or a dict of "
            "them with layer_pattern=. A mask for all layers is the mask= of the call"
        )
    if len(given) != depth:
        raise ValueError(f"layer_masks= has {len(given)} masks for {depth} layers: pass one for each")
    return tuple(_text(mask, f"layer_masks[{index}]") for index, mask in enumerate(given))


def _of_pattern(given: Mapping[object, object], pattern: object, depth: int) -> tuple[str, ...]:
    names = [*map(repr, given)]
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(
            f"layer_masks= is a dict of {', '.join(names)}, and layer_pattern= is {pattern!r}: it says which layer has "
            'which, such as "LLLG", again and again'
        )
    texts = {name: _text(mask, f"layer_masks[{name!r}]") for name, mask in given.items()}
    unknown = [name for name in pattern if name not in texts]
    if unknown:
        raise ValueError(f"layer_pattern={pattern!r}: no mask is named {unknown[0]!r}; layer_masks= has {names}")
    return tuple(texts[pattern[index % len(pattern)]] for index in range(depth))


def _text(given: object, name: str) -> str:
    mask = from_text(given)
    if not isinstance(mask, Mask):
        raise MaskError(not_a_mask(f"{name} must be a mask expression or its text", given))
    if mask.batch_size != 1:
        raise MaskError(f"{name} is `{mask}`, which differs from sample to sample: a model's mask is for every batch")
    text = str(mask)
    try:
        same = from_text(text) == mask
    except MaskError:
        same = False
    if not same:
        raise MaskError(
            f"{name} is `{text}`, which holds data that no text can say, and a model keeps its masks as text: "
            "pass it in the call"
        )
    return text


class LayerMasks:
    """The masks of the layers of a stack, each distinct one once: layer i has `terms[which[i]]`; None is no mask."""

    def __init__(self, texts: Sequence[str] | None, depth: int) -> None:
        distinct = list(dict.fromkeys(texts)) if texts is not None else []
        self.terms: list[Mask | None] = [_read(text) for text in distinct] or [None]
        self.which = [0] * depth if texts is None else [distinct.index(text) for text in texts]

    def each(self, user: Mask) -> list[Mask]:
        """The mask of a call with each of the terms."""
        return [user if term is None else with_layer(user, term) for term in self.terms]


def _read(text: str) -> Mask:
    mask = from_text(text)
    assert isinstance(mask, Mask)
    return mask


def with_layer(user: Mask, term: Mask) -> Mask:
    """The mask of a call ANDed with that of a layer, which counts positions as the call's does."""
    return _with_layer_later(user, term) if torch.compiler.is_dynamo_compiling() else _with_layer(user, term)


def _with_layer(user: Mask, term: Mask) -> Mask:
    mask = with_term(user, term)
    if mask is None:
        raise MaskError(
            f"the layers' mask `{term}` counts positions, and the call's `{user}` does not say from where: negate "
            "within `packed` or `padded`, as in `(~mask).packed(...)`, and choose heads within, too"
        )
    return mask


@deferrable
def _with_layer_later(user: Mask, term: Mask) -> Mask:
    return _with_layer(user, term)
