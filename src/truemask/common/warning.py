"""Warnings that point at the line of the caller, however many calls of ours and of other libraries lie between."""

from __future__ import annotations

import sys
import warnings

from truemask.errors import ConventionWarning

PACKAGES_BETWEEN = ("truemask", "torch", "transformers", "x_transformers", "peft", "accelerate")  # us and the caller


def warn(message: str) -> None:
    """A ConventionWarning that points at the caller's line: the first frame outside this library and those around."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES_BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ConventionWarning, stacklevel=level)
