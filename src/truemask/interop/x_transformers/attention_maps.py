"""What an `Attention` of x-transformers gives back beside its output: attention maps, computed when looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor


class LazyIntermediates:
    """The `Intermediates` of a call on the backends: its attention maps are computed when somebody looks at them."""

    def __init__(self, compute: Callable[[], tuple[Tensor, Any]]) -> None:
        self._compute = compute
        self.values: Tensor | None = None
        self.cached_kv: tuple[Tensor, Tensor] | None = None
        self.layer_type: str | None = None
        self.hybrid_hidden: Tensor | None = None
        self.log_probs: Tensor | None = None

    @cached_property
    def _maps(self) -> Any:
        return self._compute()[1]

    @property
    def qk_similarities(self) -> Tensor | None:
        return self._maps.qk_similarities

    @property
    def pre_softmax_attn(self) -> Tensor | None:
        return self._maps.pre_softmax_attn

    @property
    def post_softmax_attn(self) -> Tensor | None:
        return self._maps.post_softmax_attn

    def to_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.qk_similarities, self.pre_softmax_attn, self.post_softmax_attn


def intermediates_of(module: Any) -> Any:
    """An empty `Intermediates` of the library that the module comes from, as its flash path returns."""
    cls = next(kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "x_transformers")
    return sys.modules[cls.__module__].Intermediates()
