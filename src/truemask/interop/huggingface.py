"""transformers models on our attention: two functions registered under one key, and the switch of a model to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from truemask._attend import attend
from truemask.errors import MaskError, describe
from truemask.interop.claims import PLACE, Claim, of_tensor
from truemask.interop.layers import MARK, Layer, assigned, attention_layers, kept
from truemask.interop.lifting import lift
from truemask.masks.combine import everything
from truemask.masks.positional import causal

KEY = "truemask"
REASON = "`tm.use` plans each call, so a graph ends at masks and attention"


@cache
def register() -> None:
    """Make the key known to transformers: attention function and mask function, always both."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(KEY, torch.compiler.disable(attention, reason=REASON))
    AttentionMaskInterface.register(KEY, torch.compiler.disable(claim, reason=REASON))


# -- the mask function -------------------------------------------------------------------------------------------------


def claim(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **_: object,
) -> Claim:
    """What transformers calls once a forward for each kind of layer, like its `sdpa_mask`: nothing is materialised."""
    sizes, starts = (batch_size, q_length, kv_length), (int(q_offset), int(kv_offset))
    if isinstance(attention_mask, Claim):  # generate made it ahead, for a static cache
        known = attention_mask
        if known.shape != (batch_size, 1, q_length, kv_length) or (known.q_start, known.k_start) != starts:
            raise MaskError(f"a mask for {list(known.shape)} was passed on to a forward of {list(sizes)}")
        return known
    if attention_mask is not None and attention_mask.ndim != 2:
        raise MaskError(f"attention_mask is [samples, tokens] or 4-D, got {describe(attention_mask)}")
    if mask_function is None:
        from transformers.masking_utils import causal_mask_function as mask_function
    found = lift(mask_function, cell_by_cell=use_vmap)
    real = None if attention_mask is None else attention_mask.bool()
    return Claim(
        found.mask,
        sizes,
        starts,
        real=real,
        packing=found.packing,
        unpacked=found.unpacked,
        looks_back=found.looks_back,
        device=device,
    )


# -- the attention function --------------------------------------------------------------------------------------------


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every layer: `[b, h, q, d]` in, `[b, q, h, d]` and perhaps the weights out."""
    layer = vars(module).get(MARK)
    if layer is None:
        _refuse_unknown(module)
    own = _claim_for(module, layer, attention_mask, query, key, is_causal)
    _refuse(options, own)
    if layer.cross:
        mask = own.cross_mask(layer.mask, _rows_before(layer, own), layer.replace)
    else:
        own.warn_of_documents(options.get("position_ids"), layer.mask)
        mask, PLACE.rows = own.mask(layer.mask, layer.replace), (layer, own)
    keys = own.keys_written
    if keys < key.shape[2]:
        key, value = key[:, :, :keys], value[:, :, :keys]
    weights = _wants_weights(module, options)
    found = attend(
        query,
        key,
        value,
        mask,
        bias=_bias(position_bias, own.bias, keys),
        scale=scaling,
        softcap=softcap,
        sink_logits=s_aux,
        dropout=dropout,
        return_weights=weights,
    )
    out, shares = found if isinstance(found, tuple) else (found, None)
    return out.transpose(1, 2).contiguous(), shares


def _claim_for(module: nn.Module, layer: Layer, mask: Any, query: Tensor, key: Tensor, is_causal: bool | None) -> Claim:
    """The model's own mask, whatever came: a claim, a 4-D tensor, or nothing."""
    batch, q_len, k_len = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        looks_back = (
            not layer.cross and q_len > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        )
        if looks_back and k_len < q_len:
            raise MaskError(f"`{layer.path}` is causal, has no mask, and {q_len} queries meet only {k_len} keys")
        rule, placed = causal if looks_back else everything, q_len == k_len
        return Claim(rule, (batch, q_len, k_len), looks_back=bool(looks_back), placed=placed)
    if isinstance(mask, Tensor):
        return of_tensor(mask, batch, q_len, k_len)
    if not isinstance(mask, Claim):
        raise MaskError(
            f"`{layer.path}` was given {describe(mask)} as its mask: tensors and masks of `tm.use` are known"
        )
    if (mask.batch, mask.q_len, mask.k_len) != (batch, q_len, k_len):
        raise MaskError(
            f"`{layer.path}`: the model made its mask for {mask.batch} samples, {mask.q_len} queries and {mask.k_len} "
            f"keys, but attends with {batch}, {q_len} and {k_len}"
        )
    return mask


