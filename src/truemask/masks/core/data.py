"""Data: the immutable, hashable tensor that a mask holds, and the checks that every argument passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from truemask.common.formatting import describe
from truemask.common.memory import HoldsArrays
from truemask.common.real_tensors import is_late, is_real, is_recorded, ordinary_tensors, remembered
from truemask.common.torch_internals import is_batched
from truemask.errors import MaskError, PlanError

MAX_TOKENS = 1 << 24  # that a mask may hold a table for: of packed documents and trees, global ones
SHOWN_NUMBERS = 64  # data of at most this many numbers is written out in a mask's text
STRIDE_WORDS = 1021  # words that a fingerprint adds up separately: a prime, so that rows moved down make another one
COMPARED_BYTES = 1 << 22  # bytes compared at once


class Data(HoldsArrays):
    """A tensor copied to the CPU once, compared by its bytes, hashed by sums of them, never changed.

    Data is `late` where a graph is recorded (`torch.export`, `torch.jit.trace`) and its numbers come in with each call
    of that graph: then it is the tensor itself, equal to nothing else, and nothing that holds it is remembered.

    >>> Data(torch.tensor([1, 2])) == Data(torch.tensor([1, 2]))
    True
    """

    __slots__ = ("__dict__", "late", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.late = is_recorded() and not is_real(tensor)
        if self.late:
            self.tensor = tensor.detach()
            return
        _refuse_without_numbers(tensor)
        with ordinary_tensors():
            self.tensor = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def reshaped(self, *shape: int) -> Data:
        """The same numbers, which are not copied again, in another shape."""
        new = object.__new__(Data)
        new.tensor, new.late = self.tensor.reshape(shape), self.late
        return new

    @remembered
    def digest(self) -> str:
        """BLAKE2 of dtype, shape and bytes, as 16 hexadecimal digits."""
        self.must_be_known()
        head = f"{self.tensor.dtype} {tuple(self.tensor.shape)} ".encode()
        total = hashlib.blake2b(head, digest_size=8)
        total.update(self._raw.data)
        return total.hexdigest()

    @remembered
    def fingerprint(self) -> int:
        """What equal data share: a hash of dtype, shape, and sums of 64-bit words, in one quick pass.

        Different data may share it too, so it finds candidates and never decides.
        """
        raw = self._raw
        words = raw[: raw.nbytes // 8 * 8].view(np.int64)
        whole_rows = len(words) // STRIDE_WORDS * STRIDE_WORDS
        sums = words[:whole_rows].reshape(-1, STRIDE_WORDS).sum(0)  # wraps around, which is as good
        rest = raw[whole_rows * 8 :].tobytes()
        return hash((str(self.tensor.dtype), tuple(self.tensor.shape), sums.tobytes(), rest))

    @property
    def _raw(self) -> NDArray[np.uint8]:
        """The bytes."""
        return self.array.reshape(-1).view(np.uint8)

    def _same_as(self, other: Data) -> bool:
        """Dtype, shape and bytes, part by part up to the first difference."""
        if self.tensor.dtype != other.tensor.dtype or self.tensor.shape != other.tensor.shape:
            return False
        mine, theirs = self._raw, other._raw
        parts = range(0, len(mine), COMPARED_BYTES)
        return all(np.array_equal(mine[i : i + COMPARED_BYTES], theirs[i : i + COMPARED_BYTES]) for i in parts)

    @remembered
    def array(self) -> NDArray[Any]:
        """The same numbers for numpy, read-only."""
        self.must_be_known()
        with ordinary_tensors():
            view = self.tensor.numpy()
        view.flags.writeable = False
        return view

    @remembered
    def _row_kinds(self) -> list[int]:
        return np.unique(self.array, axis=0, return_inverse=True)[1].ravel().tolist() if self.tensor.numel() else [0]

    def row_kind(self, row: int) -> int:
        """A number that equal rows share; the last row stands for those beyond."""
        return self._row_kinds[min(row, len(self._row_kinds) - 1)]

    @property
    def text(self) -> str:
        """The numbers themselves if they are few, otherwise dtype, shape and digest: `bool [2, 300] #0f3a...`."""
        if self.complete:
            return str(self.array.tolist())
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        if self.late:
            return f"<{dtype} of {self.tensor.ndim} axes, of each call>"
        return f"<{dtype} {list(self.tensor.shape)} #{self.digest}>"

    @property
    def complete(self) -> bool:
        """Whether `text` holds every number."""
        return not self.late and self.tensor.numel() <= SHOWN_NUMBERS

    def arrays(self) -> Iterator[Tensor]:
        """The tensor, of which all else is a view; none while nobody has its numbers."""
        yield from [] if self.late else [self.tensor]

    def must_be_known(self) -> None:
        """Raise if the numbers come only when the recorded graph runs."""
        if self.late:
            raise MaskError(
                f"the data {self.text} of a mask comes in with each call of the graph that is recorded, and here its "
                "numbers are needed now: make the mask before (lists, or tensors from outside of the function), or "
                "say the same by `keys`, `queries`, `padding`, `same`, `documents(ids=)` or `dense`, which need none"
            )

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Data):
            return self is other
        return not (self.late or other.late) and self.fingerprint == other.fingerprint and self._same_as(other)

    def __hash__(self) -> int:
        return self.fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is pickled: `torch.multiprocessing` moves what it sends into shared memory, from under `array`."""
        with ordinary_tensors():
            return restore_data, (self.tensor if self.late else self.tensor.clone(),)

    def __repr__(self) -> str:
        return f"Data({self.text})"


