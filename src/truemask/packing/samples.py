"""What a caller packs, read once: lists, arrays, tensors or dicts of them become arrays of numbers, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from truemask.common.formatting import describe

TOKEN_KEYS = ("input_ids", "tokens")  # what a dict may call its tokens
PACKING_KEYS = ("position_ids", "positions", "lengths", "mask")  # what packing works out: nobody may bring it along


Arrays = list[np.ndarray]  # one `[n]` for each sequence


class Samples(NamedTuple):
    """The fields of all sequences; `labels` are the tokens unless samples bring their own."""

    tokens: Arrays
    labels: Arrays
    extras: dict[str, Arrays]

    @property
    def sizes(self) -> np.ndarray:
        """How many tokens each sequence has, int64."""
        return sizes_of(self.tokens)


def sizes_of(arrays: Arrays) -> np.ndarray:
    """The lengths of arrays, int64."""
    return np.fromiter(map(len, arrays), np.int64, len(arrays))


def read_samples(caller: str, sequences: Iterable[Any]) -> Samples:
    """The sequences of a call of `caller`, which errors name."""
    if isinstance(sequences, (str, bytes, Mapping)) or not isinstance(sequences, Iterable):
        raise TypeError(f"{caller}: sequences are a list of token sequences, got {describe(sequences)}")
    samples = list(sequences)
    if not samples:
        raise ValueError(f"{caller}: there are no sequences, so there is nothing to pack")
    if isinstance(samples[0], Mapping):
        return _read_dicts(caller, samples)
    tokens = read_field(caller, "sequence", samples, whole=True)
    return Samples(tokens, tokens, {})


def _read_dicts(caller: str, samples: list[Any]) -> Samples:
    names = _names(caller, samples)
    main = next((name for name in TOKEN_KEYS if name in names), None)
    if main is None:
        raise ValueError(f"{caller}: a dict needs its tokens as 'input_ids', got the keys {sorted(names)}")
    fields: dict[str, Arrays] = {}
    for name in (main, *(name for name in names if name != main)):
        if name in PACKING_KEYS:
            raise ValueError(f"{caller}: {name!r} is worked out by packing: leave it out of the dicts")
        whole = name in (main, "labels")
        fields[name] = read_field(caller, f"[{name!r}] of sequence", [x[name] for x in samples], whole=whole)
        _check_sizes(caller, name, fields[name], main, fields[main])
    _check_attention(caller, fields.pop("attention_mask", []))
    tokens = fields.pop(main)
    return Samples(tokens, fields.pop("labels", tokens), fields)


def _names(caller: str, samples: list[Any]) -> list[str]:
    """The keys, which all dicts share."""
    names = list(samples[0])
    for index, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or set(sample) != set(names):
            keys = sorted(sample) if isinstance(sample, Mapping) else describe(sample)
            raise ValueError(f"{caller}: sequence 0 is a dict of {sorted(names)}, but sequence {index} has {keys}")
    return names


def read_field(caller: str, what: str, values: Sequence[Any], *, whole: bool) -> Arrays:
    """One field of all sequences; `what` names it in errors, and tokens and labels are `whole` numbers."""
    return [_array(caller, what, index, value, whole) for index, value in enumerate(values)]


def _array(caller: str, what: str, index: int, value: Any, whole: bool) -> np.ndarray:
    """One sequence of numbers `[n]`."""
    numbers = _numpy(value) if isinstance(value, Tensor) else value
    sized = isinstance(numbers, (Sequence, np.ndarray)) and not isinstance(numbers, (str, bytes))
    try:
        array = np.asarray(numbers) if sized else None
    except ValueError:  # lists of different lengths
        array = None
    kinds = "iu" if whole else "iufb"
    if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        expected = "whole numbers [n]" if whole else "one number for each token, [n]"
        got = f"array {value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else describe(value)
        raise TypeError(f"{caller}: {what} {index} must be {expected}, got {got}{_hint(value, index, whole)}")
    if array.dtype == np.float64 and not isinstance(numbers, np.ndarray) and torch.get_default_dtype() != torch.float64:
        return array.astype(np.float32)  # a list of floats, as `torch.tensor` reads it
    return array


def _numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16


def _hint(value: Any, index: int, whole: bool) -> str:
    if isinstance(value, (str, bytes)):
        return ": text has to be tokenized first" if whole else ": leave out what does not belong to single tokens"
    if isinstance(value, (int, np.integer)):
        return ": for one sequence pass a list that holds it" if index == 0 and whole else ": leave it out"
    return ""


def _check_sizes(caller: str, name: str, arrays: Arrays, main: str, tokens: Arrays) -> None:
    wrong = np.flatnonzero(sizes_of(arrays) != sizes_of(tokens))
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"{caller}: sequence {i} has {len(tokens[i])} tokens in {main!r} and {len(arrays[i])} numbers in {name!r}: "
            "every field holds one number for each token, and labels are not shifted"
        )


def _check_attention(caller: str, masks: Arrays) -> None:
    """An `attention_mask` of ones says nothing; one with zeros says that there is padding."""
    for index, mask in enumerate(masks):
        if not (mask == 1).all():
            raise ValueError(
                f"{caller}: the 'attention_mask' of sequence {index} hides tokens: packing needs sequences without "
                "padding, so tokenize with padding=False"
            )
