"""Masks as JSON and tensors: one safetensors file whose header holds the expression. No pickle, no code."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from truemask.common.formatting import describe, suggest
from truemask.errors import MaskError
from truemask.masks.core.construction import operand
from truemask.masks.core.data import MAX_TOKENS, Data, integers
from truemask.masks.core.kinds import KINDS
from truemask.masks.core.mask import Mask
from truemask.masks.core.value import MAX_DEPTH
from truemask.masks.formats.as_mask import expression
from truemask.masks.formats.parse import FUNCTIONS
from truemask.masks.leaves.documents import same
from truemask.masks.leaves.per_token import global_tokens, keys, queries
from truemask.masks.leaves.predicate import Predicate

FORMAT = "truemask-1"
Json = dict[str, Any]


def to_json(mask: Mask) -> tuple[Json, dict[str, Tensor]]:
    """The expression as JSON values, and its data as tensors named by digest.

    >>> from truemask.masks.leaves.bands import window
    >>> to_json(~window(4))
    ({'kind': 'not', 'base': {'kind': 'window', 'size': 4}}, {})
    """
    tensors: dict[str, Tensor] = {}
    return _node(mask, tensors), tensors


def _node(mask: Mask, tensors: dict[str, Tensor]) -> Json:
    if isinstance(mask, Predicate):
        raise MaskError(
            f"`{mask}` is a function and cannot be saved: write it in the language, or save `dense(mask.to_dense(n))`"
        )
    return {"kind": mask.kind, **{name: _value(part, tensors) for name, part in mask.parts.items()}}


def _value(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Mask():
            return _node(value, tensors)
        case Data():
            tensors[value.digest] = value.tensor
            return {"data": value.digest}
        case tuple():
            return [_value(item, tensors) for item in value]
        case _:
            return value


def from_json(expression: Json, tensors: dict[str, Tensor]) -> Mask:
    """The inverse of `to_json`; everything is checked as if a user had written it.

    >>> from_json({"kind": "not", "base": {"kind": "window", "size": 4}}, {})
    ~window(4)
    """
    try:
        mask = _read(expression, tensors, 0)
    except (TypeError, KeyError, ValueError, AttributeError, AssertionError, IndexError, RuntimeError) as error:
        if isinstance(error, MaskError):
            raise
        raise MaskError(f"this is not a mask as `to_json` writes it: {type(error).__name__}: {error}") from error
    if not isinstance(mask, Mask):
        raise MaskError(f"this is not a mask as `to_json` writes it: {describe(expression)}")
    return mask


def _read(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH:
        raise MaskError(f"this file nests masks more than {MAX_DEPTH} deep")
    match value:
        case {"kind": str() as kind, **rest}:
            if kind not in KINDS:
                raise MaskError(f"unknown kind of mask {kind[:60]!r}{suggest(kind, KINDS)}")
            return _build(kind, {name: _read(part, tensors, depth + 1) for name, part in rest.items()})
        case {"data": str() as digest}:
            if digest not in tensors or Data(tensors[digest]).digest != digest:
                raise MaskError(f"the data #{digest[:60]} of this mask is missing or was changed")
            return Data(tensors[digest])
        case list():
            return tuple(_read(item, tensors, depth + 1) for item in value)
        case _:
            return value


def _build(kind: str, parts: Json) -> Mask:
    """Through the same functions as a user's own call, so that a file cannot say what a program could not."""
    if kind == "predicate":
        raise MaskError("a predicate is a function, which no file holds: build it in Python")
    if kind in ("and", "or", "xor") and len(parts.get("terms") or ()) < 2:
        raise MaskError(f"{kind!r} needs two or more terms")
    match kind:
        case "causal" | "everything" | "nothing":
            return KINDS[kind].make(**parts)
        case "and" | "or" | "xor":
            first, second, *rest = (operand(kind, term) for term in parts["terms"])
            return KINDS[kind].make(first, second, *rest)
        case "minus":
            return operand("-", parts["left"]) - operand("-", parts["right"])
        case "not":
            return ~operand("~", parts["base"])
        case "at" | "take" | "select" | "packed" | "padded" | "prepended" | "transposed":
            names = [f.name for f in fields(cast(Any, KINDS[kind]))]
            return KINDS[kind].make(operand(kind, parts["base"]), *(parts[name] for name in names[1:]))
        case "documents" | "same":
            runs = (*_runs(parts, ""), *_runs(parts, "kv_"))
            none = {"none": parts["none"]} if kind == "same" else {}
            _ = same([0], **none)  # checks `none`
            return KINDS[kind].make(*runs, **none)
        case "keys" | "queries":
            return {"keys": keys, "queries": queries}[kind](parts["flags"])
        case "global_tokens":
            return global_tokens(parts["positions_"])
        case "per_head" | "per_sample":
            return FUNCTIONS[kind](parts["masks"])
        case _:
            return FUNCTIONS[kind](**parts)


def _runs(parts: Json, side: str) -> tuple[Data | None, Data | None]:
    """The runs of labels that a file holds, if they follow each other."""
    pair = [parts[f"{side}{name}"] for name in ("ends", "values")]
    if pair == [None, None]:
        return None, None
    ends, values = (integers(part, f"{side}{name}") for part, name in zip(pair, ("ends", "values"), strict=True))
    rows = np.atleast_2d(ends.array)
    totals = rows[:, -1:].ravel()
    good = ends.tensor.shape == values.tensor.shape and (np.diff(rows, axis=1, prepend=0) >= 0).all()
    if not good or len(set(totals.tolist())) > 1 or totals.sum() > MAX_TOKENS:
        raise MaskError("the runs of this mask's labels do not follow each other, or are too long")
    return ends, values


def save_mask(mask: Mask | str, path: str | Path) -> None:
    """Write a mask to one safetensors file: the expression in its header, the data as tensors. Needs safetensors."""
    from safetensors.torch import save_file

    written, tensors = to_json(expression("save_mask: mask", mask))
    save_file(tensors, str(path), metadata={"format": FORMAT, "mask": json.dumps(written)})


def load_mask(path: str | Path) -> Mask:
    """Read a mask that `save_mask` wrote. Nothing in the file is executed; a damaged one is a MaskError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise MaskError(f"{path} is not a mask file: {error}") from error
    if header.get("format") != FORMAT:
        raise MaskError(
            f"{path} is a safetensors file, but not one that save_mask wrote (format {header.get('format')!r})"
        )
    try:
        expression = json.loads(header["mask"])
    except (ValueError, KeyError, RecursionError) as error:
        raise MaskError(f"{path}: the mask in its header cannot be read: {error}") from error
    return from_json(expression, tensors)
