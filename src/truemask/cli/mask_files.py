"""Masks in files of other tools: tensors, arrays, images and tables of 0 and 1, each read as what it surely means."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truemask.errors import MaskError, describe, suggest
from truemask.masks.core import Mask
from truemask.masks.data import keys
from truemask.masks.foreign.importers import from_additive
from truemask.masks.matrices import dense
from truemask.masks.serial import load_mask
from truemask.masks.text import parse

BRIGHT = 0.5  # of the brightest: from here on a pixel may attend
LARGEST = 1 << 30  # bytes of a file that is read


def is_file(text: str) -> bool:
    """Whether a command's argument names a file rather than an expression."""
    return Path(text).suffix.lower() in READERS and not re.search(r"[()&|~]", text)


def read_mask(path: Path, name: str | None = None) -> tuple[Mask, str]:
    """The mask in a file, and how it was read; `name` chooses among several tensors.

    Raises:
        MaskError: no such file, nothing in it that can be a mask, or numbers that are a bias.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise MaskError(f"{path.name}: masks are read from {', '.join(READERS)}{suggest(path.suffix, READERS)}")
    if not path.is_file():
        raise MaskError(f"there is no file {path}")
    if path.stat().st_size > LARGEST:
        raise MaskError(f"{path.name} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read")
    try:
        found = reader(path)
    except MaskError:
        raise
    except Exception as error:
        raise MaskError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    return found if isinstance(found, tuple) else _meaning(_chosen(found, name, path), path)


def _chosen(found: Any, name: str | None, path: Path) -> Tensor:
    """The tensor, or the one of several that was named."""
    if isinstance(found, Tensor):
        return found
    tensors = (
        {key: value for key, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    )
    if name is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if name in tensors:
        return tensors[name]
    known = ", ".join(tensors) or "none"
    raise MaskError(f"{path.name} holds {len(tensors)} tensors ({known}): name one with `--tensor NAME`")


def _meaning(tensor: Tensor, path: Path) -> tuple[Mask, str]:
    """Booleans are taken as they are, 0 and 1 as booleans, and floats only if they are surely a mask."""
    what = describe(tensor)
    if tensor.is_floating_point() and bool(((tensor == 0) | (tensor == 1)).all()) and bool((tensor == 1).any()):
        tensor, what = tensor.bool(), f"{what} of 0 and 1, read as 1 = may attend"
    elif tensor.is_floating_point():
        return from_additive(tensor), f"{what}, read as numbers that are added to the scores (0 = may attend)"
    elif tensor.dtype != torch.bool:
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise MaskError(f"{path.name} holds {what}, and a mask holds 0 and 1 (or booleans)")
        tensor, what = tensor.bool(), f"{what} of 0 and 1, read as 1 = may attend"
    else:
        what = f"{what}, read as True = may attend"
    if tensor.ndim == 1:
        return keys(tensor), f"{what}, one flag for each key"
    return dense(tensor), what


def _torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _numpy(path: Path) -> Any:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found)
    return {key: torch.from_numpy(found[key]) for key in found.files}


def _safetensors(path: Path) -> Any:
    """Our own masks, or tensors."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        ours = (file.metadata() or {}).get("format", "").startswith("truemask")
    if ours:
        mask = load_mask(path)
        return mask, "an expression that `save_mask` wrote"
    return load_file(path)


def _image(path: Path) -> Any:
    """Bright pixels may attend."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MaskError("reading an image needs pillow: pip install truemask[viz]") from error
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L"))
    bright = torch.from_numpy(grey >= BRIGHT * max(1, int(grey.max())))
    return dense(bright), f"an image of {grey.shape[1]} x {grey.shape[0]} pixels, read as bright = may attend"


def _text(path: Path) -> Any:
    """Rows of 0 and 1, or an expression."""
    text = path.read_text(encoding="utf-8")
    rows = [re.sub(r"[\s,;]", "", line) for line in text.splitlines() if line.strip()]
    if not rows or not re.fullmatch(r"[01]+", "".join(rows)):
        return parse(text), "an expression"
    if len({len(row) for row in rows}) > 1:
        raise MaskError(f"{path.name}: rows have {sorted({len(row) for row in rows})} cells, and need the same number")
    return dense(torch.tensor([[sign == "1" for sign in row] for row in rows])), "a table, read as 1 = may attend"


READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _torch,
    ".pth": _torch,
    ".npy": _numpy,
    ".npz": _numpy,
    ".safetensors": _safetensors,
    ".png": _image,
    ".bmp": _image,
    ".jpg": _image,
    ".jpeg": _image,
    ".txt": _text,
    ".csv": _text,
    ".mask": _text,
}
