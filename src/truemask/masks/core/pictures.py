"""Pictures of a mask: `show` for people with a terminal, `_repr_html_` for those with a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from truemask.errors import MaskError
from truemask.viz.picture import html_picture, text_picture


class Pictures(ABC):
    """What can be drawn, in terms of the cells."""

    batch_size: Any
    head_count: Any
    text: Any

    @abstractmethod
    def to_dense(
        self, q_len: int, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """The mask as a bool tensor `[b, h, q, k]`."""

    @abstractmethod
    def check(self, q_len: int, kv_len: int, *, batch: int | None = None, heads: int | None = None) -> None:
        """Raise if the mask cannot answer for these sizes."""

    @abstractmethod
    def kv_len_for(self, q_len: int) -> int:
        """What `kv_len=None` means."""

    def show(
        self, q_len: int = 16, kv_len: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> str:
        """A picture in text, one panel for each sample and head that differs."""
        dense = self.to_dense(q_len, kv_len, batch=batch, heads=heads).numpy()
        panels = [(label, dense[place]) for place, label in _panels(dense.shape)]
        return "\n".join(text_picture(cells, title=f"{self}{label}") for label, cells in panels)

    def _repr_html_(self) -> str:
        q_len = _picture_length(self)
        dense = self.to_dense(q_len, batch=self.batch_size or 1, heads=self.head_count or 1).numpy()
        places = list(_panels(dense.shape))[:8]
        cells = np.stack([dense[place] for place, _ in places])
        return html_picture(cells, title=str(self.text), labels=[label for _, label in places])


def _panels(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], str]]:
    for b, h in np.ndindex(*shape[:2]):
        names = [f"sample {b}"] * (shape[0] > 1) + [f"head {h}"] * (shape[1] > 1)
        yield (b, h), f"  ({', '.join(names)})" if names else ""


def _picture_length(mask: Pictures, longest: int = 24) -> int:
    """The longest length up to `longest` that the mask's data answers for."""
    for length in range(longest, 0, -1):
        try:
            mask.check(length, mask.kv_len_for(length))
        except MaskError:
            continue
        return length
    return 0
