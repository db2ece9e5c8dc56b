"""What torch does not declare and calls must know: whether a `vmap` or another transform surrounds them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import forward_ad


def is_batched(x: Tensor) -> bool:
    """Whether a `vmap` maps over the tensor: `torch.func`'s, or the older one that `is_grads_batched` uses."""
    return is_batchedtensor(x) or is_older_batch(x)


def is_older_batch(x: Tensor) -> bool:
    """Whether the `vmap` is the older one, which knows few operations and no autograd function's own rule."""
    return is_legacy_batchedtensor(x)


def transform() -> str:
    """The function transform that the call stands inside of, or nothing."""
    if torch._C._are_functorch_transforms_active():
        return "vmap or torch.func"
    return "forward mode" if forward_ad._current_level >= 0 else ""
