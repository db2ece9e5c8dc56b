"""truemask: attention masks as small exact expressions, and the fastest correct way to run them. True means attend.

The public names and their homes are written in `__init__.pyi`. They come with the first that is asked for, so `truemask
--help` needs no torch; or at once if torch is imported already: then a program that `torch.export` wrote finds the
operators that it calls.
"""

from __future__ import annotations

import gc
import pkgutil
import re
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_STUB = (pkgutil.get_data(__name__, "__init__.pyi") or b"").decode()
_HOMES: dict[str, str] = {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as", _STUB, re.MULTILINE)}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name != "nn" and name not in _HOMES:
        raise AttributeError(f"module 'truemask' has no attribute '{name}'")
    _import_all()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "nn"})


def _import_all() -> None:
    """Every public name, without a pause in which the garbage collector walks all of torch."""
    collects = gc.isenabled()
    gc.disable()
    try:
        globals().update({name: getattr(import_module(home), name) for name, home in _HOMES.items()})
    finally:
        if collects:
            gc.enable()


if "torch" in sys.modules:
    _import_all()
