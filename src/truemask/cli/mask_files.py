"""Masks in files of other tools: tensors, arrays, images and tables of 0 and 1, each read as what it surely means."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truemask.errors import MaskError, counted, describe, suggest
from truemask.masks.core import Mask
from truemask.masks.data import keys
from truemask.masks.foreign.importers import from_additive
from truemask.masks.matrices import dense
from truemask.masks.serial import load_mask
from truemask.masks.text import parse

BRIGHT = 0.5  # of the brightest: from here on a pixel may attend
LARGEST = 1 << 30  # bytes of a file that is read


def is_file(text: str) -> bool:
    """Whether a command's argument names a file rather than an expression; no expression ends as such files do."""
    path = Path(text)
    return path.suffix.lower() in READERS or (path.suffix != "" and _is_there(path))


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # an expression longer than a file's name may be
        return False


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
    held = found.items() if isinstance(found, dict) else ()
    tensors = {str(key): value for key, value in held if isinstance(value, Tensor) and value.ndim}
    if name is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if name in tensors:
        return tensors[name]
    if not tensors:
        raise MaskError(f"{path.name} holds no tensor, and a mask is one")
    wanted = "" if name is None else f", and none is {name!r}{suggest(name, tensors)}"
    known = f"{counted(len(tensors), 'tensor')} ({', '.join(tensors)})"
    raise MaskError(f"{path.name} holds {known}{wanted}: name one with `--tensor NAME`")


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
    """Tensors alone: nothing in the file runs."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own words advise to load it unguarded
        raise _refused(path, "torch.save(tensor, path)") from error


def _numpy(path: Path) -> Any:
    """The arrays of numbers: nothing in the file runs."""
    try:
        found = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's own words, too
        raise _refused(path, "numpy.save(path, array)") from error
    if isinstance(found, np.ndarray):
        found = {path.stem: found}
    return {name: tensor for name in found if (tensor := _of_numbers(found, name)) is not None}


def _of_numbers(arrays: Mapping[str, Any], name: str) -> Tensor | None:
    """One of the arrays; None if it holds text or objects."""
    try:
        return torch.from_numpy(arrays[name])
    except (TypeError, ValueError):
        return None


def _refused(path: Path, way: str) -> MaskError:
    return MaskError(
        f"{path.name} cannot be read: it is broken, or holds Python objects. Those could run code, so none of it was "
        f"loaded. Save the mask alone: `{way}`"
    )


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
