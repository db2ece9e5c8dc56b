"""Which masks a model under `tm.use` asks `attend` for."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from truemask.attention.attend import attend
from truemask.interop.x_transformers import attention as x_attention
from truemask.masks.core.mask import Mask


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Mask]:
    """The masks that `attend` is called with."""
    seen: list[Mask] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **named: Any) -> Tensor:
        seen.append(mask)
        return attend(q, k, v, mask, **named)

    monkeypatch.setattr(x_attention, "attend", counted)
    return seen
