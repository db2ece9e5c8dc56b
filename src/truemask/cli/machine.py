"""The machine and the versions, as a report names them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = ("truemask", "torch", "numpy", "x-transformers", "matplotlib")


def facts(threads: int) -> list[tuple[str, str]]:
    """The machine and the versions."""
    packages = [(name, version_of(name)) for name in PACKAGES]
    return [
        ("machine", f"{_processor()}, {os.cpu_count()} CPUs, {threads} threads used"),
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


def _processor() -> str:
    """The processor's name; Linux keeps it in a file."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
