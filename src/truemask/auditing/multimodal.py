"""Models that take pictures or sound: audited at the vectors that they make of them, one for each output position.

What comes before those vectors (patches, convolutions) lies outside the audit, and a note says what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truemask.auditing.subject import INPUT_KEYWORDS, MIN_POSITIONS, AuditError, first_outputs
from truemask.common.formatting import describe

SIGNAL_KEYWORDS = ("pixel_values", "input_values", "input_features")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_MASK = "attention_mask"
MAX_NAMES = 3


class VectorSite(NamedTuple):
    """Where vectors pass: what a module is given (`before`) or gives, in its so-manieth call that fits."""

    module: nn.Module
    before: bool
    turn: int


class VectorModel(nn.Module):
    """A model and its batch, called with vectors `[b, n, d]` in the place of those that it makes of the batch.

    Attributes:
        outside: what the audit cannot see of this model, in words.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], site: VectorSite, outside: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._batch, self._site = model, dict(batch), [site]  # a list: its module is no second child
        self.config = getattr(model, "config", None)
        self.training, self.outside = model.training, outside

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        """`attention_mask` tells the audit which vectors are real; the model has its own, in the batch."""
        turns = count(1)

        def other(module: nn.Module, vectors: Tensor, before: bool) -> Tensor | None:
            return x if next(turns) == self._site[0].turn else None

        with _watched([self._site[0]], x.shape[:2], other):
            return self.model(**self._batch)


def without_signals(model: nn.Module, batch: Any) -> tuple[nn.Module, Any]:
    """The model and batch as they are, or as a model of vectors where the batch holds a picture or sound."""
    if not isinstance(batch, Mapping) or any(isinstance(batch.get(name), Tensor) for name in INPUT_KEYWORDS):
        return model, batch
    name = next((name for name in SIGNAL_KEYWORDS if isinstance(batch.get(name), Tensor)), None)
    if name is None:
        return model, batch
    site, vectors, earlier = _first_vectors(model, batch, name)
    flags, unknown = _flags(model, batch.get(ATTENTION_MASK), vectors.shape[1])
    outside = (_outside(model, name, site, earlier), *unknown)
    named = type(type(model).__name__, (VectorModel,), {})  # reports and expected masks go by the name of the class
    return named(model, batch, site, outside), {"x": vectors} | ({} if flags is None else {ATTENTION_MASK: flags})


def _first_vectors(model: nn.Module, batch: Mapping[str, Any], name: str) -> tuple[VectorSite, Tensor, list[nn.Module]]:
    """The first place that a vector for each output position passes, those vectors, and which modules ran earlier."""
    with torch.no_grad():
        result = model(**batch)
    outputs = first_outputs(result)
    if outputs is not None and outputs.shape[1] >= MIN_POSITIONS:
        passes: list[tuple[VectorSite, Tensor]] = []
        earlier: list[nn.Module] = []

        def watch(module: nn.Module, vectors: Tensor, before: bool) -> None:
            turn = 1 + sum(site.module is module and site.before == before for site, _ in passes)
            passes.append((VectorSite(module, before, turn), vectors.detach().clone()))

        def note_earlier(module: nn.Module, args: Any, result: Any) -> None:
            if not passes:
                earlier.append(module)

        inner = [module for module in model.modules() if module is not model]
        sides = [VectorSite(module, before, 0) for module in inner for before in (True, False)]
        handles = [module.register_forward_hook(note_earlier) for module in inner]
        try:
            with torch.no_grad(), _watched(sides, outputs.shape[:2], watch):
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        if passes:
            return *passes[0], earlier
    named_outputs = result if isinstance(result, Mapping) else {"outputs": outputs}
    shapes = ", ".join(
        f"{key} {describe(value).partition(' on ')[0]}"
        for key, value in named_outputs.items()
        if isinstance(value, Tensor)
    )
    attending = _attending(model)
    advice = f"the part that attends ({attending})" if attending else "a part that takes a vector for each position"
    raise AuditError(
        f"{type(model).__name__} takes {name} and gives {shapes or describe(result)}: no part of it makes a vector for "
        f"each output position of `logits` or `last_hidden_state` [b, n, d], with n {MIN_POSITIONS} or more. Audit "
        f"{advice}, with the vectors [b, n, d] that it is given"
    )


VectorCallback = Callable[..., Tensor | None]


@contextmanager
def _watched(sites: list[VectorSite], shape: torch.Size, callback: VectorCallback) -> Iterator[None]:
    """Call `callback(module, vectors, before=)` when vectors of this shape pass; what it returns takes their place."""

    def fits(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == shape and value.is_floating_point()

    def before_call(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        first = args[0] if args else next(iter(named.values()), None)
        other = callback(module, first, before=True) if fits(first) else None
        if other is None:
            return None
        return ((other, *args[1:]), named) if args else (args, {**named, next(iter(named)): other})

    def after_call(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        return callback(module, result, before=False) if fits(result) else None

    handles = [
        site.module.register_forward_pre_hook(before_call, with_kwargs=True)
        if site.before
        else site.module.register_forward_hook(after_call)
        for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flags(model: nn.Module, attention_mask: Any, n: int) -> tuple[Tensor | None, tuple[str, ...]]:
    """Which of the `n` vectors are real, `[b, n]`, of an attention_mask that may count samples; and what is unknown."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.shape[1] == n:
        return attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None, ()
    for module in model.modules():
        shorter = getattr(module, "_get_feature_vector_attention_mask", None)
        if callable(shorter):
            flags = shorter(n, attention_mask)
            if isinstance(flags, Tensor) and flags.shape == (len(attention_mask), n):
                return flags.long(), ()
    unknown = (
        f"{ATTENTION_MASK} speaks of {attention_mask.shape[1]} places and the model does not say which of the {n} "
    )
    return None, (f"{unknown}vectors are padding: none was taken for it",)


def _outside(model: nn.Module, name: str, site: VectorSite, earlier: list[nn.Module]) -> str:
    """What the audit does not see of a model of pictures or sound."""
    names = {module: path for path, module in model.named_modules()}
    text = f"`{name}` was changed as the vectors that `{names[site.module]}` {'is given' if site.before else 'gives'}"
    mixing = [module for module in dict.fromkeys(earlier) if isinstance(module, CONVOLUTIONS) and _overlaps(module)]
    if not mixing:
        return f"{text}; what makes them of it lies outside this audit"
    first = ", ".join(f"`{names[module]}`" for module in mixing[:MAX_NAMES])
    more = f" and {len(mixing) - MAX_NAMES} more" if len(mixing) > MAX_NAMES else ""
    many = len(mixing) != 1
    return (
        f"{text}; the convolution{'s' * many} before {'them' if many else 'it'} ({first}{more}) mix{'es' * (not many)} "
        "neighbouring places and what stands in padding, which lies outside this audit"
    )


def _overlaps(module: nn.Module) -> bool:
    """Whether a convolution reads some place twice; patches do not."""
    assert isinstance(module, CONVOLUTIONS)
    return any(size > step for size, step in zip(module.kernel_size, module.stride, strict=True))


def _attending(model: nn.Module) -> str:
    """The parts of a model that are stacks of layers with attention, by name; empty if none is found."""
    paths = [
        path
        for path, module in model.named_modules()
        if path and any(isinstance(part, nn.ModuleList) and _attends(part) for part in module.children())
    ]
    return ", ".join(f"model.{path}" for path in paths[:MAX_NAMES])


def _attends(layers: nn.ModuleList) -> bool:
    return any("attention" in type(part).__name__.lower() for part in layers.modules())
