"""Logits of tokens that came already are lowered.

Shapes: b samples, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from truemask.nn.config import check_type


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """How much less likely a token becomes that was there before; nothing changes by default.

    repetition  logits above 0 are divided by it and others multiplied, for every token of prompt and answer (above 1
                discourages; CTRL, Keskar et al., arXiv 1909.05858; the meaning of Hugging Face)
    frequency   is taken off once for each time that the *answer* has the token (the meaning of OpenAI's API)
    presence    is taken off once if the *answer* has the token (likewise)

    >>> found = Penalties(repetition=2.0, presence=1.0).apply(
    ...     torch.tensor([[4.0, -1.0, 3.0]]), seen=torch.tensor([[True, True, False]]), counts=torch.tensor([[1, 0, 0]])
    ... )
    >>> found
    tensor([[ 1., -2.,  3.]])
    """

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            check_type(f"{item.name}_penalty", getattr(self, item.name), "float")
        if self.repetition <= 0:
            raise ValueError(
                f"repetition_penalty is {self.repetition}; it divides logits, so it is above 0: 1 changes nothing, "
                "more discourages what was there"
            )
        for name in ("frequency", "presence"):
            if abs(value := getattr(self, name)) > 2:
                raise ValueError(f"{name}_penalty is {value}; it is taken off logits, from -2 to 2")

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return self != Penalties()

    def apply(self, logits: Tensor, *, seen: Tensor, counts: Tensor) -> Tensor:
        """Logits (b, v), of tokens that prompt or answer have (`seen`, bool) and the answer has so often (`counts`)."""
        if self.repetition != 1:
            lowered = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
            logits = torch.where(seen, lowered, logits)
        return logits - self.frequency * counts - self.presence * (counts > 0)
