"""What attention asks of a cache that masks size; the cache itself needs transformers, and this does not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from truemask.interop.huggingface.kept_keys import Kept, Needs


class SizedLayer(ABC):
    """The keys and values of one attention layer, between two calls and during one."""

    kept: Kept
    past: int
    tokens: int | None

    @property
    @abstractmethod
    def total(self) -> int:
        """Tokens in all, those of the call included."""

    @abstractmethod
    def gave(self, key: Tensor) -> bool:
        """Whether these are the keys that the layer gave the model for this call, as they were."""

    @abstractmethod
    def read(self) -> tuple[Tensor, Tensor]:
        """The keys and values that there are, those of the call included, `[b, g, n, e]`."""

    @abstractmethod
    def advance(self, needs: Needs) -> None:
        """Take over what the call brought; forget what is needed no more."""


class SizedCache(ABC):
    """A cache whose layers forget what their masks let them forget."""

    @abstractmethod
    def admit(self, model: nn.Module) -> None:
        """Begin a forward of a model. Raises MaskError if the cache is not for it, or not for its masks."""

    @abstractmethod
    def finish(self) -> None:
        """End the forward; of one that was broken off nothing stays, where that can be."""

    @abstractmethod
    def layer_of(self, module: nn.Module) -> SizedLayer:
        """The memory of an attention layer."""


def sized_cache(cache: Any) -> SizedCache | None:
    """The cache that masks size among what a model was given as `past_key_values`."""
    inner = getattr(cache, "self_attention_cache", cache)
    return inner if isinstance(inner, SizedCache) else None
