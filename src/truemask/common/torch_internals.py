"""What torch does not declare and calls need: whether a `vmap` or another transform surrounds them, and ways in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

TORCH: Any = torch  # whose declared face leaves these out
cpu_flash = TORCH._scaled_dot_product_flash_attention_for_cpu
cpu_flash_backward = TORCH.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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


def at_once(call: Callable[[Any], None]) -> None:
    """Make the call while dynamo traces, rather than write it down."""
    dynamo: Any = torch._dynamo
    dynamo.comptime.comptime(call)


@contextmanager
def recorded_by_autograd() -> Iterator[None]:
    """Autograd as in eager code: inside of an operator's kernel torch leaves it out."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    key = torch._C.DispatchKey
    for one in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor):
        left_out = left_out.remove(one)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, left_out), torch.enable_grad():
        yield


def with_constant_sizes(tensor: Tensor, *axes: int) -> Tensor:
    """The tensor with a note for dynamo: its sizes along these axes are constants of what is compiled."""
    for axis in axes:
        TORCH._dynamo.mark_static(tensor, axis)
    return tensor
