"""Models that take pictures or sound: audited at the vectors that they make of them, one for each output position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from truemask.auditing.models import INPUTS, AuditError, first_outputs

SIGNALS = ("pixel_values", "input_values", "input_features")


class Signals(nn.Module):
    """A model and its batch, called with what `inner` makes of the batch, `[b, n, d]`, in its place."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], inner: nn.Module) -> None:
        super().__init__()
        self.model, self._batch, self._inner = model, dict(batch), [inner]  # a list, so that it is no second child
        self.config = getattr(model, "config", None)
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        handle = self._inner[0].register_forward_hook(lambda module, args, result: x)
        try:
            return self.model(**self._batch)
        finally:
            handle.remove()


def without_signals(model: nn.Module, batch: Any) -> tuple[nn.Module, Any]:
    """The model and batch as they are, or as a model of vectors where the batch holds a picture or sound."""
    if not isinstance(batch, Mapping) or any(isinstance(batch.get(name), Tensor) for name in INPUTS):
        return model, batch
    name = next((name for name in SIGNALS if isinstance(batch.get(name), Tensor)), None)
    if name is None:
        return model, batch
    inner, features = _first_vectors(model, batch, name)
    named = type(type(model).__name__, (Signals,), {})  # reports and claims go by the name of the class
    return named(model, batch, inner), {"x": features}


def _first_vectors(model: nn.Module, batch: Mapping[str, Any], name: str) -> tuple[nn.Module, Tensor]:
    """The first module inside whose result has a vector for each output position, with that result."""
    made: list[tuple[nn.Module, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(result, Tensor) and result.ndim == 3 and result.is_floating_point():
            made.append((module, result.detach().clone()))

    handles = [module.register_forward_hook(watch) for module in model.modules() if module is not model]
    try:
        with torch.no_grad():
            outputs = first_outputs(model(**batch))
    finally:
        for handle in handles:
            handle.remove()
    if outputs is not None:
        for module, vectors in made:
            if vectors.shape[:2] == outputs.shape[:2]:
                return module, vectors
    raise AuditError(
        f"{type(model).__name__} takes {name}, and no part of it makes a vector for each of its output positions: "
        "audit the part that attends (model.encoder, say) with the vectors that it is given"
    )
