"""Modules of `torch.nn`: the mask that goes into a call of theirs, and what to assume of models that are made of them.

They look both ways unless a mask goes in, or a direction is built in (`nn.LSTM`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truemask.auditing.subject import AuditedModel, AuditError
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.foreign import from_torch_mha
from truemask.masks.leaves.bands import causal

ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
DECODERS = (nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer)
ATTENTION = (*ENCODERS, *DECODERS, nn.MultiheadAttention)
MASK_KEYWORDS = ("mask", "src_mask", "attn_mask")
LANGUAGE_MODEL_NAMES = ("CausalLM", "LMHeadModel", "Decoder", "GPT")  # names of models that look back


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of one sequence `[b, n, d]`, as its own queries, keys and values."""

    def __init__(self, model: nn.MultiheadAttention) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        x = x if self.model.batch_first else x.transpose(0, 1)
        outputs = self.model(x, x, x, **keywords)[0]
        return outputs if self.model.batch_first else outputs.transpose(0, 1)


class TorchMask(NamedTuple):
    """What a module of torch runs: the mask, who says so, and through how many layers."""

    mask: Mask
    source: str
    layers: int | None


def without_queries(model: nn.Module, batch: Any) -> tuple[nn.Module, Any]:
    """The model and batch as they are, or self-attention where the model is `nn.MultiheadAttention`."""
    if isinstance(model, (*ATTENTION, nn.RNNBase)) and not isinstance(model, nn.MultiheadAttention):
        flags = {part.batch_first for part in model.modules() if isinstance(part, (nn.MultiheadAttention, nn.RNNBase))}
        if flags == {False}:
            raise AuditError(
                f"this {type(model).__name__} was built with batch_first=False and takes [n, b, d], and the audit "
                "feeds [b, n, d]: build it with batch_first=True"
            )
    if not isinstance(model, nn.MultiheadAttention):
        return model, batch
    if isinstance(batch, Mapping):
        same = batch.get("query")
        others = [batch.get(name) for name in ("key", "value")]
        if same is not None and any(other is not None and other is not same for other in others):
            raise AuditError("of nn.MultiheadAttention self-attention is audited: pass one tensor [b, n, d]")
        rest = {name: value for name, value in batch.items() if name not in ("query", "key", "value")}
        batch = rest if same is None else {"x": same} | rest
    return type(type(model).__name__, (SelfAttention,), {})(model), batch


def torch_mask_of(subject: AuditedModel) -> TorchMask | None:
    """The mask of a call of one of torch's modules; None of any other model."""
    model: Any = subject.model.model if isinstance(subject.model, SelfAttention) else subject.model
    kind = f"nn.{type(model).__name__}"
    if isinstance(model, nn.RNNBase):
        return TorchMask(everything if model.bidirectional else causal, f"what {kind} does", model.num_layers)
    if not isinstance(model, ATTENTION):
        return None
    layers = getattr(getattr(model, "decoder", model), "num_layers", 1)
    decodes = isinstance(model, DECODERS)
    names = ("tgt_mask",) if decodes else MASK_KEYWORDS
    for name in names:
        value = subject.keywords.get(name)
        if isinstance(value, Tensor):
            heads = next(part.num_heads for part in model.modules() if isinstance(part, nn.MultiheadAttention))
            return TorchMask(from_torch_mha(value, num_heads=heads), f"the {name} that goes into {kind}", layers)
    looks_back = decodes or bool(subject.keywords.get("is_causal"))
    return TorchMask(causal if looks_back else everything, f"{kind} without a mask", layers)


def assumed_mask_of(subject: AuditedModel) -> tuple[Mask, str]:
    """The mask that a model is held to of which nobody says anything, and a note that says so."""
    premise = "nobody said which mask this model runs: "
    kind = _unmasked(subject)
    if not kind:
        return causal, f"{premise}it was held to `causal`. Pass mask= to say what it should be"
    name = type(subject.model).__name__
    if subject.writes_tokens or any(word in name for word in LANGUAGE_MODEL_NAMES):
        return causal, (
            f"{premise}it was held to `causal`, since it gives a number for each token of its vocabulary, though its "
            f"{kind} looks both ways. Pass mask= to say what it should be ('everything', if it is meant to see the "
            "whole text)"
        )
    return everything, (
        f"{premise}it was held to `everything`, since its {kind} looks both ways. Pass mask='causal' if it should look "
        "back"
    )


def _unmasked(subject: AuditedModel) -> str:
    """The kind of torch's modules in this model that look both ways, if all that run in a call do; else nothing."""
    modules: list[nn.Module] = [part for part in subject.model.modules() if isinstance(part, (*ATTENTION, nn.RNNBase))]
    directions: list[bool] = []
    kinds: list[str] = []

    def listen(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        directions.append(_looks_back(module, args, named))
        kinds.append(f"nn.{type(module).__name__}")

    if modules:
        with _watching(modules, listen), torch.no_grad():
            subject.outputs()
    return kinds[0] if directions and not any(directions) else ""


@contextmanager
def _watching(modules: list[nn.Module], listen: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(listen, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _looks_back(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call of one of torch's modules is given a mask, or a direction is built in."""
    if isinstance(module, nn.RNNBase):
        return not module.bidirectional
    arguments = inspect.signature(module.forward).bind_partial(*args, **named).arguments
    names = ("tgt_mask", "tgt_is_causal") if isinstance(module, DECODERS) else (*MASK_KEYWORDS, "is_causal")
    return any(isinstance(arguments.get(name), Tensor) or arguments.get(name) is True for name in names)
