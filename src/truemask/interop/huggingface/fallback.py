"""What a transformers model runs where it is not in use: its config may name our attention, because others use it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from truemask.errors import MaskError
from truemask.interop.huggingface.configs import account_of
from truemask.interop.huggingface.layers import ScopedLayer

EAGER = "eager"  # the attention that no registry knows: it stands in the file of its model


def named(config: Any, scoped_layer: ScopedLayer | None = None) -> str | None:
    """The attention that a config names without us; None if it is ours, as in a copy of a model in use."""
    account = account_of(config)
    if account is not None:
        return account.before
    return getattr(config, "_attn_implementation", None) or (None if scoped_layer is None else scoped_layer.before)


def own_mask(name: str, arguments: dict[str, Any]) -> Any:
    """The mask that transformers makes for an attention of this name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    return MASKS[name](**arguments) if name in MASKS else None


def own_attention(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The attention function of this name for a layer; None if it has none that could be called."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    if name in FUNCTIONS:
        return FUNCTIONS[name]
    forward = inspect.unwrap(type(module).forward)
    called = next((other for other in forward.__code__.co_names if other.endswith(f"{EAGER}_attention_forward")), "")
    here, there = forward.__globals__, vars(sys.modules[type(module).__module__])
    return here.get(called) or there.get(f"{EAGER}_attention_forward")


def refuse_unknown(module: nn.Module) -> NoReturn:
    """Raise for a layer that runs our attention and that nobody put to use."""
    account = account_of(getattr(module, "config", None))
    if account is not None:
        raise MaskError(
            f"this {type(module).__name__} is no layer of the model in use ({', '.join(sorted(set(account.users)))}), "
            "but shares its config object, which says for both which attention runs. Build one of them with a config "
            "of its own (`copy.deepcopy(config)`), or put both to use: without a mask a model computes what it always "
            "did"
        )
    raise MaskError(
        f"{type(module).__name__} runs the attention 'truemask', but no `tm.use` or `tm.enable` knows its model: call "
        "one of them on the model instead of choosing the key yourself"
    )
