"""A transformers model that reads drafts, with a `DynamicCache` in which each sample keeps what was right.

Shapes: b samples, n nodes, w tokens of a prompt, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.generation.speculation.places import Places
from truemask.generation.speculation.trees import Nodes
from truemask.interop.huggingface.drafted import DraftedForward, drafted
from truemask.interop.huggingface.inputs import names_of
from truemask.interop.positions import first_position


class HuggingFaceReader:
    """A decoder of transformers in use; `real` [b, w] says which tokens of the prompts are no pads, all on the left.

    `tokens` is what prompt and answer have at most.
    """

    def __init__(self, name: str, model: Any, real: Tensor, tokens: int) -> None:
        from transformers import DynamicCache

        check_readable(name, model)
        self._name, self._model, self._real = name, model, real.cpu()
        starts = (~self._real).sum(1)
        self._starts = starts.tolist() if bool(starts.any()) else None
        self._before = starts[:, None] - first_position(model)  # a position of a row less this is the token's
        self._cache: Any = DynamicCache()  # without the config: a layer's window must not crop what others keep
        self._places = Places(len(real), 0, tokens)

    def begin(self, tokens: Tensor) -> Tensor:
        """Logits [b, v] after prompts [b, w]."""
        width = tokens.shape[1]
        last = {"logits_to_keep": 1} if "logits_to_keep" in names_of(type(self._model)) else {}
        flags = {} if self._starts is None else {"attention_mask": self._real.long().to(tokens.device)}
        logits = self._run(tokens, torch.arange(width) - self._before, **flags, **last)[:, -1]
        _check_layers(self._name, self._cache, width)
        self._places = Places(len(tokens), width, self._places.tokens)
        return logits

    def __call__(self, nodes: Nodes) -> Tensor:
        """Logits [b, n, v] after each node."""
        with drafted(DraftedForward(nodes, self._places, self._starts)):
            return self._run(nodes.tokens, self._places.positions_of(nodes) - self._before)

    def accept(self, paths: Sequence[Sequence[int]], *, sure: bool = True) -> None:
        """Keep these nodes of the last call. Nothing is forgotten here, so that all of it may be taken back."""
        moves = self._places.accept(paths)
        for layer in self._cache.layers:
            for sample, places, to in moves:
                layer.keys[sample, :, to] = layer.keys[sample, :, places]
                layer.values[sample, :, to] = layer.values[sample, :, places]
        self._crop()

    def rewind(self, read: Sequence[int]) -> None:
        """Forget of each sample all tokens but the first `read`, pads included."""
        self._places.rewind(read)
        self._crop()

    def _run(self, tokens: Tensor, positions: Tensor, **more: Any) -> Tensor:
        device = self._model.device
        found = self._model(
            input_ids=tokens.to(device),
            position_ids=positions.clamp(min=0).to(device),
            past_key_values=self._cache,
            use_cache=True,
            **more,
        )
        return found.logits

    def _crop(self) -> None:
        for layer in self._cache.layers:
            layer.keys = layer.keys[:, :, : self._places.stop]
            layer.values = layer.values[:, :, : self._places.stop]


def check_readable(name: str, model: Any) -> None:
    """Raise MaskError if a model cannot read a draft, as far as its class says; `name` is what the caller calls it."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise MaskError(f"{name} is {describe(model)}; speculate takes a decoder of transformers with a language head")
    kind, names = type(model).__name__, names_of(type(model))
    if model.config.is_encoder_decoder or not model.can_generate():
        raise MaskError(f"{name} is a {kind}; speculate takes decoders with a language head (`...ForCausalLM`)")
    if "position_ids" not in names or "past_key_values" not in names:
        raise MaskError(
            f"{name} is a {kind}, whose forward takes no position_ids or no cache: the guesses of a draft have "
            "positions that only they can say"
        )


def _check_layers(name: str, cache: Any, width: int) -> None:
    from transformers.cache_utils import DynamicLayer

    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer or layer.get_seq_length() != width:
            raise MaskError(
                f"{name} keeps something else in layer {index} of its cache than the keys of {width} tokens "
                f"({type(layer).__name__}), which cannot take back guesses: use `generate`"
            )
