"""Masks in files of other tools: tensors, arrays, images and tables of 0 and 1, each read as what it surely means.

Where a file could mean something else too, the reading carries a finding that says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from truemask.common.finding import Finding
from truemask.common.formatting import counted, describe, suggest
from truemask.errors import MaskError
from truemask.masks.core.mask import Mask
from truemask.masks.foreign.importers import from_additive
from truemask.masks.foreign.tables import table_in
from truemask.masks.formats.parse import parse
from truemask.masks.formats.serialization import load_mask
from truemask.masks.leaves.matrices import dense
from truemask.masks.leaves.per_token import keys

BRIGHT = 0.5  # of the brightest: from here on a pixel may attend
MAX_FILE_BYTES = 1 << 30  # bytes of a file that is read


def is_file(text: str) -> bool:
    """Whether a command's argument names a file rather than an expression; no expression ends as such files do."""
    path = Path(text)
    return path.suffix.lower() in READERS or (path.suffix != "" and _is_there(path))


def read_expression(text: str) -> Mask:
    """The mask that a command's text says; a file is told where it is read."""
    if is_file(text):
        raise MaskError(f"{text[:60]!r} is a file's name, and here an expression is read: `truemask check` reads files")
    return parse(text)


def perhaps_a_file(text: str) -> str:
    """What to add to an error about an expression, where its text looks like the name of a file."""
    path = Path(text)
    if _is_there(path):
        return f"\nthere is a file {text}, but its name does not end in what says how to read it: {', '.join(READERS)}"
    if re.fullmatch(r"[\w./\\~-]*[\w-]\.[A-Za-z]\w{1,11}", text) and path.suffix not in (".T",):
        return f"\nif {text} is a file, there is none, and masks are read from {', '.join(READERS)}"
    return ""


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # an expression longer than a file's name may be
        return False


class Reading(NamedTuple):
    """A mask, how it was read, and what should be said of that."""

    mask: Mask
    source: str
    notes: tuple[Finding, ...] = ()


def read_mask(path: Path, name: str | None = None, axes: str | None = None) -> Reading:
    """The mask in a file; `name` chooses among several tensors, `axes` says what the first of three axes is.

    Raises:
        MaskError: no such file, nothing in it that can be a mask, or numbers that are a bias.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise MaskError(f"{path.name}: masks are read from {', '.join(READERS)}{suggest(path.suffix, READERS)}")
    if not path.is_file():
        raise MaskError(f"there is no file {path}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise MaskError(f"{path.name} has {path.stat().st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    try:
        contents = reader(path)
    except MaskError:
        raise
    except Exception as error:
        raise MaskError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(contents, Reading):
        return _meaning(_chosen(contents, name, path), path, axes)
    for option, value in (("--tensor", name), ("--axes", axes)):
        if value is not None:
            raise MaskError(f"{path.name} holds one mask, {contents.source}: leave out `{option} {value}`")
    return contents


def _chosen(contents: Any, name: str | None, path: Path) -> Tensor:
    """The tensor, or the one of several that was named."""
    if isinstance(contents, Tensor):
        if name is not None:
            raise MaskError(f"{path.name} holds one tensor, which has no name: leave out `--tensor {name}`")
        return contents
    items = contents.items() if isinstance(contents, dict) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor) and value.ndim}
    if name is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if name in tensors:
        return tensors[name]
    if not tensors:
        raise MaskError(f"{path.name} holds no tensor, and a mask is one")
    unknown = "" if name is None else f", and none is {name!r}{suggest(name, tensors)}"
    listing = f"{counted(len(tensors), 'tensor')} ({', '.join(tensors)})"
    raise MaskError(f"{path.name} holds {listing}{unknown}: name one with `--tensor NAME`")


def _meaning(tensor: Tensor, path: Path, axes: str | None = None, said: str = "") -> Reading:
    """Booleans are taken as they are, 0 and 1 as booleans, and floats only if they are surely a mask."""
    what, notes = f"{describe(tensor)}{said}", ()
    binary = bool(((tensor == 0) | (tensor == 1)).all())
    if tensor.is_floating_point() and not (binary and bool((tensor == 1).any())):
        read = f"{what}, read as numbers that are added to the scores (0 = may attend)"
        return Reading(from_additive(_three_told(tensor, path, axes), axes), read)
    if tensor.dtype == torch.bool:
        read = f"{what}, read as True = may attend"
    elif binary:
        read = f"{what} of 0 and 1, read as 1 = may attend"
        notes = (FLOATS,) if tensor.is_floating_point() else ()
    else:
        raise MaskError(f"{path.name} holds {what}, and a mask holds 0 and 1 (or booleans)")
    flags = _three_told(tensor.bool(), path, axes)
    if flags.ndim == 1:
        return Reading(keys(flags), f"{read}, one flag for each key", notes)
    return Reading(dense(flags, axes), read, notes)


FLOATS = Finding(
    "floats-as-booleans",
    "warning",
    "floats of 0.0 and 1.0",
    "they were read as booleans, 1.0 = may attend; added to scores, as floats are by torch, they would hide nothing",
    "save booleans, `mask.bool()`; a mask to add holds 0 and -inf (`to_additive`)",
)


def _three_told(tensor: Tensor, path: Path, axes: str | None) -> Tensor:
    """`[1, q, k]` as `[q, k]`: samples or heads, there is one; of more, `axes` says which."""
    if tensor.ndim == 3 and axes is None:
        if len(tensor) == 1:
            return tensor[0]
        raise MaskError(
            f"{path.name} holds {describe(tensor)}, whose first axis may be samples or heads: say `--axes bqk` for "
            f"{counted(len(tensor), 'sample')}, `--axes hqk` for {counted(len(tensor), 'head')}"
        )
    return tensor


def _torch(path: Path) -> Any:
    """Tensors alone: nothing in the file runs."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own words advise to load it unguarded
        raise _refused(path, "torch.save(tensor, path)") from error


