"""x-transformers' `Attention` and `Attend` while in use: the call read, and run by `attend` or on their own path."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from truemask.attention.attend import attend
from truemask.errors import MaskError, PlanError
from truemask.interop.checkpointing import checkpoints
from truemask.interop.layer_masks import AttentionLayer
from truemask.interop.removed_pairs import warn_of_removed_pairs
from truemask.interop.scopes import ScopedEntry, ScopedValue
from truemask.interop.x_transformers.attention_maps import LazyIntermediates, intermediates_of
from truemask.interop.x_transformers.coverage import dropout_of, objections_to
from truemask.interop.x_transformers.inputs import (
    ForwardProxy,
    StackInput,
    StackKey,
    arguments,
    known_positions,
    set_variable,
)
from truemask.interop.x_transformers.masks import ModelMask, RegisterLayout, from_flags, from_matrix, model_rule
from truemask.masks.compose.boolean import conjunction, everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.matrices import dense


@dataclass(frozen=True, eq=False)
class Intermediate:
    """What `Attention` knows of a call and `Attend` is not given."""

    entry: ScopedEntry[AttentionLayer]
    layout: RegisterLayout
    max_attend_past: int | None
    attn_mask: Tensor | None
    own_path: bool  # whether `attend` cannot compute it

    @property
    def layer(self) -> AttentionLayer:
        return self.entry.value


ATTENTION_CALL: ContextVar[tuple[ScopedValue[AttentionLayer], Intermediate] | None] = ContextVar(
    "truemask_call", default=None
)  # that attention is in


class AttentionForward(ForwardProxy):
    """Stands in for `Attention.forward`: takes masks out of its arguments; `AttendForward` says them as expressions."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.stack_key = StackKey()
        self.scoped_layer: ScopedValue[AttentionLayer] = ScopedValue()
        self._bare: Any = None  # the module without `max_attend_past`, which the expression says

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **named: Any) -> Any:
        entry, stack_input = self._here()
        if entry is None:
            return self.original(*args, **named)
        layer, call_arguments = entry.value, arguments(self.module, args, named)
        objections = objections_to(self.module, call_arguments)
        plain = layer.mask is None and layer.backend is None and self.module.max_attend_past is None
        if objections and plain:
            return self.original(**call_arguments)
        return self._read(call_arguments, entry, stack_input, objections)

    @torch.compiler.disable(recursive=True)
    def _here(self) -> tuple[ScopedEntry[AttentionLayer] | None, StackInput]:
        """The use that holds in this context, and what the stack runs on; or in the forward that is recomputed."""
        around = checkpoints()
        return self.scoped_layer.entry(around), self.stack_key.here(around)

    @torch.compiler.disable(recursive=False)
    def _read(
        self,
        keywords: dict[str, Any],
        entry: ScopedEntry[AttentionLayer],
        stack_input: StackInput,
        objections: list[str],
    ) -> Any:
        """The call without its masks, which the intermediate holds meanwhile."""
        masked = entry.value.mask is not None
        layout = self._layout(keywords, stack_input, masked)
        attn_mask = keywords.pop("attn_mask", None)
        intermediate = Intermediate(entry, layout, self.module.max_attend_past, attn_mask, bool(objections))
        if masked and stack_input.only_starts and not layout.cross:
            keywords.pop("context_mask", None)  # left padding, which the expression says
        before = set_variable(ATTENTION_CALL, (self.scoped_layer, intermediate))
        try:
            out = self._run(keywords, entry.value)
        finally:
            set_variable(ATTENTION_CALL, before)
        if keywords.get("return_intermediates"):
            out[1].truemask_front = registers_of(keywords.get("cache"), stack_input)
        return out

    def _run(self, keywords: dict[str, Any], layer: AttentionLayer) -> Any:
        """The forward as it was, on a module without `max_attend_past`: other threads may want it."""
        if self.module.max_attend_past is None:
            return self.original(**keywords)
        if self.previous is not None:
            if layer.replace:
                raise MaskError(
                    "replace=True cannot take the place of attn_max_attend_past in an `Attention` whose forward "
                    "somebody else has replaced: put the model to use before"
                )
            return self.original(**keywords)
        bare = self._bare = self._bare or self.module.__new__(type(self.module))
        vars(bare).update({**vars(self.module), "max_attend_past": None})
        return type(self.module).forward(bare, **keywords)

    @torch.compiler.disable(recursive=True)
    def _layout(self, keywords: dict[str, Any], stack_input: StackInput, masked: bool) -> RegisterLayout:
        """All of the place but its rows and keys, which `Attend` sees."""
        module, memory = self.module, keywords.get("mem")
        added = keywords.get("additional_key_values")
        extra = module.num_mem_kv + (0 if added is None else added[0].shape[-2])
        front = max(0, registers_of(keywords.get("cache"), stack_input) - stack_input.dropped)
        if keywords.get("context") is not None:
            return RegisterLayout(
                0, 0, extra, 0 if stack_input.cached else front, token=max(0, stack_input.cached - front), cross=True
            )
        if masked:
            known_positions(stack_input, memory is not None)
        return RegisterLayout(0, 0, extra, front, stack_input.back, stack_input.starts)


