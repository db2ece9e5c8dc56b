"""`tm.use` on models of x-transformers: masks as expressions, their attention on truemask's backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from truemask.errors import MaskError
from truemask.interop.layer_masks import assigned
from truemask.interop.scopes import Hold
from truemask.interop.x_transformers.attention import Use, check_maskable
from truemask.interop.x_transformers.layers import begin, find, is_a, watch
from truemask.masks.core.mask import Mask


def is_x_transformers(model: nn.Module) -> bool:
    """Whether a model attends through x-transformers' `Attention`; by names, so the package is not imported.

    >>> is_x_transformers(nn.Linear(2, 2))
    False
    """
    return any(is_a(module, "Attention") for module in model.modules())


class Switch:
    """An x-transformers model with masks, between `apply` and `undo`; the arguments of `tm.use`."""

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | None = None,
        layers: Any = None,
        replace: bool = False,
        backend: str | None = None,
    ) -> None:
        self._model, self._found = model, find(model)
        known = {found.module: found.layer for found in self._found if found.layer is not None}
        chosen = assigned(model, known, mask, layers, replace) if known or mask is not None else {}
        self._masks = {module: layer.mask for module, layer in chosen.items()}
        self._layers = chosen
        self._replace, self._backend = replace, backend
        if replace and all(own is None for own in self._masks.values()):
            raise MaskError("use: replace=True says that a mask takes the place of the model's own, but there is none")
        for found in self._found:
            if self._masks.get(found.module) is not None:
                check_maskable(found.module, found.stack, replace)
        self._hold: Hold | None = None

    def apply(self, everywhere: bool = False) -> None:
        """Put the model to use, for this context or for all."""
        hold = self._hold = Hold(everywhere)
        for found in self._found:
            own = self._masks.get(found.module)
            layer = self._layers.get(found.module)
            told = {} if layer is None else {"number": layer.used, "path": layer.path}
            use = Use(own, self._replace and own is not None, backend=self._backend, **told)
            hold.change(partial(begin, found, use, hold))
        for stack in {found.stack: None for found in self._found if found.stack is not None}:
            hold.change(partial(watch, self._model, stack))

    def undo(self) -> None:
        """End the use; nothing if that is done. Uses of a model may end in any order."""
        if self._hold is not None:
            self._hold.stop()
            self._hold = None


def install(
    model: nn.Module, mask: Mask | None = None, layers: Any = None, replace: bool = False
) -> Callable[[], None]:
    """Put a model to use, as `used` does on entry, until the function that is returned is called."""
    switch = Switch(model, mask, layers, replace)
    switch.apply()
    return switch.undo


@contextmanager
def used(model: nn.Module, mask: Mask | None = None, layers: Any = None, replace: bool = False) -> Iterator[nn.Module]:
    """Run the attention of an x-transformers model on truemask's backends, under `mask`, while the context lasts.

    Every `Attention` of the model is reached, whatever wraps it: a bare `Decoder` or `Encoder`, `TransformerWrapper`,
    `AutoregressiveWrapper` (loss, `generate` and `beam_search`, with cache and without), `NonAutoregressiveWrapper`,
    `XTransformer`, `ContinuousTransformerWrapper`, `ViTransformerWrapper`, `XLAutoregressiveWrapper`,
    `MultiInputTransformerWrapper`, `XValTransformerWrapper`, `BeliefStateWrapper`, `DPO`.

    The mask is ANDed with what the model claims: causality, `attn_max_attend_past`, padding, `attn_mask`, left padding
    of prompts. It counts the user's tokens (law 2): memory keys (`attn_num_mem_kv`, additional keys), memory tokens,
    class tokens and prepended embeddings are seen by all and not counted; left padding re-indexes
    (`mask.padded(starts)`); cached rows go on where they stand (`mask.at(q_start=...)`). Recurrence memory (`mems`) is
    earlier keys, and positions count from the oldest that is remembered. What memory tokens see of the tokens follows
    the rule of `nn/forward_mask.py`: they carry to no query what the mask hides from it. In cross-attention rows are
    the decoder's tokens, and keys the vectors of the context as they come.

    What `attend` cannot compute keeps x-transformers' own path, under the expression as a dense mask: talking heads,
    `sigmoid`, `hard`, `sparse_topk`, `gumbel_softmax`, `custom_attn_fn`, `inverted_attention`, `cog_signed`,
    `selective`, `use_cope`, `residual_attn`, `attn_delta`, `softclamp_logits` with a bias. Attention maps
    (`return_attn`, z-loss, `qk_clip`) are computed when they are looked at.

    Args:
        model: a module with attention of x-transformers (2.31.10 was read), or a part of one.
        mask: the expression. None: the model's own masks, on our backends.
        layers: where the mask applies, as in `tm.use`: "encoder", "decoder" and the like (the part of the model that a
            stack of layers is), "cross_attention", indices of self-attention layers, or a dict of them to masks, in
            which case `mask` is for the others. The other layers run on our backends as the model claims.
        replace: the mask takes the place of causality and `attn_max_attend_past` where it applies. What the caller
            passes (padding, `attn_mask`) stays.

    Yields:
        The model. Inside another `used` of the model the inner one counts alone. A copy (`copy.deepcopy`) made inside
        is in use as long as the original; a pickle stays in use. State dicts are as always. Threads may share the
        model; each runs its own input under its own uses.

    Raises:
        MaskError: the model has no such attention; a mask cannot hold in it (`shift_tokens`, `attn_hybrid_module`,
        `attn_flash_pack_seq`); `layers` names nothing.
        In the call: tokens without a known position, with memory tokens between them
        (`memory_tokens_interspersed_every`), or with `mems` of a model that has memory tokens or prepends.

    A query that may attend to nothing gets zeros (law 5), also where x-transformers has an average of the future.

    >>> import torch, x_transformers
    >>> from truemask.masks.leaves.bands import window
    >>> stack = x_transformers.Decoder(dim=32, depth=2, heads=2, attn_dim_head=16)
    >>> model = x_transformers.TransformerWrapper(num_tokens=9, max_seq_len=16, attn_layers=stack)
    >>> with used(model, window(4)):
    ...     model(torch.arange(9)[None]).shape
    torch.Size([1, 9, 9])
    """
    undo = install(model, mask, layers, replace)
    try:
        yield model
    finally:
        undo()
