"""`use` and `enable`: any mask in the model that you have."""

from __future__ import annotations

from typing import Any

from torch import nn

from truemask.backends.context import check_backend
from truemask.common.formatting import describe
from truemask.errors import MaskError
from truemask.interop.scopes import kept
from truemask.interop.switching import Switch
from truemask.masks.core.mask import Mask


class InUse:
    """A model with a mask: a context manager, or what `enable` returns, with `undo()`."""

    def __init__(self, model: nn.Module, switch: Switch, everywhere: bool = False) -> None:
        self._model, self._switch, self._everywhere = model, switch, everywhere
        self._depth = 0

    def __enter__(self) -> Any:
        if self._depth:
            raise MaskError("this `tm.use` is entered already: write another one")
        self._switch.apply(self._everywhere)
        self._depth = 1
        return self._model

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Give the model back what it ran before; nothing if that is done."""
        if self._depth:
            self._switch.undo()
            self._depth = 0

    def __repr__(self) -> str:
        return f"<tm.use of {type(self._model).__name__}: {'in use' if self._depth else 'not in use'}>"


def use(
    model: Any, mask: Mask | str | None = None, layers: Any = None, *, replace: bool = False, backend: str | None = None
) -> InUse:
    """Run a Hugging Face transformers or x-transformers model under a mask, on our attention, inside a `with` block.

    The mask is ANDed with what the model claims itself: causality, window, chunks, padding, packed documents. It counts
    logical positions (law 2 in docs/conventions.md): left padding, restarting `position_ids`, caches of every kind and
    beams change nothing of what the mask means. `generate` works as always. Absolute position embeddings are the
    model's own: where padding or packing moves tokens, pass `position_ids`, as without us.

    What a forward says of positions in several ways (`position_ids`, 2-D flags, a 4-D mask, the length of the cache) is
    compared. A 4-D mask says padding together with `position_ids` that skip it; `position_ids` that only number the
    rows say nothing of pads. Where they contradict each other, as with a cache that has evicted keys, a mask that asks
    for positions is refused, unless it says itself which rows and keys it is about: by `at`, `take` or as a tensor.

    Args:
        model: a transformers (v5) model, or one of x-transformers, whatever wraps it (`torch.compile`, `DataParallel`,
            adapters); any part of it that is a model itself will do. What holds for x-transformers alone (registers,
            memory, what stays on its own path) is told at the end of docs/from_x_transformers.md.
        mask: an expression, or its text. None: the model's own masks, on our backends. Samples are rows of the batch:
            with beams choose them, `mask.select(samples=[0, 0, 1, 1])`. Cross-attention is reached by name only.
        layers: where the mask applies: names, indices, or a dict of them to masks, in which case `mask` is for the
            others. Names are kinds ("full_attention", "sliding_attention", "chunked_attention"), parts ("encoder",
            "decoder"), kinds of a part ("encoder.full_attention") and "cross_attention". A model with several parts,
            or with layers that mix tokens without attention (state spaces, convolutions), asks for a name.
        replace: the mask takes the place of the model's own rule (causal, window, chunks) where it applies. Padding,
            documents and what a cache has not written yet stay hidden.
        backend: a name from `backends()` for the layers in use; by default that of `attention_backend` around the
            forward, or else the plan's choice.

    Returns:
        A context manager; `as` gives the model. Inside another `use` of the model the inner one counts alone, and uses
        end in any order. A deep copy made inside stays in use; `copy.set_attn_implementation("sdpa")` is its way back.
        `save_pretrained` writes nothing of it.

        A use holds in its own context: the thread that entered it, or the task of asyncio, and what they start in a
        copy of theirs (`asyncio.to_thread`, `contextvars.copy_context().run`), replicas of `DataParallel` included.
        Everywhere else the model gives what it gives without us, though its config names our attention for all.

    Raises:
        MaskError: the model cannot switch, selects keys itself, or computes with its mask; `layers` names nothing that
            it has; information would go around the mask; positions are not known. PlanError: there is no such backend.
        A `ConventionWarning` says, once, how many pairs the model's own rule removes of a mask that asks for them, and
            that `position_ids` are smaller than the model's first position (RoBERTa's is `padding_idx + 1`).

    Under `torch.compile` the graph breaks at masks and attention, so `fullgraph=True` is refused by torch.

    Layers that `torch.utils.checkpoint` recomputes (gradient checkpointing) run under the mask of their forward,
    wherever `backward` stands; the config goes back to what it named when the last such graph is gone. Layers that
    others recompute need `backward` inside the block.

    >>> from truemask.masks.leaves.bands import causal
    >>> use(object(), causal)
    Traceback (most recent call last):
    truemask.errors.MaskError: use takes a model of transformers or x-transformers, got object <object object at ...
    """
    return _use(model, mask, layers, replace, backend, everywhere=False)


def _use(
    model: Any, mask: Mask | str | None, layers: Any, replace: bool, backend: str | None, everywhere: bool
) -> InUse:
    if not isinstance(model, nn.Module):
        raise MaskError(f"use takes a model of transformers or x-transformers, got {describe(model)}")
    if not isinstance(replace, bool):
        raise MaskError(f"use: replace is True or False, got {describe(replace)}")
    check_backend(backend)
    inner, switch = _switch(model)
    return InUse(model, switch(inner, mask, layers, replace, backend), everywhere)


def enable(
    model: Any, mask: Mask | str | None = None, layers: Any = None, *, replace: bool = False, backend: str | None = None
) -> InUse:
    """`use` for good and for all threads: the model runs on our attention until `undo()` of what this returns.

    A block of `use` counts inside of it all the same. Again on the same model `enable` takes the place of the earlier
    one, whose `undo` then does nothing; the last one's gives the model back what it ran at first. Models that share a
    config object are switched together: enable each of them.
    Arguments and errors are those of `use`.

    >>> enable(None)
    Traceback (most recent call last):
    truemask.errors.MaskError: use takes a model of transformers or x-transformers, got NoneType None
    """
    new = _use(model, mask, layers, replace, backend, everywhere=True)
    enabled = kept(_switch(model)[0], "_truemask_enabled")
    new.__enter__()
    earlier, enabled.value = enabled.value, new
    if earlier is not None:
        earlier.undo()
    return new


def _switch(model: nn.Module) -> tuple[nn.Module, type[Switch]]:
    """The model inside its wrappers, and what puts it to use, by the library that the model is from."""
    inside = _outermost(model)
    if len(inside) == 1:
        from truemask.interop.huggingface.switch import HuggingFaceSwitch

        return next(iter(inside.values())), HuggingFaceSwitch
    if inside:
        models = ", ".join(f"`{path}` ({type(each).__name__})" for path, each in inside.items())
        raise MaskError(f"{type(model).__name__} holds several models of transformers: put each to use, {models}")
    if any(_is_from("x_transformers", part) for part in model.modules()):
        from truemask.interop.x_transformers.switch import XTransformersSwitch

        return model, XTransformersSwitch
    if _is_from("transformers", model):
        raise MaskError(
            f"use takes a whole model of transformers, and {type(model).__name__} is a part of one: use the model, and "
            "say with layers= where the mask applies"
        )
    raise MaskError(
        f"use takes a model of transformers (a PreTrainedModel) or x-transformers, got {type(model).__name__} of "
        f"`{type(model).__module__}`. Your own modules call `tm.attend(q, k, v, mask)` themselves"
    )


def huggingface_model(model: object) -> Any:
    """The one model of transformers inside its wrappers, or None."""
    inside = list(_outermost(model).values()) if isinstance(model, nn.Module) else []
    return inside[0] if len(inside) == 1 else None


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """The models of transformers that are part of no other one, by their path in wrappers of whatever kind."""
    models: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{above}.") or not above for above in models)
        if not inner and _is_from("transformers", module, "PreTrainedModel"):
            models[path] = module
    return models


def _is_from(library: str, module: nn.Module, name: str | None = None) -> bool:
    """Whether a module's class, or one that it extends, comes from a library and is called so."""
    return any(
        kind.__module__.split(".")[0] == library and name in (None, kind.__name__) for kind in type(module).__mro__
    )
