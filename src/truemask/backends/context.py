"""The backend that a `with` block names for every call inside of it that does not name one itself."""

from __future__ import annotations

from contextvars import ContextVar, Token

from truemask.backends.registry import backends, unknown_backend
from truemask.common.formatting import describe
from truemask.errors import PlanError

CHOSEN: ContextVar[str | None] = ContextVar("truemask_backend", default=None)


class attention_backend:
    """A `with` block in which `attend` runs on this backend wherever it is not called with `backend=` itself.

    It reaches models and modules that call `attend` for you, `plan` (law 8 in docs/conventions.md), and compiled
    functions, for which it counts where they are called; `torch.export` writes plain operations whatever is chosen. It
    holds in its own thread and its own task of asyncio; inner blocks count before outer ones. Enter it outside of what
    `torch.compile` compiles with `fullgraph=True`.

    Args:
        name: one of `backends()`; None lets the plan choose again.

    Raises:
        PlanError: there is no such backend; in a call, that it cannot run it. TypeError: the name is no text.

    Second derivatives, which only "reference" has:

    >>> import torch
    >>> from truemask.attention.attend import attend
    >>> x = torch.ones(1, 1, 3, 2, requires_grad=True)
    >>> with attention_backend("reference"):
    ...     (grad,) = torch.autograd.grad(attend(x, x, x).square().sum(), x, create_graph=True)
    >>> torch.autograd.grad(grad.sum(), x)[0].shape
    torch.Size([1, 1, 3, 2])
    """

    def __init__(self, name: str | None) -> None:
        check_backend(name)
        self._name, self._tokens = name, list[Token[str | None]]()

    def __enter__(self) -> None:
        self._tokens.append(CHOSEN.set(self._name))

    def __exit__(self, *_: object) -> None:
        CHOSEN.reset(self._tokens.pop())

    def __repr__(self) -> str:
        return f"attention_backend({self._name!r})"


def check_backend(name: object) -> None:
    """Raise unless it is None or the name of a backend."""
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"backend must be None or one of {', '.join(backends())}, got {describe(name)}")
    if name not in backends():
        raise PlanError(unknown_backend(name))


def named_here(backend: str | None, preferred: str | None = None) -> str | None:
    """The backend that a call names, or else the block that it runs in, or else what a module prefers.

    >>> with attention_backend("reference"):
    ...     named_here(None), named_here("sdpa"), named_here(None, preferred="sdpa")
    ('reference', 'sdpa', 'reference')
    >>> named_here(None, preferred="sdpa")
    'sdpa'
    """
    check_backend(backend)
    return backend or CHOSEN.get() or preferred
