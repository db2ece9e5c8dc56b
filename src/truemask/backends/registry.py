"""The backends there are, in the order in which a plan shows them."""

from __future__ import annotations

from truemask.backends.base import Backend
from truemask.backends.reference import Reference
from truemask.backends.sdpa import Sdpa

BACKENDS: tuple[Backend, ...] = (Sdpa(), Reference())


def backends() -> tuple[str, ...]:
    """The names that `backend=` knows.

    >>> backends()
    ('sdpa', 'reference')
    """
    return tuple(backend.name for backend in BACKENDS)