def restore_data(tensor: Tensor) -> Data:
    """The data that was pickled: pickles name this function as `truemask.masks.restore_data`, in every release."""
    data = object.__new__(Data)
    data.tensor, data.late = tensor, False
    return data


restore_data.__module__ = "truemask.masks"


def _refuse_without_numbers(tensor: Tensor) -> None:
    """Raise for tensors that no copy can be made of."""
    if tensor.is_meta:
        raise MaskError(f"the data of a mask must have numbers, and a meta tensor has none: got {describe(tensor)}")
    if is_batched(tensor):
        raise PlanError(
            "vmap maps over the data of a mask, which must be known before anything runs, whatever the backend: give "
            "all of it as the samples of one call (`keys` `[b, n]`, `dense` `[b, h, q, k]`) outside of vmap, or loop"
        )


def as_tensor(number: Any) -> Tensor:
    """A number as a 0-d tensor, also one that comes in with each call of a graph."""
    if isinstance(number, Tensor):
        return number
    late = isinstance(number, torch.SymInt)
    return torch.scalar_tensor(cast(Any, number), dtype=torch.int64) if late else torch.tensor(number)


def _tensor(value: object, name: str, meaning: str) -> Tensor:
    """Lists, arrays and tensors as a tensor; what is none of these is an error."""
    if isinstance(value, Data):
        return value.tensor
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
        raise MaskError(f"{name} must be {meaning}, got {describe(value)}")
    if any(map(is_late, value)):
        return torch.stack([as_tensor(number) for number in value])
    try:
        return torch.as_tensor(value if isinstance(value, np.ndarray) else _plain(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise MaskError(f"{name} must be {meaning}, got {describe(value)}: {error}") from None


def _plain(value: Any) -> Any:
    """Nested sequences that may hold arrays or tensors, as nested lists."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (Sequence, np.ndarray)) else value


def flags(value: object, name: str, dims: tuple[int, ...] = (1, 2), shape: str = "[n] or [b, n]") -> Data:
    """Booleans, True = may attend, of one of the allowed numbers of dimensions."""
    tensor = _tensor(value, name, f"a bool tensor {shape}")
    if tensor.dtype != torch.bool and tensor.numel() == 0:
        tensor = tensor.bool()
    if tensor.dtype != torch.bool:
        raise MaskError(
            f"{name} must be bool (True = may attend), got {describe(tensor)}. A mask of numbers says nothing of what "
            "they mean: for 1 = real use `from_huggingface_2d`, for 0 and -inf use `from_additive`, for torch's "
            "MultiheadAttention (True = masked out) use `from_torch_mha`; other floats are a bias (`attend(bias=)`)"
        )
    return Data(_dims(tensor, name, dims, shape))


def integers(
    value: object, name: str, dims: tuple[int, ...] = (1, 2), shape: str = "[n] or [b, n]", *, late: bool = False
) -> Data:
    """64-bit integers of one of the allowed numbers of dimensions; `late`: their values may come with each call."""
    tensor = _tensor(value, name, f"whole numbers {shape}")
    if tensor.numel() == 0 and not tensor.dtype.is_complex and tensor.dtype != torch.bool:
        tensor = tensor.long()
    if tensor.dtype == torch.bool or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        raise MaskError(f"{name} must be whole numbers {shape}, got {describe(tensor)}")
    data = Data(_dims(tensor.long(), name, dims, shape))
    if not late:
        data.must_be_known()
    return data


def _dims(tensor: Tensor, name: str, dims: tuple[int, ...], shape: str) -> Tensor:
    if tensor.ndim not in dims:
        raise MaskError(f"{name} must be {shape}, got {describe(tensor)}")
    if tensor.ndim == 2 and tensor.shape[0] == 0 and 1 in dims:
        raise MaskError(
            f"{name} speaks of no sample, got {describe(tensor)}: a batch of none needs no mask, `mask=None`"
        )
    return tensor[0] if tensor.ndim == 2 and dims == (1, 2) and tensor.shape[0] == 1 else tensor
