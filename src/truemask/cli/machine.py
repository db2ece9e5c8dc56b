"""The machine and the versions, as a report names them."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from truemask.backends.costs.calibration_file import processor

PACKAGES = ("truemask", "torch", "numpy", "x-transformers", "matplotlib")


def facts(threads: int) -> list[tuple[str, str]]:
    """The machine and the versions."""
    packages = [(name, version_of(name)) for name in PACKAGES]
    return [
        ("machine", f"{processor()}, {os.cpu_count()} CPUs, {threads} threads used"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("Python", platform.python_version()),
        *packages,
        (
            "device",
            "CPU" if not torch.cuda.is_available() else f"CPU (a {torch.cuda.get_device_name()} is there, unused)",
        ),
    ]


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
