"""The backends there are, in the order in which a plan shows them."""

from __future__ import annotations

from truemask.backends.base import Backend
from truemask.backends.block_sparse import BlockSparse
from truemask.backends.flex import Flex
from truemask.backends.native import Native
from truemask.backends.reference import Reference
from truemask.backends.sdpa import Sdpa

BACKENDS: tuple[Backend, ...] = (Native(), Sdpa(), BlockSparse(), Flex(), Reference())


def backends() -> tuple[str, ...]:
    """The names that `backend=` knows.

    >>> backends()
    ('native', 'sdpa', 'block_sparse', 'flex', 'reference')
    """
    return tuple(backend.name for backend in BACKENDS)