class AttendForward(ForwardProxy):
    """Stands in for `Attend.forward`: the call on truemask's backends, or on its own path under a dense mask."""

    def __init__(self, module: Any, owner: AttentionForward) -> None:
        super().__init__(module)
        self.owner = owner

    @torch.compiler.disable(recursive=True)
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **named: Any) -> tuple[Tensor, Any]:
        intermediate = self._intermediate()
        if intermediate is None:
            return self.original(q, k, v, mask=mask, **named)
        layout = replace(intermediate.layout, rows=q.shape[-2], keys=k.shape[-2])
        call = AttendInputs(self.module, q, k, v, mask, named, intermediate, layout)
        own_path = partial(self._own_path, call)
        if intermediate.own_path:
            if intermediate.layer.backend is not None:
                raise PlanError(
                    f"backend={intermediate.layer.backend!r}: this layer computes what `attend` cannot, on "
                    "x-transformers' own path; use the model without backend="
                )
            return own_path()
        out = on_backends(self.module, q, k, v, call.expression, named.get("attn_bias"), intermediate.layer.backend)
        if self.module.flash:
            return out, intermediates_of(self.module)
        return out, LazyIntermediates(own_path)

    def _intermediate(self) -> Intermediate | None:
        """What `Attention` says of this call, or said in the forward that is recomputed without it."""
        call = ATTENTION_CALL.get()
        intermediate = call[1] if call is not None and call[0] is self.owner.scoped_layer else None
        return checkpoints().as_in_forward(self, lambda: intermediate)

    def _own_path(self, call: AttendInputs) -> tuple[Tensor, Any]:
        named = {**call.named, "causal": call.causal and not call.intermediate.layer.replace}
        return self.original(call.q, call.k, call.v, mask=call.matrix, **named)


@dataclass
class AttendInputs:
    """One call of `Attend`, with what its mask comes to."""

    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    named: dict[str, Any]
    intermediate: Intermediate
    layout: RegisterLayout

    @property
    def causal(self) -> bool:
        """Whether x-transformers would be causal here: its flash path does not hear of the call's own `causal`."""
        causal = self.named.get("causal")
        deaf = self.module.flash and self.named.get("attn_delta") is None
        return self.module.causal if deaf or causal is None else causal

    @cached_property
    def expression(self) -> Mask:
        intermediate, layout = self.intermediate, self.layout
        layer = intermediate.layer
        rule = everything if layer.replace else model_rule(self.causal, intermediate.max_attend_past)
        if not layout.cross and rule != everything:
            length = layout.keys - layout.extra - layout.front - layout.back
            warn_of_removed_pairs(layer.used, layer.path, layer.mask, rule, length, self.q.shape[0], self.q.shape[1])
        flags = self.mask
        whole = flags is not None and flags.ndim == 4 and flags.shape[-2] > 1  # where `max_attend_past` is in it
        padded = dense(flags) if whole else from_flags(flags, layout)
        matrix = from_matrix(intermediate.attn_mask, self.q.shape[1], layout)
        return ModelMask(rule, layout, conjunction(padded, matrix)).combined_with(layer.mask)

    @property
    def matrix(self) -> Tensor:
        """The expression as bool `[b or 1, h or 1, rows, keys]`."""
        samples, heads, rows, _ = self.q.shape
        mask = self.expression
        mask.check(rows, self.layout.keys, batch=samples, heads=heads)
        return mask.to_dense(rows, self.layout.keys, batch=samples, heads=heads).to(self.q.device)


def registers_of(cache: Any, stack_input: StackInput) -> int:
    """How many registers begin the sequence: as many as when the cache began, whatever this call was given."""
    return getattr(cache, "truemask_front", stack_input.front)


def on_backends(
    core: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, backend: str | None = None
) -> Tensor:
    """`Attend` by `attend`: `[b, h, q, dv]`. Query head h reads key head h % kv_heads there, h // group here."""
    heads, groups = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if core.scale is None else float(core.scale)
    sinks = sinks_of(core, q)
    if core.l2_distance:  # -|q - k|^2 without |q|^2, which is the same for all keys of a row
        q, k = torch.cat((2 * q, -torch.ones_like(q[..., :1])), -1), torch.cat((k, k.square().sum(-1, True)), -1)
    interleaved = 1 < groups < heads
    if interleaved:
        order = torch.arange(heads).view(-1, groups).T.flatten()
        q = q.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        mask = mask if mask.head_count == 1 else mask.select(heads=order)
        sinks = sinks if sinks is None else sinks[order]
        bias = bias[..., order, :, :] if bias is not None and bias.ndim > 2 and bias.shape[-3] > 1 else bias
    out = attend(
        q,
        k,
        v,
        mask,
        bias=bias,
        scale=scale,
        softcap=core.logit_softclamp_value if core.softclamp_logits else None,
        sink_logits=sinks,
        dropout=dropout_of(core) if core.training else 0.0,
        backend=backend,
    )
    return out.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2) if interleaved else out


def sinks_of(core: Any, q: Tensor) -> Tensor | None:
    """`[h]`: the learned sink, and the key of zeros, which is a sink of logit 0."""
    learned = core.head_attn_sink if core.head_learned_sink else None
    if not core.add_zero_kv:
        return learned
    zeros = q.new_zeros(q.shape[1])
    return zeros if learned is None else torch.logaddexp(learned, zeros)
