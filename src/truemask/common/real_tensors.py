"""What outlives a call: real tensors only, whoever traces at the time.

`torch.export`, `torch.compile`, `torch.jit.trace`, `make_fx`, `FakeTensorMode` and `torch.func` put stand-ins in the
place of tensors for the length of one call. What is made then and remembered (a table, a plan, a digest) would be a
stand-in too, and break, or silently falsify, every later call. So there is one rule: nothing that is remembered holds
one. Three names keep it, and a test walks everything that the package remembers:

* `ordinary_tensors()`: inside, torch makes real tensors, whatever is going on around;
* `remembered`: the cached property of this package, worked out among ordinary tensors;
* `is_real(tensor)`: whether a tensor may be kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import SymInt, Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses.fake_tensor import fake_tensor_tls, is_fake
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import has_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")
TORCH: Any = torch  # whose declared face leaves out what tracers use
C = TORCH._C
TRACERS = (C._TorchDispatchModeKey.FAKE, C._TorchDispatchModeKey.FUNCTIONAL, C._TorchDispatchModeKey.PROXY)


def is_recorded() -> bool:
    """Whether torch's operations are being written down, or pretended: for a graph that will run without this call.

    `torch.compile` is not meant: what it traces is told by `torch.compiler.is_dynamo_compiling()`.
    """
    if C._is_tracing():
        return True
    return C._len_torch_dispatch_stack() > 0 and any(C._get_dispatch_mode(key) is not None for key in TRACERS)


def cannot_look() -> bool:
    """Whether the values of tensors are not to be had, because a graph is made for many calls."""
    return torch.compiler.is_compiling() or is_recorded()


def is_diverted() -> bool:
    """Whether something stands between this call and ordinary tensors: a tracer, `torch.func`, a default device."""
    return C._are_functorch_transforms_active() or C._len_torch_function_stack() > 0 or is_recorded()


def is_real(tensor: Tensor) -> bool:
    """Whether the tensor has numbers of its own, which nobody is writing down.

    >>> is_real(torch.ones(2)), is_real(torch.ones(2, device="meta"))
    (True, False)
    """
    if tensor.is_meta or isinstance(tensor, FunctionalTensor) or C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not (is_fake(tensor) or TORCH._is_functional_tensor(tensor) or _is_written_down(tensor))


def is_late(value: object) -> bool:
    """Whether a number or a tensor comes in with each call of the graph that is being recorded."""
    return isinstance(value, SymInt) or (isinstance(value, Tensor) and is_recorded() and not is_real(value))


def surely(condition: Any) -> bool:
    """Whether a comparison of numbers holds, as far as it is known now: late ones are not."""
    return bool(condition) if not isinstance(condition, Tensor) or C._is_tracing() else False


def for_now(number: Any) -> Any:
    """What a late number is while the graph is recorded."""
    if isinstance(number, SymInt):
        return number.node.hint
    return int(number) if isinstance(number, Tensor) else number


@contextmanager
def trusted() -> Iterator[None]:
    """A decision by a size or a number, which `torch.jit.trace` warns of, is a check in here, no part of the graph."""
    if not C._is_tracing():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TORCH.jit.TracerWarning)
        yield


@contextmanager
def beside_real() -> Iterator[None]:
    """Under `FakeTensorMode`, real tensors (the numbers and tables of masks) may stand beside stand-ins."""
    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before


def traceable(forward: Callable[P, T]) -> Callable[P, T]:
    """A module's forward whose decisions by sizes are checks, so that `torch.jit.trace` need not warn of them."""

    @wraps(forward)
    def called(*args: P.args, **keywords: P.kwargs) -> T:
        if not TORCH.jit.is_tracing():
            return forward(*args, **keywords)
        with trusted():
            return forward(*args, **keywords)

    return called


def _is_written_down(tensor: Tensor) -> bool:
    """Whether `torch.jit.trace` or `make_fx` follows the tensor: an input, or made in the course of the trace."""
    proxies: Any = C._get_dispatch_mode(C._TorchDispatchModeKey.PROXY)
    if proxies is not None and has_proxy_slot(tensor, proxies.tracer):
        return True
    return C._is_tracing() and C._get_value_trace(tensor).node().kind() != "prim::Constant"


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is made inside outlives the call: under a tracer it would be a fake, under `torch.func` a wrapper."""
    if not (is_diverted() or C._len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch()):
        yield
        return
    with ExitStack() as stack:
        if C._are_functorch_transforms_active():
            stack.enter_context(C._DisableFuncTorch())
        if C._len_torch_function_stack():
            stack.enter_context(C.DisableTorchFunction())
        if C._is_tracing():
            stack.enter_context(_untraced())
        if not torch.compiler.is_dynamo_compiling():
            stack.enter_context(_disable_current_modes())
        yield


@contextmanager
def _untraced() -> Iterator[None]:
    """Nothing inside is written down by `torch.jit.trace`, and sizes are ints."""
    state = C._get_tracing_state()
    C._set_tracing_state(None)
    try:
        yield
    finally:
        C._set_tracing_state(state)


class remembered(cached_property[T]):
    """A property that is worked out once, among ordinary tensors, and kept in the object.

    >>> class Numbers:
    ...     @remembered
    ...     def three(self):
    ...         return torch.arange(3)
    >>> numbers = Numbers()
    >>> with torch._subclasses.FakeTensorMode():
    ...     is_real(numbers.three)
    True
    """

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        if instance is None or torch.compiler.is_dynamo_compiling():
            return super().__get__(instance, owner)
        if not is_diverted():
            return super().__get__(instance, owner)
        with ordinary_tensors():
            return super().__get__(instance, owner)