def _rows_before(layer: Layer, own: Claim) -> Claim | None:
    """The claim of the self-attention that came just before in the same layer: it knows where the rows stand."""
    if PLACE.rows is None:
        return None
    before, rows = PLACE.rows
    same = (before.used, before.part, before.index) == (layer.used, layer.part, layer.index)
    return rows if same and rows.q_len == own.q_len else None


def _bias(position_bias: Tensor | None, added: Tensor | None, keys: int) -> Tensor | None:
    """What is added to the scores, for the keys that exist."""
    found = position_bias if added is None else added if position_bias is None else position_bias + added
    return found[..., :keys] if found is not None and found.shape[-1] > keys else found


def _wants_weights(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether anybody reads the attention weights: the argument, the config, or transformers' output recorder."""
    from transformers.utils.output_capturing import _active_collector

    if options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    return any("attentions" in name for name in _active_collector.get() or ())


def _refuse(options: dict[str, Any], own: Claim) -> None:
    """Raise for what changes the meaning and cannot be honoured (law 9)."""
    if options.get("cache") is not None:
        raise MaskError("paged caches (continuous batching) do not run under `tm.use`: use `generate` without them")
    if options.get("sinks") is not None:
        raise MaskError("this model passes `sinks=`, which `tm.use` does not know: it knows the sinks called `s_aux`")
    if options.get("cu_seq_lens_q") is not None and own.packing is None:
        raise MaskError(
            "cu_seq_lens_q says that documents are packed, but the model's mask does not keep them apart: transformers "
            "does that if position_ids restart and neither attention_mask nor a cache is passed"
        )


def _refuse_unknown(module: nn.Module) -> NoReturn:
    raise MaskError(
        f"{type(module).__name__} runs the attention 'truemask', but no `tm.use` or `tm.enable` knows its model: call "
        "one of them on the model instead of choosing the key yourself"
    )


# -- the switch --------------------------------------------------------------------------------------------------------


class Switch:
    """A model on our attention with these masks, until `undo`."""

    def __init__(self, model: Any, mask: object, layers: object, replace: bool) -> None:
        self.model = model
        self._layers = assigned(model, attention_layers(model), mask, layers, replace)
        if replace and mask is None and not layers:
            raise MaskError(
                "use: replace=True says that a mask takes the place of the model's own, but there is no mask"
            )
        self._before: list[tuple[Any, str | None]] = []
        self._marks: dict[nn.Module, Layer | None] = {}

    def apply(self) -> None:
        """Switch the model over."""
        _check_switchable(self.model)
        register()
        self._before = [(config, config._attn_implementation) for config in _configs(self.model)]
        self._marks = {module: vars(module).get(MARK) for module in self._layers}
        try:
            self.model.set_attn_implementation(KEY)
            for module, layer in self._layers.items():
                _check_switched(self.model, module, layer)
                vars(module)[MARK] = layer
        except BaseException:
            self._restore()
            raise
        later = kept(self.model, "_truemask_uses")
        later.value = [*(later.value or ()), self]

    def undo(self) -> None:
        """Give the model back what it ran before."""
        uses = kept(self.model, "_truemask_uses")
        if not uses.value or uses.value[-1] is not self:
            raise MaskError("the model is in use by a later `tm.use` or `tm.enable`: undo that one first")
        uses.value = uses.value[:-1]
        self._restore()

    def _restore(self) -> None:
        for config, implementation in self._before:
            config._attn_implementation_internal = implementation
        for module, layer in self._marks.items():
            vars(module).pop(MARK, None)
            if layer is not None:
                vars(module)[MARK] = layer


def _configs(model: Any) -> list[Any]:
    """Every config that the model or a part of it reads, each once."""
    from transformers import PreTrainedModel

    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _check_switchable(model: Any) -> None:
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not part._can_set_attn_implementation():
            raise MaskError(
                f"{type(part).__name__} cannot switch its attention: transformers looks for its AttentionInterface in "
                "the file of the class, and does not find it (classes of a notebook have no file). A mask can reach "
                "such a model only as the tensor that it takes: `tm.to_additive(mask, ...)` or `tm.to_torch_sdpa`"
            )


def _check_switched(model: Any, module: nn.Module, layer: Layer) -> None:
    """Raise if a layer goes on with another attention: its config is not one that transformers switches."""
    config = getattr(module, "config", None)
    if config is not None and config._attn_implementation != KEY:
        raise MaskError(
            f"{type(model).__name__}: `{layer.path}` keeps its attention '{config._attn_implementation}', because "
            "transformers does not switch its config with the model's"
        )