def _numpy(path: Path) -> Any:
    """The arrays of numbers: nothing in the file runs."""
    try:
        arrays = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's own words, too
        raise _refused(path, "numpy.save(path, array)") from error
    if isinstance(arrays, np.ndarray):
        return _of_numbers({path.stem: arrays}, path.stem)
    return {name: tensor for name in arrays if (tensor := _of_numbers(arrays, name)) is not None}


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
        return Reading(load_mask(path), "an expression that `save_mask` wrote")
    return load_file(path)


def _image(path: Path) -> Any:
    """Bright pixels may attend."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MaskError("reading an image needs pillow: pip install truemask[viz]") from error
    with Image.open(path) as image:
        brightness, how = _brightness(image)
    bright = torch.from_numpy(brightness >= BRIGHT * max(1, int(brightness.max())))
    return Reading(
        dense(bright), f"an image of {brightness.shape[1]} x {brightness.shape[0]} pixels, read as {how} = may attend"
    )


def _brightness(image: Any) -> tuple[np.ndarray, str]:
    """How bright each pixel is, and what that is called; where an image is transparent, it is dark.

    An image of one colour says by its transparency alone what is drawn.
    """
    if image.mode[0] in "IF":  # numbers of more than 8 bits
        return np.asarray(image), "bright"
    if not image.has_transparency_data:
        return np.asarray(image.convert("L")), "bright"
    rgba = image.convert("RGBA")
    grey, alpha = np.asarray(rgba.convert("L"), np.float64), np.asarray(rgba.getchannel("A"))
    drawn = grey[alpha > 0]
    if not drawn.size or drawn.min() == drawn.max():
        return alpha, "opaque"
    return grey * (alpha / 255), "bright and opaque"


def _text(path: Path) -> Any:
    """A table of 0 and 1, or an expression."""
    text = path.read_text(encoding="utf-8-sig")
    table = table_in(text, path.name)
    if table is None:
        return Reading(parse(text), "an expression")
    cells, left_out = table
    if cells.dtype == torch.bool:
        return Reading(dense(cells), f"a table{left_out}, read as 1 = may attend")
    return _meaning(cells, path, said=f", a table{left_out}")


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
