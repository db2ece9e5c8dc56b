"""The backends there are, in the order in which a plan shows them."""

from __future__ import annotations

from truemask.backends.backend import Backend
from truemask.backends.block_sparse.backend import BlockSparse
from truemask.backends.flex.backend import Flex
from truemask.backends.native.backend import Native
from truemask.backends.reference import Reference
from truemask.backends.sdpa import Sdpa
from truemask.common.formatting import suggest

BACKENDS: tuple[Backend, ...] = (Native(), Sdpa(), BlockSparse(), Flex(), Reference())


def backends() -> tuple[str, ...]:
    """The names that `backend=` knows.

    >>> backends()
    ('native', 'sdpa', 'block_sparse', 'flex', 'reference')
    """
    return tuple(backend.name for backend in BACKENDS)


ELSEWHERE = {  # names that other libraries have, and who does that here
    "flash": "FlashAttention's way to compute is `native` on the CPU, and one of the kernels of `sdpa` on CUDA",
    "fa2": "FlashAttention's way to compute is `native` on the CPU, and one of the kernels of `sdpa` on CUDA",
    "fa3": "FlashAttention's way to compute is `native` on the CPU, and one of the kernels of `sdpa` on CUDA",
    "efficient": "torch's own kernels are `sdpa`, which chooses among them",
    "mem": "torch's own kernels are `sdpa`, which chooses among them",
    "cudnn": "torch's own kernels are `sdpa`, which chooses among them",
    "xformers": "kernels that skip what a mask hides are `native`, `block_sparse` and `flex`",
    "torch": "torch's own kernels are `sdpa`, which chooses among them",
    "math": "plain torch operations, in chunks of rows, are `reference`",
    "eager": "plain torch operations, in chunks of rows, are `reference`",
    "flex": "FlexAttention is `flex`",
    "triton": "generated kernels are `flex`, by FlexAttention",
    "auto": "leave `backend` out, and the plan chooses",
    "default": "leave `backend` out, and the plan chooses",
}


def unknown_backend(name: str) -> str:
    """What to say of a name that no backend has: the nearest, or who does here what has that name elsewhere.

    >>> print(unknown_backend("sdap"))
    there is no backend 'sdap', did you mean 'sdpa'? (known: native, sdpa, block_sparse, flex, reference)
    >>> print(unknown_backend("math"))
    there is no backend 'math': plain torch operations, in chunks of rows, are `reference` (known: native, sdpa, ...)
    """
    names = ", ".join(backends())
    hint = next((way for word, way in ELSEWHERE.items() if str(name).lower().startswith(word)), "")
    near = f": {hint}" if hint else suggest(str(name).lower(), backends())
    return f"there is no backend {name!r}{near} (known: {names})"
